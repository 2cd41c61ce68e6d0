"""One shard file in the making: samples to bytes.

A shard is built in memory and published by rename: HDF5 itself never touches the disk.
`shards/NNNNN.json`, written after its shard, is the record that the shard is done.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import crc32c
import h5py
import hdf5plugin
import numpy as np
from numpy.typing import NDArray

from synthlong.dataset.reader import IMAGES, MASKS, SCHEMA, VOLUMES
from synthlong.errors import ConfigError, SynthlongError
from synthlong.plain import canonical_json
from synthlong.publishing import output_error, publish

__all__ = [
    "Sample",
    "encode_shard",
    "image_as_stored",
    "shard_name",
    "shard_path",
    "write_shard",
]

_BLOSC_LZ4 = hdf5plugin.Blosc(cname="lz4", clevel=5, shuffle=hdf5plugin.Blosc.SHUFFLE)
_FILTERS: dict[str, list[tuple[int, tuple[int, ...]]]] = {
    "blosc-lz4": [(_BLOSC_LZ4.filter_id, _BLOSC_LZ4.filter_options)],
    "none": [],
}
_HIGHEST = dict.fromkeys(MASKS, 1) | {"evolution": 5}


@dataclass(frozen=True, eq=False)
class Sample:
    """One pair as a shard stores it, arrays in the table's order.

    Args:
        baseline: First visit, shape `(S, S, S)`, any float dtype, brain mode = 1; stored as float16.
        followup: Second visit, likewise.
        new_lesions: uint8 or bool `(S, S, S)`, as the other masks; 0 or 1.
        evolution: 0 to 5.
        lesions_baseline: 0 or 1.
        lesions_followup: 0 or 1.
        recipe: The recipe as JSON.
        subject: Whose scan it was made from: the unit that `split` keeps together.
    """

    baseline: NDArray[Any]
    followup: NDArray[Any]
    new_lesions: NDArray[Any]
    evolution: NDArray[Any]
    lesions_baseline: NDArray[Any]
    lesions_followup: NDArray[Any]
    recipe: str
    subject: str


def encode_shard(
    samples: Sequence[Sample],
    *,
    config_json: str,
    versions_json: str,
    compression: str = "blosc-lz4",
    first_index: int = 0,
) -> tuple[bytes, dict[str, Any]]:
    """Return a shard's bytes and its sidecar; the same arguments give the same bytes.

    Args:
        samples: At least one, all of the same side.
        config_json: Canonical configuration, stored as attribute `config`.
        versions_json: Versions of what made the samples, stored as attribute `versions`.
        compression: "blosc-lz4" or "none".
        first_index: Global pair index of the first sample; the others follow it.

    Raises:
        ConfigError: Unknown `compression`.
        SynthlongError: An image holds values that are not finite in float16.
        ValueError: Arrays of another shape or dtype, or values outside the contract.
    """
    if compression not in _FILTERS:
        raise ConfigError(f"compression must be one of {', '.join(_FILTERS)}, not {compression!r}")
    if not samples:
        raise ValueError("a shard needs at least one sample")
    n, side = len(samples), samples[0].baseline.shape[0]
    stored = [_stored(sample, side, first_index + k) for k, sample in enumerate(samples)]
    recipes = [sample.recipe.encode() for sample in samples]

    buffer = io.BytesIO()
    with _blosc_environment_ignored(), _empty_file(buffer) as file:
        file.attrs["schema"] = SCHEMA  # first of all: `reader` looks for it at the head of the file
        file.attrs["config"] = config_json
        file.attrs["versions"] = versions_json
        file.attrs["spacing_mm"] = np.float64(1)
        shape = (side, side, side)
        volumes = {
            name: _create(file, name, dtype, (n, *shape), chunk=(1, *shape), compression=compression)
            for name, dtype in VOLUMES.items()
        }
        for k, arrays in enumerate(stored):
            for name, dataset in volumes.items():
                dataset[k] = arrays[name]
        for name, values in (
            ("recipe_json", np.frombuffer(b"".join(recipes), np.uint8)),
            ("recipe_end", np.cumsum([len(recipe) for recipe in recipes], dtype="<i8")),
        ):
            dataset = _create(file, name, values.dtype, values.shape, values.shape, compression)
            dataset[...] = values
    data = buffer.getvalue()

    chunk_sums = _chunk_sums(data, n)
    records = [
        {
            "index": first_index + k,
            "subject": sample.subject,
            "sha256": _sample_sha256(stored[k], recipes[k]),
            "crc32c": chunk_sums[k],
        }
        for k, sample in enumerate(samples)
    ]
    return data, {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), "n": n, "samples": records}


def write_shard(
    folder: str | Path,
    number: int,
    samples: Sequence[Sample],
    *,
    first_index: int,
    config_json: str,
    versions_json: str,
    compression: str = "blosc-lz4",
) -> dict[str, Any]:
    """Publish `folder/shards/NNNNN.h5`, then its sidecar, and return the sidecar; see `encode_shard`."""
    data, sidecar = encode_shard(
        samples,
        config_json=config_json,
        versions_json=versions_json,
        compression=compression,
        first_index=first_index,
    )
    shard = shard_path(Path(folder), number)
    try:
        shard.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise output_error(shard.parent, error, 0) from error
    publish(shard, data)
    publish(shard.with_suffix(".json"), canonical_json(sidecar).encode())
    return sidecar


def shard_path(out: Path, number: int) -> Path:
    """Return where shard `number` of the run in `out` lies."""
    return out / shard_name(number)


def shard_name(number: int) -> str:
    """Return the file of shard `number`, seen from its run's folder."""
    return f"shards/{number:05d}.h5"


def _stored(sample: Sample, side: int, index: int) -> dict[str, NDArray[Any]]:
    """Return the arrays as the table wants them, or raise if one cannot be stored faithfully."""
    if not sample.recipe:
        raise ValueError(f"pair {index}: the recipe is empty")
    arrays = {}
    for name, dtype in VOLUMES.items():
        array = np.asarray(getattr(sample, name))
        fitting = array.dtype.kind == "f" if name in IMAGES else array.dtype in (np.bool_, np.uint8)
        if not fitting or side < 1 or array.shape != (side, side, side):
            raise ValueError(f"pair {index}: {name} is {array.dtype} {array.shape}, side {side}")
        if name in IMAGES:
            arrays[name] = image_as_stored(array, f"pair {index} ({sample.subject}): {name}")
            continue
        arrays[name] = np.ascontiguousarray(array, dtype)
        if arrays[name].max() > _HIGHEST[name]:
            raise ValueError(f"pair {index}: {name} holds values above {_HIGHEST[name]}")
    return arrays


def image_as_stored(image: NDArray, called: str) -> NDArray[np.float16]:
    """Return an image as float16.

    Raises:
        SynthlongError: A value that is not finite then; names the image as `called`.
    """
    with np.errstate(over="ignore"):
        stored = np.ascontiguousarray(image, np.float16)
    if not np.isfinite(stored).all():
        problem = "holds NaN or values beyond float16 (65504); check the scan with `synthlong check`"
        raise SynthlongError(f"{called} {problem}")
    return stored


def _empty_file(buffer: io.BytesIO) -> Any:
    """Return a new HDF5 file, made by HDF5 itself: h5py before 3.15 would put the time into it.

    Of the format of HDF5 1.10 (2016), whose metadata have checksums: the latest is read by the latest HDF5 only.
    """
    access, creation = h5py.h5p.create(h5py.h5p.FILE_ACCESS), h5py.h5p.create(h5py.h5p.FILE_CREATE)
    access.set_fileobj_driver(h5py.h5fd.fileobj_driver, buffer)
    access.set_fclose_degree(h5py.h5f.CLOSE_STRONG)
    access.set_libver_bounds(h5py.h5f.LIBVER_V110, h5py.h5f.LIBVER_V110)
    access.set_cache(0, 1, 0, 0)  # each chunk is written at once, in whole
    creation.set_obj_track_times(False)
    return h5py.File(h5py.h5f.create(b"shard", h5py.h5f.ACC_TRUNC, creation, access))


def _create(
    file: Any,
    name: str,
    dtype: np.dtype[Any],
    shape: tuple[int, ...],
    chunk: tuple[int, ...],
    compression: str,
) -> Any:
    """Create a dataset through HDF5 itself: h5py puts fletcher32 before the compression."""
    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plist.set_chunk(chunk)
    plist.set_obj_track_times(False)
    for code, options in _FILTERS[compression]:
        plist.set_filter(code, h5py.h5z.FLAG_OPTIONAL, options)  # optional: a chunk that grows stays plain
    plist.set_fletcher32()
    space, kind = h5py.h5s.create_simple(shape), h5py.h5t.py_create(dtype)
    return h5py.Dataset(h5py.h5d.create(file.id, name.encode(), kind, space, plist))


@contextmanager
def _blosc_environment_ignored() -> Iterator[None]:
    """Hide BLOSC_NTHREADS, BLOSC_CLEVEL, ...: each changes the bytes, threads even from run to run."""
    hidden = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith("BLOSC_")}
    try:
        yield
    finally:
        os.environ.update(hidden)


def _chunk_sums(data: bytes, n: int) -> list[dict[str, int]]:
    """Return for each sample the crc32c of each dataset's chunk, as it lies in the file."""
    view = memoryview(data)
    with h5py.File(io.BytesIO(data), "r") as file:
        return [
            {
                name: crc32c.crc32c(view[chunk.byte_offset : chunk.byte_offset + chunk.size])
                for name in VOLUMES
                for chunk in [file[name].id.get_chunk_info_by_coord((k, 0, 0, 0))]
            }
            for k in range(n)
        ]


def _sample_sha256(arrays: dict[str, NDArray[Any]], recipe: bytes) -> str:
    digest = hashlib.sha256()
    for name in VOLUMES:
        digest.update(arrays[name].data)
    digest.update(recipe)
    return digest.hexdigest()
