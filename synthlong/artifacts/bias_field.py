"""Bias field: a slowly varying factor, the exponential of a polynomial.

    y = x exp(sum over a + b + c <= order of w_abc u^a v^b w^c)

with u, v, w from -1 to 1 across the axes, as TorchIO's `BiasField` has it.

Sources: Van Leemput et al. 1999 (doi:10.1109/42.811270), Sudre et al. 2017 (doi:10.1016/j.media.2017.02.007).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from synthlong.artifacts.base import Artifact, Params, RandomArtifact
from synthlong.artifacts.ranges import Range, check_number
from synthlong.artifacts.volumes import copied, in_slabs, on_volumes
from synthlong.compiling import compiled

__all__ = ["PolynomialBiasField", "RandomPolynomialBiasField", "polynomial_bias_field"]

_HIGHEST = 6  # order
_LARGEST = 50.0  # sum of the coefficients' magnitudes: exp(50) is far from float32's limits

_LANES = 16  # rows are padded to whole vectors of the widest processors

# 2^f for f from 0 to 1, highest power first, with the least maximal error: 3e-9
_EXP_2 = np.array([0.00021889227, 0.0012384304, 0.0096849763, 0.055480221, 0.24023055, 0.69314692, 1], np.float32)


def polynomial_bias_field(x: Tensor, *, coefficients: Sequence[float], order: int = 3) -> Tensor:
    """Multiply by the exponential of a polynomial in the voxel's place.

    Places run from -1 to 1 between the centres of an axis's outer voxels; an axis of one voxel lies at 0.

    Args:
        x: Image, shape `(..., I, J, K)`, any intensity unit.
        coefficients: One for each term u^a v^b w^c of degree up to `order`, in the order of a, then b, then c:
            (order + 1)(order + 2)(order + 3) / 6 numbers, 20 for order 3, of magnitudes that add up to 50 at most;
            all 0 changes nothing.
        order: Of the polynomial, in [0, 6].

    Raises:
        ValueError: A parameter outside its range, or `x` not finite floating-point voxels.
    """
    order = int(check_number("order", order, least=0, most=_HIGHEST, whole=True))
    weights = _weights(coefficients, order)
    if not weights.any():
        return copied(x)
    return on_volumes(x, torch_kernel=lambda v: _by_torch(v, weights), numba_kernel=lambda v: _by_numba(v, weights))


class PolynomialBiasField(Artifact):
    """`polynomial_bias_field` as a transform.

    Args:
        coefficients: One for each term of degree up to `order`.
        order: Of the polynomial.
        **kwargs: See `Artifact`.
    """

    kernel = staticmethod(polynomial_bias_field)

    def __init__(self, coefficients: Any, order: Any = 3, **kwargs: Any) -> None:
        super().__init__({"coefficients": coefficients, "order": order}, **kwargs)


class RandomPolynomialBiasField(RandomArtifact):
    """A bias field of random coefficients.

    Args:
        coefficients: Range of each; a number d stands for `(-d, d)`.
        order: Of the polynomial.
        **kwargs: See `RandomArtifact`.
    """

    final = PolynomialBiasField
    identity: ClassVar[dict[str, float]] = {"coefficients": 0.0}

    def __init__(self, coefficients: float | Sequence[float] = 0.5, order: int = 3, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.order = int(check_number("order", order, least=0, most=_HIGHEST, whole=True))
        most = _LARGEST / math.comb(self.order + 3, 3)
        self.coefficients = Range.of("coefficients", coefficients, least=-most, most=most, symmetric=True)

    def draw_params(self, rng: np.random.Generator) -> Params:
        """Draw the coefficients."""
        count = math.comb(self.order + 3, 3)
        return {"coefficients": [self.coefficients.draw(rng) for _ in range(count)], "order": self.order}


def _weights(coefficients: Any, order: int) -> NDArray[np.float64]:
    """Return the polynomial's coefficients as `(a, b, c)`, for the logarithm to base 2."""
    listed = list(coefficients) if isinstance(coefficients, (Sequence, np.ndarray)) else []
    terms = _terms(order)
    if len(listed) != len(terms):
        raise ValueError(f"coefficients = {coefficients!r}: must be {len(terms)} numbers for order {order}")
    numbers = [check_number("coefficients", value, least=-_LARGEST, most=_LARGEST) for value in listed]
    if sum(map(abs, numbers)) > _LARGEST:
        raise ValueError(f"coefficients = {coefficients!r}: their magnitudes must add up to {_LARGEST:g} at most")
    weights = np.zeros((order + 1,) * 3)
    for term, number in zip(terms, numbers, strict=True):
        weights[term] = number / math.log(2)
    return weights


@cache
def _terms(order: int) -> list[tuple[int, int, int]]:
    """Return the powers of each term."""
    powers = range(order + 1)
    return [(a, b, c) for a in powers for b in powers for c in powers if a + b + c <= order]


def _places(n: int) -> NDArray[np.float64]:
    """Return the places of n voxels along an axis, from -1 to 1."""
    return (2 * np.arange(n) - (n - 1)) / max(n - 1, 1)


def _by_torch(volumes: Tensor, weights: NDArray[np.float64]) -> Tensor:
    powers = [_places(n)[:, None] ** np.arange(len(weights)) for n in volumes.shape[1:]]
    tensors = [torch.as_tensor(t, dtype=torch.float32, device=volumes.device) for t in (weights, *powers)]
    return volumes * torch.exp2(torch.einsum("abc,ia,jb,kc->ijk", *tensors))


def _by_numba(volumes: NDArray[np.float32], weights: NDArray[np.float64]) -> NDArray[np.float32]:
    result = np.empty_like(volumes)
    u, v, w = (_places(n) for n in volumes.shape[1:])
    v, w = v.astype(np.float32), np.append(w, np.zeros(-len(w) % _LANES)).astype(np.float32)
    in_slabs(lambda start, stop: _multiply(volumes, result, weights, u, v, w, start, stop), len(u), volumes.size)
    return result


@compiled(fastmath={"contract"})
def _multiply(x, y, weights, us, vs, ws, start, stop):  # type: ignore[no-untyped-def]
    """Multiply planes `start` to `stop` by their field."""
    h = np.zeros((_HIGHEST + 1, vs.size), np.float32)  # coefficients of 1, w, w^2, ... for each row of a plane
    field = np.empty(ws.size, np.float32)
    for i in range(start, stop):
        for c in range(weights.shape[2]):
            row = h[c]
            row[:] = 0
            for b in range(weights.shape[1] - 1, -1, -1):
                total = 0.0
                for a in range(weights.shape[0] - 1, -1, -1):
                    total = total * us[i] + weights[a, b, c]
                part = np.float32(total)
                for j in range(row.size):
                    row[j] = row[j] * vs[j] + part
        for j in range(vs.size):
            h0, h1, h2, h3, h4, h5, h6 = h[0, j], h[1, j], h[2, j], h[3, j], h[4, j], h[5, j], h[6, j]
            for k in range(field.size):
                w = ws[k]
                e = h0 + w * (h1 + w * (h2 + w * (h3 + w * (h4 + w * (h5 + w * h6)))))
                whole = np.floor(e)
                p = np.float32(0)
                for factor in _EXP_2:
                    p = p * (e - whole) + factor
                bits = (np.int32(whole) + np.int32(127)) << np.int32(23)  # of 2^whole
                field[k] = p * np.int32(bits).view(np.float32)
            for n in range(x.shape[0]):
                voxels, result = x[n, i, j], y[n, i, j]
                for k in range(result.size):
                    result[k] = voxels[k] * field[k]
