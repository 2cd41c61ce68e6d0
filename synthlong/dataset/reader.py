"""One shard file (schema `synthlong/1`): its layout, checked before any data are read.

HDF5 metadata carry checksums under `libver="latest"` and every chunk ends in fletcher32, so a
changed byte surfaces as an error of HDF5, which this module turns into `ShardCorruptError`. What
no checksum catches, a file built to mislead, the layout check refuses: links to other files,
external or virtual storage, unknown filters, a size that was never written.

The text attributes alone lie outside all checksums, in HDF5's global heap, and HDF5 2.0 can loop
for ever on a heap with one changed bit. So this module never asks HDF5 for them: it finds `schema`
in the head of the file itself. Read `config` and `versions` only after the file's SHA-256 matched.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import hdf5plugin
import numpy as np
from numpy.typing import NDArray

from synthlong.errors import InputError, ShardCorruptError

__all__ = ["IMAGES", "MASKS", "SCHEMA", "VOLUMES", "ShardReader", "check_schema"]

SCHEMA = "synthlong/1"
IMAGES = ("baseline", "followup")
MASKS = ("new_lesions", "evolution", "lesions_baseline", "lesions_followup")
VOLUMES: dict[str, np.dtype[Any]] = {
    **dict.fromkeys(IMAGES, np.dtype("<f2")),
    **dict.fromkeys(MASKS, np.dtype("u1")),
}
_RECIPES: dict[str, np.dtype[Any]] = {"recipe_json": np.dtype("u1"), "recipe_end": np.dtype("<i8")}
_BLOSC, _FLETCHER32 = hdf5plugin.Blosc.filter_id, h5py.h5z.FILTER_FLETCHER32
_HEAD = 2**16


class _LayoutError(ValueError):
    """A shard that HDF5 can read but that is not laid out as the schema says."""


class ShardReader:
    """An open shard; nothing but its metadata is read until `volume` or `recipe` is called.

    Args:
        path: The shard, for example `OUT/shards/00000.h5`. No lock is taken, no file is written.

    Attributes:
        n: Number of samples.
        side: Edge of the cubes, in voxels.

    Raises:
        InputError: The file cannot be opened, or a newer synthlong wrote it.
        ShardCorruptError: Its layout is not the contract's, or its bytes have changed.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._recipes: list[str] | None = None
        with _corruption_named(self.path, None):
            _check_head(self.path)
            self._file = h5py.File(self.path, "r", locking=False, rdcc_nbytes=0)
        try:
            with _corruption_named(self.path, None):
                self._datasets = self._checked_datasets()
        except BaseException:
            self._file.close()
            raise
        self.n, self.side = self._datasets["baseline"].shape[:2]

    def close(self) -> None:
        """Close the file; the reader is of no use afterwards."""
        self._file.close()

    def volume(self, name: str, position: int) -> NDArray[Any]:
        """Return sample `position` of dataset `name` in its stored dtype, shape `(S, S, S)`."""
        with _corruption_named(self.path, position):
            volume: NDArray[Any] = self._datasets[name][position]
        return volume

    def recipe(self, position: int) -> str:
        """Return the recipe of sample `position` as JSON; all recipes are read at the first call."""
        if self._recipes is None:
            with _corruption_named(self.path, position):
                end = self._datasets["recipe_end"][:]
                text = self._datasets["recipe_json"][:].tobytes()
                start = np.concatenate(([0], end[:-1]))
                if (end < start).any() or end[-1] != len(text):
                    raise _LayoutError("recipe_end does not divide recipe_json")
                self._recipes = [text[a:b].decode() for a, b in zip(start, end, strict=True)]
        return self._recipes[position]

    def _checked_datasets(self) -> dict[str, Any]:
        file, wanted = self._file, VOLUMES | _RECIPES
        if len(file) != len(wanted) or set(file) != set(wanted):
            raise _LayoutError("does not hold the datasets of its schema")
        for name in wanted:
            if not isinstance(file.get(name, getlink=True), h5py.HardLink):
                raise _LayoutError(f"{name} is a link to somewhere else")
        datasets = {name: file[name] for name in wanted}
        n, side, *_ = _shape(datasets, "baseline", rank=4)
        length = _shape(datasets, "recipe_json", rank=1)[0]
        for name in VOLUMES:
            _check_storage(datasets, name, shape=(n, side, side, side), chunk=(1, side, side, side))
        _check_storage(datasets, "recipe_json", shape=(length,), chunk=(length,))
        _check_storage(datasets, "recipe_end", shape=(n,), chunk=(n,))
        return datasets


def check_schema(path: Path, schema: object, *, made_by: str | None = None) -> None:
    """Raise unless `schema` is the one this version reads; a newer one names what is needed.

    Args:
        path: The file that the error names.
        schema: What the file says it is.
        made_by: The version of synthlong that wrote the file, where known.
    """
    if schema == SCHEMA:
        return
    if not isinstance(schema, str) or not re.fullmatch(r"synthlong/[1-9][0-9]{0,5}", schema):
        raise ShardCorruptError(path, None, f"is not of schema {SCHEMA}")
    needed = f">= {made_by}" if made_by else f"that reads {schema}"
    raise InputError(path, f"has schema {schema}, newer than {SCHEMA}", f"install a synthlong {needed}")


def _check_head(path: Path) -> None:
    """Check the schema in the file's first bytes, where `writer` puts it: its length, then its text."""
    with path.open("rb") as file:
        head = file.read(_HEAD)
    schema = re.search(rb"(.{8})(synthlong/[0-9]+)", head, re.DOTALL)
    if schema is None or int.from_bytes(schema[1], "little") != len(schema[2]):
        raise _LayoutError(f"is not of schema {SCHEMA}")
    version = re.search(rb'"synthlong": ?"([0-9A-Za-z.+]{1,32})"', head)
    check_schema(path, schema[2].decode(), made_by=version[1].decode() if version else None)


def _shape(datasets: dict[str, Any], name: str, *, rank: int) -> tuple[int, ...]:
    dataset = datasets[name]
    if not isinstance(dataset, h5py.Dataset) or dataset.shape is None or len(dataset.shape) != rank:
        raise _LayoutError(f"{name} is not a dataset of rank {rank}")
    shape: tuple[int, ...] = dataset.shape
    if min(shape) < 1:
        raise _LayoutError(f"{name} is empty")
    return shape


def _check_storage(datasets: dict[str, Any], name: str, *, shape: tuple[int, ...], chunk: tuple[int, ...]) -> None:
    """Raise unless the dataset lies whole inside this file, as the contract says."""
    dataset = datasets[name]
    if _shape(datasets, name, rank=len(shape)) != shape or dataset.maxshape != shape:
        raise _LayoutError(f"{name} has shape {dataset.shape}, not {shape}")
    if dataset.dtype != (VOLUMES | _RECIPES)[name]:
        raise _LayoutError(f"{name} has dtype {dataset.dtype}")
    plist = dataset.id.get_create_plist()
    if plist.get_layout() != h5py.h5d.CHUNKED or plist.get_external_count() or plist.get_chunk() != chunk:
        raise _LayoutError(f"{name} is not stored in chunks of {chunk}")
    filters = [plist.get_filter(k)[0] for k in range(plist.get_nfilters())]
    if filters not in ([_FLETCHER32], [_BLOSC, _FLETCHER32]):
        raise _LayoutError(f"{name} has filters {filters}")
    if dataset.id.get_num_chunks() != shape[0] // chunk[0]:
        raise _LayoutError(f"{name} was never written in full")


@contextmanager
def _corruption_named(path: Path, sample: int | None) -> Iterator[None]:
    """Turn what h5py raises on a damaged file into an error that names file and sample."""
    try:
        yield
    except OSError as error:
        if error.errno:
            problem = f"cannot be read ({os.strerror(error.errno)})"
            raise InputError(path, problem, "check the disk and the file's permissions") from error
        if "etcher32" in str(error):
            raise ShardCorruptError(path, sample, "the stored bytes do not match their checksum") from error
        raise ShardCorruptError(path, sample, "HDF5 cannot decode it") from error
    except _LayoutError as error:
        raise ShardCorruptError(path, sample, str(error)) from error
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ShardCorruptError(path, sample, "HDF5 cannot decode it") from error
