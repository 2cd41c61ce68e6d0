"""Anisotropic downsampling: thick voxels along one axis, interpolated back to the grid of the scan.

    x on n voxels -> m = floor(n / factor) samples, `factor` apart, around the same centre -> cubic B-spline -> n voxels

As TorchIO's `RandomAnisotropy` (Billot et al. 2020, doi:10.1007/978-3-030-59728-3_18) with
`image_interpolation="bspline"`: a sample is the voxel nearest to its place, half-way the later one. Where TorchIO has
zeros, beyond the outer samples' voxels, the spline goes on. Spline and prefilter reflect at the outer samples
("mirror" in scipy), which makes the prefilter a tridiagonal system with an exact solution, and is what SimpleITK does.

Spline: Unser, Aldroubi, Eden 1993 (doi:10.1109/78.193221).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from synthlong.artifacts.base import Artifact, Params, RandomArtifact, on_axis
from synthlong.artifacts.ranges import Range, check_axes, check_number
from synthlong.artifacts.volumes import copied, in_slabs, on_volumes
from synthlong.compiling import compiled

__all__ = ["AnisotropicDownsampling", "RandomAnisotropicDownsampling", "anisotropic_downsampling"]

_WIDTH = 128  # lines worked on together: their samples stay in the cache


def anisotropic_downsampling(x: Tensor, *, factor: float, axis: int, prefilter: bool = False) -> Tensor:
    """Sample one axis coarsely and interpolate back; the shape stays, and the field of view stays centred.

    Nearest samples may lie up to half a voxel from their place (all of them where `factor` is 2 and n even);
    means do not.

    Args:
        x: Image, shape `(..., I, J, K)`, any intensity unit.
        factor: Size of a coarse voxel in voxels, in [1, 64]; 1 changes nothing.
        axis: 0, 1 or 2, for I, J or K.
        prefilter: A sample is the mean over its coarse voxel (partly covered voxels count in part), as in a scanner,
            instead of the nearest voxel.

    Raises:
        ValueError: A parameter outside its range, or `x` not finite floating-point voxels.
    """
    factor = check_number("factor", factor, least=1, most=64)
    axis = int(check_number("axis", axis, least=0, most=2, whole=True))
    if factor == 1:
        return copied(x)
    return on_volumes(
        x,
        torch_kernel=lambda v: _by_torch(v, factor, axis, bool(prefilter)),
        numba_kernel=lambda v: _by_numba(v, factor, axis, bool(prefilter)),
    )


class AnisotropicDownsampling(Artifact):
    """`anisotropic_downsampling` as a transform.

    Args:
        factor: Size of a coarse voxel in voxels, in [1, 64].
        axis: 0, 1 or 2; `"axial"`: the one closest to the head's axis, found from the affine.
        prefilter: Average over the coarse voxel.
        **kwargs: See `Artifact`.
    """

    kernel = staticmethod(anisotropic_downsampling)

    def __init__(self, factor: Any, axis: Any, prefilter: Any = False, **kwargs: Any) -> None:
        super().__init__({"factor": factor, "axis": axis, "prefilter": prefilter}, **kwargs)

    @staticmethod
    def on_grid(params: Params, affine: NDArray[np.float64]) -> Params:
        """Find the axial axis."""
        return on_axis(params, affine)


class RandomAnisotropicDownsampling(RandomArtifact):
    """Downsampling by a random factor along a random axis.

    Args:
        factor: Range of the size of a coarse voxel in voxels.
        axes: The axes to choose from; `"axial"`: that one alone.
        prefilter: Average over the coarse voxel.
        **kwargs: See `RandomArtifact`.
    """

    final = AnisotropicDownsampling
    identity: ClassVar[dict[str, float]] = {"factor": 1.0}

    def __init__(
        self,
        factor: float | Sequence[float] = (1.5, 4),
        axes: int | Sequence[int] | Literal["axial"] = (0, 1, 2),
        prefilter: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.factor = Range.of("factor", factor, least=1, most=64, around=1)
        self.axes = (axes,) if axes == "axial" else check_axes(axes)
        self.prefilter = bool(prefilter)

    def draw_params(self, rng: np.random.Generator) -> Params:
        """Draw factor and axis."""
        factor = self.factor.draw(rng)
        return {"factor": factor, "axis": self.axes[int(rng.random() * len(self.axes))], "prefilter": self.prefilter}


def _by_torch(volumes: Tensor, factor: float, axis: int, prefilter: bool) -> Tensor:
    """Multiply by the matrix of the operation: what it makes of the unit matrix."""
    n = volumes.shape[1 + axis]
    matrix = _by_numba(np.eye(n, dtype=np.float32).reshape(1, n, n, 1), factor, 0, prefilter).reshape(n, n)
    lines = volumes.movedim(1 + axis, -1)
    return (lines @ torch.from_numpy(matrix).to(volumes.device).T).movedim(-1, 1 + axis)


def _by_numba(volumes: NDArray[np.float32], factor: float, axis: int, prefilter: bool) -> NDArray[np.float32]:
    result = np.empty_like(volumes)
    n = volumes.shape[1 + axis]
    if axis == 2:  # one stack of lines, a column each
        x, y = (v.reshape(1, -1, n).transpose(0, 2, 1) for v in (volumes, result))
    else:
        stacks = math.prod(volumes.shape[: 1 + axis])
        x, y = (v.reshape(stacks, n, -1) for v in (volumes, result))
    plan = _plan(n, max(1, int(n / factor)), factor, prefilter)
    tiles = x.shape[0] * -(-x.shape[2] // _WIDTH)
    in_slabs(lambda start, stop: _resample(x, y, *plan, start, stop), tiles, volumes.size)
    return result


@compiled()
def _plan(n, m, factor, prefilter):  # type: ignore[no-untyped-def]
    """Return what each of m samples takes from n voxels, the prefilter's factors, and what each voxel takes back."""
    taken = math.ceil(factor) + 1 if prefilter else 1
    source, weight = np.zeros((m, taken), np.int64), np.ones((m, taken), np.float32)
    behind, ahead = np.zeros(m, np.float32), np.zeros(m, np.float32)
    place = (n - 1 - (m - 1) * factor) / 2  # of the first sample, in voxels
    for k in range(m):
        at = place + k * factor
        source[k] = math.floor(at + 0.5 + 1e-9)  # half-way: up, whatever the rounding
        if prefilter:
            low, high = max(at - factor / 2, -0.5), min(at + factor / 2, n - 0.5)
            for t in range(taken):
                i = math.floor(low + 0.5) + t
                source[k, t] = min(i, n - 1)
                weight[k, t] = max(min(high, i + 0.5) - max(low, i - 0.5), 0.0) / (high - low)
        # sample k = (before, 4, after) / 6 times the coefficients k - 1, k, k + 1; solved by elimination
        before, after = (0.0 if k == 0 else 2.0 if k == m - 1 else 1.0), (2.0 if k == 0 else 1.0)
        pivot = 1 / ((6.0 if m == 1 else 4.0) - before * ahead[k - 1])
        weight[k] *= np.float32(6 * pivot)
        behind[k], ahead[k] = before * pivot, after * pivot
    back, share = np.zeros((n, 4), np.int64), np.zeros((n, 4), np.float32)
    for i in range(n):
        at = (i - place) / factor
        for t in range(4):
            k = math.floor(at) - 1 + t
            d = abs(at - k)
            share[i, t] = (4 - 6 * d**2 + 3 * d**3) / 6 if d < 1 else max(2 - d, 0.0) ** 3 / 6
            k = abs(k) % max(2 * m - 2, 1)
            back[i, t] = min(k, 2 * m - 2 - k)
    return source, weight, behind, ahead, back, share


@compiled(fastmath={"contract"})
def _resample(x, y, source, weight, behind, ahead, back, share, start, stop):  # type: ignore[no-untyped-def]
    """Resample lines along axis 1 of `(stacks, n, columns)`: samples, then spline coefficients, then voxels."""
    m = source.shape[0]
    across = (x.shape[2] + _WIDTH - 1) // _WIDTH
    tile = np.zeros((m + 1, _WIDTH), np.float32)  # row -1 stays zero
    for n in range(start, stop):
        stack, left = n // across, n % across * _WIDTH
        right = min(left + _WIDTH, x.shape[2])
        width = right - left
        for k in range(m):
            row, last = tile[k, :width], tile[k - 1, :width]
            voxels, w, b = x[stack, source[k, 0], left:right], weight[k, 0], behind[k]
            for c in range(width):
                row[c] = w * voxels[c] - b * last[c]
            for t in range(1, source.shape[1]):
                voxels, w = x[stack, source[k, t], left:right], weight[k, t]
                for c in range(width):
                    row[c] += w * voxels[c]
        for k in range(m - 2, -1, -1):
            row, following, a = tile[k, :width], tile[k + 1, :width], ahead[k]
            for c in range(width):
                row[c] -= a * following[c]
        for i in range(x.shape[1]):
            voxels = y[stack, i, left:right]
            t0, t1, t2, t3 = tile[back[i, 0]], tile[back[i, 1]], tile[back[i, 2]], tile[back[i, 3]]
            s0, s1, s2, s3 = share[i, 0], share[i, 1], share[i, 2], share[i, 3]
            for c in range(width):
                voxels[c] = s0 * t0[c] + s1 * t1[c] + s2 * t2[c] + s3 * t3[c]
