"""A run: cases to shards.

    lock -> find cases -> prepare each (read, fill its lesions) -> run.json -> shards, by workers -> index.json

Pair k belongs to case k mod n and is drawn from (seed, case, k), so the bytes are the same whatever the workers. A
run that stopped goes on when it is called again: every shard without a valid record is made, from cases prepared anew
if need be; the other cases are only hashed.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from synthlong.dataset.assets import asset_hashes, synthesis_of
from synthlong.dataset.cases import CaseTask, case_folder, prepare_cases
from synthlong.dataset.index import (
    Index,
    found_files,
    index_part,
    planned_shards,
    read_sidecar,
    recorded_samples,
    write_index,
)
from synthlong.dataset.making import ShardTask, make_shard
from synthlong.dataset.plan import adopt_plan, check_folder, check_space, make_plan, read_plan, shard_samples
from synthlong.dataset.reader import ShardReader
from synthlong.dataset.shards import ShardDataset
from synthlong.dataset.writer import shard_path
from synthlong.environment import environment
from synthlong.errors import ConfigError, InputError, OutputError
from synthlong.lock import writer_lock
from synthlong.manifest import find_cases
from synthlong.networks import settled
from synthlong.plain import canonical_json
from synthlong.pool import LocalPool, Lost, Pool, processors
from synthlong.progress import Progress
from synthlong.publishing import is_leftover, publish
from synthlong.synthesis import SynthesisConfig

__all__ = ["Outcome", "generate"]

_MB_PER_PAIR = {"blosc-lz4": 0.75, "none": 2.1}
_MB_PER_CASE = 140


@dataclass(frozen=True)
class Outcome:
    """What a run did.

    Args:
        pairs: Pairs in the run.
        shards: Shards in it.
        made: Pairs made by this call; the others were there.
        seconds: Wall time of making them, cases prepared before.
        failures: Message of each case that the run leaves out, by subject.
        lost: What became of each shard that could not be made, by number; without any, the run is complete.
    """

    pairs: int
    shards: int
    made: int
    seconds: float
    failures: dict[str, str] = field(default_factory=dict)
    lost: dict[int, str] = field(default_factory=dict)


def generate(
    source: str | Path,
    out: str | Path,
    *,
    pairs: int,
    seed: int,
    config: SynthesisConfig | None = None,
    shard_size: int = 64,
    workers: int = 0,
    scheduler: str | None = None,
    strict: bool = False,
    break_lock: bool = False,
    prefer: str | None = None,
    progress: Progress | None = None,
) -> Outcome:
    """Make a data set of synthetic pairs.

    Args:
        source: Manifest or folder of cases in MNI space.
        out: Folder to write; it must be new, empty, or hold the same run.
        pairs: Number of pairs.
        seed: Seed of every draw.
        config: How pairs are drawn.
        shard_size: Pairs in a shard.
        workers: Processes; 0: one per usable processor.
        scheduler: Work on a Dask cluster instead; see `cluster.DaskPool`.
        strict: Write nothing if a case cannot be used; else the pairs come from the others.
        break_lock: Take the folder's lock from a writer that is gone; see `lock.writer_lock`.
        prefer: "sform" or "qform" where a scan's two disagree.
        progress: Called as (stage, done, total).

    Raises:
        ConfigError: An option outside its range, or `out` holds another run.
        InputError: No usable case, or `strict` and one that is not.
        OutputError: `out` cannot be written, or another process writes there.
    """
    source, out = Path(source).absolute(), Path(out).absolute()  # workers on other machines start elsewhere
    for name, value, low in (("pairs", pairs, 1), ("seed", seed, 0), ("shard_size", shard_size, 1)):
        if value < low:
            raise ConfigError(f"{name} = {value}: must be {low} or more")
    workers = workers if workers > 0 else processors()
    config = settled((config or SynthesisConfig()).absolute())
    files, assets = find_cases(source, prefer=prefer), asset_hashes(config)
    options: dict[str, Any] = {"pairs": pairs, "seed": seed, "shard_size": shard_size}
    options |= {"config": config, "assets": assets, "prefer": prefer}
    shards = -(-pairs // shard_size)

    check_folder(out)
    if _complete(out):
        failures = _failures(out)
        hashed = [CaseTask(f, out, config, assets, sources=f.hashes()) for f in files if f.subject not in failures]
        adopt_plan(out, make_plan(source, out, cases=[p.record for p in hashed], **options))
        _clear(out)
        return Outcome(pairs, shards, 0, 0.0, failures)
    with _folder_of_run(out, break_lock=break_lock):
        sidecars: dict[int, dict[str, Any]] = {}
        spared: set[str] = set()
        if (out / "run.json").exists():  # refuse another run before hours are spent on its cases
            plan = make_plan(source, out, cases=read_plan(out)["cases"], **options)
            adopt_plan(out, plan)
            sidecars = _find_shards(out, plan, progress)
            spared = _spared(plan, sidecars)
        per_pair = _MB_PER_PAIR[config.compression] * (config.box / 64) ** 3
        left = max(0, pairs - shard_size * len(found_files(out, ".json")))
        work = out / "work"
        tasks = [
            CaseTask(f, case_folder(work, f.subject), config, assets, needed=f.subject not in spared) for f in files
        ]
        unprepared = sum(task.needed and not task.folder.exists() for task in tasks)
        check_space(out, need_mb=left * per_pair + unprepared * _MB_PER_CASE)
        synthesis_of(replace(config, device="cpu"))  # what cannot be read is said before the cases are
        with _pool(workers, scheduler, out, config, tasks=len(tasks) + shards) as pool:
            report = (lambda n: progress("cases", n, len(tasks))) if progress else None
            usable, failures = prepare_cases(pool, tasks, report)
            if failures and (strict or not usable):
                problem = f"{len(failures)} of {len(files)} cases cannot be used ({next(iter(failures.values()))})"
                way = "leave --strict out to go on without" if usable else "see `synthlong check`"
                raise InputError(source, problem, way)
            plan = make_plan(source, out, cases=[p.record for p in usable], **options)
            adopt_plan(out, plan)
            started = time.monotonic()
            made, lost = _make_shards(pool, out, plan, config, sidecars, progress)
        seconds = time.monotonic() - started
        if failures:
            publish(out / "failures.json", canonical_json({"failed": failures}).encode())
        if not lost:
            write_index(out, plan["run_id"], [sidecars[number] for number in range(shards)])
            shutil.rmtree(out / "work", ignore_errors=True)
    return Outcome(pairs, shards, made, seconds, failures, lost)


def _complete(out: Path) -> bool:
    """Whether the folder holds a whole run: its own index, and shards of the sizes that it says."""
    try:
        ShardDataset(out)
        return Index.read(out).run_id == read_plan(out)["run_id"]
    except InputError:
        return False


def _failures(out: Path) -> dict[str, str]:
    """Return the cases that a complete run has left out, and why."""
    try:
        return dict(json.loads((out / "failures.json").read_bytes())["failed"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _clear(out: Path) -> None:
    """Remove the prepared cases of a complete run, if the call that completed it was killed before it could."""
    if (out / "work").exists():
        with suppress(OutputError), writer_lock(out):
            shutil.rmtree(out / "work", ignore_errors=True)


@contextmanager
def _folder_of_run(out: Path, *, break_lock: bool) -> Iterator[None]:
    """Hold a run's folder, made if need be; nothing half-written is in it before and after.

    Where a bad input ends the run before it has a plan, all that was made is removed. After anything else, what is
    prepared stays, and is used by the next call.
    """
    fresh = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(out, f"cannot be made ({error.strerror})", "choose a folder you may write to") from error
    try:
        with writer_lock(out, break_lock=break_lock):
            _sweep(out)
            try:
                yield
            except (ConfigError, InputError):
                if not (out / "run.json").exists():
                    shutil.rmtree(out / "work", ignore_errors=True)
                raise
            finally:
                _sweep(out)
    finally:
        if fresh and not any(out.iterdir()):
            out.rmdir()


def _sweep(out: Path) -> None:
    """Remove what writers that were killed have left; only while the folder is locked."""
    for folder in (out, out / "shards"):
        for file in folder.glob("*"):
            if is_leftover(file.name):
                file.unlink(missing_ok=True)
    for unfinished in (out / "work").glob("*.unfinished"):
        shutil.rmtree(unfinished, ignore_errors=True)


def _pool(workers: int, scheduler: str | None, out: Path, config: SynthesisConfig, *, tasks: int) -> Pool:
    if scheduler is None:
        return LocalPool(min(workers, tasks), tasks=tasks)
    from synthlong.dataset.cluster import DaskPool

    return DaskPool(scheduler, folder=out, environment=environment(config.device))


def _find_shards(out: Path, plan: dict[str, Any], progress: Progress | None) -> dict[int, dict[str, Any]]:
    """Return what the index needs of each shard that is there."""
    sidecars, numbers = {}, range(len(planned_shards(plan)))
    with ThreadPoolExecutor(processors()) as readers:
        for n, sidecar in enumerate(readers.map(partial(_done, out, plan), numbers)):
            if sidecar:
                sidecars[n] = sidecar
            if progress and n % 16 == 0:
                progress("shards, those that are there", n, len(numbers))
    return sidecars


def _spared(plan: dict[str, Any], sidecars: dict[int, dict[str, Any]]) -> set[str]:
    """Return the run's cases of which no pair is missing."""
    subjects = [case["subject"] for case in plan["cases"]]
    missing = (indices for number, indices in enumerate(planned_shards(plan)) if number not in sidecars)
    return set(subjects) - {subjects[k % len(subjects)] for indices in missing for k in indices}


def _make_shards(
    pool: Pool,
    out: Path,
    plan: dict[str, Any],
    config: SynthesisConfig,
    sidecars: dict[int, dict[str, Any]],
    progress: Progress | None,
) -> tuple[int, dict[int, str]]:
    """Make every shard that has no sidecar, and add it; return how many pairs were made, and what was lost."""
    pairs, numbers = plan["pairs"], range(len(planned_shards(plan)))
    there = sum(sidecar["n"] for sidecar in sidecars.values())
    todo = [ShardTask(out, plan["run_id"], n, config) for n in numbers if n not in sidecars]
    report = (lambda n: progress("pairs", there + n, pairs)) if progress else None
    lost = {}
    for result in pool.run(make_shard, todo, report):
        if isinstance(result, Lost):
            number = result.task.number
            after = f", the last time after {result.counted} pairs" if result.counted else ""
            lost[number] = f"its worker died each time{after} ({result.problem})"
        else:
            number, sidecars[number] = result
    return sum(sidecar["n"] for sidecar in sidecars.values()) - there, lost


def _done(out: Path, plan: dict[str, Any], number: int) -> dict[str, Any] | None:
    """Return what the index needs of a shard that is there, whole, unchanged, and of this run."""
    path = shard_path(out, number)
    try:
        sidecar = read_sidecar(path.with_suffix(".json"))
        if recorded_samples(sidecar) != shard_samples(plan, number):
            return None
        with closing(ShardReader(path, sha256=bytes.fromhex(sidecar["sha256"]), sums=False)) as shard:
            return index_part(sidecar) if shard.run_id() == plan["run_id"] else None
    except (OSError, InputError):
        return None
