"""Motion: the head moves during the acquisition, so that parts of k-space belong to other positions.

    y = Re IFFT3(sum_s m_s FFT3(T_s x)) = x + sum_s F_s (T_s x - x)

Planes of k-space are acquired from one end to the other along the phase-encoding axis; m_s is 1 on those acquired in
pose T_s. F_s, the filter of m_s along that axis alone, is all that is left of the Fourier transforms (see `kspace`).
The segment with the centre of k-space is in no other pose than the image's own, so that masks of the image stay true.

Source: Shaw et al. 2019 (https://proceedings.mlr.press/v102/shaw19a.html), 2020 (PMC7116018); Kamraoui et al. 2022,
section 2.4 (doi:10.3389/fnimg.2022.948235).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from synthlong.artifacts.base import Artifact, Params, RandomArtifact, spacing_of
from synthlong.artifacts.kspace import Mask, add_filtered
from synthlong.artifacts.ranges import Range, check_axes, check_number, check_triple, check_triples
from synthlong.artifacts.volumes import copied, in_slabs, on_volumes
from synthlong.compiling import compiled

__all__ = ["KSpaceMotion", "RandomKSpaceMotion", "kspace_motion"]

Pose = NDArray[np.float64]
"""`(3, 4)`: takes a voxel, counted from the image's centre, to the one that it shows."""

_FARTHEST = 1e4  # mm
_MOST_MOVEMENTS = 100
_CENTRE = 0.05  # of the planes, on each side of the centre, in which random movements do not happen


def kspace_motion(
    x: Tensor,
    *,
    degrees: Sequence[Sequence[float]],
    translation_mm: Sequence[Sequence[float]],
    times: Sequence[float],
    axis: int,
    spacing_mm: float | Sequence[float] = 1.0,
) -> Tensor:
    """Add the artifacts of M movements during the acquisition.

    M times divide k-space into M + 1 segments. The one that holds the centre of k-space comes from `x` itself, the
    others, in their order, from `x` in each of the M poses: turned about its centre, then shifted; trilinear, 0
    outside. An axis of one voxel has no extent, and nothing moves along it.

    Args:
        x: Image, shape `(..., I, J, K)`, any intensity unit.
        degrees: M rotations about the axes I, J and K, applied in this order, each in [-360, 360]; with
            `translation_mm` all 0, nothing changes.
        translation_mm: M shifts in mm along I, J and K, each in [-10000, 10000].
        times: When the movements happen, as fractions of the acquisition, in [0, 1], not falling.
        axis: Of phase encoding: 0 for I, 1 for J, 2 for K.
        spacing_mm: Voxel size in mm, one for all axes or one each, in [0.001, 1000].

    Raises:
        ValueError: A parameter outside its range, lists of different lengths, or `x` not finite floating-point
            voxels.
    """
    turns = check_triples("degrees", degrees, least=-360, most=360)
    shifts = check_triples("translation_mm", translation_mm, least=-_FARTHEST, most=_FARTHEST)
    if not isinstance(times, (Sequence, np.ndarray)):
        raise ValueError(f"times = {times!r}: must be a list of numbers")
    moments = [check_number("times", time, least=0, most=1) for time in times]
    axis = int(check_number("axis", axis, least=0, most=2, whole=True))
    spacing = check_triple("spacing_mm", spacing_mm, least=1e-3, most=1e3)
    if not len(turns) == len(shifts) == len(moments) <= _MOST_MOVEMENTS:
        found = f"{len(turns)}, {len(shifts)} and {len(moments)}"
        raise ValueError(f"degrees, translation_mm, times: must be of one length, at most 100, not {found}")
    if sorted(moments) != moments:
        raise ValueError(f"times = {times!r}: must not fall")
    if not any(any(turn) or any(shift) for turn, shift in zip(turns, shifts, strict=True)):
        return copied(x)

    def corrupted(volumes: Tensor, changes: Callable[[Tensor, list[Pose]], list[Tensor]]) -> Tensor:
        shape = volumes.shape[1:]
        poses, masks = [], []
        for turn, shift, mask in zip(turns, shifts, _moved_segments(shape[axis], moments), strict=True):
            if any(mask) and (any(turn) or any(shift)):
                poses.append(_pose(turn, shift, shape, spacing))
                masks.append(mask)
        return add_filtered(volumes, changes(volumes, poses), masks, axis=axis)

    return on_volumes(
        x,
        torch_kernel=lambda volumes: corrupted(volumes, _changes_by_torch),
        numba_kernel=lambda volumes: corrupted(torch.from_numpy(volumes), _changes_by_numba).numpy(),
    )


class KSpaceMotion(Artifact):
    """`kspace_motion` as a transform.

    Args:
        degrees: Rotation of each pose about the axes I, J and K.
        translation_mm: Shift of each pose in mm.
        times: When the movements happen, as fractions of the acquisition.
        axis: Of phase encoding.
        **kwargs: See `Artifact`.
    """

    kernel = staticmethod(kspace_motion)

    def __init__(self, degrees: Any, translation_mm: Any, times: Any, axis: Any, **kwargs: Any) -> None:
        params = {"degrees": degrees, "translation_mm": translation_mm, "times": times, "axis": axis}
        super().__init__(params, **kwargs)

    @staticmethod
    def on_grid(params: Params, affine: NDArray[np.float64]) -> Params:
        """Add the voxel size."""
        return {**params, "spacing_mm": spacing_of(affine)}


class RandomKSpaceMotion(RandomArtifact):
    """Random movements at random times.

    None happens in the middle 10 % of the acquisition: too short a segment about the centre of k-space would let the
    other poses shift the whole image, away from its masks.

    Args:
        degrees: Range of the rotation about each axis.
        translation_mm: Range of the shift along each axis in mm.
        movements: Their number, or a range of whole numbers; 0 changes nothing.
        axes: Phase-encoding axes to choose from.
        **kwargs: See `RandomArtifact`.
    """

    final = KSpaceMotion
    identity: ClassVar[dict[str, float]] = {"degrees": 0.0, "translation_mm": 0.0}

    def __init__(
        self,
        degrees: Any = 5,
        *,
        translation_mm: Any = 4,
        movements: Any = 2,
        axes: Any = (0, 1, 2),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.degrees = Range.of("degrees", degrees, least=-360, most=360, symmetric=True)
        self.translation_mm = Range.of(
            "translation_mm", translation_mm, least=-_FARTHEST, most=_FARTHEST, symmetric=True
        )
        self.movements = Range.of("movements", movements, least=0, most=_MOST_MOVEMENTS, whole=True)
        self.axes = check_axes(axes)

    def draw_params(self, rng: np.random.Generator) -> Params:
        """Draw axis, number, poses and times."""
        axis = self.axes[int(rng.random() * len(self.axes))]
        movements = range(int(self.movements.draw(rng)))
        return {
            "degrees": [[self.degrees.draw(rng) for _ in range(3)] for _ in movements],
            "translation_mm": [[self.translation_mm.draw(rng) for _ in range(3)] for _ in movements],
            "times": sorted(_time(float(rng.random())) for _ in movements),
            "axis": axis,
        }


def _time(u: float) -> float:
    """Return the time of a movement, uniform outside the middle of the acquisition, from a number in [0, 1)."""
    time = u * (1 - 2 * _CENTRE)
    return round(time if time < 0.5 - _CENTRE else time + 2 * _CENTRE, 6)


def _moved_segments(n: int, times: Sequence[float]) -> list[Mask]:
    """Return the mask of each segment of n planes but the one with the centre of k-space."""
    edges = [0, *(int(time * n) for time in times), n]
    return [(0.0,) * a + (1.0,) * (b - a) + (0.0,) * (n - b) for a, b in pairwise(edges) if not a <= n // 2 < b]


def _pose(
    degrees: Sequence[float], translation_mm: Sequence[float], shape: Sequence[int], spacing_mm: Sequence[float]
) -> Pose:
    """Return the inverse of a movement, in voxels: the moved image at p shows the image at `pose(p)`."""
    (si, ci), (sj, cj), (sk, ck) = ((math.sin(angle), math.cos(angle)) for angle in map(math.radians, degrees))
    rotation = np.array(
        [
            [cj * ck, si * sj * ck - ci * sk, ci * sj * ck + si * sk],
            [cj * sk, si * sj * sk + ci * ck, ci * sj * sk - si * ck],
            [-sj, si * cj, ci * cj],
        ]
    )
    side = np.array(spacing_mm)
    back = rotation.T * side / side[:, None]
    pose = np.column_stack([back, -back @ (np.array(translation_mm) / side)])
    pose[np.array(shape) == 1] = 0  # no extent: it shows the one plane that there is
    return pose


def _changes_by_torch(volumes: Tensor, poses: list[Pose]) -> list[Tensor]:
    """Return what each movement adds to the volumes."""
    halves = [max((n - 1) / 2, 0.5) for n in volumes.shape[1:]]
    i, j, k = torch.meshgrid(*(torch.arange(n).to(volumes) - (n - 1) / 2 for n in volumes.shape[1:]), indexing="ij")
    changes = []
    for pose in poses:
        shown = [(u * i + v * j + w * k + t) / half for (u, v, w, t), half in zip(pose.tolist(), halves, strict=True)]
        grid = torch.stack(shown[::-1], dim=-1)  # from -1 to 1, the last axis first
        changes.append(functional.grid_sample(volumes[None], grid[None], align_corners=True)[0] - volumes)
    return changes


_LANES = 16  # voxels computed together; the surplus of a run's last group is overwritten by the next run
_ONE = 1 << 32  # a voxel, in the whole numbers that coordinates are


def _changes_by_numba(volumes: Tensor, poses: list[Pose]) -> list[Tensor]:
    """Return what each movement adds to the volumes."""
    changes = [torch.empty_like(volumes) for _ in poses]
    centre = (np.array(volumes.shape[1:]) - 1) / 2
    margin = [n + 2 for n in volumes.shape[1:]]
    padded = np.zeros(math.prod(margin) + _LANES, np.float32)
    for number, volume in enumerate(volumes.numpy()):
        padded[:-_LANES].reshape(margin)[1:-1, 1:-1, 1:-1] = volume
        for pose, change in zip(poses, changes, strict=True):
            steps = np.ascontiguousarray(pose[:, :3])
            origin = centre - steps @ centre + pose[:, 3]  # what the first voxel shows
            work = partial(_resample, padded, volume, steps, origin, change[number].numpy())
            in_slabs(work, len(volume), volume.size)
    return changes


@compiled(error_model="numpy", fastmath={"reassoc", "contract", "nsz"})
def _resample(  # type: ignore[no-untyped-def, unused-ignore]
    padded: NDArray[np.float32],
    volume: NDArray[np.float32],
    steps: NDArray[np.float64],
    origin: NDArray[np.float64],
    change: NDArray[np.float32],
    start: int,
    stop: int,
) -> None:
    """Write slices `start` to `stop` of the moved minus the given volume.

    A row passes through few cells of the source, as rotations are small. While it stays in one, each of the cell's
    eight corners is a contiguous run of voxels, and needs no gather. Where it leaves the cell is found in whole
    numbers: the upper half of a coordinate is the cell, the lower half the place in it.
    """
    ni, nj, nk = volume.shape
    line, plane = nk + 2, (nj + 2) * (nk + 2)
    da, db, dc = _whole(steps[0, 2]), _whole(steps[1, 2]), _whole(steps[2, 2] - 1)
    row = np.empty(nk + _LANES, np.float32)
    for i in range(start, stop):
        for j in range(nj):
            a = steps[0, 0] * i + steps[0, 1] * j + origin[0]
            b = steps[1, 0] * i + steps[1, 1] * j + origin[1]
            c = steps[2, 0] * i + steps[2, 1] * j + origin[2]
            k, end = _inside(a, steps[0, 2], ni, 0, nk)
            k, end = _inside(b, steps[1, 2], nj, k, end)
            k, end = _inside(c, steps[2, 2], nk, k, end)
            row[:k] = 0
            a0, b0, c0 = _whole(a), _whole(b), _whole(c)
            while k < end:
                ak, bk, ck = a0 + k * da, b0 + k * db, c0 + k * dc  # the last one counts from voxel k
                run = min(_stay(ak, da), _stay(bk, db), _stay(ck, dc), end - k)
                corner = ((ak >> 32) + 1) * plane + ((bk >> 32) + 1) * line + (ck >> 32) + 1 + k
                _interpolate(row, k, run, padded, corner, line, plane, (ak, bk, ck), (da, db, dc))
                k += run
            row[end:] = 0
            for k in range(nk):
                change[i, j, k] = row[k] - volume[i, j, k]


@compiled(forceinline=True)
def _whole(voxels):  # type: ignore[no-untyped-def, unused-ignore]
    """Return a coordinate in whole numbers."""
    return np.int64(np.floor(voxels * _ONE + 0.5))


@compiled(error_model="numpy", forceinline=True)
def _inside(origin, step, n, first, end):  # type: ignore[no-untyped-def, unused-ignore]
    """Narrow `range(first, end)` to the k for which -1 < origin + step k < n, by more than rounding."""
    edge = 1e-6 + end / _ONE
    if abs(step) < 1e-12:
        return (first, end) if edge - 1 <= origin <= n - edge else (first, first)
    near, far = (edge - 1 - origin) / step, (n - edge - origin) / step
    near, far = min(near, far), max(near, far)
    first = int(np.ceil(min(max(near, first), end)))
    return first, max(first, int(np.floor(max(min(far, end - 1), first - 1))) + 1)


@compiled(error_model="numpy", forceinline=True)
def _stay(position, step):  # type: ignore[no-untyped-def, unused-ignore]
    """Return how many voxels, this one included, are in its cell."""
    place = np.uint64(position & (_ONE - 1))
    way = np.uint64(_ONE - 1) - place if step >= 0 else place
    return np.int64(way // np.uint64(max(abs(step), 1))) + 1


@compiled(error_model="numpy", fastmath={"reassoc", "contract", "nsz"}, forceinline=True)
def _interpolate(row, k, run, padded, corner, line, plane, position, step):  # type: ignore[no-untyped-def, unused-ignore]
    """Write a run of voxels to the row, and up to 15 more that mean nothing."""
    unit, low, one = np.float32(1 / _ONE), _ONE - 1, np.uint64(1)  # unsigned: a signed index may count from the end
    wa, da = np.float32(position[0] & low) * unit, np.float32(step[0]) * unit
    wb, db = np.float32(position[1] & low) * unit, np.float32(step[1]) * unit
    wc, dc = np.float32(position[2] & low) * unit, np.float32(step[2]) * unit
    k, c00 = np.uint64(k), np.uint64(corner)
    c01, c10, c11 = c00 + np.uint64(line), c00 + np.uint64(plane), c00 + np.uint64(line + plane)
    for n in range(np.uint64((run + _LANES - 1) // _LANES * _LANES)):
        s = np.float32(np.int32(n))
        a, b, c = wa + da * s, wb + db * s, wc + dc * s
        x00 = padded[c00 + n] + c * (padded[c00 + n + one] - padded[c00 + n])
        x01 = padded[c01 + n] + c * (padded[c01 + n + one] - padded[c01 + n])
        x10 = padded[c10 + n] + c * (padded[c10 + n + one] - padded[c10 + n])
        x11 = padded[c11 + n] + c * (padded[c11 + n + one] - padded[c11 + n])
        x0, x1 = x00 + b * (x01 - x00), x10 + b * (x11 - x10)
        row[k + n] = x0 + a * (x1 - x0)
