"""A sheet to look at: what was found, lesion by lesion, in both visits."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from synthlong.case import Case
from synthlong.detection.inference import Detection
from synthlong.pair import NEW
from synthlong.pictures import Picture, gray_pixels, panels, rgb, upright

__all__ = ["MOST_ROWS", "sheet_of"]

MOST_ROWS = 20
_SIDE = 64  # mm of the close-ups
_HEIGHT = 256  # pixels of a row
_GAP = 4


def sheet_of(baseline: Case, followup: Case, detection: Detection) -> Picture:
    """Return a row per new lesion, largest first, at most `MOST_ROWS`.

    A row has the axial plane in which the lesion is largest: the follow-up with a frame around the lesion, then
    64 mm of the baseline, of the follow-up, and of the follow-up with outlines, all on one gray scale. Where nothing
    is new, the one row shows the middle of the brain.

    Args:
        baseline: First visit.
        followup: Second visit, on the same grid.
        detection: What was found in them.
    """
    places = []
    for number, box in enumerate(ndimage.find_objects(detection.labels)[:MOST_ROWS], start=1):
        own = detection.labels[box] == number
        k = int(own.sum(axis=(0, 1)).argmax())
        i, j = np.argwhere(own[:, :, k]).mean(axis=0).round().astype(int)
        places.append((box[0].start + int(i), box[1].start + int(j), box[2].start + k))
    if not places:
        i, j, k = np.argwhere(followup.brain).mean(axis=0).round().astype(int).tolist()
        places = [(i, j, k)]
    rows = [_row(baseline.flair, followup.flair, detection.labels > 0, place) for place in places]
    between = np.zeros((_GAP, rows[0].shape[1], 3), np.uint8)
    return np.vstack([part for row in rows for part in (between, row)][1:])


def _row(baseline: NDArray, followup: NDArray, new: NDArray[np.bool_], place: tuple[int, int, int]) -> Picture:
    i, j, k = place
    planes = baseline[:, :, k], followup[:, :, k], np.where(new[:, :, k], NEW, 0).astype(np.uint8)
    before, after, codes = (upright(_crop(plane, (i, j))) for plane in planes)
    views = panels(before, after, codes, side=_HEIGHT)
    pictures = [_overview(followup[:, :, k], (i, j)), views["baseline"], views["follow-up"]]
    pictures = [np.repeat(p[..., None], 3, axis=2) if p.ndim == 2 else p for p in pictures]
    gap = np.zeros((_HEIGHT, _GAP, 3), np.uint8)
    return np.hstack([part for p in (*pictures, views["follow-up, outlined"]) for part in (gap, p)][1:])


def _crop(plane: NDArray, centre: tuple[int, int]) -> NDArray:
    """Return the close-up around a voxel, 0 beyond the grid."""
    half = _SIDE // 2
    i, j = centre
    return np.pad(plane, half)[i : i + _SIDE, j : j + _SIDE]


def _overview(plane: NDArray, centre: tuple[int, int]) -> Picture:
    """Return the whole plane, as high as a row, with a frame around the close-up."""
    every = -(-max(plane.shape) // _HEIGHT)
    inside = np.zeros(plane.shape, bool)
    i, j = centre
    half = _SIDE // 2
    inside[max(i - half, 0) : i + half, max(j - half, 0) : j + half] = True
    gray, frame = upright(plane[::every, ::every]), upright(inside[::every, ::every])
    pixels = np.repeat(gray_pixels(gray)[..., None], 3, axis=2)
    pixels[frame & ~ndimage.binary_erosion(frame)] = rgb(NEW)
    spare = _HEIGHT - len(pixels)
    return np.pad(pixels, ((spare // 2, spare - spare // 2), (0, 0), (0, 0)))
