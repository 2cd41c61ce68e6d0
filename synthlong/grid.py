"""The working grid: RAS+ at 1 mm, and the way of a file's voxels there."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from synthlong.errors import InputError, InputWarning, short
from synthlong.nifti import Volume
from synthlong.resampling import carry_mask, resample

__all__ = ["SMALLEST_SIDE_MM", "WorkingGrid", "check_extent", "lies_along_axes"]

SMALLEST_SIDE_MM = 16
_LARGEST_SIDE_MM = 512


def lies_along_axes(volume: Volume) -> bool:
    """Whether a volume's voxels lie along the axes of space in steps of 1 mm, in any of the 48 orientations."""
    _, turned = _turned(volume)
    return bool(np.abs(turned[:3, :3] - np.eye(3)).max() < 1e-3)


def check_extent(volume: Volume) -> None:
    """Raise an InputError unless a volume is of a head's size, or of a part of one."""
    extent = np.array(volume.data.shape) * np.linalg.norm(volume.affine[:3, :3], axis=0)
    if extent.min() < SMALLEST_SIDE_MM - 0.5:
        way = f"pass at least {SMALLEST_SIDE_MM} mm a side"
        raise InputError(volume.path, f"the scan is only {extent.min():.0f} mm wide", way)
    if extent.max() > _LARGEST_SIDE_MM:
        raise InputError(volume.path, f"the scan spans {extent.max():.0f} mm", "check the header's voxel size")


@dataclass(frozen=True, eq=False)
class WorkingGrid:
    """The way from a file's voxels to RAS+ at 1 mm: a flip or permutation, then, if needed, resampling.

    Args:
        orientation: The flip or permutation, as nibabel has it.
        reoriented: Affine of the volume after that.
        shape: The working grid, voxels of 1 mm.
        affine: Of the working grid.
        keeps: Whether the reoriented volume lies on it already.
    """

    orientation: NDArray[Any]
    reoriented: NDArray[np.float64]
    shape: tuple[int, int, int]
    affine: NDArray[np.float64]
    keeps: bool

    @classmethod
    def of(cls, image: Volume) -> WorkingGrid:
        """Return the grid that holds all of a volume; an InputError if its size cannot be that of a head."""
        orientation, affine = _turned(image)
        shape = nib.orientations.apply_orientation(image.data, orientation).shape
        sides = np.linalg.norm(affine[:3, :3], axis=0)
        if not image.coded:
            warnings.warn(f"{short(image.path)}: neither sform nor qform is set", InputWarning, stacklevel=3)
        if sides.max() > 3.01 * sides.min():
            text = f"very anisotropic voxels, {' x '.join(f'{s:.2g}' for s in sides)} mm"
            warnings.warn(f"{short(image.path)}: {text}", InputWarning, stacklevel=3)
        check_extent(image)
        if lies_along_axes(image):
            return cls(orientation, affine, shape, affine, keeps=True)
        corners = np.array(np.meshgrid(*[(-0.5, n - 0.5) for n in shape], indexing="ij")).reshape(3, -1)
        world = affine[:3, :3] @ corners + affine[:3, 3:]
        first, last = np.ceil(world.min(axis=1) - 1e-3), np.floor(world.max(axis=1) + 1e-3)
        size = (last - first + 1).astype(int)
        target = np.eye(4)
        target[:3, 3] = first
        return cls(orientation, affine, (int(size[0]), int(size[1]), int(size[2])), target, keeps=False)

    def _turn(self, data: NDArray) -> NDArray:
        return np.ascontiguousarray(nib.orientations.apply_orientation(data, self.orientation))

    @property
    def _step(self) -> NDArray[np.float64]:
        return np.linalg.inv(self.reoriented) @ self.affine

    def _interpolate(self, data: NDArray, order: int, *, nudge: float = 0.0) -> NDArray[np.float32]:
        return resample(data, self._step, self.shape, order=order, nudge=nudge)

    def resample(self, data: NDArray) -> NDArray[np.float32]:
        """Interpolate a scan by cubic splines."""
        data = self._turn(data)
        return data.astype(np.float32) if self.keeps else self._interpolate(data, 3)

    def carry_lesions(self, data: NDArray) -> NDArray[np.bool_]:
        """Resample a lesion mask; each lesion keeps its volume."""
        data = self._turn(data) != 0
        return data if self.keeps else carry_mask(data, self._step, self.shape) != 0

    def resample_mask(self, data: NDArray) -> NDArray[np.bool_]:
        """Resample a brain mask; the nudge decides between voxels equally near alike on both sides."""
        data = self._turn(data) != 0
        if self.keeps:
            return data
        finer = np.linalg.norm(self.reoriented[:3, :3], axis=0).min() < 0.99
        return self._interpolate(data, int(finer), nudge=1e-3) >= 0.5

    def resample_labels(self, data: NDArray) -> NDArray[np.uint8]:
        """Take the nearest label."""
        data = self._turn(data)
        return (data if self.keeps else self._interpolate(data, 0)).astype(np.uint8)


def _turned(volume: Volume) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """Return the flip or permutation that brings a volume nearest to RAS+, and its affine after that."""
    orientation = nib.orientations.io_orientation(volume.affine)
    return orientation, volume.affine @ nib.orientations.inv_ornt_aff(orientation, volume.data.shape)
