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

from synthlong.errors import InputError, InputWarning
from synthlong.healthy import write_healthy
from synthlong.inpainting import Inpainter
from synthlong.manifest import CaseFiles
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
from synthlong.preparation.visit import MOTION, Record, Visit, above_zero, carried, read_visit, write_way
from synthlong.preparation.ways import way_text
from synthlong.resampling import Grid, carry_mask, resample

__all__ = ["STEPS", "Record", "prepare_subject"]

STEPS = 3
"""Of each visit: it is read and cleaned, registered, written."""

_TEMPLATE_MM = 2.0


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
    for scan in scans:
        visits.append(read_visit(scan, config, prefer))
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
            (folder / way_name(visit.scan.id, space="halfway")).write_text(way_text(way))
    alike = agreement([p.flair for p in prepared], [p.brain > 0 for p in prepared])
    records = []
    for visit, way, case, same in zip(visits, ways, prepared, alike, strict=True):
        figures = figures_of(
            above_zero(visit.flair.data, visit.head.brain),
            visit.head.brain,
            visit.head.grid.voxel_mm3,
            visit.lesions if visit.scan.mask is not None else None,
            prepared=case.flair,
            prepared_brain=case.brain > 0,
            prepared_lesions=case.lesions,
            agreement=same,
        )
        picture = picture_of(case.flair, case.lesions | case.new_lesions)
        (folder / figure_name(visit.scan.id)).write_bytes(png_bytes(picture))
        native = write_way(visit.scan, visit.head.grid, way, folder, space="MNI152")
        records.append(Record(native, figures.as_dict(), flags_of(figures)))
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
    """What `quality` looks at, on the grid of MNI152."""

    flair: NDArray[np.float32]
    brain: NDArray[np.uint8]
    lesions: NDArray[np.uint8]
    new_lesions: NDArray[np.uint8]


def _in_mni(
    visit: Visit, way: NDArray, folder: Path, config: PreparationConfig, inpainter: Inpainter | None
) -> _Prepared:
    """Write one visit on the grid of MNI152; each volume is interpolated once."""
    scan = visit.scan

    def place(what: str) -> Path:
        return folder / file_name(scan.id, what)

    def write(what: str, data: NDArray) -> Path:
        write_nifti(place(what), data, MNI.affine)
        return place(what)

    step = MNI.step_to(visit.head.grid, way)
    brain = resample(visit.head.brain, step, MNI.shape, order=1) > 0.5
    flair = np.where(brain, np.maximum(resample(visit.head.clean, step, MNI.shape), 0), 0)
    if config.denoise_again:
        flair = denoise(flair, brain, MNI)
    lesions = carry_mask(visit.lesions, step, MNI.shape) * brain
    files: dict[str, Any] = {"brain": write("desc-brain_mask.nii.gz", brain.astype(np.uint8))}
    files |= {"flair": write("FLAIR.nii.gz", flair.astype(np.float32))}
    files |= {"mask": write("desc-lesions_mask.nii.gz", lesions.astype(np.uint8))}
    if visit.tissue is not None:
        labels = resample(visit.tissue.data, step, MNI.shape, order=0)
        files["tissue"] = write("dseg.nii.gz", labels.astype(np.uint8))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InputWarning)
        try:
            case = CaseFiles(scan.id, **files).read()
        except InputError as error:  # of what was made of it, in a folder that is gone by then
            raise InputError(scan.flair, f"once in MNI152, {error.problem}", error.way_out) from error
        write("FLAIR.nii.gz", case.flair)
        files["tissue"] = write("dseg.nii.gz", case.tissue)
        if visit.t1 is not None and visit.to_t1 is not None:
            t1 = resample(visit.t1.clean, MNI.step_to(visit.t1.grid, visit.to_t1 @ way), MNI.shape)
            t1 = np.where(brain, np.maximum(t1, 0), 0)
            files["t1"] = write("T1w.nii.gz", t1 / np.float32(np.median(t1[brain])))
        if inpainter is not None and scan.mask is not None:
            case = CaseFiles(scan.id, **files).read()
            write_healthy(place("desc-healthy_FLAIR.nii.gz"), case, inpainter)
    if scan.mask is None:
        files["mask"].unlink()
    new = np.zeros(MNI.shape, np.uint8)
    if visit.new_lesions is not None:
        new = carried(visit.new_lesions, way, MNI) * case.brain
        write("desc-newlesions_mask.nii.gz", new)
    return _Prepared(case.flair, case.brain, case.lesions, new)
