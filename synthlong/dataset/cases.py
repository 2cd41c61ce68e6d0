"""The cases of a run: each read, its lesions filled, and stored for the workers.

A stored case carries a stamp of all that it depends on; it is made again only if that has changed.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from synthlong.dataset.assets import kept_synthesis
from synthlong.dataset.store import stamp_of, store_case, stored_stamp
from synthlong.errors import InputWarning, OutputError, SynthlongError
from synthlong.inpainting import heal
from synthlong.manifest import CaseFiles, warn_of_twins
from synthlong.pool import Lost, Pool, count
from synthlong.synthesis import SynthesisConfig

__all__ = [
    "CaseTask",
    "case_folder",
    "prepare_case",
    "prepare_cases",
]


@dataclass(frozen=True)
class CaseTask:
    """The task of preparing one case, and what came of it.

    Args:
        files: The case's files.
        folder: Where it is stored.
        config: Of the run.
        assets: Result of `asset_hashes`.
        needed: Whether pairs will be made of it; else its files are hashed, and no more.
        sources: SHA-256 of each file, by role; of a prepared case.
        warnings: What reading it had to say.
        failure: Why it cannot be used, if so.
    """

    files: CaseFiles
    folder: Path
    config: SynthesisConfig
    assets: dict[str, str]
    needed: bool = True
    sources: dict[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    failure: str | None = None

    @property
    def record(self) -> dict[str, Any]:
        """The case as a plan lists it."""
        return {"subject": self.files.subject, "patient": self.files.patient, "sources": self.sources}


def prepare_cases(
    pool: Pool, tasks: Sequence[CaseTask], report: Callable[[int], None] | None = None
) -> tuple[list[CaseTask], dict[str, str]]:
    """Prepare cases in parallel; return the usable ones and what is wrong with the others, by subject.

    Raises:
        OutputError: There is no space, or a worker died of a case again and again.
    """
    done = []
    for result in pool.run(prepare_case, tasks, report):
        if isinstance(result, Lost):
            problem = f"the process that prepared case '{result.task.files.subject}' was killed each time"
            raise OutputError(result.task.files.flair, problem, "run it again with fewer --workers, or more memory")
        done.append(result)
    done.sort(key=lambda p: p.files.subject)
    for text in (text for p in done for text in p.warnings):
        warnings.warn(text, InputWarning, stacklevel=3)
    warn_of_twins((p.files.subject, p.sources["flair"]) for p in done if p.failure is None)
    return [p for p in done if p.failure is None], {p.files.subject: p.failure for p in done if p.failure is not None}


def prepare_case(task: CaseTask) -> CaseTask:
    """Prepare one case, unless it is there or not needed; return the task with its result filled in."""

    def stamp(sources: dict[str, str]) -> dict[str, Any]:
        return stamp_of(task.files.subject, sources, task.config, task.assets, prefer=task.files.prefer)

    try:
        sources = task.files.hashes()
        if not task.needed or stored_stamp(task.folder) == stamp(sources):
            return replace(task, sources=sources)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", InputWarning)
            inpainter, _, _ = kept_synthesis(task.config)
            case = heal(task.files.read(), inpainter)
        store_case(task.folder, case, task.config, stamp=stamp(case.sources))
    except OutputError:
        raise
    except SynthlongError as error:
        return replace(task, failure=str(error))
    finally:
        count()
    said = tuple(str(w.message) for w in caught if issubclass(w.category, InputWarning))
    return replace(task, sources=case.sources, warnings=said)


def case_folder(work: Path, subject: str) -> Path:
    """Return where a prepared case lies; a name that any file system takes."""
    return work / f"case-{hashlib.sha256(subject.encode()).hexdigest()[:16]}"
