"""Where a pair lies on its case's grid, and how it is turned: what is edited, acquired, cut out.

case's grid -> wide: lesions, flow, shift -> region with a margin, turned: acquisition -> region: the pair

A box may reach beyond the grid; there it is background.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from synthlong.boxes import Region, box_at, on_grid, overlap, widened, within
from synthlong.case import Case
from synthlong.orientation import AS_IT_LIES, Orientation
from synthlong.recipe import Recipe
from synthlong.resampling import SHIFT_REACH

__all__ = ["MOVING", "Frame", "acquired"]

MOVING = 8
"""How far beyond a box motion looks: what moves into it is the head around it, not nothing."""

_BEYOND = SHIFT_REACH + 2
"""How far beyond a box a shift and the edges of flow look."""


@dataclass(frozen=True)
class Frame:
    """The part of a case that a pair shows, and its surroundings.

    Args:
        region: What the pair shows; may reach beyond the grid.
        wide: What is edited: the region and as far as anything looks, on the grid.
        margins: Voxels around the region that the acquisition of each visit looks at.
        shown: Orientation of the pair.
        scanned: Orientation in which visits are acquired: that of the recipe.
        grid: Affine of the case's grid.
    """

    region: Region
    wide: Region
    margins: tuple[int, int]
    shown: Orientation
    scanned: Orientation
    grid: NDArray[np.float64]

    @classmethod
    def of(cls, case: Case, recipe: Recipe, *, whole: bool) -> Self:
        """Return the frame of a recipe's box, or of the whole grid, which stays as it lies if turning changes it."""
        start = (0, 0, 0) if whole else recipe.box.start
        shape = case.shape if whole else (recipe.box.size,) * 3
        region = box_at(start, shape)
        artifacts, turn = recipe.artifacts, recipe.orientation
        bare = whole or artifacts.before_editing
        first, last = (0 if bare else _margin_of(steps) for steps in (artifacts.baseline, artifacts.followup))
        elsewhere = any(recipe.offset_mm) or any(brighter for _, brighter in recipe.flow)
        reach = max(_BEYOND if elsewhere else 0, first, last)
        changed = whole and tuple(case.shape[a] for a in turn.axes) != case.shape
        return cls(
            region=region,
            wide=on_grid(widened(region, reach), case.shape),
            margins=(first, last),
            shown=AS_IT_LIES if changed else turn,
            scanned=turn,
            grid=case.affine,
        )

    @property
    def affine(self) -> NDArray[np.float64]:
        """Affine `(4, 4)` of the pair."""
        return self._affine_of(self.region, self.shown)

    def cut(self, array: NDArray) -> NDArray:
        """Return the pair's part of an array over `wide`."""
        return self.shown.apply(_cut_out(array, self.wide, self.region))

    def acquire(self, image: NDArray[np.float32], steps: tuple[Any, ...], *, visit: int) -> NDArray[np.float32]:
        """Return the pair's part of a visit over `wide` (0 the baseline, 1 the follow-up) with its artifacts."""
        if not steps:
            return self.cut(image)
        margin = self.margins[visit]
        part = widened(self.region, margin)
        turned = self.scanned.apply(_cut_out(image, self.wide, part))
        scan = acquired(turned, steps, self._affine_of(part, self.scanned))
        if self.shown != self.scanned:
            scan = self.scanned.inverse.apply(scan)
        return np.ascontiguousarray(scan[tuple(slice(margin, n - margin) for n in scan.shape)])

    def _affine_of(self, part: Region, turn: Orientation) -> NDArray[np.float64]:
        affine = self.grid.copy()
        affine[:3, 3] += affine[:3, :3] @ np.array([s.start for s in part], float)
        return turn.apply_affine(affine, tuple(s.stop - s.start for s in part))


def acquired(image: NDArray[np.float32], steps: tuple[Any, ...], affine: NDArray[np.float64]) -> NDArray[np.float32]:
    """Return the image with its artifacts and a background of 0: scans are skull-stripped after acquisition."""
    import torch

    from synthlong.artifacts import acquire

    x = torch.from_numpy(np.require(image, requirements=("C", "W")))
    return acquire(x, steps=steps, affine=affine, zero_background=True).numpy()


def _margin_of(steps: tuple[Any, ...]) -> int:
    return MOVING if any(name == "KSpaceMotion" for name, _ in steps) else 0


def _cut_out(array: NDArray, part: Region, region: Region) -> NDArray:
    """Return a region of the grid from an array of a part of it; 0 where that part, and so the grid, ends."""
    inner = overlap(region, part)
    assert inner, "a box shows some of the grid"
    beyond = [(i.start - r.start, r.stop - i.stop) for i, r in zip(inner, region, strict=True)]
    return np.pad(array[within(inner, part)], beyond)
