"""The shards of a run: their index, and all of them as a torch dataset.

`OUT/index.json`, written last, is the record that the run is complete. One shard file is written by
`writer` and read by `reader`; this module gives the names of both that other rooms use.
"""

from __future__ import annotations

import hashlib
import json
import operator
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from synthlong.dataset.reader import IMAGES, MASKS, SCHEMA, VOLUMES, ShardReader, check_schema
from synthlong.dataset.writer import Sample, canonical_json, encode_shard, publish, shard_path, write_shard
from synthlong.errors import ConfigError, InputError, ShardCorruptError

__all__ = [
    "IMAGES",
    "MASKS",
    "SCHEMA",
    "VOLUMES",
    "Sample",
    "ShardDataset",
    "ShardReader",
    "canonical_json",
    "encode_shard",
    "publish",
    "read_index",
    "shard_path",
    "write_index",
    "write_shard",
]

_MAX_OPEN = 16


def write_index(out: str | Path, run_id: str, sidecars: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Publish `out/index.json` from the sidecars of shards 0, 1, 2, ... and return it.

    Its `sha256` is that of its own canonical JSON without this key.
    """
    shards = [
        {
            "file": f"shards/{number:05d}.h5",
            "bytes": sidecar["bytes"],
            "sha256": sidecar["sha256"],
            "n": sidecar["n"],
            "samples": [{"index": s["index"], "subject": s["subject"]} for s in sidecar["samples"]],
        }
        for number, sidecar in enumerate(sidecars)
    ]
    indices = [sample["index"] for shard in shards for sample in shard["samples"]]
    if not indices or any(b <= a for a, b in pairwise(indices)):
        raise ValueError("sidecars must be in shard order, with rising sample indices")
    index: dict[str, Any] = {"schema": SCHEMA, "run_id": run_id, "n": len(indices), "shards": shards}
    index["sha256"] = _index_sha256(index)
    publish(Path(out) / "index.json", canonical_json(index).encode())
    return index


def read_index(out: str | Path) -> dict[str, Any]:
    """Return `out/index.json` after checking its schema and the hash of itself.

    Raises:
        InputError: There is no folder or no index (the run is not finished), or it was changed.
    """
    out = Path(out)
    path = out / "index.json"
    rebuild = f"rebuild it with `synthlong verify {out.name} --rebuild-index`"
    try:
        index = json.loads(path.read_bytes())
        untouched = isinstance(index, dict) and index.get("sha256") == _index_sha256(index)
    except FileNotFoundError:
        if not out.is_dir():
            raise InputError(out, "no such folder", "give the folder that `generate` wrote") from None
        done = len(list((out / "shards").glob("*.json")))
        problem = f"not finished: {done} shards done, no index.json"
        raise InputError(out, problem, "resume it: run the same `synthlong generate` again") from None
    except OSError as error:
        problem = f"cannot be read ({error.strerror})"
        raise InputError(path, problem, "check the disk and the file's permissions") from error
    except (ValueError, RecursionError) as error:
        raise InputError(path, "is not JSON", rebuild) from error
    if not untouched:
        raise InputError(path, "does not match the hash of itself", rebuild)
    check_schema(path, index.get("schema"))
    try:
        whole = index["n"] == sum(shard["n"] for shard in index["shards"]) and all(
            (out / shard["file"], shard["n"]) == (shard_path(out, number), len(shard["samples"]))
            and all(type(s["index"]) is int and type(s["subject"]) is str for s in shard["samples"])
            for number, shard in enumerate(index["shards"])
        )
    except (KeyError, TypeError):
        whole = False
    if not whole:
        raise InputError(path, "is not an index of shards", rebuild)
    return index


class ShardDataset(Dataset[dict[str, Any]]):
    """What `generate` wrote, as a map-style torch dataset.

    `[i]` is a dict: images float32 `(1, S, S, S)`, masks uint8 `(1, S, S, S)`, `recipe` a JSON string.
    Shards are opened when first read, in each process anew, and at most 16 at a time; an object must
    not be shared between threads.

    Args:
        out: Folder with a complete run (`index.json`).
        keys: Which entries to read; default all.
        transform: Called with each sample's dict; its result is returned in its place.
        seed: If given, `transform` runs with torch's generators seeded from `(seed, epoch, index)` and
            restored afterwards, so what it draws depends neither on workers nor on order.
        split: "train" or "validation", by source subject; None gives all samples.
        fold: Which of the `folds` parts of the subjects is for validation.
        folds: Number of parts, from 2 to the number of subjects.

    Raises:
        InputError: The run is not finished, or shards are missing.
        ShardCorruptError: A shard has another size than the index says.
        ConfigError: An option outside its range.
    """

    def __init__(
        self,
        out: str | Path,
        *,
        keys: Sequence[str] | None = None,
        transform: Callable[[dict[str, Any]], Any] | None = None,
        seed: int | None = None,
        split: str | None = None,
        fold: int = 0,
        folds: int = 5,
    ) -> None:
        self.out = Path(out)
        self.keys = (*VOLUMES, "recipe") if keys is None else tuple(keys)
        if unknown := set(self.keys) - {*VOLUMES, "recipe"}:
            raise ConfigError(f"keys must be of {(*VOLUMES, 'recipe')}, not {sorted(unknown)}")
        if seed is not None and seed < 0:
            raise ConfigError(f"seed must be 0 or more, not {seed}")
        self.transform, self.seed = transform, seed
        shards = read_index(self.out)["shards"]
        self._shards = [(shard["bytes"], shard["n"]) for shard in shards]
        self._check_files()

        rows = [
            (number, position, sample["index"], sample["subject"])
            for number, shard in enumerate(shards)
            for position, sample in enumerate(shard["samples"])
        ]
        chosen = _subjects_of(split, {subject for *_, subject in rows}, fold=fold, folds=folds)
        self.subjects = sorted(chosen)  # a list, and rows an array, keep the pickle small
        self._rows = np.array([row[:3] for row in rows if row[3] in chosen], np.int64).reshape(-1, 3)
        self._readers: OrderedDict[int, ShardReader] = OrderedDict()
        self._process = os.getpid()
        self._epoch = torch.zeros((), dtype=torch.int64)
        if transform is not None and seed is not None:
            self._epoch.share_memory_()  # persistent workers see `set_epoch` too

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, item: int) -> Any:
        row = operator.index(item)
        if not -len(self) <= row < len(self):
            raise IndexError(f"sample {row} of {len(self)}")
        shard, position, index = map(int, self._rows[row])
        reader = self._reader(shard)
        sample: dict[str, Any] = {}
        for key in self.keys:
            if key == "recipe":
                sample[key] = reader.recipe(position)
            else:
                volume = reader.volume(key, position)
                dtype = np.float32 if key in IMAGES else np.uint8
                sample[key] = torch.from_numpy(volume.astype(dtype, copy=False)[None])
        if self.transform is None:
            return sample
        if self.seed is None:
            return self.transform(sample)
        with seeded(self.seed, int(self._epoch), index):
            return self.transform(sample)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_readers": OrderedDict()}

    def set_epoch(self, epoch: int) -> None:
        """Give `transform` new draws; call it before each pass over the data."""
        if epoch < 0:
            raise ConfigError(f"epoch must be 0 or more, not {epoch}")
        self._epoch.fill_(epoch)

    def _check_files(self) -> None:
        missing = [
            shard_path(self.out, number).name for number in range(len(self._shards)) if self._size(number) is None
        ]
        if missing:
            problem = f"{len(missing)} of {len(self._shards)} shards missing: {', '.join(missing)}"
            raise InputError(self.out, problem, "copy them again or generate the run anew")

    def _size(self, shard: int) -> int | None:
        """Return the size of a shard's file, None if there is none; raise if it is not the index's."""
        path, expected = shard_path(self.out, shard), self._shards[shard][0]
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            return None
        except OSError as error:
            problem = f"cannot be read ({error.strerror})"
            raise InputError(path, problem, "check the disk and the permissions") from error
        if size != expected:
            raise ShardCorruptError(path, None, f"has {size} bytes, the index says {expected}")
        return size

    def _reader(self, shard: int) -> ShardReader:
        if self._process != os.getpid():  # after a fork the parent's handles are not ours to use
            self._process, self._readers = os.getpid(), OrderedDict()
        if shard in self._readers:
            self._readers.move_to_end(shard)
            return self._readers[shard]
        while len(self._readers) >= _MAX_OPEN:
            self._readers.popitem(last=False)[1].close()
        self._size(shard)  # it may have been replaced since this dataset was opened
        reader = ShardReader(shard_path(self.out, shard))
        if reader.n != self._shards[shard][1]:
            reader.close()
            problem = f"has {reader.n} samples, the index says {self._shards[shard][1]}"
            raise ShardCorruptError(reader.path, None, problem)
        self._readers[shard] = reader
        return reader


def _index_sha256(index: dict[str, Any]) -> str:
    rest = {key: value for key, value in index.items() if key != "sha256"}
    return hashlib.sha256(canonical_json(rest).encode()).hexdigest()


def _subjects_of(split: str | None, subjects: set[str], *, fold: int, folds: int) -> set[str]:
    """Return the subjects on one side of a fold: dealt out in the order of their ids' SHA-256."""
    if split is None:
        return subjects
    if split not in ("train", "validation"):
        raise ConfigError(f"split must be 'train' or 'validation', not {split!r}")
    if not 2 <= folds <= len(subjects):
        raise ConfigError(f"folds must be from 2 to the number of subjects ({len(subjects)}), not {folds}")
    if not 0 <= fold < folds:
        raise ConfigError(f"fold must be from 0 to {folds - 1}, not {fold}")
    dealt = sorted(subjects, key=lambda subject: hashlib.sha256(subject.encode()).digest())
    validation = set(dealt[fold::folds])
    return validation if split == "validation" else subjects - validation


@contextmanager
def seeded(seed: int, epoch: int, index: int) -> Iterator[None]:
    """Seed torch's generators for one sample and put them back after it."""
    state = int(np.random.SeedSequence((seed, epoch, index)).generate_state(1, np.uint64)[0])
    on_gpu = torch.cuda.is_initialized()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if on_gpu else ()):
        torch.default_generator.manual_seed(state)
        if on_gpu:
            torch.cuda.manual_seed_all(state)
        yield
