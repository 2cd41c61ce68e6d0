"""One patient's raw scans to cases in MNI152 space.

    scan -> brain -> denoised -> without bias -> middle of the visits -> MNI152, resampled once -> mode 1

Kamraoui et al. 2022, section 2.5.2, doi 10.3389/fnimg.2022.948235, with the order of the tools that its challenge's
pipeline has; or Schmidt-Mengin et al. 2022, doi 10.3389/fnins.2022.1004050: the visits in their halfway space.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from synthlong.case import check_binary, check_mask, clip_to_brain, read_beside
from synthlong.errors import InputError, InputWarning, short
from synthlong.healthy import write_healthy
from synthlong.inpainting import Inpainter
from synthlong.manifest import CaseFiles
from synthlong.nifti import Volume, read_nifti, write_nifti
from synthlong.pictures import png_bytes
from synthlong.preparation.config import PreparationConfig
from synthlong.preparation.derivatives import figure_name, file_name, way_name
from synthlong.preparation.quality import BRAIN_ML, agreement, figures_of, flags_of, picture_of
from synthlong.preparation.registration import MNI, Image, align_visits, mni_at, register, upright
from synthlong.preparation.scans import Scan
from synthlong.preparation.tools import brain_mask, correct_bias, denoise
from synthlong.preparation.ways import read_way, way_text
from synthlong.resampling import Grid, carry_mask, resample

__all__ = ["Record", "prepare_subject"]

_MOTION: dict[str, Literal["Rigid", "Affine"]] = {"rigid": "Rigid", "affine": "Affine"}
_MOST_CUT = 0.05  # of a face of the grid: a brain stem may be cut there, a neck is wider
_VISIT_MM, _TEMPLATE_MM = 1.5, 2.0  # grids of registration


@dataclass(frozen=True)
class Record:
    """What became of one scan.

    Args:
        scan: The scan's id.
        native: Grid of the scan and name of the transform, as plain JSON.
        figures: How well it went.
        flags: What looks wrong.
    """

    scan: str
    native: dict[str, object]
    figures: dict[str, object]
    flags: list[str]


@dataclass(frozen=True, eq=False)
class _Visit:
    """A scan on its own grid, read and checked.

    Args:
        scan: Its files.
        flair: The FLAIR as stored.
        grid: Where it lies.
        brain: Its brain.
        clean: Brain and what lies around it, denoised and without bias field.
        lesions: Lesion voxels.
        t1: Brain of the T1-weighted scan, if there is one.
        to_t1: Way from the FLAIR to it.
    """

    scan: Scan
    flair: Volume
    grid: Grid
    brain: NDArray[np.bool_]
    clean: NDArray[np.float32]
    lesions: NDArray[np.bool_]
    t1: Image | None = None
    to_t1: NDArray | None = None

    def stripped(self) -> Image:
        """Return the brain on an upright grid."""
        return upright(Image(np.where(self.brain, self.clean, 0), self.grid), spacing_mm=_VISIT_MM)


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
        report: Called after each visit.

    Raises:
        InputError: A file that cannot be used.
        ConfigError: The extra `prepare` is not installed.
    """
    if config.recipe == "schmidt":
        return _halfway(scans, folder, config, prefer, report)
    visits = []
    for scan in scans:
        visits.append(_read_visit(scan, config, prefer))
        report()
    from_middle = align_visits([visit.stripped() for visit in visits], motion=_MOTION[config.visits])
    contrast, reference = _reference(visits, from_middle)
    to_middle = register(mni_at(contrast, spacing_mm=_TEMPLATE_MM), reference, motion="Affine")
    ways = [way @ to_middle for way in from_middle]

    prepared = [_in_mni(visit, way, folder, config, inpainter) for visit, way in zip(visits, ways, strict=True)]
    if len(visits) > 1:
        for visit, way in zip(visits, from_middle, strict=True):
            (folder / way_name(visit.scan.id, space="halfway")).write_text(way_text(way))
    alike = agreement([p.flair for p in prepared], [p.brain > 0 for p in prepared])
    records = []
    for visit, way, case, same in zip(visits, ways, prepared, alike, strict=True):
        figures = figures_of(
            visit.flair.data,
            visit.brain,
            visit.grid.voxel_mm3,
            visit.lesions if visit.scan.mask is not None else None,
            prepared=case.flair,
            prepared_brain=case.brain > 0,
            prepared_lesions=case.lesions,
            agreement=same,
        )
        picture = picture_of(case.flair, case.lesions | case.new_lesions)
        (folder / figure_name(visit.scan.id)).write_bytes(png_bytes(picture))
        native = _write_way(visit.scan, visit.grid, way, folder, space="MNI152")
        records.append(Record(visit.scan.id, native, figures.as_dict(), flags_of(figures)))
    return records


def _read_visit(scan: Scan, config: PreparationConfig, prefer: str | None) -> _Visit:
    """Read a scan, find its brain and clean it; a mask that does not fit is refused before the hours of work."""
    flair = read_nifti(scan.flair, prefer=prefer)
    grid = _grid_of(flair)
    mask = None if scan.mask is None else read_beside(scan.mask, flair, prefer=prefer)
    own = None if scan.brain is None else read_beside(scan.brain, flair, prefer=prefer, allow_empty=False)
    if mask is not None:
        check_mask(mask, flair)
    if own is not None:
        check_binary(own)
    t1 = None if scan.t1 is None else read_nifti(scan.t1, prefer=prefer)
    brain = own.data != 0 if own is not None else _brain(flair, config)
    if not brain.any():
        raise InputError(scan.flair, "no brain was found in it", "bring your own mask in column 'brain'")
    lesions = np.zeros(brain.shape, bool) if mask is None else clip_to_brain(mask, brain)
    clean = _cleaned(flair.data, brain, grid, config)
    visit = _Visit(scan, flair, grid, brain, clean, lesions)
    if t1 is None:
        return visit
    t1_grid = _grid_of(t1)
    t1_brain = _brain(t1, config)
    t1_clean = _cleaned(t1.data, t1_brain, t1_grid, config)
    stripped = Image(np.where(t1_brain, t1_clean, 0), t1_grid)
    to_t1 = register(visit.stripped(), upright(stripped, spacing_mm=_VISIT_MM), motion="Rigid")
    return _Visit(scan, flair, grid, brain, clean, lesions, Image(t1_clean, t1_grid), to_t1)


def _brain(scan: Volume, config: PreparationConfig) -> NDArray[np.bool_]:
    """Return the brain of a scan: all that is not 0 if it was skull-stripped, else by HD-BET."""
    grid, inside = _grid_of(scan), scan.data != 0
    faces = [np.take(inside, end, axis=axis).mean() for axis in range(3) for end in (0, -1)]
    low, high = BRAIN_ML
    if low <= inside.sum() * grid.voxel_mm3 / 1000 <= high and max(faces) < _MOST_CUT:
        text = f"{short(scan.path)}: is 0 around a brain, so taken as skull-stripped"
        warnings.warn(text, InputWarning, stacklevel=2)
        return inside
    return brain_mask(scan.data, grid, mode=config.brain, device=config.device)


def _grid_of(volume: Volume) -> Grid:
    i, j, k = volume.data.shape
    return Grid((i, j, k), volume.affine)


def _cleaned(scan: NDArray, brain: NDArray[np.bool_], grid: Grid, config: PreparationConfig) -> NDArray[np.float32]:
    """Denoise and correct the brain; what lies around it stays, for the interpolation at its edge."""
    clean = np.where(brain, denoise(scan, brain, grid), scan) if config.denoise else scan
    return correct_bias(clean, brain, grid) if config.correct_bias else clean.astype(np.float32)


def _reference(visits: list[_Visit], from_middle: list[NDArray]) -> tuple[str, Image]:
    """Return what is registered to MNI152 for all visits: the mean T1-weighted brain, or else the mean FLAIR."""
    if any(visit.t1 is not None for visit in visits):
        contrast = "T1w"
        seen = [(v.t1, v.to_t1 @ w) for v, w in zip(visits, from_middle, strict=True) if v.t1 and v.to_t1 is not None]
    else:
        contrast = "FLAIR"
        seen = [(Image(np.where(v.brain, v.clean, 0), v.grid), w) for v, w in zip(visits, from_middle, strict=True)]
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
    visit: _Visit, way: NDArray, folder: Path, config: PreparationConfig, inpainter: Inpainter | None
) -> _Prepared:
    """Write one visit on the grid of MNI152; each volume is interpolated once."""
    scan = visit.scan

    def place(what: str) -> Path:
        return folder / file_name(scan.id, what)

    def write(what: str, data: NDArray) -> Path:
        write_nifti(place(what), data, MNI.affine)
        return place(what)

    step = MNI.step_to(visit.grid, way)
    brain = resample(visit.brain, step, MNI.shape, order=1) > 0.5
    flair = np.where(brain, np.maximum(resample(visit.clean, step, MNI.shape), 0), 0)
    if config.denoise_again:
        flair = denoise(flair, brain, MNI)
    lesions = carry_mask(visit.lesions, step, MNI.shape) * brain
    files = {"brain": write("desc-brain_mask.nii.gz", brain.astype(np.uint8))}
    files |= {"flair": write("FLAIR.nii.gz", flair.astype(np.float32))}
    files |= {"mask": write("desc-lesions_mask.nii.gz", lesions.astype(np.uint8))}
    if scan.tissue is not None:
        files["tissue"] = write("dseg.nii.gz", _tissue(scan.tissue, visit, step))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InputWarning)
        case = CaseFiles(scan.id, **files).read()
        write("FLAIR.nii.gz", case.flair)
        files["tissue"] = write("dseg.nii.gz", case.tissue)
        if visit.t1 is not None and visit.to_t1 is not None:
            t1 = resample(visit.t1.data, MNI.step_to(visit.t1.grid, visit.to_t1 @ way), MNI.shape)
            t1 = np.where(brain, np.maximum(t1, 0), 0)
            files["t1"] = write("T1w.nii.gz", t1 / np.float32(np.median(t1[brain])))
        if inpainter is not None and scan.mask is not None:
            case = CaseFiles(scan.id, **files).read()
            write_healthy(place("desc-healthy_FLAIR.nii.gz"), case, inpainter)
    if scan.mask is None:
        files["mask"].unlink()
    new = np.zeros(MNI.shape, np.uint8)
    if scan.new_lesions is not None:
        new = _new_lesions(scan, visit.flair, way, MNI) * case.brain
        write("desc-newlesions_mask.nii.gz", new)
    return _Prepared(case.flair, case.brain, case.lesions, new)


def _tissue(path: Path, visit: _Visit, step: NDArray) -> NDArray[np.uint8]:
    labels = read_beside(path, visit.flair, allow_empty=False)
    return resample(labels.data, step, MNI.shape, order=0).astype(np.uint8)


def _new_lesions(scan: Scan, flair: Volume, way: NDArray, target: Grid) -> NDArray[np.uint8]:
    """Return the new lesions of a follow-up on another grid, straight from the grid on which they were drawn."""
    assert scan.new_lesions is not None
    mask = read_nifti(scan.new_lesions, allow_empty=True)
    check_binary(mask)
    if scan.new_lesions_xfm is not None:
        way = np.linalg.inv(read_way(scan.new_lesions_xfm)) @ way
    else:
        read_beside(scan.new_lesions, flair)
    return carry_mask(mask.data != 0, target.step_to(_grid_of(mask), way), target.shape)


def _write_way(scan: Scan, grid: Grid, way: NDArray, folder: Path, *, space: str) -> dict[str, object]:
    """Write the transform; return the record of the scan's own grid."""
    name = way_name(scan.id, space=space)
    (folder / name).write_text(way_text(way))
    return {"shape": list(grid.shape), "affine": grid.affine.tolist(), "transform": name}


def _halfway(
    scans: Sequence[Scan], folder: Path, config: PreparationConfig, prefer: str | None, report: Callable[[], None]
) -> list[Record]:
    """Write the visits in their halfway space: whole heads, z-scored over the grid that holds them all."""
    flairs = [read_nifti(scan.flair, prefer=prefer) for scan in scans]
    grids = [_grid_of(flair) for flair in flairs]
    heads = [upright(Image(f.data, g), spacing_mm=_VISIT_MM) for f, g in zip(flairs, grids, strict=True)]
    ways = align_visits(heads, motion=_MOTION[config.visits])
    target = Grid.around(grids, ways, spacing_mm=config.spacing_mm)
    records = []
    for scan, flair, grid, way in zip(scans, flairs, grids, ways, strict=True):

        def write(what: str, data: NDArray, scan: Scan = scan) -> None:
            write_nifti(folder / file_name(scan.id, what, space="halfway"), data, target.affine, code=2)

        image = resample(flair.data, target.step_to(grid, way), target.shape)
        mean, sd = float(image.mean(dtype=np.float64)), float(image.std(dtype=np.float64))
        write("FLAIR.nii.gz", (image - np.float32(mean)) / np.float32(sd))
        if scan.mask is not None:
            mask = read_beside(scan.mask, flair, prefer=prefer)
            check_mask(mask, flair)
            write("desc-lesions_mask.nii.gz", carry_mask(mask.data != 0, target.step_to(grid, way), target.shape))
        if scan.new_lesions is not None:
            write("desc-newlesions_mask.nii.gz", _new_lesions(scan, flair, way, target))
        native = _write_way(scan, grid, way, folder, space="halfway")
        records.append(Record(scan.id, native, {"mean": mean, "sd": sd}, []))
        report()
    return records
