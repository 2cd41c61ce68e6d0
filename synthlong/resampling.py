"""Volumes on other grids: one interpolation, however many transforms lie between; and shifts of less than a voxel.

A *step* is a 4x4 matrix from voxels of the target grid to voxels of the source; between millimetres, a *way* from A
to B maps points of A to points of B (RAS+), and so carries an image from B to A, as ITK's transforms do.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

__all__ = ["SHIFT_REACH", "Grid", "Native", "carry_labels", "carry_mask", "resample", "shifted"]

SHIFT_REACH = 3

_FWHM_PER_SD = 2.355
_LEAST_SHARE = 0.5
_DARKEST = 1e-3  # brain stays apart from background
_NUDGE = (1e-3, 1.3e-3, 1.7e-3)  # voxels; without it all ties would go to the grid's first voxels


@dataclass(frozen=True, eq=False)
class Grid:
    """Where voxels lie.

    Args:
        shape: Voxels along each axis.
        affine: Voxel to RAS+ mm, shape `(4, 4)`.
    """

    shape: tuple[int, int, int]
    affine: NDArray[np.float64]

    @property
    def spacing_mm(self) -> NDArray[np.float64]:
        """Voxel sides."""
        return np.linalg.norm(self.affine[:3, :3], axis=0)

    @property
    def voxel_mm3(self) -> float:
        """Volume of a voxel."""
        return float(abs(np.linalg.det(self.affine[:3, :3])))

    def step_to(self, source: Grid, way: NDArray | None = None) -> NDArray[np.float64]:
        """Return the step from this grid to a source, by a way from here to there (default: the same space)."""
        return np.linalg.inv(source.affine) @ (np.eye(4) if way is None else way) @ self.affine

    @classmethod
    def around(cls, grids: list[Grid], ways: list[NDArray], *, spacing_mm: float) -> Grid:
        """Return the upright RAS+ grid that holds all of some grids.

        Args:
            grids: Grids of the volumes.
            ways: From the upright grid's space to each.
            spacing_mm: Its voxels' side.
        """
        corners = []
        for grid, way in zip(grids, ways, strict=True):
            ends = np.indices((2, 2, 2)).reshape(3, 8) * np.array(grid.shape)[:, None] - 0.5
            world = np.linalg.inv(way) @ grid.affine @ np.vstack([ends, np.ones(8)])
            corners.append(world[:3])
        low, high = np.hstack(corners).min(axis=1), np.hstack(corners).max(axis=1)
        size = np.maximum(np.ceil((high - low) / spacing_mm - 1e-6).astype(int), 1)
        affine = np.diag([spacing_mm] * 3 + [1.0])
        affine[:3, 3] = low + spacing_mm / 2
        return cls((int(size[0]), int(size[1]), int(size[2])), affine)


@dataclass(frozen=True, eq=False)
class Native:
    """Where a prepared scan came from.

    Args:
        grid: Of the scan as it left the scanner.
        way: From the prepared scan's space to it.
    """

    grid: Grid
    way: NDArray[np.float64]


def resample(
    data: NDArray, step: NDArray, shape: tuple[int, int, int], *, order: int = 3, nudge: float = 0.0
) -> NDArray[np.float32]:
    """Interpolate by B-splines; where the target is coarser, average first.

    Args:
        data: Volume `(I, J, K)`.
        step: From target voxels to source voxels.
        shape: Of the target.
        order: Of the spline: 3 for images, 1 linear, 0 nearest.
        nudge: Added to each source coordinate, voxels: decides between voxels equally near.

    Returns:
        float32, 0 beyond the source's voxels.
    """
    data = data.astype(np.float32)
    coarser = np.maximum(np.linalg.norm(step[:3, :3], axis=1), 1)
    if order and coarser.max() > 1.01:
        data = ndimage.gaussian_filter(data, np.sqrt(coarser**2 - 1) / _FWHM_PER_SD, mode="nearest")
    data = np.pad(data, 1, mode="edge")  # the outer half of border voxels is theirs, not background
    return ndimage.affine_transform(
        data, step[:3, :3], step[:3, 3] + 1 + nudge, shape, np.float32, order=order, mode="constant"
    )


def shifted(brain_image: NDArray, offset: tuple[float, float, float]) -> NDArray[np.float32]:
    """Return a skull-stripped image whose content lies off by less than a voxel; the background 0 stays where it is.

    Lanczos interpolation (3 lobes, which keeps more of the texture than a cubic) over the brain's voxels alone, so that
    the border does not darken. Depends on voxels up to `SHIFT_REACH` away.

    Args:
        brain_image: `(I, J, K)`, 0 outside the brain.
        offset: Voxels along each axis, above -1 and below 1.

    Raises:
        ValueError: An offset of a voxel or more.
    """
    if max(map(abs, offset)) >= 1:
        raise ValueError(f"offset must be below a voxel along each axis, got {offset}")
    inside = brain_image != 0
    moved, share = brain_image.astype(np.float32), inside.astype(np.float32)
    for axis, along in enumerate(offset):
        if along:
            x = np.arange(-SHIFT_REACH, SHIFT_REACH + 1) + along
            weights = np.where(np.abs(x) < SHIFT_REACH, np.sinc(x) * np.sinc(x / SHIFT_REACH), 0)
            moved = ndimage.correlate1d(moved, weights, axis=axis, mode="nearest")
            share = ndimage.correlate1d(share, weights, axis=axis, mode="nearest")
    enough = inside & (share > _LEAST_SHARE)
    brain = np.maximum(moved / np.maximum(share, _LEAST_SHARE), _DARKEST)
    return np.where(enough, brain, brain_image).astype(np.float32)


def carry_mask(mask: NDArray, step: NDArray, shape: tuple[int, int, int]) -> NDArray[np.uint8]:
    """Carry lesions to another grid, each with its volume: none is lost, none grows; see `carry_labels`.

    Args:
        mask: Lesion voxels; lesions are 26-connected.
        step: From target voxels to source voxels.
        shape: Of the target.
    """
    labels, _ = ndimage.label(mask, np.ones((3, 3, 3)))
    return (carry_labels(labels, step, shape) != 0).astype(np.uint8)


def carry_labels(labels: NDArray[np.int32], step: NDArray, shape: tuple[int, int, int]) -> NDArray[np.int32]:
    """Carry numbered lesions to another grid, each with its volume; where two meet, the higher number stays.

    Linear interpolation of each lesion, cut at the level that keeps its volume (at least one voxel): at one half,
    lesions of a few voxels vanish between slices, and nearest neighbours draw the steps of thick slices.

    Args:
        labels: Number of the lesion at each voxel, 0 outside.
        step: From target voxels to source voxels.
        shape: Of the target.
    """
    per_voxel = 1 / abs(np.linalg.det(step[:3, :3]))  # target voxels in a source voxel
    back = np.linalg.inv(step)
    result = np.zeros(shape, np.int32)
    reach = np.ceil(np.linalg.norm(step[:3, :3], axis=1)).astype(int) + 1  # what smoothing and interpolation see
    for number, box in enumerate(ndimage.find_objects(labels), start=1):
        if box is None:
            continue
        low = np.array([s.start for s in box]) - reach
        high = np.array([s.stop for s in box]) + reach
        lesion = np.pad(labels[box] == number, [(r, r) for r in reach])
        ends = np.indices((2, 2, 2)).reshape(3, 8) * (high - low - 1)[:, None] + low[:, None]
        there = back[:3, :3] @ ends + back[:3, 3:]
        first = np.clip(np.floor(there.min(axis=1)).astype(int), 0, shape)
        last = np.clip(np.ceil(there.max(axis=1)).astype(int) + 1, 0, shape)
        if (last <= first).any():
            continue
        local = step.copy()
        local[:3, 3] += step[:3, :3] @ first - low + _NUDGE
        size = last - first
        filled = resample(lesion, local, (int(size[0]), int(size[1]), int(size[2])), order=1)
        centres = back[:3, :3] @ (np.argwhere(lesion) + low).T + back[:3, 3:]
        upper = np.array(shape)[:, None] - 0.5
        inside = int(((centres >= -0.5) & (centres < upper)).all(axis=0).sum())
        if not inside:
            continue
        count = max(1, round(inside * per_voxel))
        best = np.argsort(-filled, axis=None, kind="stable")[:count]
        best = best[filled.ravel()[best] > 0]
        at = np.unravel_index(best, filled.shape)
        result[tuple(a + f for a, f in zip(at, first, strict=True))] = number
    return result
