"""One patient's raw scans to cases in MNI152 space.

    scan -> brain -> denoised -> without bias -> middle of the visits -> MNI152, resampled once -> mode 1

Kamraoui et al. 2022, section 2.5.2, doi 10.3389/fnimg.2022.948235, with the order of the tools that its challenge's
pipeline has. The other recipe is `halfway`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from synthlong.case import read_case
from synthlong.errors import InputError, InputWarning, short
from synthlong.healthy import write_healthy
from synthlong.inpainting import Inpainter
from synthlong.nifti import write_nifti
from synthlong.pictures import png_bytes
from synthlong.preparation.config import PreparationConfig
from synthlong.preparation.derivatives import figure_name, file_name, way_name
from synthlong.preparation.halfway import halfway
from synthlong.preparation.quality import (
    agreement,
    figures_of,
    flags_of,
    picture_of,
)
from synthlong.preparation.registration import MNI, Image, align_visits, mni_at, register
from synthlong.preparation.scans import Scan
from synthlong.preparation.tools import denoise
from synthlong.preparation.visit import (
    MOTION,
    Head,
    Record,
    Visit,
    above_zero,
    carried,
    clean_visit,
    orientation_flags,
    read_files,
    write_way,
)
from synthlong.preparation.ways import way_text
from synthlong.resampling import Grid, carry_mask, resample

__all__ = ["STEPS", "Record", "prepare_subject"]

STEPS = 3
"""Of each visit: it is read and cleaned, registered, written."""

_TEMPLATE_MM = 2.0
_LEAST_COVERED = 0.5


def prepare_subject(
    scans: Sequence[Scan],
    folder: Path,
    config: PreparationConfig,
    *,
    inpainter: Inpainter | None = None,
    prefer: str | None = None,
    report: Callable[[], None] = lambda: None,
) -> list[Record]:
    """Prepare all visits of one patient.

    Args:
        scans: The visits, in the order of time.
        folder: Where to write; exists, with the folder of figures in it.
        config: How.
        inpainter: Fills the lesions; None: no healthy volume.
        prefer: "sform" or "qform" where a scan's two disagree.
        report: Called after each of a visit's `STEPS`.

    Raises:
        InputError: A file that cannot be used.
        ConfigError: The extra `prepare` is not installed.
    """
    if config.recipe == "schmidt":
        return halfway(scans, folder, config, prefer, report)
    visits = []
    for files in [read_files(scan, prefer) for scan in scans]:  # all, before the first takes minutes
        visits.append(clean_visit(files, config))
        report()
    from_middle = align_visits([visit.head.coarse() for visit in visits], motion=MOTION[config.visits], report=report)
    contrast, reference = _reference(visits, from_middle)
    to_middle = register(mni_at(contrast, spacing_mm=_TEMPLATE_MM), reference, motion="Affine")
    ways = [way @ to_middle for way in from_middle]
    report()

    prepared = []
    for visit, way in zip(visits, ways, strict=True):
        prepared.append(_in_mni(visit, way, folder, config, inpainter))
        report()
    if len(visits) > 1:
        for visit, way in zip(visits, from_middle, strict=True):
            (folder / way_name(visit.files.scan.id, space="halfway")).write_text(way_text(way))
    alike = agreement([p.flair for p in prepared], [p.brain > 0 for p in prepared])
    records = []
    for visit, way, case, same in zip(visits, ways, prepared, alike, strict=True):
        scan, flair = visit.files.scan, visit.files.flair
        figures = figures_of(
            above_zero(flair.data, visit.head.brain),
            visit.head.brain,
            visit.head.grid,
            visit.lesions if scan.mask is not None else None,
            prepared=case.flair,
            prepared_brain=case.brain > 0,
            prepared_lesions=case.lesions,
            agreement=same,
        )
        picture = picture_of(case.flair, case.lesions | case.new_lesions)
        (folder / figure_name(scan.id)).write_bytes(png_bytes(picture))
        native = write_way(scan, visit.head.grid, way, folder, space="MNI152")
        flags = flags_of(figures) + case.looks + orientation_flags(flair, visit.files.t1)
        records.append(Record(native, figures.as_dict(), flags))
    return records


def _reference(visits: list[Visit], from_middle: list[NDArray]) -> tuple[str, Image]:
    """Return what is registered to MNI152 for all visits: the mean T1-weighted brain, or else the mean FLAIR."""
    visible = list(zip(visits, from_middle, strict=True))
    contrast = "T1w"
    seen = [(v.t1.stripped(), v.to_t1 @ w) for v, w in visible if v.t1 is not None and v.to_t1 is not None]
    if not seen:
        contrast, seen = "FLAIR", [(v.head.stripped(), w) for v, w in visible]
    grid = Grid.around([image.grid for image, _ in seen], [way for _, way in seen], spacing_mm=_TEMPLATE_MM)
    total = np.zeros(grid.shape, np.float32)
    for image, way in seen:
        data = np.maximum(resample(image.data, grid.step_to(image.grid, way), grid.shape, order=1), 0)
        total += data / np.float32(np.median(image.data[image.data > 0]))
    return contrast, Image(total, grid)


@dataclass(frozen=True, eq=False)
class _Prepared:
    """What `quality` looks at, on the grid of MNI152, and what makes the FLAIR look unlike one."""

    flair: NDArray[np.float32]
    brain: NDArray[np.uint8]
    lesions: NDArray[np.uint8]
    new_lesions: NDArray[np.uint8]
    looks: list[str]


def _in_mni(
    visit: Visit, way: NDArray, folder: Path, config: PreparationConfig, inpainter: Inpainter | None
) -> _Prepared:
    """Write one visit on the grid of MNI152; each volume is interpolated once."""
    scan = visit.files.scan

    def write(what: str, data: NDArray) -> Path:
        path = folder / file_name(scan.id, what)
        write_nifti(path, data, MNI.affine)
        return path

    step = MNI.step_to(visit.head.grid, way)
    brain = resample(visit.head.brain, step, MNI.shape, order=1) > 0.5
    flair = np.where(brain, np.maximum(resample(visit.head.clean, step, MNI.shape), 0), 0)
    if config.denoise_again:
        flair = denoise(flair, brain, MNI)
    files: dict[str, Any] = {"brain": write("desc-brain_mask.nii.gz", brain.astype(np.uint8))}
    files |= {"flair": write("FLAIR.nii.gz", flair.astype(np.float32))}
    if scan.mask is not None:
        lesions = carry_mask(visit.lesions, step, MNI.shape) * brain
        files["mask"] = write("desc-lesions_mask.nii.gz", lesions.astype(np.uint8))
    if visit.files.tissue is not None:
        labels = resample(visit.files.tissue.data, step, MNI.shape, order=0)
        files["tissue"] = write("dseg.nii.gz", labels.astype(np.uint8))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", InputWarning)
        try:
            case = read_case(**files, subject=scan.id)
        except InputError as error:  # of what was made of it, in a folder that is gone by then
            raise InputError(scan.flair, f"once in MNI152, {error.problem}", error.way_out) from error
    of_flair = f"{short(files['flair'])}: "
    looks = [str(w.message).removeprefix(of_flair) for w in said if str(w.message).startswith(of_flair)]
    write("FLAIR.nii.gz", case.flair)
    files["tissue"] = write("dseg.nii.gz", case.tissue)
    if visit.t1 is not None and visit.to_t1 is not None:
        write("T1w.nii.gz", _t1_in_mni(scan, visit.t1, visit.to_t1 @ way, brain))
    if inpainter is not None and scan.mask is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", InputWarning)  # as above
            case = read_case(**files, subject=scan.id)
        write_healthy(folder / file_name(scan.id, "desc-healthy_FLAIR.nii.gz"), case, inpainter)
    new = np.zeros(MNI.shape, np.uint8)
    if visit.files.new_lesions is not None:
        new = carried(visit.files.new_lesions, way, MNI) * case.brain
        write("desc-newlesions_mask.nii.gz", new)
    return _Prepared(case.flair, case.brain, case.lesions, new, looks)


def _t1_in_mni(scan: Scan, t1: Head, way: NDArray, brain: NDArray[np.bool_]) -> NDArray:
    """Return a T1-weighted scan on the grid of MNI152, with median 1 where it covers the brain."""
    step = MNI.step_to(t1.grid, way)
    covered = brain & (resample(t1.brain, step, MNI.shape, order=1) > 0.5)
    share = np.count_nonzero(covered) / np.count_nonzero(brain)
    if share < _LEAST_COVERED:
        assert scan.t1 is not None
        raise InputError(scan.t1, f"covers only {share:.0%} of the brain", "leave its column 't1' empty")
    placed = np.where(brain, np.maximum(resample(t1.clean, step, MNI.shape), 0), 0)
    return placed / np.float32(np.median(placed[covered]))
