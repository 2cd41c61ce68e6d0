"""Every byte of a run looked at again, or names and sizes only; all that is wrong is listed.

    run.json, index.json -> names and sizes -> each shard: SHA-256, layout, run, then sample by sample

A shard is held against `index.json` (of an unfinished run: against its sidecar), its samples, stored and decoded,
against its sidecar. Shards are read by several threads: reading, hashing and unpacking run outside Python's lock.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from synthlong.dataset.index import (
    Index,
    found_files,
    index_part,
    planned_shards,
    read_sidecar,
    recorded_samples,
    write_index,
)
from synthlong.dataset.plan import read_plan, shard_samples
from synthlong.dataset.reader import ShardReader
from synthlong.dataset.writer import shard_name
from synthlong.errors import InputError
from synthlong.progress import Progress
from synthlong.publishing import is_leftover

__all__ = ["Problem", "Report", "rebuild_index", "verify"]

_COPY = "copy it again or generate it anew"

T = TypeVar("T")


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: the file, seen from the run's folder, what is wrong with it, and the way out."""

    file: str
    problem: str
    way_out: str

    def __str__(self) -> str:
        return f"{self.file}: {self.problem}; {self.way_out}"


@dataclass(frozen=True)
class Report:
    """What was looked at and what is wrong.

    Args:
        shards: Shards without a problem.
        samples: Samples in them; unless the check was quick, each was decoded and hashed.
        bytes: Size of these shards.
        problems: All that is wrong.
        leftovers: Temporary files of a killed writer: harmless, no reader looks at them.
        seconds: Wall time.
    """

    shards: int
    samples: int
    bytes: int
    problems: list[Problem]
    leftovers: list[str]
    seconds: float


@dataclass(frozen=True)
class _Run:
    """What should be in a folder, and what is.

    Args:
        out: The folder.
        run_id: Of its run.
        indices: Sample indices of each shard.
        plan: What `run.json` holds, if that can be read.
        index: What to hold the shards against; None: their sidecars.
        complete: All shards should be there; else those with a sidecar.
        found: Size of each file in `shards/`, by its name seen from the folder.
    """

    out: Path
    run_id: str
    indices: list[range]
    plan: dict[str, Any] | None
    index: Index | None
    complete: bool
    found: dict[str, int]


@dataclass(frozen=True)
class _Shard:
    """What a shard has to be, as its sidecar and the index tell."""

    bytes: int
    sha256: str
    subjects: list[str]


def verify(out: str | Path, *, quick: bool = False, progress: Progress | None = None) -> Report:
    """Look for damage in a run; nothing is written.

    Args:
        out: Folder that `generate` wrote.
        quick: Names and sizes only.
        progress: Called as (stage, done, total).

    Raises:
        InputError: There is no such folder.
        OSError: It cannot be read.
    """
    out, started, problems = Path(out), time.monotonic(), list[Problem]()
    found = _listed(out)
    plan = _trying(read_plan, out, "run.json", problems)
    index = _trying(Index.read, out, "index.json", problems)
    if plan is not None:
        run_id, indices = plan["run_id"], planned_shards(plan)
    elif index is not None:
        run_id, indices = index.run_id, index.indices()
    else:
        return Report(0, 0, 0, problems, [], time.monotonic() - started)
    if index is not None and (index.run_id, index.indices()) != (run_id, indices):
        problems.append(Problem("index.json", "is not of the run in run.json", _COPY))
        index = None
    run = _Run(out, run_id, indices, plan, index, (out / "index.json").exists(), found)
    return _look(run, problems, quick=quick, progress=progress, started=started)


def rebuild_index(out: str | Path, *, progress: Progress | None = None) -> Report:
    """Verify a run without its index and, if nothing is wrong, write `index.json` from the sidecars.

    Args:
        out: Folder that `generate` wrote, with `run.json` and all shards.
        progress: Called as (stage, done, total).

    Raises:
        InputError: There is no such folder, or no sound `run.json` in it.
        OutputError: It cannot be written.
        OSError: It cannot be read.
    """
    out, started = Path(out), time.monotonic()
    found, plan = _listed(out), read_plan(Path(out))
    run = _Run(out, plan["run_id"], planned_shards(plan), plan, None, True, found)
    report = _look(run, [], quick=False, progress=progress, started=started)
    if not report.problems:
        write_index(out, run.run_id, [index_part(read_sidecar(out / _record(k))) for k in range(len(run.indices))])
    return report


def _look(run: _Run, problems: list[Problem], *, quick: bool, progress: Progress | None, started: float) -> Report:
    """Check every shard, whatever is found."""
    planned = range(len(run.indices))
    strange = sorted(run.found.keys() - {shard_name(k) for k in planned} - {_record(k) for k in planned})
    leftovers = [name for name in strange if is_leftover(name.rpartition("/")[2])]
    foreign = [name for name in strange if name.endswith((".h5", ".json"))]
    problems += [Problem(name, "is not of this run", "move it away") for name in foreign]
    numbers = [k for k in planned if run.complete or _record(k) in run.found]
    shards = samples = size = 0
    with _threads() as pool:
        check = partial(_check, run, quick=quick)
        results = map(check, numbers) if quick else pool.map(check, numbers)
        for done, (number, wrong) in enumerate(zip(numbers, results, strict=True), 1):
            problems += wrong
            if not wrong:
                shards, samples = shards + 1, samples + len(run.indices[number])
                size += run.found[shard_name(number)]
            if progress:
                progress("shards", done, len(numbers))
    return Report(shards, samples, size, problems, leftovers, time.monotonic() - started)


def _check(run: _Run, number: int, *, quick: bool) -> list[Problem]:
    """Return what is wrong with a shard and its sidecar."""
    file, record = shard_name(number), _record(number)
    problems = [Problem(name, "is missing", _COPY) for name in (file, record) if name not in run.found]
    expected = _indexed(run.index, number) if run.index is not None else None
    sidecar = None
    if record in run.found and not (quick and expected):
        sidecar = _trying(lambda out: read_sidecar(out / record), run.out, record, problems)
    if sidecar is not None:
        recorded = _Shard(sidecar["bytes"], sidecar["sha256"], [s["subject"] for s in sidecar["samples"]])
        if not _is_planned(run, number, sidecar):
            problems.append(Problem(record, "is of another shard or run", _COPY))
            sidecar = None
        elif expected not in (None, recorded):
            problems.append(Problem(record, "does not agree with index.json", _COPY))
        expected = expected or recorded
    if expected is None or file not in run.found:
        return problems
    if run.found[file] != expected.bytes:
        problem = f"has {run.found[file]} bytes, recorded are {expected.bytes}"
        return [*problems, Problem(file, problem, _COPY)]
    if quick:
        return problems
    try:
        with closing(ShardReader(run.out / file, sha256=bytes.fromhex(expected.sha256))) as shard:
            return problems + _check_inside(run, number, shard, sidecar)
    except InputError as error:
        where = _damaged(run.out / file, sidecar) if sidecar else ""
        return [*problems, Problem(file, error.problem + where, error.way_out)]


def _is_planned(run: _Run, number: int, sidecar: dict[str, Any]) -> bool:
    """Return whether a sidecar records the samples that the run is to have there."""
    recorded = recorded_samples(sidecar)
    if run.plan is None:
        return [index for index, _ in recorded] == list(run.indices[number])
    return recorded == shard_samples(run.plan, number)


def _check_inside(run: _Run, number: int, shard: ShardReader, sidecar: dict[str, Any] | None) -> list[Problem]:
    """Return what is wrong within a shard whose SHA-256 is right."""
    if shard.n != len(run.indices[number]):
        return [Problem(shard_name(number), f"has {shard.n} samples, not {len(run.indices[number])}", _COPY)]
    if (run_id := shard.run_id()) != run.run_id:
        return [Problem(shard_name(number), f"is of run {run_id}, not {run.run_id}", _COPY)]
    problems = []
    for position, record in enumerate(sidecar["samples"] if sidecar else ()):
        digest = hashlib.sha256()
        for volume in shard.volumes(position).values():
            digest.update(volume.data)
        digest.update(shard.recipe(position).encode())
        if digest.hexdigest() != record["sha256"] or shard.sums(position) != record["crc32c"]:
            problem = f"sample {position}: is not what the shard holds"
            problems.append(Problem(_record(number), problem, _COPY))
    return problems


def _damaged(path: Path, sidecar: dict[str, Any]) -> str:
    """Return, in words, which samples of a damaged shard are not what its sidecar says."""
    try:
        with closing(ShardReader(path)) as shard:
            wrong = [k for k, record in enumerate(sidecar["samples"]) if shard.sums(k) != record["crc32c"]]
    except (InputError, IndexError):
        return ""
    return f" (samples {', '.join(map(str, wrong))})" if wrong else " (no sample's voxels)"


def _indexed(index: Index, number: int) -> _Shard:
    _, n, first, size, sha256 = index.shards[number].item()
    return _Shard(size, sha256.hex(), [index.subjects[k] for k in index.subject[first : first + n]])


def _trying(read: Callable[[Path], T], out: Path, file: str, problems: list[Problem]) -> T | None:
    """Return what can be read of a file; what is wrong with it joins the problems."""
    try:
        return read(out)
    except InputError as error:
        problems.append(Problem(file, error.problem, error.way_out))
        return None


def _listed(out: Path) -> dict[str, int]:
    if not out.is_dir():
        raise InputError(out, "no such folder", "give the folder that `generate` wrote")
    os.listdir(out)  # a folder that cannot be read is no damage
    return {f"shards/{name}": size for name, size in found_files(out, "").items()}


def _record(number: int) -> str:
    return shard_name(number).removesuffix(".h5") + ".json"


@contextmanager
def _threads() -> Iterator[ThreadPoolExecutor]:
    """Yield a thread for each processor; after an interrupt only the shards under way are waited for."""
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
