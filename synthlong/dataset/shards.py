"""The shards of a run as a torch dataset: `index` knows which there are, `reader` reads one of them."""

from __future__ import annotations

import hashlib
import logging
import operator
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset, get_worker_info

from synthlong.dataset.index import Index, found_files
from synthlong.dataset.reader import IMAGES, VOLUMES, Layout, ShardReader
from synthlong.dataset.writer import shard_path
from synthlong.errors import ConfigError, InputError, InputWarning, ShardCorruptError, short

__all__ = ["ShardDataset", "checked_keys", "seeded", "subjects_of", "tell_affine"]

_MAX_OPEN = 16
_CHECKS = ("always", "first", "off")
_LOG = logging.getLogger("synthlong")


class ShardDataset(Dataset[dict[str, Any]]):
    """What `generate` wrote, as a map-style torch dataset.

    `[i]` is a dict: images float32 `(1, S, S, S)`, masks uint8 `(1, S, S, S)`, `recipe` a JSON string. What it
    holds is decided when it is made: the index, and the size of each shard, are read once. Shards are opened
    when first read, at most 16 at a time; nothing is locked or written. It may be sent to other processes, before
    or after a read, but not shared between threads.

    Args:
        out: Folder of a run.
        keys: Which entries to read; default all.
        transform: Called with each sample's dict; its result is returned in its place. Images have the attribute
            `affine`, by which the transforms of this package know which axis is axial.
        seed: If given, `transform` runs with torch's generators seeded from `(seed, epoch, index)` and
            restored afterwards, so what it draws depends neither on workers nor on order.
        split: "train" or "validation", by source subject; None gives all samples.
        fold: Which of the `folds` parts of the subjects is for validation.
        folds: Number of parts, from 2 to the number of subjects.
        subjects: All subjects to deal into folds; default: the run's own, so folds of two runs are not the same
            patients. Give the subjects of all runs that are used together to each of them.
        check: "always": a shard's SHA-256 when a process first reads it, and a crc32c at every read;
            "first": the SHA-256 only; "off": no more than the shards' sizes. A DataLoader's workers are new processes
            in each epoch: use `persistent_workers=True`, or run `synthlong verify` once and choose "off".
        allow_missing: Go on without shards that are missing, and log how many samples are left.
        partial: Read a run that is not complete: the shards that are finished now.

    Raises:
        InputError: The run is not finished, or shards are missing.
        ShardCorruptError: A shard has another size than the index says; when it is read, other bytes.
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
        subjects: Iterable[str] | None = None,
        check: str = "always",
        allow_missing: bool = False,
        partial: bool = False,
    ) -> None:
        self.out = Path(out).absolute()  # the working directory may change
        self.keys = checked_keys(keys)
        self._names = tuple(key for key in self.keys if key != "recipe")
        if seed is not None and seed < 0:
            raise ConfigError(f"seed must be 0 or more, not {seed}")
        if check not in _CHECKS:
            raise ConfigError(f"check must be one of {_CHECKS}, not {check!r}")
        self.transform, self.seed, self.check = transform, seed, check

        complete = not partial or (self.out / "index.json").exists()
        index = Index.read(self.out) if complete else Index.of_finished(self.out)
        self._run_id = None if complete else index.run_id  # the index tells whose the shards are, sidecars do not
        self._shards = index.shards
        among = set(index.subjects) if subjects is None else set(subjects)
        if strange := set(index.subjects) - among:
            problem = f"{min(strange)!a} of {short(self.out)} is not among them"
            raise ConfigError(f"subjects: {problem}; give those of all runs")
        chosen = subjects_of(split, sorted(among), fold=fold, folds=folds)
        self.subjects = sorted(chosen & set(index.subjects))
        there = self._find_files(index, allow_missing)
        of_split = np.array([name in chosen for name in index.subjects])[index.subject]
        rows = of_split & np.repeat(there, index.shards["n"])
        self._bits = np.packbits(rows)  # a bit for each: a state that is pickled for every worker has to be small
        self._epoch = torch.zeros((), dtype=torch.int64)
        self.__setstate__({})

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, item: int) -> Any:
        row = operator.index(item)
        if not -len(self) <= row < len(self):
            raise IndexError(f"sample {row} of {len(self)}")
        at = int(self._rows[row])
        shard = int(self._ends.searchsorted(at, side="right"))
        position = at - int(self._ends[shard]) + int(self._shards["n"][shard])
        sample = self._read(shard, position)
        if self.transform is None:
            return sample
        if not set(self.keys).isdisjoint(IMAGES):
            from synthlong.recipe import affine_of

            recipe = sample.get("recipe") or self._reader(shard).recipe(position)
            try:
                tell_affine(sample, affine_of(recipe))
            except ConfigError:  # of another version
                text = f"{self.out.name}: its recipes are of another version; transforms take images for RAS, 1 mm"
                warnings.warn(text, InputWarning, stacklevel=2)
        if self.seed is None:
            return self.transform(sample)
        with seeded(self.seed, int(self._epoch), int(self._shards["first"][shard]) + position):
            return self.transform(sample)

    def __getstate__(self) -> dict[str, Any]:
        derived = ("_ends", "_rows", "_layouts", "_readers")
        return {name: value for name, value in self.__dict__.items() if name not in derived}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._epoch.share_memory_()  # persistent workers see `set_epoch` too; a copy's is not shared
        self._ends = self._shards["n"].cumsum()
        self._rows = np.unpackbits(self._bits).nonzero()[0]
        self._layouts: dict[int, Layout] = {}
        self._readers: OrderedDict[int, ShardReader] = OrderedDict()
        np.empty(2**24, np.uint8)  # once it is freed, malloc keeps as much at hand: reading then costs no page faults

    def set_epoch(self, epoch: int) -> None:
        """Give `transform` new draws; call it before each pass over the data."""
        if epoch < 0:
            raise ConfigError(f"epoch must be 0 or more, not {epoch}")
        self._epoch.fill_(epoch)

    def _find_files(self, index: Index, allow_missing: bool) -> NDArray[np.bool_]:
        """Return which shards are there; raise if one has another size than the index says."""
        found, names = found_files(self.out, ".h5"), index.names()
        sizes = np.array([found.get(name, -1) for name in names], np.int64)
        there = sizes >= 0
        for k in np.flatnonzero(there & (sizes != self._shards["bytes"])):
            problem = f"has {sizes[k]} bytes, the index says {self._shards['bytes'][k]}"
            raise ShardCorruptError(self.out / "shards" / names[k], None, problem)
        if not there.all():
            missing = [name for name, is_there in zip(names, there, strict=True) if not is_there]
            problem = f"{len(missing)} of {len(names)} shards missing: {', '.join(missing)}"
            if not allow_missing:
                raise InputError(self.out, problem, "copy them again or use allow_missing=True")
            left = int(self._shards["n"][there].sum())
            _LOG.warning("%s: %s; %d of %d samples are left", self.out.name, problem, left, len(index.subject))
        return there

    def _read(self, shard: int, position: int) -> dict[str, Any]:
        """Return a sample as it is stored."""
        try:
            reader = self._reader(shard)
            volumes = reader.volumes(position, self._names)
            sample: dict[str, Any] = {}
            for key in self.keys:
                if key == "recipe":
                    sample[key] = reader.recipe(position)
                else:
                    volume = torch.from_numpy(volumes[key][None])
                    sample[key] = volume.float() if key in IMAGES else volume
            return sample
        except ShardCorruptError as error:
            raise (_CorruptInWorker(str(error)) if get_worker_info() else error) from error

    def _reader(self, shard: int) -> ShardReader:
        """Return an open shard; one that is new to this process, or is a new file, is checked first."""
        if shard in self._readers:
            self._readers.move_to_end(shard)
            return self._readers[shard]
        while len(self._readers) >= _MAX_OPEN:
            self._readers.popitem(last=False)[1].close()
        number, n, _, size, sha256 = self._shards[shard].item()
        reader = ShardReader(
            shard_path(self.out, number),
            size=size,
            sha256=None if self.check == "off" else sha256,
            sums=self.check == "always",
            layout=self._layouts.get(shard),
        )
        if reader.n != n:
            raise ShardCorruptError(reader.path, None, f"has {reader.n} samples, the index says {n}")
        if self._run_id and self.check != "off" and reader.run_id() != self._run_id:
            raise ShardCorruptError(reader.path, None, "belongs to another run")
        self._layouts[shard], self._readers[shard] = reader.layout, reader
        return reader


class _CorruptInWorker(ShardCorruptError):
    """`ShardCorruptError` as a DataLoader can hand it on: torch makes a worker's error anew from its text alone."""

    def __init__(self, text: str) -> None:
        path, sample = re.findall(r"(\S+\.h5): (?:sample (\d+): )?", text)[-1]
        super().__init__(path, int(sample) if sample else None, text)
        self.args = (text,)

    def __str__(self) -> str:
        return str(self.args[0])


def checked_keys(keys: Sequence[str] | None) -> tuple[str, ...]:
    """Return which entries a sample is to have; None: all."""
    if unknown := set(keys or ()) - {*VOLUMES, "recipe"}:
        raise ConfigError(f"keys must be of {(*VOLUMES, 'recipe')}, not {sorted(unknown)}")
    return (*VOLUMES, "recipe") if keys is None else tuple(keys)


def subjects_of(split: str | None, subjects: Sequence[str], *, fold: int, folds: int) -> set[str]:
    """Return the subjects on one side of a fold: dealt out, in the order of their ids' SHA-256, among those given."""
    if split is None:
        return set(subjects)
    if split not in ("train", "validation"):
        raise ConfigError(f"split must be 'train' or 'validation', not {split!r}")
    if not 2 <= folds <= len(subjects):
        n = len(subjects)
        there = "there is 1 patient" if n == 1 else f"there are {n} patients"
        way = f"use 2 to {n}" if n > 1 else "add patients, or hold nobody out (split=None; in a training --folds 1)"
        raise ConfigError(f"folds = {folds}: {there}; {way}")
    if not 0 <= fold < folds:
        raise ConfigError(f"fold must be from 0 to {folds - 1}, not {fold}")
    dealt = sorted(subjects, key=lambda subject: hashlib.sha256(subject.encode()).digest())
    validation = set(dealt[fold::folds])
    return validation if split == "validation" else set(subjects) - validation


def tell_affine(sample: dict[str, Any], affine: NDArray[np.float64]) -> None:
    """Give the images of a sample the attribute `affine`."""
    for name in IMAGES:
        if name in sample:
            sample[name].affine = affine


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
