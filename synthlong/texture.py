"""Texture: the noise and grain that a network trained on squared error leaves out.

The mean of all likely tissues is smooth. What is missing is put back as Gaussian noise with the spread and the
neighbour correlation of the tissue around, as much of it as the fill lacks at each voxel: gray matter has more of it
than white matter.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from synthlong.hole import FLUID

__all__ = ["Texture", "mottle", "roughen", "texture_of"]

_SMOOTH, _AROUND, _NEARBY = 1.5, 1.5, 4.0
_FEWEST = 500
_FEW = 0.01
_COARSE = 1.2
_SKEW = 0.4
_FINE = 1.3
_WIDTHS = np.concatenate([[0.0], np.linspace(0.3, 3, 55)])


@cache
def _overlaps() -> NDArray[np.float64]:
    """Return products of kernels with themselves along an axis, at lags 0 and 1, `(2, 3, len(_WIDTHS))`.

    White noise under a Gaussian of each of `_WIDTHS`, less the same under another Gaussian of `_SMOOTH`, has the
    autocorrelation `first - 2 * second + third`, each a product over the axes.
    """
    at = np.arange(-16, 17)

    def gaussian(width: float) -> NDArray[np.float64]:
        kernel = np.exp(-0.5 * (at / width) ** 2) if width else (at == 0).astype(float)
        return kernel / kernel.sum()

    found = np.empty((2, 3, len(_WIDTHS)))
    for n, width in enumerate(_WIDTHS):
        plain = gaussian(width)
        smooth = np.convolve(plain, gaussian(_SMOOTH), mode="same")
        for m, (one, other) in enumerate(((plain, plain), (plain, smooth), (smooth, smooth))):
            found[:, m, n] = one @ other, (one[1:] @ other[:-1] + one[:-1] @ other[1:]) / 2
    return found


_SIGNS = np.array([1.0, -2.0, 1.0])


@dataclass(frozen=True)
class Texture:
    """Grain of a scan's tissue.

    Args:
        sd: Standard deviation about the local mean (a Gaussian of SD 1.5 voxels), brain mode 1.
        correlation: Of that between neighbours along each axis, in [0, 1).
    """

    sd: float
    correlation: tuple[float, float, float]

    @cached_property
    def widths(self) -> tuple[float, float, float]:
        """SD of the Gaussians under which white noise has this correlation about its local mean."""
        table = _overlaps()
        at = [int(np.argmin(np.abs(_WIDTHS - 0.6)))] * 3
        for _ in range(6):
            for axis in range(3):
                others = [table[0, :, at[a]] for a in range(3) if a != axis]
                beside = _SIGNS * others[0] * others[1]
                correlation = (beside @ table[1]) / (beside @ table[0])
                at[axis] = int(np.argmin(np.abs(correlation - self.correlation[axis])))
        return float(_WIDTHS[at[0]]), float(_WIDTHS[at[1]]), float(_WIDTHS[at[2]])

    @property
    def whole_sd(self) -> float:
        """Standard deviation of such noise, not only about its local mean."""
        return self.sd / max(self.share, 1e-6)

    @cached_property
    def share(self) -> float:
        """SD about the local mean of such noise whose whole SD is 1."""
        products = np.prod([_overlaps()[0, :, np.searchsorted(_WIDTHS, w)] for w in self.widths], axis=0)
        return float(np.sqrt((_SIGNS @ products) / products[0]))

    def noise(self, shape: tuple[int, ...], seed: int) -> NDArray[np.float32]:
        """Return noise of this correlation, its SD about the local mean 1."""
        white = np.random.default_rng(np.random.SeedSequence(seed)).standard_normal(shape, np.float32)
        grain = ndimage.gaussian_filter(white, self.widths, mode="wrap")
        return grain / np.float32(max(float(grain.std()) * self.share, 1e-6))


def texture_of(x: NDArray, leave_out: NDArray) -> Texture:
    """Measure the grain of an image's tissue, away from CSF, background and `leave_out`.

    Args:
        x: Image, shape `(I, J, K)`, brain mode 1, background 0.
        leave_out: Voxels that do not count, zero or not.
    """
    flat = _away(x, leave_out)
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
    """Return an image with grain in its hole, where it has less than the tissue nearby.

    Args:
        x: Image with a smooth fill, shape `(I, J, K)`.
        weight: The hole, in [0, 1]; where it is 0 the image stays bit for bit.
        texture: Of the image's tissue.
        seed: Seed of the noise.
    """
    tissue = (x >= FLUID) | (weight > 0)  # a ventricle's wall is no grain
    rest = x - _local_mean(x, tissue, _SMOOTH)
    nearby, there = _grain_nearby(rest, _away(x, weight), texture), _grain_in_fill(rest, weight)
    lacking = np.sqrt(np.maximum(nearby - there, 0))
    return _added(x, weight, lacking * texture.noise(x.shape, seed))


def mottle(
    x: NDArray[np.float32], weight: NDArray, texture: Texture, *, spread: NDArray, there: NDArray, seed: int
) -> NDArray[np.float32]:
    """Return an image with a lesion's unevenness in its hole, as strong as is asked for at each voxel.

    Up to 1.3 times the tissue's own SD is grain as the tissue's; the rest is coarser (white noise under a Gaussian of
    at least 1.2 voxels). Both are skewed as a log-normal whose logarithm has an SD of 0.4: real lesions have more
    bright spots than dark ones.

    Args:
        x: Image with a smooth lesion, shape `(I, J, K)`.
        weight: The hole, in [0, 1]; where it is 0 the image stays bit for bit.
        texture: Of the tissue around.
        spread: SD of the lesion about its profile, at each voxel.
        there: What the smooth lesion differs by from its profile.
        seed: Seed of the noise.
    """
    lacking = np.maximum(spread**2 - ndimage.gaussian_filter(there**2, _AROUND), 0)
    fine = np.minimum(lacking, (_FINE * texture.whole_sd) ** 2)
    white = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(1,))).standard_normal(x.shape, np.float32)
    coarse = ndimage.gaussian_filter(white, np.maximum(texture.widths, _COARSE), mode="wrap")
    share = np.sqrt(fine / np.maximum(lacking, 1e-9))
    even = share * texture.share * texture.noise(x.shape, seed) + np.sqrt(1 - share**2) * coarse / coarse.std()
    skewed = (np.exp(_SKEW * even - 0.5 * _SKEW**2) - 1) / np.sqrt(np.expm1(_SKEW**2))
    return _added(x, weight, np.sqrt(lacking) * skewed)


def _away(x: NDArray, leave_out: NDArray) -> NDArray[np.bool_]:
    """Return the tissue 3 voxels away from CSF, background and `leave_out`, or less where there is hardly any."""
    tissue = (x >= FLUID) & (np.asarray(leave_out) == 0)
    return next((f for n in (3, 2, 1) if (f := ndimage.binary_erosion(tissue, iterations=n)).sum() >= _FEWEST), tissue)


def _grain_nearby(rest: NDArray, away: NDArray[np.bool_], texture: Texture) -> NDArray:
    """Return the variance about the local mean of the tissue `away` within about a centimetre, around each voxel.

    Where there is no such tissue it is that of the texture, which also says what is grain and what an edge.
    """
    power = np.where(away, np.clip(rest, -3 * texture.sd, 3 * texture.sd) ** 2, 0).astype(np.float32)
    usual = power.sum() / max(int(away.sum()), 1)
    if not usual:
        return np.full_like(power, texture.sd**2)
    counts = ndimage.gaussian_filter(away.astype(np.float32), _NEARBY)
    nearby = (ndimage.gaussian_filter(power, _NEARBY) + _FEW * usual) / (counts + _FEW)
    return nearby * (texture.sd**2 / usual)


def _grain_in_fill(rest: NDArray, weight: NDArray) -> NDArray:
    """Return the variance that a fill has about its local mean, around each voxel.

    It is that of the whole hole: at its soft edge lies the tissue's own grain, which fades by itself.
    """
    return _local_mean(rest**2, weight >= 1, _AROUND)


def _local_mean(x: NDArray, where: NDArray[np.bool_], width: float) -> NDArray:
    """Return the mean over the voxels `where`, under a Gaussian; 0 far from all of them."""
    counts = ndimage.gaussian_filter(where.astype(np.float32), width)
    return ndimage.gaussian_filter(np.where(where, x, 0), width) / np.maximum(counts, 1e-6)


def _added(x: NDArray[np.float32], weight: NDArray, grain: NDArray) -> NDArray[np.float32]:
    """Return an image with grain in its hole; at the soft edge as much as the tissue's own grain has faded by."""
    faded = np.sqrt(weight * (2 - weight))
    return np.where(weight > 0, np.maximum(x + faded * grain, 0), x).astype(np.float32, copy=False)
