"""Two visits of a patient as files: ready for `detect`, with the way back to the follow-up's own voxels.

    baseline, follow-up -> read_visits -> Visits -> detect -> Detection

Brains on one grid of MNI space are used as they are. Whatever else comes, a skull, another grid, visits that were
prepared apart, both go through `prepare` together.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from synthlong.case import Case, read_case, read_lesions
from synthlong.errors import ConfigError, InputError, InputWarning, SynthlongError, short
from synthlong.grid import lies_along_axes
from synthlong.looks import unlike_brain
from synthlong.nifti import Volume, read_nifti
from synthlong.preparation.config import PreparationConfig
from synthlong.preparation.derivatives import file_name, read_native, read_record
from synthlong.preparation.scans import Scan
from synthlong.progress import Progress
from synthlong.resampling import Grid
from synthlong.tissue import fitted_tissue_maps

__all__ = ["Visits", "check_same_grid", "in_common_brain", "read_pair", "read_visits"]

_ROLES = ("baseline", "follow-up")

_Masks = tuple[Path | None, Path | None]


@dataclass(frozen=True, eq=False)
class Visits:
    """Two visits of a patient on one grid, and the way back.

    Args:
        baseline: First visit.
        followup: Second visit, on the same grid.
        scan: The follow-up as it was given.
        way: From the space of both to that of `scan`, mm, shape `(4, 4)`.
        prepared: Why both were prepared here; None: they were used as they are.
        about: Of baseline and follow-up as plain JSON: file, its SHA-256, figures and flags of their preparation.
    """

    baseline: Case
    followup: Case
    scan: Volume
    way: NDArray[np.float64]
    prepared: str | None
    about: tuple[dict[str, Any], dict[str, Any]]

    @property
    def grid(self) -> Grid:
        """Where the voxels of the follow-up as it was given lie."""
        i, j, k = self.scan.data.shape
        return Grid((i, j, k), self.scan.affine)

    @property
    def step(self) -> NDArray[np.float64]:
        """From voxels of the follow-up as it was given to those of both visits; see `resampling`."""
        return self.grid.step_to(Grid(self.followup.shape, self.followup.affine), np.linalg.inv(self.way))


def read_visits(
    baseline: str | Path,
    followup: str | Path,
    *,
    baseline_brain: Path | None = None,
    followup_brain: Path | None = None,
    work: Path | None = None,
    config: PreparationConfig | None = None,
    prefer: str | None = None,
    progress: Progress | None = None,
    tell: Callable[[str], None] | None = None,
) -> Visits:
    """Read two visits of a patient, and prepare them where they need it.

    Args:
        baseline: FLAIR of the first visit, NIfTI: raw, or what `synthlong prepare` made of it.
        followup: The same of the second.
        baseline_brain: Brain mask on the grid of `baseline`.
        followup_brain: Brain mask on the grid of `followup`.
        work: Where prepared scans stay, to be found by the next call; default: a temporary folder.
        config: How raw scans are prepared: by recipe "kamraoui"; no lesion is filled.
        prefer: "sform" or "qform" where a file's two disagree.
        progress: Called as (stage, done, total) while they are prepared.
        tell: Called before they are, with the reason.

    Raises:
        InputError: A file that cannot be used; or they are not two visits of one patient.
        ConfigError: They need preparation, and the extra `prepare` is not installed; or an option outside its range.
        OutputError: `work` cannot be written.
        SynthlongError: They cannot be prepared.
    """
    config = replace(config or PreparationConfig(), healthy=False)
    if config.recipe != "kamraoui":
        raise ConfigError(f"recipe = {config.recipe!a}: networks look for lesions in MNI space; use kamraoui")
    files = read_nifti(baseline, prefer=prefer), read_nifti(followup, prefer=prefer)
    _check_two(files[0].sha256, files[1].sha256, files[1].path)
    brains = baseline_brain, followup_brain
    found = _as_they_are(files, brains, prefer)
    if not isinstance(found, str):
        about = _about(files[0], files[0].path, "figures/"), _about(files[1], files[1].path, "figures/")
        return Visits(*found, files[1], np.eye(4), None, about)
    if tell:
        tell(found)
    with nullcontext(work) if work else TemporaryDirectory(prefix="synthlong-") as place:
        flairs = _prepare(files, brains, Path(place), found, config=config, prefer=prefer, progress=progress)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", InputWarning)  # flags say the same, of the user's own files
            cases = _read(flairs[0]), _read(flairs[1])
        pictures = f"{work.name}/figures" if work else "the figures/ that --work keeps"
        about = _about(files[0], flairs[0], pictures), _about(files[1], flairs[1], pictures)
        native = read_native(flairs[1])
    assert native is not None
    return Visits(*cases, files[1], native.way, found, about)


def check_same_grid(baseline: Case, followup: Case, *, path: str | Path | None = None) -> None:
    """Raise an InputError, of `path` or else the follow-up's id, unless both visits lie on one grid."""
    if baseline.shape != followup.shape or not np.allclose(baseline.affine, followup.affine, atol=1e-3):
        problem = "its grid is not that of the baseline"
        raise InputError(path or followup.id, problem, "resample one onto the other's grid")


def read_pair(
    baseline: Path, followup: Path, mask: Path, *, subject: str | None = None, prefer: str | None = None
) -> tuple[Case, Case]:
    """Read two visits of a patient; the lesions of the follow-up are the new ones, the baseline has none.

    Args:
        baseline: FLAIR of the first visit, NIfTI, as `read_case` takes it.
        followup: The same of the second, on the same grid.
        mask: The new lesions, on that grid.
        subject: Identifier of both.
        prefer: "sform" or "qform" where a file's two disagree.

    Raises:
        InputError: See `read_case` and `read_lesions`; or the grids differ, or both visits are one file.
    """
    # as without the truth
    before, after = (read_case(visit, subject=subject, prefer=prefer) for visit in (baseline, followup))
    _check_two(before.sources["flair"], after.sources["flair"], followup)
    check_same_grid(before, after, path=followup)
    return before, replace(after, lesions=read_lesions(mask, followup, prefer=prefer))


def in_common_brain(baseline: Case, followup: Case) -> tuple[Case, Case]:
    """Return two visits of one grid, with their lesions, without what is brain in one of them only.

    Where one visit was cut away there is nothing to compare with, and tissue beside nothing looks new.

    Raises:
        InputError: The brains do not meet.
    """
    brain = baseline.brain & followup.brain
    if not brain.any():
        raise InputError(followup.id, "its brain does not meet that of the baseline", "register one to the other")
    first, last = (
        replace(visit, brain=brain, flair=visit.flair * brain, lesions=visit.lesions * brain)
        for visit in (baseline, followup)
    )
    return first, last


def _check_two(baseline: str, followup: str, path: Path) -> None:
    """Raise an InputError, of the follow-up at `path`, if both visits have one SHA-256."""
    if baseline == followup:
        raise InputError(path, "is the baseline itself", "pass the later visit")


def _as_they_are(files: tuple[Volume, Volume], brains: _Masks, prefer: str | None) -> tuple[Case, Case] | str:
    """Return two visits that need no preparation, or why they need one."""
    one, other = (read_record(file.path) for file in files)
    if one and other:
        if one.get("subject") != other.get("subject"):
            problem = f"was prepared as subject '{other.get('subject')}', the baseline as '{one.get('subject')}'"
            raise InputError(files[1].path, problem, "pass two visits of one patient, or the raw scans")
        if one.get("space") != "MNI152" or any(one.get(key) != other.get(key) for key in ("visits", "stamp")):
            return "the follow-up was not prepared together with the baseline"
        return _both(files, brains, prefer)
    for role, file in zip(_ROLES, files, strict=True):
        if not lies_along_axes(file):
            return f"the {role} does not lie along the axes of MNI space in steps of 1 mm"
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", InputWarning)
        try:
            cases = _both(files, brains, prefer)
        except InputError as error:
            if error.path in brains:
                raise
            role = _ROLES[error.path == files[1].path]
            return f"the {role} cannot be used as it is ({error.problem})"
    for role, case in zip(_ROLES, cases, strict=True):
        brain, affine = case.brain > 0, case.affine
        if text := unlike_brain(case.flair, brain, fitted_tissue_maps(brain, affine), affine):
            return f"the {role} cannot be used as it is ({text})"
    for warning in said:
        warnings.warn(warning.message, stacklevel=4)
    return cases


def _both(files: tuple[Volume, Volume], brains: _Masks, prefer: str | None) -> tuple[Case, Case]:
    baseline, followup = (_read(f.path, brain=b, prefer=prefer) for f, b in zip(files, brains, strict=True))
    check_same_grid(baseline, followup, path=files[1].path)
    return baseline, followup


def _read(flair: Path, *, brain: Path | None = None, prefer: str | None = None) -> Case:
    """Read a FLAIR, with the brain and tissue that `prepare` wrote beside it."""
    paths: dict[str, Path] = {}
    if brain is not None:
        paths["brain"] = brain
    elif "_FLAIR.nii" in flair.name and read_record(flair) is not None:
        stem = flair.name.split("FLAIR.nii")[0]
        beside = {"brain": "desc-brain_mask.nii.gz", "tissue": "dseg.nii.gz"}
        found = {role: flair.with_name(stem + name) for role, name in beside.items()}
        paths |= {role: path for role, path in found.items() if path.exists()}
    return read_case(flair, prefer=prefer, **paths)  # type: ignore[arg-type]


def _prepare(
    files: tuple[Volume, Volume],
    brains: _Masks,
    work: Path,
    why: str,
    *,
    config: PreparationConfig,
    prefer: str | None,
    progress: Progress | None,
) -> tuple[Path, Path]:
    """Prepare both visits under a name that tells pairs apart; return their FLAIR."""
    from synthlong.preparation.run import prepare

    both = hashlib.sha256("".join(file.sha256 for file in files).encode()).hexdigest()
    subject = f"pair{both[:10]}"
    scans = [
        Scan(subject, file.path, session, brain=brain) for session, file, brain in zip("12", files, brains, strict=True)
    ]
    try:
        outcome = prepare(scans, work, config=config, workers=1, prefer=prefer, progress=progress)
    except ConfigError as error:
        raise ConfigError(f"{short(files[1].path)}: {why}, so both are prepared first: {error}") from error
    if subject in outcome.failures:
        raise SynthlongError(outcome.failures[subject])
    one, other = (work / file_name(scan.id, "FLAIR.nii.gz") for scan in scans)
    return one, other


def _about(file: Volume, flair: Path, pictures: str) -> dict[str, Any]:
    """Return what is known of a visit, with a warning of what looks wrong.

    Args:
        file: As it was given.
        flair: As it is used, maybe with a record beside it.
        pictures: Where that of the preparation lies, in words.
    """
    record = read_record(flair) or {}
    flags = record.get("flags", [])
    if flags:
        text = f"{short(file.path)}: flagged by `prepare` ({'; '.join(flags)}); look at its picture in {pictures}"
        warnings.warn(text, InputWarning, stacklevel=3)
    return {"file": file.path.name, "sha256": file.sha256, "figures": record.get("figures"), "flags": flags}
