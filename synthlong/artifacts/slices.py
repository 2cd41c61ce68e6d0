"""Slice thickness: the mean over neighbouring slices, as a thick slice gives it.

    y(n) = (x(n - h) + ... + x(n - h + size - 1)) / size,   h = size // 2, along one axis, edges reflected

An odd size is centred. An even one covers n - size/2 to n + size/2 - 1, and so moves the image up its axis by half a
voxel, as in `scipy.ndimage.uniform_filter1d`.

Source: Kamraoui et al. 2022, section 2.4 (doi:10.3389/fnimg.2022.948235).
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from synthlong.artifacts.base import Artifact, Params, RandomArtifact, on_axis
from synthlong.artifacts.blur import mirrored
from synthlong.artifacts.ranges import Range, check_axis, check_number
from synthlong.artifacts.volumes import copied, in_slabs, on_volumes
from synthlong.compiling import compiled

__all__ = ["RandomSliceThickness", "SliceThickness", "slice_thickness"]

_THICKEST = 64  # voxels
_FEW = 4  # summed directly along rows
_ROWS = 64


def slice_thickness(x: Tensor, *, size: int, axis: int) -> Tensor:
    """Average over slices, as `scipy.ndimage.uniform_filter1d(x, size, axis)` does along I, J or K.

    Args:
        x: Image, shape `(..., I, J, K)`, any intensity unit.
        size: Slices averaged, a whole number in [1, 64]; 1 changes nothing, an even one moves by half a voxel.
        axis: Across the slices: 0 for I, 1 for J, 2 for K.

    Raises:
        ValueError: `size` or `axis` outside its range, or `x` not finite floating-point voxels.
    """
    size = int(check_number("size", size, least=1, most=_THICKEST, whole=True))
    axis = int(check_number("axis", axis, least=0, most=2, whole=True))
    if size == 1:
        return copied(x)
    return on_volumes(
        x,
        torch_kernel=lambda volumes: _by_torch(volumes, size, axis),
        numba_kernel=lambda volumes: _by_numba(volumes, size, axis),
    )


class SliceThickness(Artifact):
    """`slice_thickness` as a transform.

    Args:
        size: Slices averaged.
        axis: 0, 1 or 2; `"axial"`: the one closest to the head's axis, found from the affine.
        **kwargs: See `Artifact`.
    """

    kernel = staticmethod(slice_thickness)

    def __init__(self, size: Any, *, axis: Any = "axial", **kwargs: Any) -> None:
        super().__init__({"size": size, "axis": axis}, **kwargs)

    @staticmethod
    def on_grid(params: Params, affine: NDArray[np.float64]) -> Params:
        """Find the axial axis."""
        return on_axis({"axis": "axial", **params}, affine)


class RandomSliceThickness(RandomArtifact):
    """Mean over a random number of slices.

    Args:
        size: Range of whole numbers.
        axis: 0, 1 or 2; `"axial"`: the one closest to the head's axis, found from the affine.
        **kwargs: See `RandomArtifact`.
    """

    final = SliceThickness
    identity: ClassVar[dict[str, float]] = {"size": 1}

    def __init__(self, size: Any = (2, 4), *, axis: Any = "axial", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.size = Range.of("size", size, least=1, most=_THICKEST, whole=True)
        self.axis = check_axis(axis)

    def draw_params(self, rng: np.random.Generator) -> Params:
        """Draw the size."""
        return {"size": self.size.draw(rng), "axis": self.axis}


def _by_torch(volumes: Tensor, size: int, axis: int) -> Tensor:
    read = mirrored(volumes.shape[1 + axis], size // 2, (size - 1) // 2)
    padded = volumes.index_select(1 + axis, torch.from_numpy(read).to(volumes.device))
    return padded.unfold(1 + axis, size, 1).mean(-1)


def _by_numba(volumes: NDArray[np.float32], size: int, axis: int) -> NDArray[np.float32]:
    n, inner = volumes.shape[1 + axis], math.prod(volumes.shape[2 + axis :])
    x = volumes.reshape(-1, n, inner)
    out = np.empty_like(x)
    read = mirrored(n, size // 2, (size - 1) // 2)

    def kernel(start: int, stop: int) -> None:
        if inner > 1:
            _average_columns(x, read, size, out, start, stop)
        elif size <= _FEW:
            _average_rows(x[:, :, 0], read, size, out[:, :, 0], start, stop)
        else:
            ndimage.uniform_filter1d(x[start:stop], size, axis=1, output=out[start:stop])

    in_slabs(kernel, count=len(x) * inner, voxels=x.size)
    return out.reshape(volumes.shape)


@compiled()
def _average_columns(x, read, size, out, start, stop):  # type: ignore[no-untyped-def]
    """Average x (outer, n, inner) along n by running sums, for columns `start` to `stop` of outer * inner."""
    _, n, inner = x.shape
    sums, share = np.empty(inner, np.float64), 1 / size
    for o in range(start // inner, -(-stop // inner)):
        columns = slice(max(start - o * inner, 0), min(stop - o * inner, inner))
        total = sums[columns]
        total[:] = 0
        for t in range(size - 1):
            line = x[o, read[t], columns]
            for k in range(total.size):
                total[k] += line[k]
        for i in range(n):
            last, first, y = x[o, read[i + size - 1], columns], x[o, read[i], columns], out[o, i, columns]
            for k in range(total.size):
                whole = total[k] + last[k]
                y[k] = whole * share
                total[k] = whole - first[k]


@compiled()
def _average_rows(x, read, size, out, start, stop):  # type: ignore[no-untyped-def]
    """Average x (outer, n) along n, for rows `start` to `stop` and a size of four at most.

    A run over many rows takes no notice of where they end; what it gets wrong there is then done again.
    """
    n, before, after = x.shape[1], size // 2, (size - 1) // 2
    t, u = min(2, size - 1), min(3, size - 1)  # the window's third and fourth voxel, or any for the share 0
    share, third, fourth = np.float32(1 / size), np.float32((size > 2) / size), np.float32((size > 3) / size)
    flat, averages = x.ravel(), out.ravel()
    i = np.arange(n)
    ends = i[(i < before) | (i >= n - after)]
    for row in range(start, stop, _ROWS):
        end = min(row + _ROWS, stop)
        head, tail = max(row * n, before), min(end * n, flat.size - after)
        run, a = averages[head:tail], flat[head - before :]
        b, c, d = a[1:], a[t:], a[u:]
        for p in range(run.size):
            run[p] = share * (a[p] + b[p]) + (third * c[p] + fourth * d[p])
        for e in ends:
            a0, b0, c0, d0 = read[e], read[e + 1], read[e + t], read[e + u]
            for o in range(row, end):
                out[o, e] = share * (x[o, a0] + x[o, b0]) + (third * x[o, c0] + fourth * x[o, d0])
