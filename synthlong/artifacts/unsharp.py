"""Unsharp mask: sharpening, as a scanner's reconstruction or a resampling with overshoot leaves it.

    y = x + amount * (x - blur(x)),   blur Gaussian, see `synthlong.artifacts.blur`

Source: Kamraoui et al. 2022, section 2.4 (doi:10.3389/fnimg.2022.948235).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from synthlong.artifacts.base import Artifact, Params, RandomArtifact
from synthlong.artifacts.blur import Widths, away_from_blur, in_voxels, width_given
from synthlong.artifacts.ranges import Range, check_number

__all__ = ["RandomUnsharpMask", "UnsharpMask", "unsharp_mask"]

_STRONGEST = 100


def unsharp_mask(x: Tensor, *, std: float | Sequence[float], amount: float = 1.0) -> Tensor:
    """Sharpen by adding what a Gaussian blur takes away; edges overshoot, so that values may leave the image's range.

    Args:
        x: Image, shape `(..., I, J, K)`, any intensity unit.
        std: SD of the blur in voxels, one for all axes or one each, in [0, 100]; 0 changes nothing.
        amount: How much of the difference is added, in [0, 100]; 0 changes nothing.

    Raises:
        ValueError: `std` or `amount` outside its range, or `x` not finite floating-point voxels.
    """
    return away_from_blur(x, std=std, amount=check_number("amount", amount, least=0, most=_STRONGEST))


class UnsharpMask(Artifact):
    """`unsharp_mask` as a transform.

    Args:
        std: SD of the blur in voxels, one for all axes or one each.
        amount: How much of the difference is added.
        std_mm: SD in mm instead.
        **kwargs: See `Artifact`.
    """

    kernel = staticmethod(unsharp_mask)

    def __init__(self, std: Any = None, *, amount: Any = 1.0, std_mm: Any = None, **kwargs: Any) -> None:
        super().__init__({**width_given(std, std_mm), "amount": amount}, **kwargs)

    @staticmethod
    def on_grid(params: Params, affine: NDArray[np.float64]) -> Params:
        """Turn mm into voxels."""
        return in_voxels(params, affine)


class RandomUnsharpMask(RandomArtifact):
    """Sharpening of random width, and of random strength if asked for.

    Args:
        std: Range of the blur's SD in voxels, the same along all axes; three ranges `((a, b), (c, d), (e, f))`: one
            drawn for each axis.
        amount: A number, which is fixed, or a range.
        std_mm: Range of the SD in mm instead.
        **kwargs: See `RandomArtifact`.
    """

    final = UnsharpMask
    identity: ClassVar[dict[str, float]] = {"std": 0.0, "std_mm": 0.0}

    def __init__(self, std: Any = (0.5, 1.75), *, amount: Any = 1.0, std_mm: Any = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.widths = Widths.of(std, std_mm)
        fixed = not isinstance(amount, Sequence)
        self.amount = Range.of("amount", (amount, amount) if fixed else amount, least=0, most=_STRONGEST)

    def draw_params(self, rng: np.random.Generator) -> Params:
        """Draw the SD, and the amount."""
        return {**self.widths.draw(rng), "amount": self.amount.draw(rng)}
