"""One patient's raw scans to cases in MNI152 space.

    scan -> brain -> denoised -> without bias -> middle of the visits -> MNI152, resampled once -> mode 1

Kamraoui et al. 2022, section 2.5.2, doi 10.3389/fnimg.2022.948235, with the order of the tools that its challenge's
pipeline has; or Schmidt-Mengin et al. 2022, doi 10.3389/fnins.2022.1004050: the visits in their halfway space.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from synthlong.errors import InputError, InputWarning, short
from synthlong.healthy import write_healthy
from synthlong.inpainting import Inpainter
from synthlong.looks import is_stripped
from synthlong.manifest import CaseFiles
from synthlong.mask import MOST_OUTSIDE, check_binary, check_labels, check_mask, clip_to_brain, read_beside
from synthlong.nifti import Volume, read_nifti, write_nifti
from synthlong.pictures import png_bytes
from synthlong.preparation.config import PreparationConfig
from synthlong.preparation.derivatives import figure_name, file_name, way_name
from synthlong.preparation.quality import (
    agreement,
    figures_of,
    flags_of,
    halfway_flags,
    halfway_picture,
    picture_of,
)
from synthlong.preparation.registration import MNI, Image, align_visits, mni_at, register, upright
from synthlong.preparation.scans import Scan
from synthlong.preparation.tools import brain_mask, correct_bias, denoise
from synthlong.preparation.ways import read_way, way_text
from synthlong.resampling import Grid, carry_mask, resample

__all__ = ["STEPS", "Record", "prepare_subject"]

STEPS = 3
"""Of each visit: it is read and cleaned, registered, written."""

_PICTURE_MM = 1.0
"""Voxels of pictures and figures of the halfway space, about."""

_MOTION: dict[str, Literal["Rigid", "Affine"]] = {"rigid": "Rigid", "affine": "Affine"}
_VISIT_MM, _TEMPLATE_MM = 1.5, 2.0  # grids of registration


@dataclass(frozen=True)
class Record:
    """What became of one scan.

    Args:
        native: Grid of the scan and name of the transform, as plain JSON.
        figures: How well it went.
        flags: What looks wrong.
    """

    native: dict[str, object]
    figures: dict[str, object]
    flags: list[str]


@dataclass(frozen=True, eq=False)
class _Head:
    """A scan on its own grid, cleaned.

    Args:
        clean: Brain and what lies around it, denoised and without bias field.
        brain: Its brain.
        grid: Where it lies.
    """

    clean: NDArray[np.float32]
    brain: NDArray[np.bool_]
    grid: Grid

    def stripped(self) -> Image:
        """Return the brain alone."""
        return Image(np.where(self.brain, self.clean, 0), self.grid)


@dataclass(frozen=True, eq=False)
class _Visit:
    """The scans and masks of a visit, read and checked.

    Args:
        scan: Their files.
        flair: The FLAIR as stored.
        head: The FLAIR, cleaned.
        lesions: Lesion voxels.
        tissue: Labels on the FLAIR's grid, if there are any.
        new_lesions: New lesions on the grid on which they were drawn, and the way there from the FLAIR.
        t1: The T1-weighted scan, cleaned, if there is one.
        to_t1: The way from the FLAIR to it.
    """

    scan: Scan
    flair: Volume
    head: _Head
    lesions: NDArray[np.bool_]
    tissue: Volume | None
    new_lesions: tuple[Image, NDArray] | None
    t1: _Head | None = None
    to_t1: NDArray | None = None


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
        return _halfway(scans, folder, config, prefer, report)
    visits = []
    for scan in scans:
        visits.append(_read_visit(scan, config, prefer))
        report()
    from_middle = align_visits([_coarse(visit.head) for visit in visits], motion=_MOTION[config.visits], report=report)
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
            _above_zero(visit.flair.data, visit.head.brain),
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
        native = _write_way(visit.scan, visit.head.grid, way, folder, space="MNI152")
        records.append(Record(native, figures.as_dict(), flags_of(figures)))
    return records


def _read_visit(scan: Scan, config: PreparationConfig, prefer: str | None) -> _Visit:
    """Read a visit, find its brain and clean it; a file that does not fit is refused before that work."""
    flair = read_nifti(scan.flair, prefer=prefer)
    mask, new = _read_mask(scan, flair, prefer), _read_new_lesions(scan, flair, prefer)
    tissue = None if scan.tissue is None else read_beside(scan.tissue, flair, prefer=prefer, allow_empty=False)
    own = None if scan.brain is None else read_beside(scan.brain, flair, prefer=prefer, allow_empty=False)
    if own is not None:
        check_binary(own)
    if tissue is not None:
        check_labels(tissue)
    t1 = None if scan.t1 is None else read_nifti(scan.t1, prefer=prefer)
    brain = own.data != 0 if own is not None else _brain(flair, config, "bring your own mask in column 'brain'")
    if new is not None:
        _check_new_lesions(scan, *new, flair, brain)
    lesions = np.zeros(brain.shape, bool) if mask is None else clip_to_brain(mask, brain)
    visit = _Visit(scan, flair, _cleaned(flair, brain, config), lesions, tissue, new)
    if t1 is None:
        return visit
    head = _cleaned(t1, _brain(t1, config, "leave its column 't1' empty"), config)
    return replace(visit, t1=head, to_t1=register(_coarse(visit.head), _coarse(head), motion="Rigid"))


def _read_mask(scan: Scan, flair: Volume, prefer: str | None) -> Volume | None:
    if scan.mask is None:
        return None
    mask = read_beside(scan.mask, flair, prefer=prefer)
    check_mask(mask, flair)
    return mask


def _read_new_lesions(scan: Scan, flair: Volume, prefer: str | None) -> tuple[Image, NDArray] | None:
    """Return the new lesions of a follow-up on the grid on which they were drawn, and the way there from the FLAIR."""
    if scan.new_lesions is None:
        return None
    if scan.new_lesions_xfm is None:
        mask, there = read_beside(scan.new_lesions, flair, prefer=prefer), np.eye(4)
    else:
        mask = read_nifti(scan.new_lesions, prefer=prefer, allow_empty=True)
        there = read_way(scan.new_lesions_xfm)
    check_binary(mask)
    return Image(mask.data != 0, _grid_of(mask)), np.linalg.inv(there)


def _check_new_lesions(scan: Scan, drawn: Image, from_flair: NDArray, flair: Volume, brain: NDArray[np.bool_]) -> None:
    """Raise an InputError if a tenth of the new lesions does not lie in the brain."""
    voxels = np.argwhere(drawn.data)
    step = drawn.grid.step_to(_grid_of(flair), np.linalg.inv(from_flair))
    at = np.rint(voxels @ step[:3, :3].T + step[:3, 3]).astype(int)
    on_grid = ((at >= 0) & (at < brain.shape)).all(axis=1)
    outside = len(voxels) - np.count_nonzero(brain[tuple(at[on_grid].T)])
    if outside > MOST_OUTSIDE * len(voxels):
        assert scan.new_lesions is not None
        problem = f"{outside} of {len(voxels)} voxels of new lesions lie outside the brain"
        way = "check that mask and scan belong together"
        if scan.new_lesions_xfm is not None:
            way = "check its transform, which maps points of the mask to points of the FLAIR: is it the inverse?"
        raise InputError(scan.new_lesions, problem, way)


def _brain(scan: Volume, config: PreparationConfig, way_out: str) -> NDArray[np.bool_]:
    """Return the brain of a scan: all that is not 0 if it was skull-stripped, else by HD-BET."""
    grid = _grid_of(scan)
    if is_stripped(scan.data, grid.voxel_mm3):
        text = f"{short(scan.path)}: is 0 around a brain, so taken as skull-stripped"
        warnings.warn(text, InputWarning, stacklevel=2)
        return scan.data != 0
    found = brain_mask(scan.data, grid, mode=config.brain, device=config.device)
    if not found.any():
        raise InputError(scan.path, "no brain was found in it", way_out)
    return found


def _grid_of(volume: Volume) -> Grid:
    i, j, k = volume.data.shape
    grid = Grid((i, j, k), volume.affine)
    sides = np.array(grid.shape) * grid.spacing_mm
    if sides.min() < 16 or sides.max() > 512:
        raise InputError(
            volume.path, f"spans {sides.min():.0f} to {sides.max():.0f} mm", "check the header's voxel size"
        )
    return grid


def _cleaned(scan: Volume, brain: NDArray[np.bool_], config: PreparationConfig) -> _Head:
    """Denoise and correct the brain; what lies around it stays, for the interpolation at its edge."""
    grid = _grid_of(scan)
    clean = _above_zero(scan.data, brain)
    if config.denoise:
        clean = np.where(brain, denoise(clean, brain, grid), clean).astype(np.float32)
    if config.correct_bias:
        clean = correct_bias(clean, brain, grid)
    return _Head(clean, brain, grid)


def _above_zero(scan: NDArray[np.float32], brain: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Return a z-scored scan with intensities of 0 or more, as the tools need them; any other as it is."""
    darkest = float(np.percentile(scan[brain], 0.5))
    return scan if darkest >= 0 else np.maximum(scan - np.float32(darkest), 0)


def _coarse(head: _Head) -> Image:
    return upright(head.stripped(), spacing_mm=_VISIT_MM)


def _reference(visits: list[_Visit], from_middle: list[NDArray]) -> tuple[str, Image]:
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
    visit: _Visit, way: NDArray, folder: Path, config: PreparationConfig, inpainter: Inpainter | None
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
        new = _carried(visit.new_lesions, way, MNI) * case.brain
        write("desc-newlesions_mask.nii.gz", new)
    return _Prepared(case.flair, case.brain, case.lesions, new)


def _carried(drawn: tuple[Image, NDArray], way: NDArray, target: Grid) -> NDArray[np.uint8]:
    """Carry new lesions to a target, straight from the grid on which they were drawn.

    Args:
        drawn: Where they were drawn, and the way there from the FLAIR.
        way: From the target to the FLAIR.
        target: The grid.
    """
    mask, from_flair = drawn
    return carry_mask(mask.data, target.step_to(mask.grid, from_flair @ way), target.shape)


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
    masks = [_read_mask(scan, flair, prefer) for scan, flair in zip(scans, flairs, strict=True)]
    new = [_read_new_lesions(scan, flair, prefer) for scan, flair in zip(scans, flairs, strict=True)]
    for scan, flair, drawn in zip(scans, flairs, new, strict=True):
        if drawn is not None:
            _check_new_lesions(scan, *drawn, flair, np.ones(flair.data.shape, bool))
    grids = [_grid_of(flair) for flair in flairs]
    heads = []
    for flair, grid in zip(flairs, grids, strict=True):
        heads.append(upright(Image(flair.data, grid), spacing_mm=_VISIT_MM))
        report()
    ways = align_visits(heads, motion=_MOTION[config.visits], report=report)
    target = Grid.around(grids, ways, spacing_mm=config.spacing_mm)
    report()
    every = max(round(_PICTURE_MM / config.spacing_mm), 1)
    images, drawn_on, moments, natives = [], [], [], []
    for scan, flair, grid, way, mask, drawn in zip(scans, flairs, grids, ways, masks, new, strict=True):

        def write(what: str, data: NDArray, scan: Scan = scan) -> None:
            write_nifti(folder / file_name(scan.id, what, space="halfway"), data, target.affine, code=2)

        step = target.step_to(grid, way)
        image = resample(flair.data, step, target.shape)
        mean, sd = float(image.mean(dtype=np.float64)), float(image.std(dtype=np.float64))
        image = (image - np.float32(mean)) / np.float32(sd)
        write("FLAIR.nii.gz", image)
        lesions = np.zeros(target.shape, np.uint8)
        if mask is not None:
            lesions |= (carried := carry_mask(mask.data != 0, step, target.shape))
            write("desc-lesions_mask.nii.gz", carried)
        if drawn is not None:
            lesions |= (carried := _carried(drawn, way, target))
            write("desc-newlesions_mask.nii.gz", carried)
        images.append(image[::every, ::every, ::every].copy())
        drawn_on.append(lesions[::every, ::every, ::every].copy())
        moments.append({"mean": mean, "sd": sd})
        natives.append(_write_way(scan, grid, way, folder, space="halfway"))
        report()
    within = [seen > 0 for seen in images]
    alike = agreement(list(images), within)
    records = []
    for scan, seen, marked, moment, native, same in zip(scans, images, drawn_on, moments, natives, alike, strict=True):
        (folder / figure_name(scan.id)).write_bytes(png_bytes(halfway_picture(seen, marked, within[0])))
        figures: dict[str, object] = {**moment, "agreement": None if same is None else round(same, 4)}
        records.append(Record(native, figures, halfway_flags(same)))
    return records
