"""A parameter: one number, or a range to draw it from.

    value -> Range -> draw(rng) -> number

A single number d of a random transform stands for the range from the value that changes nothing, as in TorchIO: (0, d),
or (-d, d) where both signs make sense; (d, d) is fixed. A whole number stands for itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Range", "check_axes", "check_axis", "check_number", "check_triple", "check_triples"]

_DIGITS = 6  # of a number drawn from a wide range: keeps recipes and histories short


@dataclass(frozen=True)
class Range:
    """A closed range to draw numbers from.

    Args:
        low: Least value.
        high: Largest value.
        whole: Draw whole numbers.
    """

    low: float
    high: float
    whole: bool = False

    @classmethod
    def of(
        cls,
        name: str,
        value: float | Sequence[float] | NDArray,
        *,
        least: float = -math.inf,
        most: float = math.inf,
        symmetric: bool = False,
        around: float = 0.0,
        whole: bool = False,
    ) -> Range:
        """Build the range of parameter `name`.

        Args:
            name: For messages.
            value: `(low, high)`, or a number d: `(around, d)`, `(-d, d)` if `symmetric`, `(d, d)` if `whole`.
            least: Smallest allowed.
            most: Largest allowed.
            symmetric: What a single number means.
            around: The value that changes nothing, where a single number's range starts.
            whole: Only whole numbers are allowed.

        Raises:
            ValueError: Not numbers, falling, or outside `[least, most]`.
        """
        given = _listed(value)
        if isinstance(given, list):
            pair = given
        else:
            d = check_number(name, given, least=0 if symmetric and not whole else least, most=most, whole=whole)
            pair = [d, d] if whole else [-d, d] if symmetric else sorted((around, d))
        if len(pair) != 2:
            raise ValueError(f"{name} = {value!r}: must be a number or a range (low, high)")
        low, high = (check_number(name, v, least=least, most=most, whole=whole) for v in pair)
        if low > high:
            raise ValueError(f"{name} = {value!r}: the range must rise, as in ({high}, {low})")
        return cls(low, high, whole)

    def draw(self, rng: np.random.Generator) -> float:
        """Draw a number, uniformly."""
        u = rng.random()
        if self.whole:
            return int(self.low) + int(u * (int(self.high) - int(self.low) + 1))
        width = self.high - self.low
        value = self.low + float(u) * width
        return min(max(round(value, _DIGITS) if width > 1e-3 else value, self.low), self.high)


def check_number(
    name: str, value: Any, *, least: float = -math.inf, most: float = math.inf, whole: bool = False
) -> float:
    """Return `value` as float (int if `whole`).

    Raises:
        ValueError: Not a finite number in `[least, most]`; names parameter, value and range.
    """
    allowed = f"{'a whole' if whole else 'a'} number in [{least:g}, {most:g}]"
    try:
        number = int(value) if whole else float(value)  # exact, where a float has 53 bits
        good = not isinstance(value, (bool, str)) and math.isfinite(number) and number == value
        good = good and least <= number <= most
    except (TypeError, ValueError, OverflowError):
        good = False
    if not good:
        raise ValueError(f"{name} = {value!r}: must be {allowed}")
    return number


def check_triple(
    name: str, value: Any, *, least: float = -math.inf, most: float = math.inf
) -> tuple[float, float, float]:
    """Return one number per axis; a single number stands for all three.

    Raises:
        ValueError: Neither a number nor three, or outside `[least, most]`.
    """
    given = _listed(value)
    values = given if isinstance(given, list) else [value] * 3
    if len(values) != 3:
        raise ValueError(f"{name} = {value!r}: must be a number, or three, one per axis")
    i, j, k = (check_number(name, v, least=least, most=most) for v in values)
    return i, j, k


def check_axes(value: Any) -> tuple[int, ...]:
    """Return the array axes to choose from.

    Raises:
        ValueError: Neither an axis nor a sequence of them.
    """
    given = _listed(value)
    axes = given if isinstance(given, list) else [value]
    if not axes:
        raise ValueError(f"axes = {value!r}: must have at least one of 0, 1, 2")
    return tuple(int(check_number("axes", axis, least=0, most=2, whole=True)) for axis in axes)


def check_axis(axis: Any) -> int | str:
    """Return 0, 1, 2 or "axial".

    Raises:
        ValueError: Anything else.
    """
    if isinstance(axis, str):
        if axis != "axial":
            raise ValueError(f"axis = {axis!r}: must be 0, 1, 2 or 'axial'")
        return axis
    return int(check_number("axis", axis, least=0, most=2, whole=True))


def check_triples(
    name: str, value: Any, *, least: float = -math.inf, most: float = math.inf
) -> list[tuple[float, float, float]]:
    """Return rows of three numbers; none is allowed.

    Raises:
        ValueError: Not a sequence of threes, or a number outside `[least, most]`.
    """
    rows = value.tolist() if isinstance(value, np.ndarray) else value
    if not isinstance(rows, Sequence) or any(not isinstance(row, (Sequence, np.ndarray)) for row in rows):
        raise ValueError(f"{name} = {value!r}: must be a list of threes, one number per axis")
    return [check_triple(name, row, least=least, most=most) for row in rows]


def _listed(value: Any) -> Any:
    """Return a sequence or an array as a list, anything else as it is."""
    if isinstance(value, np.ndarray):
        return list(value) if value.ndim else value
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
