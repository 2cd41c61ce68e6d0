"""Numbers of one patch: what a lesion or a fill looks like, whatever its size and place."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from synthlong.hole import FLUID
from synthlong.profile import depth_in

from .material import Patch

__all__ = ["FEATURES", "appearance", "features"]

_DEPTHS = np.arange(-4.5, 3.0, 1.0)
FEATURES = (
    *(f"excess at {d:g}" for d in _DEPTHS),
    *(f"SD at {d:g}" for d in (-2.5, -1.5, -0.5, 0.5, 1.5)),
    "contrast",
    "edge width",
    "grain",
    "grain / around",
    "grain around",
    *(f"neighbours {a}" for a in "xyz"),
    "coarse structure",
    "skewness",
    "gradient at the border",
    "SD around",
    "fluid around",
)


def features(patch: Patch) -> NDArray[np.float64]:
    """Return the numbers that `FEATURES` names; intensities are taken against the tissue around."""
    x, mask = patch.image.astype(np.float64), patch.mask
    depth = depth_in(mask)
    brain = x > 0
    ring = brain & (depth < -3) & (depth > -7) & (x >= FLUID)
    level = float(np.median(x[ring])) if ring.any() else 1.0
    excess = []
    for d in _DEPTHS:
        here = brain & (np.abs(depth - d) <= 0.5) & (mask | (x >= FLUID))
        excess.append(x[here].mean() - level if here.any() else (excess[-1] if excess else 0.0))
    spreads = []
    for d in (-2.5, -1.5, -0.5, 0.5, 1.5):
        here = brain & (np.abs(depth - d) <= 0.5) & (mask | (x >= FLUID))
        spreads.append(x[here].std() if here.sum() > 1 else (spreads[-1] if spreads else 0.0))
    fine = x - ndimage.gaussian_filter(x, 1.0)
    coarse = ndimage.gaussian_filter(x, 1.0) - ndimage.gaussian_filter(x, 2.5)
    inside = ndimage.binary_dilation(mask) & brain
    grain, around = fine[inside].std(), fine[ring].std() if ring.any() else 0.0
    inner = x[mask]
    shape = ((inner - inner.mean()) ** 3).mean() / max(inner.std(), 1e-3) ** 3
    steps = np.sqrt(sum(g**2 for g in np.gradient(x)))
    border = brain & (np.abs(depth) < 1) & (x >= FLUID)
    shell = brain & (depth < -1) & (depth > -5)
    numbers = [
        *excess,
        *spreads,
        inner.mean() - level,
        edge_width(np.array(excess)),
        grain,
        grain / max(around, 1e-3),
        around,
        *(neighbours(fine, inside, axis) for axis in range(3)),
        coarse[inside].std(),
        shape,
        steps[border].mean() if border.any() else 0.0,
        x[ring].std() if ring.any() else 0.0,
        (x[shell] < FLUID).mean() if shell.any() else 0.0,
    ]
    return np.array(numbers)


def appearance(patch: Patch) -> dict[str, float]:
    """Return the numbers that the tables speak of: contrast, edge width (10-90 %, voxels), texture (SD)."""
    found = dict(zip(FEATURES, features(patch), strict=True))
    return {"contrast": found["contrast"], "edge": found["edge width"], "texture": found["grain"]}


def edge_width(excess: NDArray[np.float64]) -> float:
    """Return the distance over which a profile rises from 10 % to 90 % of its height, voxels."""
    outside, top = excess[1:3].mean(), excess[5:].max()
    rising = np.maximum.accumulate((excess - outside) / max(top - outside, 1e-3))
    at = np.interp([0.1, 0.9], rising + 1e-6 * np.arange(len(rising)), _DEPTHS)
    return float(at[1] - at[0])


def neighbours(rest: NDArray, where: NDArray[np.bool_], axis: int, lag: int = 1) -> float:
    """Return the correlation of voxels `lag` apart along an axis, both of them in `where`."""
    n = rest.shape[axis]
    first, last = (np.take(rest, range(a, n - lag + a), axis) for a in (0, lag))
    both = np.take(where, range(n - lag), axis) & np.take(where, range(lag, n), axis)
    if both.sum() < 4:
        return 0.0
    a, b = first[both], last[both]
    return float((a * b).mean() / max(0.5 * ((a**2).mean() + (b**2).mean()), 1e-9))
