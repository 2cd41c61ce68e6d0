"""Registration by mutual information (ANTs): visits to their middle, and the middle to MNI152.

The MNI scan of a contrast is made of the tissue maps: mutual information asks only that tissues differ.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import linalg

from synthlong.atlas import MNI_SHAPE, mni_affine, tissue_maps
from synthlong.preparation.tools import ants_image, load_ants, unheard
from synthlong.preparation.ways import middle_of, read_way, way_text
from synthlong.resampling import Grid, resample

__all__ = ["MNI", "Image", "align_visits", "mni_at", "mni_brain", "mni_scan", "register", "upright"]

MNI = Grid(MNI_SHAPE, mni_affine())

_SAMPLES = 150_000  # of the fixed image, on its own grid
_CONTRASTS = {"FLAIR": (0.15, 1.1, 0.9), "T1w": (0.2, 0.65, 1.0)}  # CSF, gray, white matter


class Image(NamedTuple):
    """A volume and where it lies."""

    data: NDArray
    grid: Grid


@lru_cache
def mni_scan(contrast: str) -> NDArray[np.float32]:
    """Return what a brain of the MNI template looks like in "FLAIR" or "T1w", the brighter matter about 1."""
    return np.sum([np.float32(w) * m for w, m in zip(_CONTRASTS[contrast], tissue_maps(), strict=True)], axis=0)


@lru_cache
def mni_brain() -> NDArray[np.bool_]:
    """Return the brain of the MNI template."""
    return np.sum(tissue_maps(), axis=0) > 0.5


def mni_at(contrast: str, *, spacing_mm: float) -> Image:
    """Return the MNI scan of a contrast on a coarser grid."""
    return upright(Image(mni_scan(contrast), MNI), spacing_mm=spacing_mm)


def upright(image: Image, *, spacing_mm: float) -> Image:
    """Return an image on the upright grid around it."""
    grid = Grid.around([image.grid], [np.eye(4)], spacing_mm=spacing_mm)
    return Image(np.maximum(resample(image.data, grid.step_to(image.grid), grid.shape, order=1), 0), grid)


def register(
    fixed: Image, moving: Image, *, motion: Literal["Rigid", "Affine"], start: NDArray | None = None
) -> NDArray[np.float64]:
    """Return the way from `fixed` to `moving`, `(4, 4)`.

    Args:
        fixed: On an upright grid of cubes.
        moving: Likewise.
        motion: "Rigid" (6 parameters) or "Affine" (12).
        start: A first way; default: from one centre of mass to the other.

    Raises:
        RuntimeError: ANTs failed.
    """
    ants = load_ants()
    with tempfile.TemporaryDirectory(prefix="synthlong-") as folder:
        first = None
        if start is not None:
            first = str(Path(folder) / "start.txt")
            Path(first).write_text(way_text(start))
        with unheard("registration"):
            found = ants.registration(
                ants_image(*fixed),
                ants_image(*moving),
                type_of_transform=motion,
                initial_transform=first,
                outprefix=str(Path(folder) / "found"),
                aff_metric="mattes",
                aff_random_sampling_rate=min(1.0, _SAMPLES / np.prod(fixed.grid.shape)),
                aff_iterations=(500, 250, 50),
                aff_shrink_factors=(4, 2, 1),
                aff_smoothing_sigmas=(2, 1, 0),
                random_seed=1,
            )
        ways = [read_way(path) for path in found["fwdtransforms"]]
    result = np.eye(4)
    for way in reversed(ways):  # the last one is applied first to a point
        result = way @ result
    return result


def align_visits(
    visits: Sequence[Image],
    *,
    motion: Literal["Rigid", "Affine"] = "Rigid",
    report: Callable[[], None] = lambda: None,
) -> list[NDArray[np.float64]]:
    """Return the ways from the middle of a patient's visits to each of them; one visit is its own middle.

    Every visit is registered to the first and the first to it; the mean of both favours neither.

    Args:
        visits: Brains, or heads, of one patient on upright grids.
        motion: "Affine" where the scanners' scales differ, by about 1 % between two of them.
        report: Called after each visit but the first.
    """
    ways = [np.eye(4)]
    for visit in visits[1:]:
        there = register(visits[0], visit, motion=motion)
        back = register(visit, visits[0], motion=motion, start=np.linalg.inv(there))
        mean = linalg.expm((linalg.logm(there) - linalg.logm(back)).real / 2)
        ways.append(_rigid(mean) if motion == "Rigid" else mean)
        report()
    return middle_of(ways)


def _rigid(way: NDArray) -> NDArray[np.float64]:
    """Return the nearest rotation and shift."""
    u, _, v = np.linalg.svd(way[:3, :3])
    result = way.copy()
    result[:3, :3] = u @ v
    return result
