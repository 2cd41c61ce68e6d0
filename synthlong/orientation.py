"""How a box is turned: one of the 48 orthogonal orientations, of its voxels and of its affine."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["AS_IT_LIES", "Orientation", "draw_orientation"]


@dataclass(frozen=True)
class Orientation:
    """An orthogonal orientation: axes permuted, then some reversed.

    Args:
        axes: Axis of the source for each axis of the result.
        flips: Whether each axis of the result is reversed.
    """

    axes: tuple[int, int, int] = (0, 1, 2)
    flips: tuple[bool, bool, bool] = (False, False, False)

    def apply(self, array: NDArray) -> NDArray:
        """Return the turned array, contiguous."""
        steps = tuple(slice(None, None, -1 if f else 1) for f in self.flips)
        return np.ascontiguousarray(array.transpose(self.axes)[steps])

    @property
    def inverse(self) -> Orientation:
        """The orientation that turns back."""
        i, j, k = (self.axes.index(a) for a in range(3))
        return Orientation((i, j, k), (self.flips[i], self.flips[j], self.flips[k]))

    def apply_affine(self, affine: NDArray[np.float64], shape: tuple[int, ...]) -> NDArray[np.float64]:
        """Return the affine of the turned array; `shape` is that before turning."""
        turn = np.zeros((4, 4))
        turn[3, 3] = 1
        for new, (old, flip) in enumerate(zip(self.axes, self.flips, strict=True)):
            turn[old, new] = -1 if flip else 1
            turn[old, 3] = shape[old] - 1 if flip else 0
        return affine @ turn


AS_IT_LIES = Orientation()


def draw_orientation(rng: np.random.Generator, among: str) -> Orientation:
    """Draw an orientation among "all" 48, by "mirror" only (left-right), or "none"."""
    if among == "none":
        return AS_IT_LIES
    if among == "mirror":
        return Orientation(flips=(bool(rng.random() < 0.5), False, False))
    i, j, k = (int(a) for a in rng.permutation(3))
    a, b, c = (bool(f) for f in rng.random(3) < 0.5)
    return Orientation((i, j, k), (a, b, c))
