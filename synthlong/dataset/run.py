"""A run: cases to shards.

    find cases -> prepare each (read, fill its lesions) -> run.json -> shards, by a pool of processes -> index.json

What the run makes follows from sources, config and seed alone: pair k belongs to case k mod n and is drawn from
(seed, case, k), so the bytes are the same whatever the number of workers. A run that stopped goes on when it is
called again.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import synthlong
from synthlong.atlas import prior_path
from synthlong.case import Case
from synthlong.dataset.shards import Sample, canonical_json, publish, shard_path, write_index, write_shard
from synthlong.dataset.store import open_case, store_case, stored_stamp
from synthlong.errors import ConfigError, InputError, OutputError, SynthlongError
from synthlong.inpainting import Inpainter, heal
from synthlong.lesions import LesionBank, read_bank
from synthlong.manifest import CaseFiles, find_cases
from synthlong.networks import default_precision
from synthlong.painting import LesionPainter
from synthlong.pair import Pair, render
from synthlong.recipe import SynthesisConfig, draw_recipe, rng_of

__all__ = [
    "BUNDLED",
    "Outcome",
    "asset_hashes",
    "bundled_cases",
    "generate",
    "read_run",
    "sample_of",
    "synthesis_of",
]

SCHEMA = "synthlong-run/1"
BUNDLED = "bundled"
_MB_PER_PAIR = {"blosc-lz4": 0.75, "none": 2.1}

Progress = Callable[[str, int, int], None]
"""Called as (stage, done, total)."""


@dataclass(frozen=True)
class Outcome:
    """What a run did.

    Args:
        pairs: Pairs in the finished run.
        shards: Shards in it.
        made: Pairs made by this call; the others were there.
        seconds: Wall time of making them.
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
        out: Folder to write; it must be new, empty, or hold the same run unfinished.
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
        InputError: No usable case.
        OutputError: `out` cannot be written.
    """
    out = Path(out)
    config = _resolved(config or SynthesisConfig())
    for name, value, low in (("pairs", pairs, 1), ("seed", seed, 0), ("shard_size", shard_size, 1), ("workers", workers, 0)):
        if value < low:
            raise ConfigError(f"{name} = {value}: must be {low} or more")
    workers = workers or len(os.sched_getaffinity(0))
    files = find_cases(source)
    assets = asset_hashes(config)
    if out.exists() and not out.is_dir():
        raise OutputError(out, "is not a folder", "name a folder for the run")
    fresh = not out.exists()
    _check_folder(out)
    _make_folder(out, need_mb=pairs * _MB_PER_PAIR[config.compression] * (config.box / 64) ** 3 + 90 * len(files))
    try:
        prepared, failures = _prepare(files, out, config, assets, workers, prefer, progress)
        if failures and (strict or not prepared):
            first = next(iter(failures.values()))
            problem = f"{len(failures)} of {len(files)} cases cannot be used (first: {first})"
            raise InputError(source, problem, "see `synthlong check`" + (", or leave --strict out" if prepared else ""))
        plan = _plan(source, out, prepared, pairs, seed, config, shard_size, assets)
        _adopt(out, plan)
    except BaseException:
        if fresh and not (out / "run.json").exists():
            shutil.rmtree(out, ignore_errors=True)
        raise
    numbers = range(-(-pairs // shard_size))
    sidecars = {n: s for n in numbers if (s := _done(out, n)) is not None}
    there = sum(s["n"] for s in sidecars.values())
    started = time.monotonic()
    todo = [n for n in numbers if n not in sidecars]
    patients = [p.patient for p in prepared]
    folders = [str(_case_folder(out, p.subject)) for p in prepared]
    if todo and not (out / "index.json").exists():
        job = _Job(str(out), folders, patients, pairs, seed, config, shard_size, canonical_json(_shard_config(plan)), canonical_json(plan["versions"]))
        report = (lambda n: progress("pairs", there + n, pairs)) if progress else None
        with _pool(min(workers, len(todo)), job) as pool:
            for sidecar_number, sidecar in pool.run(_make_shard, todo, report):
                sidecars[sidecar_number] = sidecar
    write_index(out, plan["run_id"], [sidecars[n] for n in numbers])
    if failures:
        publish(out / "failures.json", canonical_json({"failed": failures}).encode())
    shutil.rmtree(out / "work", ignore_errors=True)
    return Outcome(pairs, len(numbers), pairs - there, time.monotonic() - started, failures)


def _resolved(config: SynthesisConfig) -> SynthesisConfig:
    """Return the config with "auto" replaced by what this machine computes natively."""
    if config.precision != "auto":
        return config
    return replace(config, precision=default_precision(config.device))  # type: ignore[arg-type]


def read_run(out: Path) -> dict[str, Any]:
    """Return `run.json`.

    Raises:
        InputError: There is none, or it is damaged.
    """
    try:
        plan = json.loads((out / "run.json").read_bytes())
        if plan["run_id"] != _run_id(plan) or plan["schema"] != SCHEMA:
            raise ValueError
    except FileNotFoundError:
        raise InputError(out, "no run.json in it", "give a folder that `synthlong generate` wrote") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(out / "run.json", "is damaged", "restore it, or generate the run anew") from error
    return plan


def synthesis_of(config: SynthesisConfig) -> tuple[Inpainter, LesionPainter, LesionBank]:
    """Return the networks and the lesion bank that a config names."""

    def path(name: str | None) -> Path | None:
        return Path(name) if name else None

    common: dict[str, Any] = {"precision": config.precision, "device": config.device}
    return (
        Inpainter.read(path(config.inpainter), **common),
        LesionPainter.read(path(config.generator), **common),
        read_bank(path(config.lesion_bank)),
    )


def _shard_config(plan: dict[str, Any]) -> dict[str, Any]:
    """Return what each shard's attribute `config` holds: how its pairs were drawn, no path in it."""
    return {"synthesis": plan["config"], "assets": plan["assets"], "seed": plan["seed"], "run_id": plan["run_id"]}


def sample_of(pair: Pair, patient: str) -> Sample:
    """Return a pair as a shard stores it."""
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


# What the run is


def asset_hashes(config: SynthesisConfig) -> dict[str, str]:
    """Return the SHA-256 of prior, bank and weights."""
    paths = {
        "prior": Path(config.prior) if config.prior else prior_path(),
        "lesion_bank": Path(config.lesion_bank) if config.lesion_bank else LesionBank.default_path(),
        "inpainter": Path(config.inpainter) if config.inpainter else Inpainter.default_path(),
        "generator": Path(config.generator) if config.generator else LesionPainter.default_path(),
    }
    sums = {}
    for name, path in paths.items():
        try:
            sums[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        except OSError as error:
            raise InputError(path, f"{name} cannot be read ({error.strerror})", f"correct '{name}' in the config") from error
    return sums


def _plan(
    source: str | Path,
    out: Path,
    prepared: list[_Prepared],
    pairs: int,
    seed: int,
    config: SynthesisConfig,
    shard_size: int,
    assets: dict[str, str],
) -> dict[str, Any]:
    plain = config.as_dict() | {name: None for name in assets}  # their hashes stand under "assets"
    plan: dict[str, Any] = {
        "schema": SCHEMA,
        "seed": seed,
        "pairs": pairs,
        "shard_size": shard_size,
        "config": plain,
        "config_sha256": hashlib.sha256(canonical_json(plain).encode()).hexdigest(),
        "assets": assets,
        "cases": [{"subject": p.subject, "patient": p.patient, "sources": p.sources} for p in prepared],
        "versions": _versions(),
        "machine": {"cpu": torch.backends.cpu.get_cpu_capability(), "device": config.device},
    }
    plan["run_id"] = _run_id(plan)
    plan["source"] = _relative(Path(source), out)
    return plan


def _run_id(plan: dict[str, Any]) -> str:
    decisive = {k: v for k, v in plan.items() if k not in ("run_id", "source")}
    return hashlib.sha256(canonical_json(decisive).encode()).hexdigest()[:16]


def _versions() -> dict[str, str]:
    libraries = ("torch", "numpy", "scipy", "numba", "h5py", "hdf5plugin")
    return {"synthlong": synthlong.__version__, **{name: version(name) for name in libraries}}


def _relative(source: Path, out: Path) -> str | None:
    """Return where the cases lie, seen from `out`; None where that would climb far and tell of the machine."""
    if source.resolve() == bundled_cases().resolve():
        return BUNDLED
    path = os.path.relpath(source.resolve(), out.resolve())
    return path if path.count("..") <= 2 and not os.path.isabs(path) else None


def bundled_cases() -> Path:
    """Return the manifest of the cases that come with the package."""
    return Path(synthlong.__file__).parent / "assets" / "cases" / "cases.csv"


def _check_folder(out: Path) -> None:
    if out.exists() and not (out / "run.json").exists():
        foreign = [p.name for p in out.iterdir() if p.name != "work"]
        if foreign:
            problem = f"the folder is not empty and holds no run (first: {ascii(min(foreign))})"
            raise ConfigError(f"{out.name}: {problem}; name a new or empty folder")


def _adopt(out: Path, plan: dict[str, Any]) -> None:
    """Write run.json, or check that the folder's run is this one."""
    if not (out / "run.json").exists():
        publish(out / "run.json", canonical_json(plan).encode())
        return
    old = read_run(out)
    if old["run_id"] == plan["run_id"]:
        return
    changed = [
        f"{key}: {_shown(before)} -> {_shown(after)}"
        for key in sorted({*_flat(old), *_flat(plan)} - {"run_id", "source", "config_sha256"})
        if (before := _flat(old).get(key)) != (after := _flat(plan).get(key))
    ]
    raise ConfigError(f"{out.name}: holds another run ({'; '.join(changed[:6])}); use another folder")


def _flat(plan: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in plan.items():
        if key == "cases":
            value = {c["subject"]: c["sources"] for c in value}
        if isinstance(value, dict):
            result |= _flat(value, f"{prefix}{key}.")
        else:
            result[prefix + key] = value
    return result


def _shown(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 24 else text[:12] + "..."


def _make_folder(out: Path, *, need_mb: float) -> None:
    try:
        (out / "work").mkdir(parents=True, exist_ok=True)
        probe = out / "work" / ".probe"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise OutputError(out, f"cannot be written ({error.strerror})", "choose a folder you may write to") from error
    free_mb = shutil.disk_usage(out).free / 1e6
    if free_mb < need_mb:
        shutil.rmtree(out / "work", ignore_errors=True)
        problem = f"too little space: the run needs about {need_mb:.0f} MB, {free_mb:.0f} MB are free"
        raise OutputError(out, problem, "free some, or choose another disk")


def _done(out: Path, number: int) -> dict[str, Any] | None:
    """Return the sidecar of a shard that is there, whole and unchanged."""
    path = shard_path(out, number)
    try:
        sidecar = json.loads(path.with_suffix(".json").read_bytes())
        whole = hashlib.sha256(path.read_bytes()).hexdigest() == sidecar["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return sidecar if whole else None


# Preparing cases


@dataclass(frozen=True)
class _Prepared:
    subject: str
    patient: str
    sources: dict[str, str]


def _case_folder(out: Path, subject: str) -> Path:
    return out / "work" / f"case-{subject}"


def _prepare(
    files: list[CaseFiles],
    out: Path,
    config: SynthesisConfig,
    assets: dict[str, str],
    workers: int,
    prefer: str | None,
    progress: Progress | None,
) -> tuple[list[_Prepared], dict[str, str]]:
    """Read every case and fill its lesions, in parallel; return the usable ones and what is wrong with the others."""
    tasks = [(f, str(_case_folder(out, f.subject)), config, assets, prefer) for f in files]
    results: dict[int, _Prepared | str] = {}
    report = (lambda n: progress("cases", n, len(files))) if progress else None
    with _pool(min(workers, len(tasks)), None) as pool:
        for number, result in pool.run(_prepare_case, list(enumerate(tasks)), report):
            results[number] = result
    ordered = [results[n] for n in range(len(files))]
    good = [r for r in ordered if isinstance(r, _Prepared)]
    return good, {f.subject: r for f, r in zip(files, ordered, strict=True) if isinstance(r, str)}


def _prepare_case(task: tuple[int, tuple]) -> tuple[int, _Prepared | str]:
    number, (files, folder, config, assets, prefer) = task
    try:
        case = files.read(prefer=prefer)
        decisive = config.as_dict() | {"box": None}
        stamp = {"sources": case.sources, "assets": assets, "config": decisive, "version": synthlong.__version__}
        if stored_stamp(Path(folder)) != json.loads(json.dumps(stamp)):
            inpainter, _, _ = _synthesis(config)
            store_case(Path(folder), heal(case, inpainter), config, stamp=stamp)
    except SynthlongError as error:
        if isinstance(error, OutputError):
            raise
        return number, str(error)
    _count(1)
    return number, _Prepared(files.subject, files.patient, case.sources)


# Making shards


@dataclass(frozen=True)
class _Job:
    """What every worker of a run needs to know."""

    out: str
    folders: list[str]
    patients: list[str]
    pairs: int
    seed: int
    config: SynthesisConfig
    shard_size: int
    config_json: str
    versions_json: str


def _make_shard(number: int) -> tuple[int, dict[str, Any]]:
    job = _worker["job"]
    assert job is not None
    _, painter, bank = _synthesis(job.config)
    first = number * job.shard_size
    samples = []
    for k in range(first, min(first + job.shard_size, job.pairs)):
        if _worker["stop"].is_set():
            raise KeyboardInterrupt
        n = k % len(job.folders)
        case = _opened(job.folders[n], job.config)
        recipe = draw_recipe(case, job.config, rng_of(job.seed, case.id, k))
        samples.append(sample_of(render(case, recipe, painter=painter, bank=bank), job.patients[n]))
        _count(1)
    sidecar = write_shard(
        job.out,
        number,
        samples,
        first_index=first,
        config_json=job.config_json,
        versions_json=job.versions_json,
        compression=job.config.compression,
    )
    return number, sidecar


@lru_cache(maxsize=256)
def _opened(folder: str, config: SynthesisConfig) -> Case:
    return open_case(Path(folder), config)


@lru_cache(maxsize=1)
def _synthesis(config: SynthesisConfig) -> tuple[Inpainter, LesionPainter, LesionBank]:
    return synthesis_of(config)


# The pool

_worker: dict[str, Any] = {}


def _start_worker(job: _Job | None, counter: Any, stop: Any) -> None:
    """One torch thread: with two, the bits of a result change."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    _worker.update(job=job, counter=counter, stop=stop)


def _count(n: int) -> None:
    with _worker["counter"].get_lock():
        _worker["counter"].value += n


class _Pool:
    def __init__(self, executor: ProcessPoolExecutor, counter: Any) -> None:
        self.executor, self.counter = executor, counter

    def run(self, work: Callable, tasks: list[Any], report: Callable[[int], None] | None) -> Iterator[Any]:
        """Yield results as they come; report the workers' count meanwhile."""
        waiting: set[Future] = {self.executor.submit(work, task) for task in tasks}
        while waiting:
            done, waiting = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
            if report:
                report(self.counter.value)
            for future in done:
                try:
                    yield future.result()
                except BrokenProcessPool as error:
                    way = "run it again to go on, with fewer --workers if memory is short"
                    raise OutputError("worker", "a worker process was killed", way) from error


@contextmanager
def _pool(workers: int, job: _Job | None) -> Iterator[_Pool]:
    context = multiprocessing.get_context("spawn")
    counter, stop = context.Value("q", 0), context.Event()
    executor = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(job, counter, stop))
    try:
        yield _Pool(executor, counter)
    except BaseException:
        stop.set()
        raise
    finally:
        executor.shutdown(cancel_futures=True)
