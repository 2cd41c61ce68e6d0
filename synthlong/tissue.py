"""Tissue of a FLAIR scan: a Gaussian mixture under the ICBM maps as prior.

The maps say where white and gray matter usually are, the scan says where this patient's ventricles and sulci
are. Expectation-maximisation with spatial priors, as in Ashburner & Friston (2005), Unified segmentation,
doi 10.1016/j.neuroimage.2005.02.018, without the deformation.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from synthlong.atlas import mni_affine, sample_map, tissue_maps

__all__ = ["CSF", "GRAY", "WHITE", "classify_tissue", "fitted_tissue_maps", "is_whole", "misplaced"]

CSF, GRAY, WHITE = 1, 2, 3

_CSF_FLOOR, _MATTER_FLOOR = 0.2, 0.05  # how much the scan may overrule the maps
_ITERATIONS = 25
_EVERY = 10
_TOUCHED = 0.05  # of the largest cross-section
_FARTHEST_MM, _SMALLEST_ML = 12.0, 500


def is_whole(brain: NDArray[np.bool_]) -> bool:
    """Return whether the grid cuts nothing off: next to no brain lies at its border, as where it just fits."""
    sections = [brain.sum(axis=tuple(a for a in range(3) if a != axis)) for axis in range(3)]
    return all(max(areas[0], areas[-1]) <= _TOUCHED * areas.max() for areas in sections)


def fitted_tissue_maps(brain: NDArray[np.bool_], affine: NDArray[np.float64]) -> tuple[NDArray[np.float32], ...]:
    """Return the ICBM maps of CSF, gray and white matter on a scan's grid, scaled to the scan's brain.

    Scans that were registered rigidly keep their own size, 10 to 20 % a side off the template. Where a whole
    brain is more than 10 % off in volume, the maps are shifted and scaled, axis by axis, to the mean and SD
    of its coordinates; not where it is `misplaced`.

    Args:
        brain: Brain voxels, shape `(I, J, K)`.
        affine: Of the grid, axis-aligned at 1 mm.
    """
    maps = tissue_maps()
    home = mni_affine()
    if is_whole(brain) and misplaced(brain, affine) is None:
        (centre, extent), (usual_centre, usual_extent) = _lies(brain, affine), _usual()
        scale = extent / usual_extent
        if abs(scale.prod() - 1) > 0.1 and (scale > 0.7).all() and (scale < 1.4).all():
            fit = np.eye(4)
            fit[:3, :3] = np.diag(scale)
            fit[:3, 3] = centre - scale * usual_centre
            home = fit @ home
    return tuple(np.clip(sample_map(m, home, brain.shape, affine), 0, 1) for m in maps)


def misplaced(brain: NDArray[np.bool_], affine: NDArray[np.float64]) -> float | None:
    """Return how far a whole brain's centre lies from that of the template, mm, if that is too far for MNI space.

    The centres of registered brains were 0 to 6 mm apart; 12 is too far. None where part of a brain is cut off.
    """
    if brain.sum() < _SMALLEST_ML * 1000 or not is_whole(brain):
        return None
    apart_mm = float(np.linalg.norm(_lies(brain, affine)[0] - _usual()[0]))
    return apart_mm if apart_mm > _FARTHEST_MM else None


def _lies(brain: NDArray[np.bool_], affine: NDArray[np.float64]) -> tuple[NDArray, NDArray]:
    """Return mean and SD of the coordinates of a brain along each axis."""
    at = np.argwhere(brain[::2, ::2, ::2]) * 2.0 + affine[:3, 3]
    return at.mean(axis=0), at.std(axis=0)


@cache
def _usual() -> tuple[NDArray, NDArray]:
    _, gray, white = tissue_maps()
    return _lies(gray + white > 0.5, mni_affine())


def classify_tissue(
    flair: NDArray[np.float32],
    brain: NDArray[np.bool_],
    lesions: NDArray[np.bool_],
    maps: tuple[NDArray[np.float32], ...],
) -> NDArray[np.uint8]:
    """Label each brain voxel as CSF (1), gray (2) or white matter (3); lesions count as white matter.

    Args:
        flair: Scan, shape `(I, J, K)`, any positive unit; CSF is dark.
        brain: Brain voxels.
        lesions: Lesion voxels.
        maps: Probability of CSF, gray and white matter on the same grid.
    """
    smooth = ndimage.gaussian_filter(flair, 0.6)
    at = brain & ~lesions
    x = smooth[at]
    x = np.minimum(x, np.float32(np.percentile(x, 99))) / np.float32(np.median(x))
    usual = np.stack([ndimage.gaussian_filter(m, 2.0)[at] for m in maps])
    prior = (usual + _CSF_FLOOR) / (usual.sum(axis=0) + 3 * _CSF_FLOOR)
    few, few_prior = x[::_EVERY], prior[:, ::_EVERY]
    mean, sd = _start(few, few_prior)
    for _ in range(_ITERATIONS):
        belief = few_prior * _likelihood(few, mean, sd)
        belief /= np.maximum(belief.sum(axis=0), 1e-12)
        total = np.maximum(belief.sum(axis=1), 1e-6)
        mean = (belief @ few) / total
        sd = np.maximum(np.sqrt((belief * (few - mean[:, None]) ** 2).sum(axis=1) / total), 0.03)
        mean[0] = min(mean[0], 0.75 * mean[1:].min())  # CSF is dark in FLAIR, whatever the maps say
    belief = prior * _likelihood(x, mean, sd)
    is_csf = belief[0] > belief[1:].max(axis=0)
    # beyond gray's and white's means (partial volume, unlabelled lesions) intensity says no more than at them
    between = np.clip(x, mean[1:].min(), mean[1:].max())
    matter = (usual[1:] + _MATTER_FLOOR) * _likelihood(between, mean, sd)[1:]
    labels = np.zeros(flair.shape, np.uint8)
    labels[at] = np.where(is_csf, CSF, GRAY + np.argmax(matter, axis=0))
    labels[brain & lesions] = WHITE
    return labels


def _start(x: NDArray[np.float32], prior: NDArray[np.float32]) -> tuple[NDArray, NDArray]:
    weight = prior**2
    mean = (weight @ x) / weight.sum(axis=1)
    mean[0] = min(mean[0], float(np.percentile(x, 5)))
    return mean, np.array([0.15, 0.12, 0.10])


def _likelihood(x: NDArray[np.float32], mean: NDArray, sd: NDArray) -> NDArray[np.float64]:
    """Gaussian densities `(3, n)`; below its mean CSF stays as likely as at it."""
    z = (x[None] - mean[:, None]) / sd[:, None]
    z[0] = np.maximum(z[0], 0)
    return np.exp(-0.5 * z**2) / sd[:, None] + 1e-12
