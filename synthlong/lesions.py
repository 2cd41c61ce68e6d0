"""Lesions as objects: the connected ones of a mask, and parts of one.

Confluent lesions are one 26-connected component that can hold most of a patient's lesion load; as a whole
they neither appear nor vanish, so those above a limit are split at their necks first.
"""

from __future__ import annotations

from dataclasses import dataclass
from heapq import heapify, heappop, heappush

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from synthlong.boxes import Region, box_of

__all__ = [
    "SMALLEST_EVENT_MM3",
    "TOUCHING",
    "LesionMap",
    "core",
    "find_lesions",
    "grown",
]

SMALLEST_EVENT_MM3 = 3.0
"""No lesion of this volume or less is new or vanished: the challenge's scores drop those."""

TOUCHING = np.ones((3, 3, 3), bool)
"""What a voxel of a lesion touches: its 26 neighbours."""

_NECK_RADIUS = 4


@dataclass(frozen=True, eq=False)
class LesionMap:
    """The lesions of a scan, numbered from 1.

    Args:
        labels: int32 `(I, J, K)`, 0 where there is no lesion.
        volumes_mm3: Volume of each lesion.
        boxes: Bounding box of each.
        mutable: For each, whether it may appear, vanish, grow or shrink: larger than 3 mm3, no larger than
            the limit.
    """

    labels: NDArray[np.int32]
    volumes_mm3: NDArray[np.float64]
    boxes: tuple[Region, ...]
    mutable: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.boxes)


def find_lesions(mask: NDArray, *, max_event_mm3: float) -> LesionMap:
    """Number the 26-connected lesions of a mask, splitting those over `max_event_mm3` at their necks.

    The split is a watershed of the distance to the border, from maxima at least 4 voxels apart. Parts that
    are still too large stay as they are: present at both visits.

    Args:
        mask: Lesion voxels of 1 mm3, shape `(I, J, K)`, zero or not.
        max_event_mm3: Largest lesion that may change between the visits.
    """
    labels, n = ndimage.label(np.asarray(mask) != 0, TOUCHING)
    labels = labels.astype(np.int32, copy=False)
    volumes = np.bincount(labels.ravel(), minlength=n + 1)[1:]
    for number, box in enumerate(ndimage.find_objects(labels), start=1):
        if volumes[number - 1] > max_event_mm3:
            whole = labels[box] == number
            parts = _split_at_necks(whole)
            extra = parts > 1
            labels[box][extra] = parts[extra] - 1 + n
            n += int(parts.max()) - 1
    volumes = np.bincount(labels.ravel(), minlength=n + 1)[1:]
    return LesionMap(
        labels=labels,
        volumes_mm3=volumes.astype(np.float64),
        boxes=tuple(ndimage.find_objects(labels)),
        mutable=(volumes > SMALLEST_EVENT_MM3) & (volumes <= max_event_mm3),
    )


def _split_at_necks(whole: NDArray[np.bool_]) -> NDArray[np.int32]:
    """Return parts 1..n of one lesion by the watershed of its distance map."""
    padded = np.pad(whole, 1)
    depth = ndimage.gaussian_filter(ndimage.distance_transform_edt(padded), 1.0) * padded
    peak = padded & (depth == ndimage.maximum_filter(depth, size=2 * _NECK_RADIUS + 1))
    seeds, n = ndimage.label(peak, TOUCHING)
    if n < 2:
        return whole.astype(np.int32)
    return _flood(seeds, depth)[1:-1, 1:-1, 1:-1]


def _flood(seeds: NDArray[np.integer], depth: NDArray[np.float64]) -> NDArray[np.int32]:
    """Grow seeds over all voxels of depth above 0 (none on a face of the array), the deepest first.

    `scipy.ndimage.watershed_ift` will not do: it floods by differences of height, also from the background
    inwards.
    """
    steps = np.argwhere(TOUCHING) - 1
    strides = np.array([depth.shape[1] * depth.shape[2], depth.shape[2], 1])
    offsets = [int(o) for o in steps @ strides if o]
    parts, deep = seeds.ravel().tolist(), depth.ravel().tolist()
    queue = [(-deep[at], at) for at in np.flatnonzero(seeds).tolist()]
    heapify(queue)
    while queue:
        _, at = heappop(queue)
        for offset in offsets:
            near = at + offset
            if deep[near] > 0 and not parts[near]:
                parts[near] = parts[at]
                heappush(queue, (-deep[near], near))
    return np.array(parts, np.int32).reshape(seeds.shape)


def core(mask: NDArray, fraction: float) -> NDArray[np.bool_]:
    """Return the inner part of one lesion that holds about `fraction` of its voxels.

    Voxels are taken from the deepest one outwards: by depth below the border, then by nearness to the
    deepest. The part is connected; 0 gives no voxel, 1 the lesion itself, anything between at least one
    voxel and, of a lesion of several, not all.

    Args:
        mask: The voxels of one lesion, shape `(I, J, K)`.
        fraction: In [0, 1].
    """
    mask = np.asarray(mask) != 0
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction must be in [0, 1], got {fraction}")
    if fraction in (0, 1) or not mask.any():
        return mask.copy() if fraction == 1 else np.zeros_like(mask)
    voxels = int(mask.sum())
    keep = max(min(round(fraction * voxels), voxels - 1), 1)
    depth = ndimage.distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1, 1:-1]
    where = np.argwhere(mask)
    deepest = where[np.argmax(depth[mask])]
    rank = 0.5 * np.linalg.norm(where - deepest, axis=1) - depth[mask]
    inner = np.zeros_like(mask)
    inner[tuple(where[np.argsort(rank, kind="stable")[:keep]].T)] = True
    parts, _ = ndimage.label(inner, TOUCHING)
    return parts == parts[tuple(deepest)]


def grown(mask: NDArray, margin: int) -> NDArray[np.bool_]:
    """Return a mask grown by `margin` voxels (Euclidean), within its array."""
    mask = np.asarray(mask) != 0
    result = np.zeros_like(mask)
    if mask.any():
        box = box_of(mask, margin + 1)
        result[box] = ndimage.distance_transform_edt(~mask[box]) <= margin
    return result
