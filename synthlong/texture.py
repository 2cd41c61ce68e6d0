"""Texture: the noise and grain that a network trained on squared error leaves out.

The mean of all likely tissues is smooth. What is missing is put back as Gaussian noise with the spread and the
neighbour correlation of the tissue around, as much of it as the fill lacks at each voxel.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from synthlong.hole import FLUID

__all__ = ["Texture", "roughen", "texture_of"]

_SMOOTH, _AROUND = 1.5, 1.5
_FEWEST = 500
_WIDTHS = np.concatenate([[0.0], np.linspace(0.3, 3, 55)])


@cache
def _correlations() -> NDArray[np.float64]:
    """Return the neighbour correlation of white noise under a sampled Gaussian of each of `_WIDTHS`."""
    at = np.arange(-12, 13)
    kernels = [np.exp(-0.5 * (at / w) ** 2) if w else (at == 0).astype(float) for w in _WIDTHS]
    return np.array([(k[1:] * k[:-1]).sum() / (k**2).sum() for k in kernels])


@dataclass(frozen=True)
class Texture:
    """Grain of a scan's tissue.

    Args:
        sd: Standard deviation about the local mean, brain mode 1.
        correlation: Between neighbours along each axis, in [0, 1).
    """

    sd: float
    correlation: tuple[float, float, float]

    def noise(self, shape: tuple[int, ...], seed: int) -> NDArray[np.float32]:
        """Return white noise under Gaussians as wide as give this correlation, SD 1."""
        white = np.random.default_rng(np.random.SeedSequence(seed)).standard_normal(shape, np.float32)
        widths = np.interp(self.correlation, _correlations(), _WIDTHS)
        grain = ndimage.gaussian_filter(white, widths, mode="wrap")
        return grain / np.float32(max(float(grain.std()), 1e-6))


def texture_of(x: NDArray, leave_out: NDArray) -> Texture:
    """Measure the grain of an image's tissue, away from CSF, background and `leave_out`.

    Args:
        x: Image, shape `(I, J, K)`, brain mode 1, background 0.
        leave_out: Voxels that do not count, zero or not.
    """
    tissue = (x >= FLUID) & (np.asarray(leave_out) == 0)
    flat = next((f for n in (3, 2, 1) if (f := ndimage.binary_erosion(tissue, iterations=n)).sum() >= _FEWEST), tissue)
    if flat.sum() < 2:
        return Texture(0.0, (0.0, 0.0, 0.0))
    rest = x - ndimage.gaussian_filter(x, _SMOOTH)
    sd = 1.4826 * float(np.median(np.abs(rest[flat])))
    rest = np.clip(rest, -3 * sd, 3 * sd)
    correlation = []
    for axis in range(3):
        first, last = np.take(rest, range(x.shape[axis] - 1), axis), np.take(rest, range(1, x.shape[axis]), axis)
        both = np.take(flat, range(x.shape[axis] - 1), axis) & np.take(flat, range(1, x.shape[axis]), axis)
        power = float((first[both] ** 2).sum())
        correlation.append(min(max(float((first[both] * last[both]).sum()) / power, 0.0), 0.95) if power else 0.0)
    return Texture(sd, (correlation[0], correlation[1], correlation[2]))


def roughen(x: NDArray[np.float32], weight: NDArray, texture: Texture, *, seed: int) -> NDArray[np.float32]:
    """Return an image with grain in its hole, where it has less than the texture says.

    Args:
        x: Image with a smooth fill, shape `(I, J, K)`.
        weight: The hole, in [0, 1]; where it is 0 the image stays bit for bit.
        texture: Of the tissue around.
        seed: Seed of the noise.
    """
    rest = x - ndimage.gaussian_filter(x, _SMOOTH)
    there = ndimage.gaussian_filter(rest**2, _AROUND)
    lacking = np.sqrt(np.maximum(texture.sd**2 - there, 0))
    rough = np.maximum(x + weight * lacking * texture.noise(x.shape, seed), 0)
    return np.where(weight > 0, rough, x).astype(np.float32, copy=False)
