"""Masks and labels as they come: on the grid of their scan, of the values they may have, within the brain."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from synthlong.errors import InputError, InputWarning, short
from synthlong.nifti import Volume, read_nifti

__all__ = ["MOST_OUTSIDE", "WRONG_MASK", "check_binary", "check_labels", "check_mask", "clip_to_brain", "read_beside"]

MOST_OUTSIDE = 0.1
"""Share of a mask's voxels that may lie outside the brain."""

WRONG_MASK = "name the lesion mask in column 'mask'"


def read_beside(path: Path, image: Volume, *, prefer: str | None = None, allow_empty: bool = True) -> Volume:
    """Read a volume that must lie on the grid of `image`.

    Raises:
        InputError: It cannot be read, or its shape or affine is another.
    """
    volume = read_nifti(path, prefer=prefer, allow_empty=allow_empty)
    if volume.data.shape != image.data.shape:
        problem = f"shape {volume.data.shape}, but {short(image.path)} has {image.data.shape}"
        raise InputError(path, problem, "resample one onto the other's grid")
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in image.data.shape], indexing="ij")).reshape(3, -1)
    apart = np.linalg.inv(image.affine) @ volume.affine
    moved = apart[:3, :3] @ corners + apart[:3, 3:] - corners
    if np.abs(moved).max() > 1e-3:
        problem = f"its grid lies {np.abs(moved).max():.3g} voxel off that of {short(image.path)}"
        raise InputError(path, problem, "resample one onto the other's grid")
    return volume


def check_binary(volume: Volume) -> None:
    """Raise an InputError unless all voxels are 0 or one other value, a positive one."""
    positive = volume.data[volume.data != 0]
    if positive.size and (positive.min() != positive.max() or positive.min() < 0):
        problem = f"not a binary mask (values from {positive.min():g} to {positive.max():g} beside 0)"
        raise InputError(volume.path, problem, "threshold it so that it holds 0 and one other value")


def check_labels(tissue: Volume) -> None:
    """Raise an InputError unless all voxels are 0, 1, 2 or 3."""
    if not np.isin(tissue.data, (0, 1, 2, 3)).all():
        raise InputError(tissue.path, "tissue labels other than 0-3", "use 0 background, 1 CSF, 2 GM, 3 WM")


def check_mask(mask: Volume, image: Volume) -> None:
    """Raise an InputError unless a volume can be the lesion mask of a scan."""
    if mask.sha256 == image.sha256 or np.array_equal(mask.data, image.data):
        raise InputError(mask.path, "the mask is the FLAIR itself", WRONG_MASK)
    check_binary(mask)
    lesion, scan = mask.data != 0, image.data != 0
    if lesion.any() and lesion.sum() > 0.5 * scan.sum():
        problem = f"the mask covers {lesion.sum() / scan.sum():.0%} of the scan, like a brain mask"
        raise InputError(mask.path, problem, WRONG_MASK)


def clip_to_brain(mask: Volume, brain: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return a mask's lesions within the brain, with a warning if some are not; a tenth outside is an InputError."""
    lesion = mask.data != 0
    outside = int((lesion & ~brain).sum())
    if outside > MOST_OUTSIDE * lesion.sum():
        problem = f"{outside} of {lesion.sum()} lesion voxels lie outside the brain"
        raise InputError(mask.path, problem, "check that mask and scan belong together")
    if outside:
        text = f"{short(mask.path)}: {outside} of {lesion.sum()} lesion voxels outside the brain are left out"
        warnings.warn(text, InputWarning, stacklevel=3)
    return lesion & brain
