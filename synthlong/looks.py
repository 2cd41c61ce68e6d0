"""Whether a scan looks like one: FLAIR, skull-stripped, in MNI space."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from synthlong.errors import InputError, InputWarning, short
from synthlong.tissue import is_whole, misplaced

__all__ = ["BRAIN_ML", "check_looks", "is_stripped", "unlike_brain"]

BRAIN_ML = (700, 2200)
"""Volumes that whole brains have."""

_ELSEWHERE_MM = 25
_MOST_CUT = 0.05  # of a face of the grid: a brain stem may be cut there, a neck is wider


def is_stripped(scan: NDArray, voxel_mm3: float) -> bool:
    """Return whether a scan is 0 around what has the volume of a brain."""
    inside = scan != 0
    faces = [np.take(inside, end, axis=axis).mean() for axis in range(3) for end in (0, -1)]
    low, high = BRAIN_ML
    return bool(low <= inside.sum() * voxel_mm3 / 1000 <= high and max(faces) < _MOST_CUT)


def check_looks(
    path: Path,
    values: NDArray[np.float32],
    brain: NDArray[np.bool_],
    maps: tuple[NDArray[np.float32], ...],
    affine: NDArray[np.float64],
) -> None:
    """Warn of scans that are probably not skull-stripped FLAIR in MNI space; refuse those that lie elsewhere."""
    csf, gm, wm = maps
    if (apart_mm := misplaced(brain, affine)) and apart_mm > _ELSEWHERE_MM:
        problem = f"its middle lies {apart_mm:.0f} mm off that of the MNI brain"
        raise InputError(path, problem, "register it to MNI152, as `synthlong prepare` does")
    if text := unlike_brain(values, brain, maps, affine):
        warnings.warn(f"{short(path)}: {text}", InputWarning, stacklevel=3)
    regions = [values[brain & (m > 0.95)] for m in (csf, gm, wm)]
    if min(len(r) for r in regions) < 100:
        return
    dark, gray, white = (float(np.median(r)) for r in regions)
    if dark > 0.9 * white or gray < 0.85 * white:
        medians = f"CSF {dark:.3g}, gray matter {gray:.3g}, white matter {white:.3g}"
        warnings.warn(f"{short(path)}: looks like no FLAIR ({medians})", InputWarning, stacklevel=3)


def unlike_brain(
    values: NDArray[np.float32],
    brain: NDArray[np.bool_],
    maps: tuple[NDArray[np.float32], ...],
    affine: NDArray[np.float64],
) -> str | None:
    """Return what makes a scan look not skull-stripped, or not in MNI space, None if nothing does.

    Args:
        values: Scan, shape `(I, J, K)`, any unit.
        brain: What is taken as its brain.
        maps: Those of `fitted_tissue_maps` for this brain.
        affine: Of the grid.
    """
    if apart_mm := misplaced(brain, affine):
        return f"its middle lies {apart_mm:.0f} mm off that of the MNI brain: not in MNI space?"
    head = ndimage.binary_dilation(sum(maps) > 0.5, iterations=5)
    outside = (brain & ~head).sum() / max(brain.sum(), 1)
    if outside > 0.15:
        return f"{outside:.0%} of its non-zero voxels lie outside the MNI brain: skull, or not in MNI space?"
    return "a shell unlike brain surrounds it: not skull-stripped?" if _has_shell(values, brain) else None


def _has_shell(values: NDArray[np.float32], brain: NDArray[np.bool_]) -> bool:
    """Whether a whole scan is brighter (scalp) or darker (skull) near its surface than deep inside.

    Within 5 to 8 mm of the surface the median of skull-stripped FLAIR is that of the inside.
    """
    solid = ndimage.binary_fill_holes(brain[::2, ::2, ::2])
    if not is_whole(brain) or solid.all():
        return False
    depth_mm = 2 * ndimage.distance_transform_edt(solid)
    layers = ((0, 5), (5, 8), (20, np.inf))
    parts = [values[::2, ::2, ::2][(depth_mm > low) & (depth_mm <= high)] for low, high in layers]
    if min(p.size for p in parts) < 100:
        return False
    rim, below, inside = (float(np.median(p)) for p in parts)
    return rim > 1.3 * inside or below < 0.75 * inside
