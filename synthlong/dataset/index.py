"""Which shards a run has, and from whose scans their samples were made.

`OUT/index.json`, written last, is the record that the run is complete. A run that is still being made can be
read too, as far as its sidecars go.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from synthlong.dataset.reader import SCHEMA, VOLUMES, check_schema
from synthlong.dataset.writer import shard_name, shard_path
from synthlong.errors import InputError, ShardCorruptError
from synthlong.plain import canonical_json
from synthlong.publishing import publish

__all__ = [
    "SHARD",
    "Index",
    "found_files",
    "index_part",
    "planned_shards",
    "read_sidecar",
    "recorded_samples",
    "write_index",
]

SHARD = np.dtype([("number", "<i4"), ("n", "<i4"), ("first", "<u4"), ("bytes", "<i8"), ("sha256", "V32")])
_OWN_SHA256 = re.compile(rb'\{"n":\d+,"run_id":"[^"\\]*","schema":"[^"\\]*",("sha256":"([0-9a-f]{64})",)')
_GIVE = "give the folder that `generate` wrote"
_RESUME = "run the same `synthlong generate` again"


@dataclass(frozen=True, eq=False)
class Index:
    """The shards of a run.

    Args:
        run_id: Of the run.
        sha256: The index's own hash; None for a run that is not complete.
        shards: A row of dtype `SHARD` for each, by rising number: samples, index of the first one, size and
            digest of the file.
        subjects: Ids of the run's source subjects, sorted.
        subject: Of each sample, its subject's place among them.
    """

    run_id: str
    sha256: str | None
    shards: NDArray[Any]
    subjects: tuple[str, ...]
    subject: NDArray[np.int32]

    @classmethod
    def read(cls, out: Path) -> Index:
        """Return `out/index.json` after checking its schema and its hash of itself.

        Raises:
            InputError: There is no folder or no index (the run is not finished), or it is newer or was changed.
        """
        path, rebuild = out / "index.json", f"rebuild it with `synthlong verify {out.name or out} --rebuild-index`"
        try:
            text = path.read_bytes()
        except FileNotFoundError:
            if not out.is_dir():
                raise InputError(out, "no such folder", _GIVE) from None
            if not any((out / name).exists() for name in ("run.json", "shards")):
                raise InputError(out, "holds no run of pairs", _GIVE) from None
            problem = f"not finished: {_progress(out)}, no index.json"
            raise InputError(out, problem, f"{_RESUME}, or in Python use partial=True") from None
        except OSError as error:
            problem = f"cannot be read ({error.strerror})"
            raise InputError(path, problem, "check the disk and the file's permissions") from error
        try:
            plain = json.loads(text)
            check_schema(path, plain["schema"])
            if not _vouches_for_itself(text):
                raise InputError(path, "does not match the hash of itself", rebuild)
            return _index_of(plain)
        except (ShardCorruptError, ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
            raise InputError(path, "is not an index of shards", rebuild) from error

    @classmethod
    def of_finished(cls, out: Path) -> Index:
        """Return the shards that are finished now of a run that is not: those with a sidecar.

        Raises:
            InputError: There is no `run.json`, or a sidecar is damaged or another run's.
        """
        from synthlong.dataset.plan import read_plan, shard_samples  # slow to import: all of the synthesis

        plan = read_plan(out)
        patients = [case["patient"] for case in plan["cases"]][: plan["pairs"]]
        place = {name: k for k, name in enumerate(sorted(set(patients)))}
        shards_in_all = len(planned_shards(plan))
        finished = sorted(_numbers(found_files(out, ".json")))
        shards, subject = np.zeros(len(finished), SHARD), []
        for row, number in zip(shards, finished, strict=True):
            path = shard_path(out, number).with_suffix(".json")
            sidecar = read_sidecar(path)
            recorded = recorded_samples(sidecar)
            if number >= shards_in_all or recorded != shard_samples(plan, number):
                raise InputError(path, "is not of this run", "move it away")
            names = [name for _, name in recorded]
            row["number"], row["n"], row["first"], row["bytes"] = number, len(names), recorded[0][0], sidecar["bytes"]
            row["sha256"] = bytes.fromhex(sidecar["sha256"])
            subject += [place[name] for name in names]
        return cls(plan["run_id"], None, shards, tuple(place), np.array(subject, np.int32))

    def indices(self) -> list[range]:
        """Return the sample indices of each shard."""
        return [range(first, first + n) for n, first in self.shards[["n", "first"]].tolist()]

    def names(self) -> list[str]:
        """Return the shards' file names."""
        return [f"{number:05d}.h5" for number in self.shards["number"].tolist()]


def write_index(out: str | Path, run_id: str, sidecars: Sequence[dict[str, Any]]) -> None:
    """Publish `out/index.json` from the sidecars of shards 0, 1, 2, ... of a complete run.

    Its `sha256` is that of its own canonical JSON without this key.
    """
    samples = [sample for sidecar in sidecars for sample in sidecar["samples"]]
    if not samples or [sample["index"] for sample in samples] != list(range(len(samples))):
        raise ValueError("sidecars must be in shard order and hold the samples 0, 1, 2, ...")
    place = {name: k for k, name in enumerate(sorted({sample["subject"] for sample in samples}))}
    shards = [
        {
            "file": shard_name(number),
            "bytes": sidecar["bytes"],
            "sha256": sidecar["sha256"],
            "n": sidecar["n"],
            "subject": [place[sample["subject"]] for sample in sidecar["samples"]],
        }
        for number, sidecar in enumerate(sidecars)
    ]
    index = {"schema": SCHEMA, "run_id": run_id, "n": len(samples), "shards": shards, "subjects": list(place)}
    index["sha256"] = hashlib.sha256(canonical_json(index).encode()).hexdigest()
    publish(Path(out) / "index.json", canonical_json(index).encode())


def read_sidecar(path: Path) -> dict[str, Any]:
    """Return the record of a finished shard.

    Raises:
        InputError: It cannot be read, or is no such record.
    """
    try:
        sidecar: dict[str, Any] = json.loads(path.read_bytes())
        samples = sidecar["samples"]
        whole = (
            sidecar.keys() == {"bytes", "sha256", "n", "samples"}
            and type(sidecar["bytes"]) is int
            and 0 < sidecar["bytes"] < 2**63
            and _is_digest(sidecar["sha256"])
            and 0 < sidecar["n"] == len(samples)
            and all(
                type(s["index"]) is int
                and type(s["subject"]) is str
                and _is_digest(s["sha256"])
                and s["crc32c"].keys() == VOLUMES.keys()
                for s in samples
            )
        )
    except OSError as error:
        problem = f"cannot be read ({error.strerror})"
        raise InputError(path, problem, "check the disk and the file's permissions") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        whole = False
    if not whole:
        raise InputError(path, "is not the record of a shard", f"copy it again, or delete it and {_RESUME}")
    return sidecar


def index_part(sidecar: dict[str, Any]) -> dict[str, Any]:
    """Return a sidecar without its samples' hashes, which are most of it and which no index needs."""
    samples = [{"index": sample["index"], "subject": sys.intern(sample["subject"])} for sample in sidecar["samples"]]
    return {**sidecar, "samples": samples}


def recorded_samples(sidecar: dict[str, Any]) -> list[tuple[int, str]]:
    """Return index and patient of each sample that a sidecar records, as `plan.shard_samples` plans them."""
    return [(sample["index"], sample["subject"]) for sample in sidecar["samples"]]


def planned_shards(plan: dict[str, Any]) -> list[range]:
    """Return the sample indices of each shard that a run is to have."""
    pairs, size = plan["pairs"], plan["shard_size"]
    return [range(first, min(first + size, pairs)) for first in range(0, pairs, size)]


def found_files(out: Path, suffix: str) -> dict[str, int]:
    """Return name and size of the files in `out/shards` whose name ends in `suffix`.

    Raises:
        InputError: The folder is there but cannot be read.
    """
    found = {}
    try:
        with os.scandir(out / "shards") as entries:
            for entry in entries:
                with suppress(FileNotFoundError):  # a temporary that has just been renamed
                    if entry.name.endswith(suffix) and entry.is_file():
                        found[entry.name] = entry.stat().st_size
    except FileNotFoundError:
        pass
    except OSError as error:
        problem = f"cannot be read ({error.strerror})"
        raise InputError(out / "shards", problem, "check the disk and the permissions") from error
    return found


def _numbers(names: Iterable[str]) -> list[int]:
    """Return the numbers of the files that are named like shards."""
    stems = (Path(name).stem for name in names)
    return [int(stem) for stem in stems if stem.isascii() and stem.isdigit() and stem == f"{int(stem):05d}"]


def _progress(out: Path) -> str:
    from synthlong.dataset.plan import read_plan  # slow to import: all of the synthesis

    done = len(_numbers(found_files(out, ".json")))
    try:
        return f"{done}/{len(planned_shards(read_plan(out)))} shards"
    except InputError:
        return f"{done} shards"


def _vouches_for_itself(text: bytes) -> bool:
    """Return whether a canonical index, its own hash cut out of it, has that hash."""
    own = _OWN_SHA256.match(text)
    if own is None:
        return False
    rest = hashlib.sha256(text[: own.start(1)])
    rest.update(memoryview(text)[own.end(1) :])
    return rest.hexdigest() == own[2].decode()


def _index_of(plain: dict[str, Any]) -> Index:
    """Return the index that plain JSON stands for; what does not fit raises one of several errors."""
    entries, subjects = plain["shards"], tuple(plain["subjects"])
    subject = np.array(list(chain.from_iterable(entry["subject"] for entry in entries)), np.int32)
    shards = np.zeros(len(entries), SHARD)
    shards["number"] = np.arange(len(entries))
    shards["n"] = [len(entry["subject"]) for entry in entries]
    shards["first"] = np.cumsum(shards["n"]) - shards["n"]
    shards["bytes"] = [entry["bytes"] for entry in entries]
    digests = bytes.fromhex("".join(entry["sha256"] for entry in entries))
    shards["sha256"] = np.frombuffer(digests, "V32")
    index = Index(plain["run_id"], plain["sha256"], shards, subjects, subject)
    whole = (
        [entry["file"] for entry in entries] == [f"shards/{name}" for name in index.names()]
        and all(type(name) is str for name in subjects)
        and [entry["n"] for entry in entries] == shards["n"].tolist()
        and plain["n"] == len(subject) > 0
        and shards["n"].min() > 0
        and 0 <= subject.min() <= subject.max() < len(subjects)
    )
    if not whole:
        raise ValueError
    return index


def _is_digest(text: object) -> bool:
    return isinstance(text, str) and re.fullmatch("[0-9a-f]{64}", text) is not None
