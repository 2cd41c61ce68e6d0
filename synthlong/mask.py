"""Masks and labels as they come: on the grid of their scan, of the values they may have, within the brain."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from synthlong.errors import InputError, InputWarning, short
from synthlong.nifti import TOLERANCE_MM, Volume, corner_distance_mm, read_nifti

__all__ = [
    "MOST_OUTSIDE",
    "WRONG_MASK",
    "check_binary",
    "check_csf",
    "check_labels",
    "check_mask",
    "clip_to_brain",
    "read_beside",
]

MOST_OUTSIDE = 0.1
"""Share of a mask's voxels that may lie outside the brain."""

_FEW_OUTSIDE = 10
_FEWEST_LABELLED = 100

WRONG_MASK = "name the lesion mask in column 'mask'"
_LABELS = "use 0 background, 1 CSF, 2 GM, 3 WM, or leave it out"


def read_beside(path: Path, image: Volume, *, prefer: str | None = None, allow_empty: bool = True) -> Volume:
    """Read a volume that must lie on the grid of `image`.

    Raises:
        InputError: It cannot be read, or its shape or affine is another.
    """
    volume = read_nifti(path, prefer=prefer, allow_empty=allow_empty)
    if volume.data.shape != image.data.shape:
        problem = f"shape {volume.data.shape}, but {short(image.path)} has {image.data.shape}"
        raise InputError(path, problem, "resample one onto the other's grid")
    apart_mm = corner_distance_mm(image.data.shape, volume.affine, image.affine)
    if apart_mm > TOLERANCE_MM:
        problem = f"its grid lies {apart_mm:.3g} mm off that of {short(image.path)}"
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
        raise InputError(tissue.path, "tissue labels other than 0-3", _LABELS)


def check_csf(tissue: Volume, image: Volume) -> None:
    """Raise an InputError if label 1 is not the darkest in FLAIR: BIDS and SPM number gray and white matter first."""
    medians = [
        float(np.median(values)) if values.size >= _FEWEST_LABELLED else None
        for values in (image.data[tissue.data == label] for label in (1, 2, 3))
    ]
    csf, *matter = medians
    if csf is not None and any(m is not None and m < csf for m in matter):
        said = ", ".join(f"{label} {m:.4g}" for label, m in enumerate(medians, start=1) if m is not None)
        raise InputError(tissue.path, f"label 1 is not the darkest (medians in FLAIR: {said})", _LABELS)


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
    """Return a mask's lesions within the brain, with a warning if some are not.

    Raises:
        InputError: All of them lie outside, or a tenth, which is more than a few voxels.
    """
    lesion = mask.data != 0
    outside = int((lesion & ~brain).sum())
    if outside > max(MOST_OUTSIDE * lesion.sum(), min(_FEW_OUTSIDE, lesion.sum() - 1)):
        problem = f"{outside} of {lesion.sum()} lesion voxels lie outside the brain"
        raise InputError(mask.path, problem, "check that mask and scan belong together")
    if outside:
        text = f"{short(mask.path)}: {outside} of {lesion.sum()} lesion voxels outside the brain are left out"
        warnings.warn(text, InputWarning, stacklevel=3)
    return lesion & brain
