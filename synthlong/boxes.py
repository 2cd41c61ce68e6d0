"""Boxes of voxels: of each axis a slice with start and stop, either of which may lie beyond the grid."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

__all__ = ["Region", "box_at", "box_of", "crop", "on_grid", "overlap", "widened", "within"]

Region = tuple[slice, ...]


def box_at(start: Iterable[int], shape: Iterable[int]) -> Region:
    """Return the box of a shape whose first voxel is `start`."""
    return tuple(slice(s, s + n) for s, n in zip(start, shape, strict=True))


def box_of(mask: NDArray, margin: int) -> Region:
    """Return the bounding box of a non-empty mask, `margin` voxels larger, within the array."""
    box = []
    for axis in range(mask.ndim):
        (hit,) = np.nonzero(mask.any(axis=tuple(a for a in range(mask.ndim) if a != axis)))
        box.append(slice(int(hit[0]), int(hit[-1]) + 1))
    return on_grid(widened(tuple(box), margin), mask.shape)


def widened(box: Region, margin: int) -> Region:
    """Return a box with so many voxels more on each face."""
    return tuple(slice(b.start - margin, b.stop + margin) for b in box)


def on_grid(box: Region, shape: tuple[int, ...]) -> Region:
    """Return what of a box lies on a grid; along an axis where nothing does, an empty slice."""
    return tuple(slice(max(b.start, 0), max(min(b.stop, n), 0)) for b, n in zip(box, shape, strict=True))


def overlap(box: Region, other: Region) -> Region | None:
    """Return what two boxes share, None if that is nothing."""
    both = tuple(slice(max(b.start, o.start), min(b.stop, o.stop)) for b, o in zip(box, other, strict=True))
    return both if all(b.start < b.stop for b in both) else None


def within(box: Region, outer: Region) -> Region:
    """Return a box as it lies in an array over `outer`."""
    return tuple(slice(b.start - o.start, b.stop - o.start) for b, o in zip(box, outer, strict=True))


def crop(x: NDArray, centre: tuple[int, ...], side: int) -> tuple[NDArray, tuple[int, ...]]:
    """Return the cube of `side` voxels around a voxel, zero beyond the grid, and its first voxel."""
    start = tuple(int(c) - side // 2 for c in centre)
    cube = box_at(start, (side,) * 3)
    result = np.zeros((side,) * 3, x.dtype)
    if inner := overlap(cube, box_at((0, 0, 0), x.shape)):
        result[within(inner, cube)] = x[inner]
    return result, start
