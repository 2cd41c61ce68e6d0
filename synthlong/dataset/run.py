"""A run: cases to shards.

    find cases -> prepare each (read, fill its lesions) -> run.json -> shards, by several processes -> index.json

Pair k belongs to case k mod n and is drawn from (seed, case, k), so the bytes are the same whatever the number of
workers. A run that stopped goes on when it is called again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import synthlong
from synthlong.case import Case
from synthlong.dataset.plan import adopt_plan, asset_hashes, make_folder, make_plan, read_plan, shard_config
from synthlong.dataset.pool import count, job, stop_if_told, worker_pool
from synthlong.dataset.shards import Sample, canonical_json, publish, shard_path, write_index, write_shard
from synthlong.dataset.store import open_case, store_case, stored_stamp
from synthlong.errors import ConfigError, InputError, InputWarning, OutputError, SynthlongError
from synthlong.inpainting import Inpainter, heal
from synthlong.lesions import LesionBank, read_bank
from synthlong.manifest import CaseFiles, find_cases
from synthlong.networks import check_device, default_precision
from synthlong.painting import LesionPainter
from synthlong.pair import Painter, Pair, painter_of, render
from synthlong.recipe import draw_recipe, rng_of
from synthlong.synthesis import SynthesisConfig

__all__ = ["Outcome", "generate", "synthesis_of"]

_MB_PER_PAIR = {"blosc-lz4": 0.75, "none": 2.1}
_MB_PER_CASE = 140
_MOST_OPEN = 16  # a case holds a dozen file descriptors while it is open, and opening one takes milliseconds

Progress = Callable[[str, int, int], None]
"""Called as (stage, done, total)."""


@dataclass(frozen=True)
class Outcome:
    """What a run did.

    Args:
        pairs: Pairs in the finished run.
        shards: Shards in it.
        made: Pairs made by this call; the others were there.
        seconds: Wall time of making them, cases prepared before.
        failures: Message of each case that was left out, by subject.
    """

    pairs: int
    shards: int
    made: int
    seconds: float
    failures: dict[str, str] = field(default_factory=dict)


def generate(
    source: str | Path,
    out: str | Path,
    *,
    pairs: int,
    seed: int,
    config: SynthesisConfig | None = None,
    shard_size: int = 64,
    workers: int = 0,
    strict: bool = False,
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
        strict: Write nothing if a case cannot be used; else the pairs come from the others.
        prefer: "sform" or "qform" where a scan's two disagree.
        progress: Called as (stage, done, total).

    Raises:
        ConfigError: An option outside its range, or `out` holds another run.
        InputError: No usable case, or `strict` and one that is not.
        OutputError: `out` cannot be written.
    """
    source, out = Path(source), Path(out)
    for name, value, low in (("pairs", pairs, 1), ("seed", seed, 0), ("shard_size", shard_size, 1)):
        if value < low:
            raise ConfigError(f"{name} = {value}: must be {low} or more")
    workers = workers if workers > 0 else _processors()
    config = config or SynthesisConfig()
    check_device(config.device)
    if config.precision == "auto":
        config = replace(config, precision=default_precision(config.device))
    files, assets = find_cases(source), asset_hashes(config)
    options: dict[str, Any] = {"pairs": pairs, "seed": seed, "shard_size": shard_size}
    options |= {"config": config, "assets": assets, "prefer": prefer}

    if (out / "index.json").exists():
        known = {case["subject"] for case in read_plan(out)["cases"]}
        hashed = [_case_record(f, f.hashes()) for f in files if f.subject in known]
        adopt_plan(out, make_plan(source, out, cases=hashed, **options))
        return Outcome(pairs, -(-pairs // shard_size), 0, 0.0)

    fresh = not out.exists()
    per_pair = _MB_PER_PAIR[config.compression] * (config.box / 64) ** 3
    make_folder(out, need_mb=pairs * per_pair + len(files) * _MB_PER_CASE)
    try:
        usable, failures = _prepare(files, out, config, assets, workers, prefer, progress)
        if failures and (strict or not usable):
            problem = f"{len(failures)} of {len(files)} cases cannot be used ({next(iter(failures.values()))})"
            way = "leave --strict out to go on without" if usable else "see `synthlong check`"
            raise InputError(source, problem, way)
        records = [_case_record(f, sources) for f, sources in usable]
        plan = make_plan(source, out, cases=records, **options)
        adopt_plan(out, plan)
    except BaseException:
        if not (out / "run.json").exists():
            shutil.rmtree(out if fresh else out / "work", ignore_errors=True)
        raise
    started = time.monotonic()
    sidecars, there = _make_shards(out, plan, usable, config, workers, progress)
    seconds = time.monotonic() - started
    if failures:
        publish(out / "failures.json", canonical_json({"failed": failures}).encode())
    write_index(out, plan["run_id"], sidecars)
    shutil.rmtree(out / "work", ignore_errors=True)
    return Outcome(pairs, len(sidecars), pairs - there, seconds, failures)


def _processors() -> int:
    """Return the number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def synthesis_of(config: SynthesisConfig) -> tuple[Inpainter, Painter, LesionBank]:
    """Return the inpainter, the painter and the lesion bank that a config names."""

    def path(name: str | None) -> Path | None:
        return Path(name) if name else None

    common: dict[str, Any] = {"precision": config.precision, "device": config.device}
    network = config.painter == "network"
    painter = LesionPainter.read(path(config.generator), **common) if network else painter_of(config.painter)
    return Inpainter.read(path(config.inpainter), **common), painter, read_bank(path(config.lesion_bank))


def _case_record(files: CaseFiles, sources: dict[str, str]) -> dict[str, Any]:
    return {"subject": files.subject, "patient": files.patient, "sources": sources}


def _case_folder(out: Path, subject: str) -> Path:
    return out / "work" / f"case-{subject}"


# Preparing cases


@dataclass(frozen=True)
class _Preparation:
    """What a worker needs to prepare one case, and what it found."""

    files: CaseFiles
    folder: Path
    config: SynthesisConfig
    assets: dict[str, str]
    prefer: str | None
    sources: dict[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    failure: str | None = None


def _prepare(
    files: list[CaseFiles],
    out: Path,
    config: SynthesisConfig,
    assets: dict[str, str],
    workers: int,
    prefer: str | None,
    progress: Progress | None,
) -> tuple[list[tuple[CaseFiles, dict[str, str]]], dict[str, str]]:
    """Read every case and fill its lesions, in parallel; return the usable ones and what is wrong with the others."""
    tasks = [_Preparation(f, _case_folder(out, f.subject), config, assets, prefer) for f in files]
    report = (lambda n: progress("cases", n, len(files))) if progress else None
    with worker_pool(min(workers, len(tasks))) as pool:
        done = sorted(pool.run(_prepare_case, tasks, report), key=lambda p: p.files.subject)
    for text in (text for p in done for text in p.warnings):
        warnings.warn(text, InputWarning, stacklevel=3)
    usable = [(p.files, p.sources) for p in done if p.failure is None]
    return usable, {p.files.subject: p.failure for p in done if p.failure is not None}


def _prepare_case(task: _Preparation) -> _Preparation:
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", InputWarning)
            case = task.files.read(prefer=task.prefer)
        stamp = {
            "sources": case.sources,
            "assets": task.assets,
            "config": task.config.as_dict(),
            "version": synthlong.__version__,
        }
        if stored_stamp(task.folder) != stamp:
            inpainter, _, _ = _synthesis(task.config)
            store_case(task.folder, heal(case, inpainter), task.config, stamp=stamp)
    except OutputError:
        raise
    except SynthlongError as error:
        return replace(task, failure=str(error))
    except OSError as error:
        way = "free some space, then run the same command again"
        raise OutputError(task.folder, f"cannot be written ({error.strerror})", way) from error
    finally:
        count()
    said = tuple(str(w.message) for w in caught if issubclass(w.category, InputWarning))
    return replace(task, sources=case.sources, warnings=said)


# Making shards


@dataclass(frozen=True)
class _Job:
    """What every worker needs to make shards; `cases` are (folder, patient)."""

    out: Path
    cases: list[tuple[Path, str]]
    pairs: int
    seed: int
    shard_size: int
    config: SynthesisConfig
    config_json: str
    versions_json: str


def _make_shards(
    out: Path,
    plan: dict[str, Any],
    usable: list[tuple[CaseFiles, dict[str, str]]],
    config: SynthesisConfig,
    workers: int,
    progress: Progress | None,
) -> tuple[list[dict[str, Any]], int]:
    """Make every shard that is not there; return all sidecars and how many pairs were there."""
    pairs, shard_size = plan["pairs"], plan["shard_size"]
    numbers = range(-(-pairs // shard_size))
    sidecars = {n: sidecar for n in numbers if (sidecar := _done(out, n))}
    there = sum(sidecar["n"] for sidecar in sidecars.values())
    todo = [n for n in numbers if n not in sidecars]
    if todo:
        work = _Job(
            out=out,
            cases=[(_case_folder(out, f.subject), f.patient) for f, _ in usable],
            pairs=pairs,
            seed=plan["seed"],
            shard_size=shard_size,
            config=config,
            config_json=canonical_json(shard_config(plan)),
            versions_json=canonical_json(plan["versions"]),
        )
        report = (lambda n: progress("pairs", there + n, pairs)) if progress else None
        with worker_pool(min(workers, len(todo)), work) as pool:
            sidecars |= dict(pool.run(_make_shard, todo, report))
    return [sidecars[n] for n in numbers], there


def _done(out: Path, number: int) -> dict[str, Any] | None:
    """Return the sidecar of a shard that is there, whole and unchanged."""
    path = shard_path(out, number)
    try:
        sidecar = json.loads(path.with_suffix(".json").read_bytes())
        whole = hashlib.sha256(path.read_bytes()).hexdigest() == sidecar["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return sidecar if whole else None


def _make_shard(number: int) -> tuple[int, dict[str, Any]]:
    work: _Job = job()
    _, painter, bank = _synthesis(work.config)
    first = number * work.shard_size
    samples = []
    for k in range(first, min(first + work.shard_size, work.pairs)):
        stop_if_told()
        folder, patient = work.cases[k % len(work.cases)]
        case = _opened(folder, work.config)
        recipe = draw_recipe(case, work.config, rng_of(work.seed, case.id, k))
        samples.append(_sample(render(case, recipe, painter=painter, bank=bank), patient))
        count()
    sidecar = write_shard(
        work.out,
        number,
        samples,
        first_index=first,
        config_json=work.config_json,
        versions_json=work.versions_json,
        compression=work.config.compression,
    )
    return number, sidecar


def _sample(pair: Pair, patient: str) -> Sample:
    return Sample(
        baseline=pair.baseline,
        followup=pair.followup,
        new_lesions=pair.new_lesions,
        evolution=pair.evolution,
        lesions_baseline=pair.lesions_baseline,
        lesions_followup=pair.lesions_followup,
        recipe=pair.recipe.to_json(),
        subject=patient,
    )


@lru_cache(maxsize=_MOST_OPEN)
def _opened(folder: Path, config: SynthesisConfig) -> Case:
    return open_case(folder, config)


@lru_cache(maxsize=1)
def _synthesis(config: SynthesisConfig) -> tuple[Inpainter, Painter, LesionBank]:
    return synthesis_of(config)
