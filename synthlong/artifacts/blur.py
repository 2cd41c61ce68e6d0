"""Gaussian blur: a point-spread function wider than a voxel.

    y = g_i * g_j * g_k * x,   g_a(n) proportional to exp(-n^2 / (2 std_a^2)), truncated at 4 std, edges reflected

Source: Kamraoui et al. 2022, section 2.4 (doi:10.3389/fnimg.2022.948235).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from synthlong.artifacts.base import Artifact, Params, RandomArtifact, spacing_of
from synthlong.artifacts.ranges import Range, check_triple
from synthlong.artifacts.volumes import copied, in_slabs, on_volumes
from synthlong.compiling import compiled

__all__ = [
    "GaussianBlur",
    "RandomGaussianBlur",
    "Widths",
    "away_from_blur",
    "gaussian_blur",
    "in_voxels",
    "mirrored",
    "width_given",
]

_WIDEST = 100  # SD


def gaussian_blur(x: Tensor, *, std: float | Sequence[float]) -> Tensor:
    """Blur with a Gaussian, as `scipy.ndimage.gaussian_filter(x, std)` does.

    Args:
        x: Image, shape `(..., I, J, K)`, any intensity unit.
        std: SD in voxels, one for all axes or one each, in [0, 100]; 0 changes nothing.

    Raises:
        ValueError: `std` outside its range, or `x` not finite floating-point voxels.
    """
    return away_from_blur(x, std=std, amount=-1)


def away_from_blur(x: Tensor, *, std: float | Sequence[float], amount: float) -> Tensor:
    """Return x + amount (x - blur(x)): -1 blurs, 0 changes nothing, 1 sharpens; arguments as `gaussian_blur`'s."""
    sigmas = check_triple("std", std, least=0, most=_WIDEST)
    if not any(sigmas) or amount == 0:
        return copied(x)
    return on_volumes(
        x,
        torch_kernel=lambda volumes: _by_torch(volumes, sigmas, amount),
        numba_kernel=lambda volumes: _by_numba(volumes, sigmas, amount),
    )


class GaussianBlur(Artifact):
    """`gaussian_blur` as a transform.

    Args:
        std: SD in voxels, one for all axes or one each.
        std_mm: SD in mm instead.
        **kwargs: See `Artifact`.
    """

    kernel = staticmethod(gaussian_blur)

    def __init__(self, std: Any = None, *, std_mm: Any = None, **kwargs: Any) -> None:
        super().__init__(width_given(std, std_mm), **kwargs)

    @staticmethod
    def on_grid(params: Params, affine: NDArray[np.float64]) -> Params:
        """Turn mm into voxels."""
        return in_voxels(params, affine)


class RandomGaussianBlur(RandomArtifact):
    """Blur of random width.

    Args:
        std: Range of the SD in voxels, the same along all axes; three ranges `((a, b), (c, d), (e, f))`: one drawn
            for each axis.
        std_mm: Range of the SD in mm instead.
        **kwargs: See `RandomArtifact`.
    """

    final = GaussianBlur
    identity: ClassVar[dict[str, float]] = {"std": 0.0, "std_mm": 0.0}

    def __init__(self, std: Any = (0.5, 1.75), *, std_mm: Any = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.widths = Widths.of(std, std_mm)

    def draw_params(self, rng: np.random.Generator) -> Params:
        """Draw the SD."""
        return self.widths.draw(rng)


@dataclass(frozen=True)
class Widths:
    """Ranges of an SD: one for all axes, or one each.

    Args:
        unit: The parameter drawn, `"std"` in voxels or `"std_mm"`.
        ranges: One or three.
    """

    unit: str
    ranges: tuple[Range, ...]

    @classmethod
    def of(cls, std: Any, std_mm: Any) -> Widths:
        """Build from a random transform's arguments; `std_mm` counts unless None."""
        unit, value = ("std", std) if std_mm is None else ("std_mm", std_mm)
        each = value if isinstance(value, Sequence) and len(value) == 3 else [value]
        return cls(unit, tuple(Range.of(unit, v, least=0, most=_WIDEST) for v in each))

    def draw(self, rng: np.random.Generator) -> Params:
        """Draw the SD."""
        drawn = [r.draw(rng) for r in self.ranges]
        return {self.unit: drawn[0] if len(drawn) == 1 else drawn}


def width_given(std: Any, std_mm: Any) -> Params:
    """Return the parameter of a width that is given in one of the two units."""
    if std is not None and std_mm is not None:
        raise ValueError("std and std_mm: give one of them")
    return {"std": std} if std_mm is None else {"std_mm": std_mm}


def in_voxels(params: Params, affine: NDArray[np.float64]) -> Params:
    """Return parameters with `std` in place of `std_mm`."""
    if "std_mm" not in params:
        return params
    width_given(params.get("std"), params["std_mm"])
    rest = {name: value for name, value in params.items() if name not in ("std", "std_mm")}
    mm = check_triple("std_mm", params["std_mm"], least=0, most=_WIDEST)
    return {**rest, "std": [s / side for s, side in zip(mm, spacing_of(affine), strict=True)]}


def mirrored(n: int, before: int, after: int) -> NDArray[np.int64]:
    """Return where an axis of `n` voxels is read, reflected ones `before` and `after` it included: b a|a b c|c b."""
    index = np.arange(-before, n + after) % (2 * n)
    return np.minimum(index, 2 * n - 1 - index)


def _by_torch(volumes: Tensor, sigmas: tuple[float, float, float], amount: float) -> Tensor:
    blurred = volumes
    for axis, sigma in enumerate(sigmas, start=1):
        if sigma:
            unit = np.eye(volumes.shape[axis], dtype=np.float32)
            matrix = torch.from_numpy(ndimage.gaussian_filter1d(unit, sigma, axis=1)).to(volumes.device)
            blurred = (blurred.movedim(axis, -1) @ matrix).movedim(-1, axis)
    return blurred if amount == -1 else volumes + amount * (volumes - blurred)


def _by_numba(volumes: NDArray[np.float32], sigmas: tuple[float, float, float], amount: float) -> NDArray[np.float32]:
    n, i, j, k = volumes.shape
    if k == 1 < i * j:  # a slice: rows of one voxel would be slow
        return _by_numba(volumes.reshape(n, 1, i, j), (0, *sigmas[:2]), amount).reshape(volumes.shape)
    out = np.empty_like(volumes)
    weights = tuple(_weights(sigma) for sigma in sigmas)
    edges = tuple(mirrored(size, w.size - 1, w.size) for size, w in zip((i, j, k), weights, strict=True))
    in_slabs(
        lambda start, stop: _blur_pairs(volumes, edges, weights, np.float32(amount), out, start, stop),
        count=n * ((i + 1) // 2),
        voxels=volumes.size,
    )
    return out


@lru_cache(maxsize=16)
def _weights(sigma: float) -> NDArray[np.float32]:
    """Return the Gaussian from its centre outwards, zeros added to make whole groups of four, one at least."""
    radius = int(4 * sigma + 0.5)
    g = np.exp(-0.5 * (np.arange(radius + 1) / (sigma or 1)) ** 2)
    return np.pad(g / (2 * g.sum() - 1), (0, max(-radius % 4, 4 - radius))).astype(np.float32)


@compiled()
def _blur_pairs(x, edges, weights, amount, out, start, stop):  # type: ignore[no-untyped-def]
    """Filter pairs of planes, which share most of what they read: along I to `wide`, K to `tall`, J to `out`.

    `wide` and `tall` have mirrored edges.
    """
    _, ni, nj, nk = x.shape
    planes, rows, columns = edges
    wi, wj, wk = weights
    rj, rk = wj.size - 1, wk.size - 1
    wide, tall = np.empty((2, nj, rk + nk + rk), np.float32), np.empty((rj + nj + rj, nk), np.float32)
    starts = np.empty(2 * wi.size, np.uint64)
    for pair in range(start, stop):
        volume, i = divmod(2 * pair, ni + ni % 2)
        for t in range(starts.size):
            starts[t] = (volume * ni + planes[i + t]) * nj * nk
        _sum_planes(x.ravel(), starts, wi, wide[0], wide[1], rk)
        for n in range(min(2, ni - i)):
            for j in range(nj):
                row = wide[n, j]
                for t in range(rk):
                    row[t], row[rk + nk + t] = row[rk + columns[t]], row[rk + columns[rk + nk + t]]
            _sum_rows(wide[n].ravel(), 1, rk + nk + rk, wk, tall[rj : rj + nj])
            for t in range(2 * rj):
                edge = t if t < rj else nj + t
                row, image = tall[edge], tall[rj + rows[edge]]
                for k in range(nk):
                    row[k] = image[k]
            new, old = out[volume, i + n], x[volume, i + n]
            _sum_rows(tall.ravel(), nk, nk, wj, new)
            if amount != -1:
                for j in range(nj):
                    for k in range(nk):
                        new[j, k] = old[j, k] + amount * (old[j, k] - new[j, k])


# The loops that take the time. Four taps a side at once measured fastest. Indices are unsigned: signed ones may
# count from the end, which keeps the compiler from vectorising.


@compiled(fastmath={"reassoc", "contract", "nsz"}, forceinline=True)
def _sum_rows(source, stride, step, weights, out):  # type: ignore[no-untyped-def]
    """Set out[j, k] to the weighted sum of the `source` voxels from j * step + k on, `stride` apart."""
    step, s, c = np.uint64(step), np.uint64(stride), np.uint64((weights.size - 1) * stride)
    for t in range(1, weights.size, 4):
        w = (weights[t], weights[t + 1], weights[t + 2], weights[t + 3])
        d = np.uint64(t) * s
        a = (c - d, c - d - s, c - d - s - s, c - d - s - s - s)
        b = (c + d, c + d + s, c + d + s + s, c + d + s + s + s)
        for j in range(np.uint64(out.shape[0])):
            for k in range(np.uint64(out.shape[1])):
                p = j * step + k
                y = weights[0] * source[c + p] if t == 1 else out[j, k]
                for n in range(4):
                    y += w[n] * (source[a[n] + p] + source[b[n] + p])
                out[j, k] = y


@compiled(fastmath={"reassoc", "contract", "nsz"}, forceinline=True)
def _sum_planes(source, starts, weights, out, next_out, margin):  # type: ignore[no-untyped-def]
    """Set `out` to the weighted sum of the planes at `starts` without the last, `next_out` without the first."""
    r, m, width = weights.size - 1, np.uint64(margin), np.uint64(out.shape[1] - 2 * margin)
    for t in range(1, weights.size, 4):
        w = (weights[t], weights[t + 1], weights[t + 2], weights[t + 3])
        u, v = r - t, r + t
        a = (starts[u + 1], starts[u], starts[u - 1], starts[u - 2], starts[u - 3])
        b = (starts[v], starts[v + 1], starts[v + 2], starts[v + 3], starts[v + 4])
        for j in range(np.uint64(out.shape[0])):
            for k in range(width):
                p = j * width + k
                before = (source[a[0] + p], source[a[1] + p], source[a[2] + p], source[a[3] + p], source[a[4] + p])
                after = (source[b[0] + p], source[b[1] + p], source[b[2] + p], source[b[3] + p], source[b[4] + p])
                y = weights[0] * before[0] if t == 1 else out[j, m + k]
                z = weights[0] * after[0] if t == 1 else next_out[j, m + k]
                for n in range(4):
                    y += w[n] * (before[n + 1] + after[n])
                    z += w[n] * (before[n] + after[n + 1])
                out[j, m + k], next_out[j, m + k] = y, z
