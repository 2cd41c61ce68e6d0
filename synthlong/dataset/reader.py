"""One shard file (schema `synthlong/1`): checked once, then read without HDF5.

    open -> size -> SHA-256 -> layout, by HDF5 -> each read: pread, crc32c, blosc

HDF5 tells where the chunks lie, which takes milliseconds, and is closed again. A chunk is then read at
its offset through the same descriptor: `pread` shares nothing with other threads or processes, and a
file that was cut meanwhile is an error, where mapped memory would kill the process.

No checksum tells a file built to mislead. So the layout check refuses links to other files, external or
virtual storage, unknown filters, and what was never written; every chunk must lie inside the file and
unpack to the size of its shape.

The text attributes lie outside HDF5's checksums, in its global heap, and HDF5 2.0 can loop for ever on a
heap with one changed bit: `schema` is found in the head of the file itself, and `config` may be asked for
only where the file's SHA-256 has matched.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
import threading
import warnings
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import crc32c
import h5py
import hdf5plugin
import numpy as np
from numpy.typing import NDArray

from synthlong.errors import InputError, ShardCorruptError

with warnings.catch_warnings(record=True):  # it says on import that it prefers another crc32c than ours
    from numcodecs import blosc

__all__ = ["IMAGES", "MASKS", "SCHEMA", "VOLUMES", "Layout", "ShardReader", "check_schema"]

SCHEMA = "synthlong/1"
IMAGES = ("baseline", "followup")
MASKS = ("new_lesions", "evolution", "lesions_baseline", "lesions_followup")
VOLUMES: dict[str, np.dtype[Any]] = {
    **dict.fromkeys(IMAGES, np.dtype("<f2")),
    **dict.fromkeys(MASKS, np.dtype("u1")),
}
_RECIPES: dict[str, np.dtype[Any]] = {"recipe_json": np.dtype("u1"), "recipe_end": np.dtype("<i8")}
_COLUMN = {name: k for k, name in enumerate(VOLUMES)}

_CHUNK = np.dtype([("offset", "<i8"), ("size", "<i8"), ("packed", "?"), ("crc32c", "<u4")])
_BLOSC, _FLETCHER32 = hdf5plugin.Blosc.filter_id, h5py.h5z.FILTER_FLETCHER32
_CHECKSUM_BYTES = 4  # of fletcher32, behind each chunk
_BLOSC_HEADER = struct.Struct("<BxBxIxxxxI")  # version, flags, size unpacked, size packed
_BLOSC_LZ4 = (2, 1)  # version, and the compressor in the flags
_LZ4_BEST_RATIO = 255

_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_HEAD_BYTES = 2**16
_BLOCK_BYTES = 2**20


class _LayoutError(ValueError):
    """A shard that can be read but is not what it should be."""


@dataclass(frozen=True, eq=False)
class Layout:
    """Where everything lies in one shard file.

    Args:
        identity: Device, inode, size and times of the file that this is true of.
        side: Edge of the cubes, in voxels.
        volumes: Chunk of each sample and dataset, shape `(N, 6)`: offset, stored size, packed or plain, crc32c.
        recipes: Chunk of all recipes, likewise.
        recipe_end: Where each recipe ends in them, shape `(N,)`.
    """

    identity: tuple[int, ...]
    side: int
    volumes: NDArray[Any]
    recipes: tuple[int, int, bool, int]
    recipe_end: NDArray[np.int64]


class ShardReader:
    """An open shard. No lock is taken, no file is written, and the object needs HDF5 no more.

    Args:
        path: The shard, for example `OUT/shards/00000.h5`.
        size: Bytes that it must have; None: any.
        sha256: Digest that it must have; None: any.
        sums: Note the crc32c of every chunk now, and compare at each read.
        layout: That of an earlier reader with the same `sums`: as long as the file is still the same one, it
            is neither hashed nor laid out again.

    Attributes:
        layout: Where everything lies in the file.
        n: Number of samples.

    Raises:
        InputError: The file cannot be opened, or a newer synthlong or HDF5 wrote it.
        ShardCorruptError: Its bytes are not those that were written, or its layout is not the contract's.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        size: int | None = None,
        sha256: bytes | None = None,
        sums: bool = True,
        layout: Layout | None = None,
    ) -> None:
        self.path = Path(path)
        self._sums = sums
        self._texts: bytes | None = None
        with _corruption_named(self.path, None):
            self._descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        self._close = weakref.finalize(self, os.close, self._descriptor)
        try:
            with _corruption_named(self.path, None):
                identity = _identity(self._descriptor)
                if layout is None or layout.identity != identity:
                    layout = self._checked(identity, size, sha256)
        except BaseException:
            self.close()
            raise
        self.layout = layout
        self.n = len(layout.recipe_end)

    def close(self) -> None:
        """Close the file; the reader is of no use afterwards."""
        self._close()

    def volumes(self, position: int, names: Iterable[str] = tuple(VOLUMES)) -> dict[str, NDArray[Any]]:
        """Return the named datasets of sample `position` in their stored dtypes, shape `(S, S, S)`."""
        with _corruption_named(self.path, position):
            chunks, shape = self.layout.volumes[position].tolist(), (self.layout.side,) * 3
            return {name: self._array(chunks[_COLUMN[name]], shape, VOLUMES[name]) for name in names}

    def recipe(self, position: int) -> str:
        """Return the recipe of sample `position` as JSON; all recipes are read at the first call."""
        with _corruption_named(self.path, position):
            end = self.layout.recipe_end
            if self._texts is None:
                self._texts = self._array(self.layout.recipes, (int(end[-1]),), _RECIPES["recipe_json"]).tobytes()
            return self._texts[end[position - 1] if position else 0 : end[position]].decode()

    def sums(self, position: int) -> dict[str, int]:
        """Return the crc32c of each dataset's chunk of sample `position`, as noted when the shard was opened."""
        return dict(zip(VOLUMES, self.layout.volumes["crc32c"][position].tolist(), strict=True))

    def run_id(self) -> str:
        """Return the run it says it is of; only a shard whose SHA-256 has matched may be asked."""
        with _corruption_named(self.path, None), _hdf5(self._descriptor) as file:
            return str(json.loads(file.attrs["config"])["run_id"])

    def _checked(self, identity: tuple[int, ...], size: int | None, sha256: bytes | None) -> Layout:
        """Return the layout of the file after every check that was asked for."""
        length = identity[2]
        if size is not None and length != size:
            raise _LayoutError(f"has {length} bytes, the index says {size}")
        if sha256 is not None and _sha256(self._descriptor) != sha256:
            raise _LayoutError("its SHA-256 is not the one that was recorded")
        _check_head(self.path, self._descriptor)
        with _hdf5(self._descriptor) as file:
            chunks = _chunks_of(file)
            n, side = file["baseline"].shape[:2]
            texts = file["recipe_json"].size
        for name, table in chunks.items():
            if (table["offset"] + table["size"] > length).any():
                raise _LayoutError(f"{name} reaches beyond the end of the file")
            if self._sums:
                table["crc32c"] = [crc32c.crc32c(_pread(self._descriptor, *chunk[:2])) for chunk in table.tolist()]
        end = self._array(chunks["recipe_end"][0].item(), (n,), _RECIPES["recipe_end"])
        if (np.diff(end, prepend=0) < 0).any() or end[-1] != texts:
            raise _LayoutError("recipe_end does not divide recipe_json")
        if _identity(self._descriptor) != identity:
            raise _LayoutError("changed while it was read")
        volumes = np.stack([chunks[name] for name in VOLUMES], axis=1)
        return Layout(identity, side, volumes, chunks["recipe_json"][0].item(), end)

    def _array(self, chunk: tuple[int, int, bool, int], shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """Return the array that a chunk holds."""
        offset, size, packed, expected = chunk
        data = _pread(self._descriptor, offset, size)
        if self._sums and (got := crc32c.crc32c(data)) != expected:
            raise _LayoutError(f"the stored bytes have crc32c {got:08x}, not {expected:08x}")
        return _unpacked(data[:-_CHECKSUM_BYTES], shape, dtype) if packed else np.ndarray(shape, dtype, data.data)


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


# The file


def _identity(descriptor: int) -> tuple[int, ...]:
    """Return what changes when a file is replaced or written to; its third item is the size."""
    s = os.fstat(descriptor)
    return s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns


def _pread(descriptor: int, offset: int, size: int) -> NDArray[np.uint8]:
    """Return `size` bytes at `offset`."""
    data = np.empty(size, np.uint8)
    view, done = data.data, 0
    while done < size:
        got = os.preadv(descriptor, [view[done:]], offset + done)
        if not got:
            raise _LayoutError(f"ends before byte {offset + size}")
        done += got
    return data


def _sha256(descriptor: int) -> bytes:
    """Return the SHA-256 of a whole file."""
    digest, block, offset = hashlib.sha256(), np.empty(_BLOCK_BYTES, np.uint8), 0
    while got := os.preadv(descriptor, [block.data], offset):
        digest.update(block[:got].data)
        offset += got
    return digest.digest()


def _check_head(path: Path, descriptor: int) -> None:
    """Check the signature, and the schema where `writer` puts it: its length, then its text."""
    head = os.pread(descriptor, _HEAD_BYTES, 0)
    schema = re.search(rb"(.{8})(synthlong/[0-9]+)", head, re.DOTALL)
    if not head.startswith(_SIGNATURE) or not schema or int.from_bytes(schema[1], "little") != len(schema[2]):
        raise _LayoutError(f"is not of schema {SCHEMA}")
    version = re.search(rb'"synthlong": ?"([0-9A-Za-z.+]{1,32})"', head)
    check_schema(path, schema[2].decode(), made_by=version[1].decode() if version else None)


# Its layout


@contextmanager
def _hdf5(descriptor: int) -> Iterator[Any]:
    """Yield the file as HDF5 sees it, through a descriptor that stays open."""
    with open(descriptor, "rb", closefd=False) as raw, h5py.File(raw, "r", locking=False) as file:
        yield file


def _chunks_of(file: Any) -> dict[str, NDArray[Any]]:
    """Return the table of each dataset's chunks, or raise if the file is not laid out as the contract says."""
    wanted = VOLUMES | _RECIPES
    if file.userblock_size or len(file) != len(wanted) or set(file) != set(wanted):
        raise _LayoutError("does not hold the datasets of its schema")
    for name in wanted:
        if not isinstance(file.get(name, getlink=True), h5py.HardLink):
            raise _LayoutError(f"{name} is a link to somewhere else")
    datasets = {name: file[name] for name in wanted}
    n, side, *_ = _shape(datasets["baseline"], "baseline", rank=4)
    shape, texts = (n, side, side, side), _shape(datasets["recipe_json"], "recipe_json", rank=1)
    stored = {name: _chunk_table(datasets[name], name, shape, chunk=(1, *shape[1:])) for name in VOLUMES}
    return stored | {
        "recipe_json": _chunk_table(datasets["recipe_json"], "recipe_json", texts, chunk=texts),
        "recipe_end": _chunk_table(datasets["recipe_end"], "recipe_end", (n,), chunk=(n,)),
    }


def _shape(dataset: Any, name: str, *, rank: int) -> tuple[int, ...]:
    if not isinstance(dataset, h5py.Dataset) or dataset.shape is None or len(dataset.shape) != rank:
        raise _LayoutError(f"{name} is not a dataset of rank {rank}")
    shape: tuple[int, ...] = dataset.shape
    if min(shape) < 1:
        raise _LayoutError(f"{name} is empty")
    return shape


def _chunk_table(dataset: Any, name: str, shape: tuple[int, ...], *, chunk: tuple[int, ...]) -> NDArray[Any]:
    """Return where a dataset's chunks lie, or raise unless it lies whole inside this file."""
    dtype = (VOLUMES | _RECIPES)[name]
    if _shape(dataset, name, rank=len(shape)) != shape or dataset.maxshape != shape:
        raise _LayoutError(f"{name} has shape {dataset.shape}, not {shape}")
    if dataset.dtype != dtype:
        raise _LayoutError(f"{name} has dtype {dataset.dtype}")
    plist = dataset.id.get_create_plist()
    if plist.get_layout() != h5py.h5d.CHUNKED or plist.get_external_count() or plist.get_chunk() != chunk:
        raise _LayoutError(f"{name} is not stored in chunks of {chunk}")
    filters = [plist.get_filter(k)[0] for k in range(plist.get_nfilters())]
    if filters not in ([_FLETCHER32], [_BLOSC, _FLETCHER32]):
        raise _LayoutError(f"{name} has filters {filters}")
    n = shape[0] // chunk[0]
    if dataset.id.get_num_chunks() != n:
        raise _LayoutError(f"{name} was never written in full")
    table, origin = np.zeros(n, _CHUNK), (0,) * (len(shape) - 1)
    nbytes = int(np.prod(chunk)) * dtype.itemsize
    for k in range(n):
        info = dataset.id.get_chunk_info_by_coord((k * chunk[0], *origin))
        packed = _BLOSC in filters and not info.filter_mask  # a chunk that would have grown is stored plain
        if info.byte_offset is None or info.filter_mask not in (0, 1)[: len(filters)]:
            raise _LayoutError(f"{name} was not written as its filters say")
        size = info.size - _CHECKSUM_BYTES
        if not size <= nbytes <= (size * _LZ4_BEST_RATIO if packed else size):
            raise _LayoutError(f"{name} holds {info.size} bytes where {nbytes} are declared")
        table[k] = info.byte_offset, info.size, packed, 0
    return table


def _unpacked(data: NDArray[np.uint8], shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return what blosc packed, after a look at what it will write."""
    array = np.empty(shape, dtype)
    version, flags, nbytes, packed = _BLOSC_HEADER.unpack_from(data.data)
    if (version, flags >> 5, nbytes, packed) != (*_BLOSC_LZ4, array.nbytes, data.nbytes):
        raise _LayoutError("a chunk is not the blosc-lz4 of its shape")
    if threading.current_thread() is not threading.main_thread():
        blosc.decompress(data, array)
        return array
    threads, blosc.use_threads = blosc.use_threads, False  # else a main thread, each worker's too, starts more
    try:
        blosc.decompress(data, array)
    finally:
        blosc.use_threads = threads
    return array


@contextmanager
def _corruption_named(path: Path, sample: int | None) -> Iterator[None]:
    """Turn what is raised on a damaged file into an error that names file and sample."""
    try:
        yield
    except OSError as error:
        if error.errno:
            problem = f"cannot be read ({os.strerror(error.errno)})"
            raise InputError(path, problem, "check the disk and the file's permissions") from error
        raise ShardCorruptError(path, sample, "HDF5 cannot decode it") from error
    except _LayoutError as error:
        raise ShardCorruptError(path, sample, str(error)) from error
    except (KeyError, OverflowError, RuntimeError, TypeError, ValueError, struct.error) as error:
        if "bad version number" in str(error):  # in metadata whose checksum is right
            problem = f"is of a format that HDF5 {h5py.version.hdf5_version} does not know"
            raise InputError(path, problem, "install a newer h5py: pip install -U h5py") from error
        raise ShardCorruptError(path, sample, "it cannot be decoded") from error
