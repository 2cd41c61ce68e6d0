"""The hole: voxels of a scan whose content a network replaces.

A lesion is wider than its expert mask (partial volume), so the hole reaches a little beyond it and
fades out; CSF and background beside a lesion stay, and with them the walls of the ventricles. Inside the
hole the networks see Gaussian noise with the image's mean and SD (Kamraoui et al. 2022, section 2.3.1, doi
10.3389/fnimg.2022.948235), and beside it a smooth first guess: the harmonic function that continues the
tissue around, to which they add what is missing.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from synthlong.boxes import box_of
from synthlong.compiling import compiled

__all__ = ["FLUID", "REACH", "corrupt", "faded", "first_guess", "hole_in", "noise", "soft_hole"]

REACH = 3
"""Voxels by which a hole can reach beyond its mask: outside that distance nothing is ever changed."""

FLUID = 0.65
"""Darker than this (brain mode 1) is CSF in FLAIR."""

_FULL, _ZERO = 1.0, 2.5


def soft_hole(mask: NDArray) -> NDArray[np.float32]:
    """Return the weight in [0, 1] with which each voxel is replaced.

    1 on the mask and its face neighbours, then a smooth step down to 0 at 2.5 voxels from the mask.

    Args:
        mask: Lesion voxels, shape `(I, J, K)`, zero or not.
    """
    return faded(np.asarray(mask) != 0, full=_FULL, zero=_ZERO)


def hole_in(x: NDArray, mask: NDArray) -> NDArray[np.float32]:
    """Return `soft_hole` of a mask, 0 on background, and on CSF beside the mask.

    Args:
        x: Image, shape `(I, J, K)`, brain mode 1, background 0.
        mask: Lesion voxels.
    """
    return soft_hole(mask) * ((x >= FLUID) | (np.asarray(mask) != 0) & (x > 0))


def faded(mask: NDArray[np.bool_], *, full: float, zero: float) -> NDArray[np.float32]:
    """Return 1 up to `full` voxels from a mask, and a smooth step down to 0 at `zero`, at most `REACH`."""
    steps = np.argwhere(np.ones((2 * REACH + 1,) * 3)) - REACH
    x = np.clip((zero - np.sqrt((steps**2).sum(axis=1))) / (zero - full), 0, 1)
    values = (x * x * (3 - 2 * x)).astype(np.float32)
    weight = np.zeros(mask.shape, np.float32)
    _stamp(weight, np.argwhere(mask), steps[values > 0], values[values > 0])
    return weight


def noise(shape: tuple[int, ...], seed: int, *, mean: float, sd: float) -> NDArray[np.float32]:
    """Return Gaussian noise that depends on nothing but its arguments."""
    white = np.random.default_rng(np.random.SeedSequence(seed)).standard_normal(shape, np.float32)
    return np.float32(mean) + np.float32(sd) * white


def first_guess(
    x: NDArray, weight: NDArray, *, tissue: NDArray[np.bool_] | None = None, sweeps: int = 60
) -> NDArray[np.float32]:
    """Return `x` with the hole filled smoothly from its rim (the discrete Laplace equation).

    Args:
        x: Image, shape `(I, J, K)`.
        weight: The hole; voxels above 0 are solved for, the others stay.
        tissue: Voxels beside the hole that are continued into it; None: all but CSF and background.
        sweeps: Sweeps of successive over-relaxation (factor 1.8); 60 settle holes about 20 voxels wide.
    """
    filled = np.ascontiguousarray(x, np.float32).copy()
    if not (weight > 0).any():
        return filled
    box = box_of(weight > 0, 2)
    part, inside = np.ascontiguousarray(filled[box]), np.ascontiguousarray(weight[box] > 0)
    usable = part >= FLUID if tissue is None else tissue[box]
    rim = ndimage.binary_dilation(inside, iterations=2) & ~inside & usable
    part[inside] = part[rim].mean() if rim.any() else 0.0
    _relax(part, usable | inside, np.argwhere(inside), sweeps, np.float32(1.8))
    filled[box] = part
    return filled


def corrupt(
    x: NDArray,
    weight: NDArray,
    region: NDArray,
    *,
    seed: int,
    tissue: NDArray[np.bool_] | None = None,
    guess: NDArray | None = None,
) -> NDArray[np.float32]:
    """Return what a network sees of an image with a hole.

    Args:
        x: Image, shape `(I, J, K)`, brain mode 1, background 0.
        weight: The hole.
        region: What the network is told of the hole: `weight` itself, or the lesion to paint.
        seed: Seed of the noise.
        tissue: As for `first_guess`.
        guess: A `first_guess` made already, of more than this part of an image; None: make it here.

    Returns:
        `(3, I, J, K)`: the image with noise in the hole, with the first guess in the hole, the region.
    """
    rest = x[(weight == 0) & (x > 0)]
    mean, sd = (float(rest.mean()), float(rest.std())) if rest.size else (1.0, 0.2)
    noisy = x + weight * (noise(x.shape, seed, mean=mean, sd=sd) - x)
    guess = first_guess(x, weight, tissue=tissue) if guess is None else guess
    return np.stack([noisy, guess, region]).astype(np.float32, copy=False)


@compiled()
def _stamp(weight, where, steps, values):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Raise `weight` to `values` (m,) at the offsets `steps` (m, 3) from each voxel of `where` (n, 3)."""
    ni, nj, nk = weight.shape
    for n in range(where.shape[0]):
        for m in range(steps.shape[0]):
            i, j, k = where[n, 0] + steps[m, 0], where[n, 1] + steps[m, 1], where[n, 2] + steps[m, 2]
            if 0 <= i < ni and 0 <= j < nj and 0 <= k < nk and values[m] > weight[i, j, k]:
                weight[i, j, k] = values[m]


@compiled()
def _relax(x, known, where, sweeps, omega):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Gauss-Seidel with over-relaxation on the voxels `where` (n, 3); neighbours not `known` are skipped."""
    ni, nj, nk = x.shape
    for _ in range(sweeps):
        for n in range(where.shape[0]):
            i, j, k = where[n, 0], where[n, 1], where[n, 2]
            total, count = np.float32(0), 0
            if i > 0 and known[i - 1, j, k]:
                total += x[i - 1, j, k]
                count += 1
            if i + 1 < ni and known[i + 1, j, k]:
                total += x[i + 1, j, k]
                count += 1
            if j > 0 and known[i, j - 1, k]:
                total += x[i, j - 1, k]
                count += 1
            if j + 1 < nj and known[i, j + 1, k]:
                total += x[i, j + 1, k]
                count += 1
            if k > 0 and known[i, j, k - 1]:
                total += x[i, j, k - 1]
                count += 1
            if k + 1 < nk and known[i, j, k + 1]:
                total += x[i, j, k + 1]
                count += 1
            if count:
                x[i, j, k] += omega * (total / count - x[i, j, k])
