"""A preparation: all scans of a manifest or BIDS folder, patients in parallel, each written whole or not at all.

OUT/sub-...                     the files of `derivatives`
OUT/prepared.csv, pairs.csv     those of `tables`
OUT/dataset_description.json
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import warnings
from collections.abc import Collection, Generator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import synthlong
from synthlong.errors import ConfigError, InputError, InputWarning, OutputError, SynthlongError, short
from synthlong.inpainting import Inpainter
from synthlong.lock import writer_lock
from synthlong.networks import one_thread, settled
from synthlong.plain import canonical_json
from synthlong.pool import LocalPool, Lost, Stopped, count, processors, stop_if_told
from synthlong.preparation.config import PreparationConfig
from synthlong.preparation.derivatives import FIGURES, description, read_record, sha256_of
from synthlong.preparation.memory import usable_memory_gb
from synthlong.preparation.scans import Scan, find_scans, some, visits_of
from synthlong.preparation.stamp import stamp_of, used_files
from synthlong.preparation.subject import prepare_subject
from synthlong.preparation.tables import Records, read_records, write_tables
from synthlong.preparation.task import Task, planned_of, record_of
from synthlong.preparation.tools import load_ants, load_hd_bet
from synthlong.progress import Progress
from synthlong.publishing import is_leftover, publish

__all__ = ["Outcome", "prepare"]

_UNFINISHED = ".unfinished-"
_OUTDATED = "of an earlier preparation, the last one failed"
_PLACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)
_GB_PER_WORKER, _GB_OF_OWN = 4.5, 1.0


@dataclass(frozen=True)
class Outcome:
    """What a preparation did.

    Args:
        prepared: Ids of the scans that were prepared now; in a dry run, of those that would be.
        there: Ids of those that were there already.
        flagged: What looks wrong, by id, of all scans.
        failures: Why a subject could not be prepared, by subject.
    """

    prepared: list[str] = field(default_factory=list)
    there: list[str] = field(default_factory=list)
    flagged: dict[str, list[str]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)


def prepare(
    source: str | Path | Sequence[Scan],
    out: str | Path,
    *,
    config: PreparationConfig | None = None,
    participants: Collection[str] = (),
    brain_mask: str | None = None,
    workers: int = 0,
    prefer: str | None = None,
    break_lock: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Outcome:
    """Prepare raw scans; what is there and was made of the same files in the same way stays, and what a person changed.

    Args:
        source: Manifest, BIDS folder, or the scans; see `find_scans`.
        out: Folder to write.
        config: How.
        participants: Only these subjects; of a manifest or BIDS folder.
        brain_mask: Where their brain masks lie; see `find_scans`.
        workers: Processes; 0: one per usable processor and 4.5 GB of memory, and one for a GPU.
        prefer: "sform" or "qform" where a scan's two disagree.
        break_lock: Take the folder's lock from a writer that is gone; see `lock.writer_lock`.
        dry_run: Write nothing, say what would be prepared.
        progress: Called as ("steps", done, total); a scan takes three: it is read, registered, written.

    Raises:
        ConfigError: An option outside its range; the extra `prepare` is not installed; `out` holds another recipe.
        InputError: No scan; no such weights.
        OutputError: `out` cannot be written, or another process writes there.
    """
    config = config or PreparationConfig()
    if isinstance(source, (str, Path)):
        scans = find_scans(source, participants=participants, brain_mask=brain_mask)
    else:
        scans = list(source)
    out = Path(out)
    tasks = [Task(tuple(visits), out, config, prefer) for _, visits in visits_of(scans)]
    _check(out, scans, config)
    visits = {task.subject: [scan.id for scan in task.scans] for task in tasks}
    made, todo, lost = planned_of(tasks)
    present = {task.subject for task in made}
    planned = [scan.id for task in todo for scan in task.scans]
    there = [scan.id for task in made for scan in task.scans]
    if dry_run:
        return Outcome(planned, there, failures={task.subject: str(task.failure) for task in lost})
    try:
        (out / FIGURES).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(out, f"cannot be made ({error.strerror})", "choose a folder you may write to") from error
    with writer_lock(out, break_lock=break_lock):
        _sweep(out)
        for task in made:
            _mark(task, outdated=False)
        for task in lost:
            _mark(task, outdated=True)
        done = lost.copy()

        def tables() -> tuple[Records, list[tuple[Scan, str]], list[str]]:
            """Write what lies there by now, and what failed; return the names that are no visits of their subjects."""
            found = read_records(out)
            records = {name: r for name, r in found.items() if name in visits.get(r["subject"], (name,))}
            failed = [(scan, task.failure) for task in done if task.failure is not None for scan in task.scans]
            write_tables(out, records, failed, subjects=present | {task.subject for task in done})
            return records, failed, [name for name in found if name not in records]

        try:
            with closing(_results(todo, workers or _processors(config), progress)) as results:
                for task in results:
                    done.append(task)
                    if task.failure is not None:
                        _mark(task, outdated=True)
        except BaseException:
            with suppress(Exception):  # why it ended says more than the tables
                tables()
            raise
        finally:
            _sweep(out)
        done.sort(key=lambda task: task.subject)
        for task in done:
            for text in task.warnings:
                warnings.warn(text, InputWarning, stacklevel=2)
        publish(out / "dataset_description.json", (json.dumps(description(), indent=1) + "\n").encode())
        records, failed, strays = tables()
    if strays:
        text = f"no visits of their subjects any more, and in no table: {some(strays)}; delete their files"
        warnings.warn(f"{short(out)}: {text}", InputWarning, stacklevel=2)
    failures = {task.subject: task.failure for task in done if task.failure is not None}
    prepared = [name for name in planned if name not in {scan.id for scan, _ in failed}]
    flagged = {name: records[name]["flags"] for name in (*there, *prepared) if records[name]["flags"]}
    return Outcome(prepared, there, flagged, failures)


def _check(out: Path, scans: Sequence[Scan], config: PreparationConfig) -> None:
    """Say what is missing or in the way before the first scan, not after."""
    settled(config)
    load_ants()
    if config.recipe == "kamraoui" and any(scan.brain is None or scan.t1 is not None for scan in scans):
        load_hd_bet()
    if config.fills:
        _inpainter(config)
    unread = {role for scan in scans for role in scan.files} - {
        role for scan in scans for role in used_files(scan.files, config)
    }
    if unread:
        text = f"recipe {config.recipe} does not use: {', '.join(sorted(unread))}"
        warnings.warn(text, InputWarning, stacklevel=3)
    other = "halfway" if config.recipe == "kamraoui" else "MNI152"
    if any(out.glob(f"sub-*_space-{other}_FLAIR.nii.gz")):
        raise ConfigError(f"{short(out)}: holds scans of the other recipe (space-{other}); name another folder")


def _processors(config: PreparationConfig) -> int:
    if config.device != "cpu":
        return 1
    memory_gb = usable_memory_gb()
    if memory_gb is None:
        return processors()
    return max(1, min(processors(), int((memory_gb - _GB_OF_OWN) / _GB_PER_WORKER)))


def _results(todo: Sequence[Task], workers: int, progress: Progress | None) -> Generator[Task]:
    """Yield the tasks with what came of them, as they are done."""
    total = sum(task.steps for task in todo)
    report = (lambda n: progress("steps", n, total)) if progress else None
    if todo:
        with LocalPool(max(1, min(workers, len(todo))), tasks=len(todo)) as pool:
            for result in pool.run(_prepare, todo, report):
                if isinstance(result, Lost):
                    problem = f"the process that prepared it was killed each time ({result.problem})"
                    result = replace(result.task, failure=f"{problem}; run it again with fewer --workers")
                yield result


def _sweep(out: Path) -> None:
    """Remove what processes that were killed have left; only while the folder is locked."""
    for folder in out.glob(f"{_UNFINISHED}*"):
        shutil.rmtree(folder, ignore_errors=True)
    for file in out.iterdir():
        if is_leftover(file.name):
            file.unlink(missing_ok=True)


def _mark(task: Task, *, outdated: bool) -> None:
    """Flag what lies there of a subject that could not be prepared since, or take that flag away."""
    for scan in task.scans:
        with suppress(InputError):
            record = read_record(task.flair(scan)) or {}
            flags = record.get("flags", [])
            if record and (_OUTDATED in flags) != outdated:
                flags = [*flags, _OUTDATED] if outdated else [flag for flag in flags if flag != _OUTDATED]
                publish(task.record(scan), canonical_json({**record, "flags": flags}).encode())


# In a worker


def _prepare(task: Task) -> Task:
    """Prepare one subject in a folder of its own, then move its files into place."""
    folder = task.out / f"{_UNFINISHED}{task.subject}-{os.getpid()}"
    named = ", ".join(scan.flair.name for scan in task.scans)
    where = short(task.scans[0].flair) if len(task.scans) == 1 else f"sub-{task.subject} ({named})"
    caught: list[warnings.WarningMessage] = []
    left = task.steps

    def step() -> None:
        nonlocal left
        left -= 1
        count()
        stop_if_told()

    try:
        (folder / FIGURES).mkdir(parents=True)
        stamp = stamp_of(task.scans, task.config, task.prefer)
        with warnings.catch_warnings(record=True) as caught, one_thread():
            warnings.simplefilter("always", InputWarning)
            records = prepare_subject(
                task.scans,
                folder,
                task.config,
                inpainter=_inpainter(task.config) if task.config.fills else None,
                prefer=task.prefer,
                report=step,
            )
        for scan, record in zip(task.scans, records, strict=True):
            names = [p.relative_to(folder).as_posix() for p in _files_of(folder, scan, task.config.space)]
            plain = {
                "scan": scan.id,
                "subject": scan.subject,
                "session": scan.session,
                "flair": scan.flair.name,
                "space": task.config.space,
                "visits": [visit.id for visit in task.scans],
                "SkullStripped": task.config.recipe == "kamraoui",
                "native": record.native,
                "figures": record.figures,
                "flags": record.flags,
                "files": {name: sha256_of(folder / name) for name in sorted(names)},
                "stamp": stamp,
                "synthlong": synthlong.__version__,
            }
            publish(folder / task.record(scan).name, canonical_json(plain).encode())
        stop_if_told()
        _move(task, folder)
    except (OutputError, Stopped):
        raise
    except SynthlongError as error:
        return replace(task, failure=str(error))
    except OSError as error:
        if error.errno in _PLACE:
            way = "free some space, or check the permissions, then run the same command again"
            place = Path(error.filename) if isinstance(error.filename, str) else task.out
            full = task.out if place.is_relative_to(task.out) else place
            raise OutputError(full, f"cannot be written ({error.strerror})", way) from error
        return replace(task, failure=f"{where}: {type(error).__name__} ({error.strerror}); is the installation whole?")
    except Exception as error:  # of the tools: whatever it is, the other subjects go on
        said = str(error).strip().splitlines()
        what = f"{type(error).__name__}{f' ({said[0][:200]})' if said else ''}"
        way = "look at the scan" if all(scan.brain for scan in task.scans) else "look at it, or fill column 'brain'"
        return replace(task, failure=f"{where}: {what}; {way}")
    finally:
        count(left)  # of one that failed
        shutil.rmtree(folder, ignore_errors=True)
    return replace(task, warnings=tuple(str(w.message) for w in caught if issubclass(w.category, InputWarning)))


def _files_of(folder: Path, scan: Scan, space: str) -> list[Path]:
    patterns = (f"sub-{scan.id}_space-{space}_*", f"sub-{scan.id}_from-FLAIR_*", f"{FIGURES}/sub-{scan.id}_desc-*")
    return [path for pattern in patterns for path in folder.glob(pattern)]


def _move(task: Task, folder: Path) -> None:
    """Replace a subject's files; its FLAIRs are removed first and written last, so that no half-written case is found.

    Records come before what they list: whatever ends this, they tell its files from a person's.
    """
    old = {name for scan in task.scans for name in record_of(task, scan).get("files", ())}
    new = [path.relative_to(folder) for scan in task.scans for path in _files_of(folder, scan, task.config.space)]
    records = [task.record(scan).name for scan in task.scans]
    for name in new:
        if name.name not in records and name.as_posix() not in old and (task.out / name).exists():
            raise InputError(task.out / name, "no preparation made it, but one is to write there", "move it away")
    flairs = [task.flair(scan).name for scan in task.scans]
    there = [path for scan in task.scans for path in _files_of(task.out, scan, task.config.space)]
    for path in sorted(there, key=lambda p: p.name not in flairs):
        if path.relative_to(task.out).as_posix() in old:
            path.unlink()
    for name in sorted(new, key=lambda n: (n.name not in records, n.name in flairs)):
        (folder / name).replace(task.out / name)


@lru_cache(maxsize=1)
def _inpainter(config: PreparationConfig) -> Inpainter:
    config = settled(config)
    return Inpainter.read(config.inpainter, precision=config.precision, device=config.device)
