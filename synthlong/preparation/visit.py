"""A visit's files: read, checked, its brain found and cleaned."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from synthlong.errors import InputError, InputWarning, short
from synthlong.grid import check_extent
from synthlong.looks import is_stripped
from synthlong.mask import MOST_OUTSIDE, check_binary, check_csf, check_labels, check_mask, clip_to_brain, read_beside
from synthlong.nifti import Volume, read_nifti
from synthlong.preparation.config import PreparationConfig
from synthlong.preparation.derivatives import way_name
from synthlong.preparation.registration import Image, register, upright
from synthlong.preparation.scans import Scan
from synthlong.preparation.tools import brain_mask, correct_bias, denoise
from synthlong.preparation.ways import read_way, way_text
from synthlong.resampling import Grid, carry_mask

__all__ = [
    "MOTION",
    "VISIT_MM",
    "Drawn",
    "Files",
    "Head",
    "Record",
    "Visit",
    "above_zero",
    "carried",
    "check_new_lesions",
    "clean_visit",
    "grid_of",
    "orientation_flags",
    "read_files",
    "read_mask",
    "read_new_lesions",
    "write_way",
]

VISIT_MM = 1.5
"""Voxels of the grids on which visits are registered to each other."""

MOTION: dict[str, Literal["Rigid", "Affine"]] = {"rigid": "Rigid", "affine": "Affine"}
"""The registration's names of how visits may move."""

Drawn = tuple[Image, NDArray]
"""New lesions on the grid on which they were drawn, and the way there from the FLAIR."""


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
class Head:
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

    def coarse(self) -> Image:
        """Return the same on a grid for registration."""
        return upright(self.stripped(), spacing_mm=VISIT_MM)


@dataclass(frozen=True, eq=False)
class Files:
    """The scans and masks of a visit as stored, checked.

    Args:
        scan: Their paths.
        flair: The FLAIR.
        mask: Lesions, if there are any, as are the others.
        new_lesions: New lesions on the grid on which they were drawn, and the way there from the FLAIR.
        tissue: Labels on the FLAIR's grid.
        brain: The brain on that grid.
        t1: The T1-weighted scan.
    """

    scan: Scan
    flair: Volume
    mask: Volume | None
    new_lesions: Drawn | None
    tissue: Volume | None
    brain: Volume | None
    t1: Volume | None


@dataclass(frozen=True, eq=False)
class Visit:
    """A visit, its brain found and its scans cleaned.

    Args:
        files: As stored.
        head: The FLAIR, cleaned.
        lesions: Lesion voxels.
        t1: The T1-weighted scan, cleaned, if there is one.
        to_t1: The way from the FLAIR to it.
    """

    files: Files
    head: Head
    lesions: NDArray[np.bool_]
    t1: Head | None = None
    to_t1: NDArray | None = None


def read_files(scan: Scan, prefer: str | None) -> Files:
    """Read a visit's files; one that is damaged or does not fit is refused."""
    flair = read_nifti(scan.flair, prefer=prefer)
    mask, new = read_mask(scan, flair, prefer), read_new_lesions(scan, flair, prefer)
    tissue = None if scan.tissue is None else read_beside(scan.tissue, flair, prefer=prefer, allow_empty=False)
    brain = None if scan.brain is None else read_beside(scan.brain, flair, prefer=prefer, allow_empty=False)
    if brain is not None:
        check_binary(brain)
    if tissue is not None:
        check_labels(tissue)
        check_csf(tissue, flair)
    return Files(scan, flair, mask, new, tissue, brain, None if scan.t1 is None else read_nifti(scan.t1, prefer=prefer))


def clean_visit(files: Files, config: PreparationConfig) -> Visit:
    """Find the brain of a visit and clean it; new lesions outside it are refused before that work."""
    flair, own = files.flair, files.brain
    brain = own.data != 0 if own is not None else _brain(flair, config, "bring your own mask in column 'brain'")
    if files.new_lesions is not None:
        check_new_lesions(files.scan, *files.new_lesions, flair, brain)
    lesions = np.zeros(brain.shape, bool) if files.mask is None else clip_to_brain(files.mask, brain)
    visit = Visit(files, _cleaned(flair, brain, config), lesions)
    if files.t1 is None:
        return visit
    t1 = _cleaned(files.t1, _brain(files.t1, config, "leave its column 't1' empty"), config)
    return replace(visit, t1=t1, to_t1=register(visit.head.coarse(), t1.coarse(), motion="Rigid"))


def read_mask(scan: Scan, flair: Volume, prefer: str | None) -> Volume | None:
    """Return the lesions of a visit as stored, checked, if there are any."""
    if scan.mask is None:
        return None
    mask = read_beside(scan.mask, flair, prefer=prefer)
    check_mask(mask, flair)
    return mask


def read_new_lesions(scan: Scan, flair: Volume, prefer: str | None) -> Drawn | None:
    """Return the new lesions of a follow-up on the grid on which they were drawn, and the way there from the FLAIR."""
    if scan.new_lesions is None:
        return None
    if scan.new_lesions_xfm is None:
        mask, there = read_beside(scan.new_lesions, flair, prefer=prefer), np.eye(4)
    else:
        mask = read_nifti(scan.new_lesions, prefer=prefer, allow_empty=True)
        there = read_way(scan.new_lesions_xfm)
    check_binary(mask)
    return Image(mask.data != 0, grid_of(mask)), np.linalg.inv(there)


def check_new_lesions(scan: Scan, drawn: Image, from_flair: NDArray, flair: Volume, brain: NDArray[np.bool_]) -> None:
    """Raise an InputError if a tenth of the new lesions does not lie in the brain."""
    voxels = np.argwhere(drawn.data)
    step = drawn.grid.step_to(grid_of(flair), np.linalg.inv(from_flair))
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
    grid = grid_of(scan)
    if is_stripped(scan.data, grid.voxel_mm3):
        text = f"{short(scan.path)}: is 0 around a brain, so taken as skull-stripped"
        warnings.warn(text, InputWarning, stacklevel=2)
        return scan.data != 0
    found = brain_mask(scan.data, grid, mode=config.brain, device=config.device)
    if not found.any():
        raise InputError(scan.path, "no brain was found in it", way_out)
    return found


def orientation_flags(*scans: Volume | None) -> list[str]:
    """Return the flag of a visit one of whose scans does not say how it lies."""
    guessed = any(scan is not None and not scan.coded for scan in scans)
    return ["orientation is a guess (neither sform nor qform is set)"] if guessed else []


def grid_of(volume: Volume) -> Grid:
    """Return where a volume lies, if it is of a head's size."""
    check_extent(volume)
    i, j, k = volume.data.shape
    return Grid((i, j, k), volume.affine)


def _cleaned(scan: Volume, brain: NDArray[np.bool_], config: PreparationConfig) -> Head:
    """Denoise and correct the brain; what lies around it stays, for the interpolation at its edge."""
    grid = grid_of(scan)
    clean = above_zero(scan.data, brain)
    if config.denoise:
        clean = np.where(brain, denoise(clean, brain, grid), clean).astype(np.float32)
    if config.correct_bias:
        clean = correct_bias(clean, brain, grid)
    return Head(clean, brain, grid)


def above_zero(scan: NDArray[np.float32], brain: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Return a z-scored scan with intensities of 0 or more, as the tools need them; any other as it is."""
    darkest = float(np.percentile(scan[brain], 0.5))
    return scan if darkest >= 0 else np.maximum(scan - np.float32(darkest), 0)


def carried(drawn: Drawn, way: NDArray, target: Grid) -> NDArray[np.uint8]:
    """Carry new lesions to a target, straight from the grid on which they were drawn.

    Args:
        drawn: Where they were drawn, and the way there from the FLAIR.
        way: From the target to the FLAIR.
        target: The grid.
    """
    mask, from_flair = drawn
    return carry_mask(mask.data, target.step_to(mask.grid, from_flair @ way), target.shape)


def write_way(scan: Scan, grid: Grid, way: NDArray, folder: Path, *, space: str) -> dict[str, object]:
    """Write the transform; return the record of the scan's own grid."""
    name = way_name(scan.id, space=space)
    (folder / name).write_text(way_text(way))
    return {"shape": list(grid.shape), "affine": grid.affine.tolist(), "transform": name}
