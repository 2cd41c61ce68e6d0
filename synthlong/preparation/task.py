"""The task of preparing one subject: what lies there already, and whether it stays, is made again or cannot be."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from synthlong.errors import InputError, InputWarning, short
from synthlong.manifest import warn_of_twins
from synthlong.nifti import sidecar_of
from synthlong.plain import differences
from synthlong.preparation.config import PreparationConfig
from synthlong.preparation.derivatives import file_name, read_record, sha256_of
from synthlong.preparation.scans import Scan, some
from synthlong.preparation.stamp import Stamp, changes, stamp_of
from synthlong.preparation.subject import STEPS
from synthlong.preparation.tables import KEYS

__all__ = ["Task", "planned_of", "record_of"]


@dataclass(frozen=True)
class Task:
    """The task of preparing one subject, and what came of it.

    Args:
        scans: The visits, in the order of time.
        out: Where to write.
        config: How.
        prefer: "sform" or "qform" where a scan's two disagree.
        warnings: What was said meanwhile.
        failure: Why it cannot be prepared.
    """

    scans: tuple[Scan, ...]
    out: Path
    config: PreparationConfig
    prefer: str | None
    warnings: tuple[str, ...] = ()
    failure: str | None = None

    @property
    def subject(self) -> str:
        """Its id."""
        return self.scans[0].subject

    @property
    def steps(self) -> int:
        """How many steps a progress bar has."""
        return STEPS * len(self.scans)

    def flair(self, scan: Scan) -> Path:
        """Where the prepared FLAIR of a visit comes to lie."""
        return self.out / file_name(scan.id, "FLAIR.nii.gz", space=self.config.space)

    def record(self, scan: Scan) -> Path:
        """Where its record does."""
        return sidecar_of(self.flair(scan))


def planned_of(tasks: Sequence[Task]) -> tuple[list[Task], list[Task], list[Task]]:
    """Return which subjects are there, which are to be prepared, and which cannot be; warn of what is not plain."""
    there, todo, failed = [], [], []
    kept, again, others = [], [], []
    flairs: dict[str, str] = {}
    for task in tasks:
        stamp = stamp_of(task.scans, task.config, task.prefer)
        made = _made_of(task, stamp)
        if failure := _failure_of(task, stamp, made):
            failed.append(replace(task, failure=failure))
            continue
        flairs |= {scan.id: stamp["scans"][scan.id]["flair"] for scan in task.scans}
        if made and not made.changes and not made.missing:
            there.append(task)
            kept += made.edited
            others += [(scan.id, text) for scan in task.scans for text in made.versions]
        else:
            todo.append(task)
            again += [(scan.id, text) for scan in task.scans for text in (made.changes if made else ())]
    warn_of_twins((name, sha256) for name, sha256 in flairs.items() if sha256)
    _say(tasks, again, "differently", "are made again")
    _say(tasks, others, "by other versions", "are kept; delete them to have them made again")
    if kept:
        text = f"changed since prepared, and kept: {some(kept)}; delete what is to be made again"
        warnings.warn(f"{short(tasks[0].out)}: {text}", InputWarning, stacklevel=3)
    return there, todo, failed


def record_of(task: Task, scan: Scan) -> dict[str, Any]:
    """Return the record of a scan, empty if there is none that can be used."""
    with suppress(InputError):
        record = read_record(task.flair(scan))
        if record and record.keys() >= KEYS:
            return record
    return {}


@dataclass(frozen=True)
class _Made:
    """What an earlier call made of a subject.

    Args:
        changes: Which of what decides has changed since.
        versions: Which tools are.
        missing: Whether a file or record is not there.
        edited: Names of files that somebody changed since.
    """

    changes: list[str]
    versions: list[str]
    missing: bool
    edited: list[str]


def _made_of(task: Task, now: Stamp) -> _Made | None:
    """Return what lies there of a subject, None if nothing is recorded, or by another program."""
    records = [record for scan in task.scans if (record := record_of(task, scan))]
    try:
        files = {name: sha256 for record in records for name, sha256 in record["files"].items()}
        sums = {name: sha256_of(task.out / name) for name in files}
        made = _Made(
            [text for record in records for text in changes(record["stamp"], now, task.config)],
            [text for record in records for text in differences(record["stamp"]["versions"], now["versions"])],
            len(records) < len(task.scans) or "" in sums.values(),
            sorted(name for name in files if sums[name] not in ("", files[name])),
        )
    except (KeyError, TypeError, AttributeError):
        return None
    return made if records else None


def _failure_of(task: Task, stamp: Stamp, made: _Made | None) -> str | None:
    """Return why a subject cannot be prepared, as far as that is known before the work."""
    seen: dict[str, Scan] = {}
    for scan in task.scans:
        if scan.problem:
            return scan.problem
        same = seen.setdefault(stamp["scans"][scan.id]["flair"] or scan.id, scan)
        if same is not scan:
            problem = f"is the FLAIR of session '{same.session}', too"
            return str(InputError(scan.flair, problem, f"name that of session '{scan.session}'"))
    if made and made.edited and (made.changes or made.missing):
        why = "; ".join(dict.fromkeys(made.changes)) or "files are missing"
        problem = f"is to be made again ({why}), but was changed by hand"
        return str(InputError(task.out / made.edited[0], problem, "move it away, or delete it"))
    return None


def _say(tasks: Sequence[Task], found: list[tuple[str, str]], how: str, what: str) -> None:
    """Warn, in one line, of scans and what differs about them."""
    if found:
        ids, texts = (dict.fromkeys(part) for part in zip(*found, strict=True))
        text = f"{short(tasks[0].out)}: {len(ids)} scans were made {how} ({'; '.join(texts)}) and {what}"
        warnings.warn(text, InputWarning, stacklevel=4)
