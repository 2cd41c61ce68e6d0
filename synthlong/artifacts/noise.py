"""Gaussian noise, the same for the same seed on every device.

    y = x + std * n(seed, voxel),   n standard normal

The generator is Philox 4x32-10 (Salmon et al. 2011, doi:10.1145/2063384.2063405): the seed is its key, so that each
seed has a stream of its own, and the counter comes from the voxel's place in the tensor. Its words become normal
numbers by the transform of Box and Muller (1958, doi:10.1214/aoms/1177706645), up to 6.7 SD.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from synthlong.artifacts.base import Artifact, Params, RandomArtifact
from synthlong.artifacts.ranges import Range, check_number
from synthlong.artifacts.volumes import copied, in_slabs, on_volumes
from synthlong.compiling import compiled

__all__ = ["GaussianNoise", "RandomGaussianNoise", "gaussian_noise"]

_COUNTERS = 256  # of a block: each gives four words, and these four normal numbers, for voxels _COUNTERS apart

_ROUNDS = 10
_FACTORS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_STEPS = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_LOW, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)
_PER_WORD = np.float32(2.0**-32)

# polynomials for float32, highest power first: p in log(1 + m) = m - m^2 / 2 + m^3 p(m) for 1 + m from sqrt(1/2) to
# sqrt(2) (Cephes' logf), sin(pi t) / t and cos(pi t) in t^2 for t from -1/2 to 1/2 (Taylor)
_LOG = np.array(
    [0.070376836, -0.1151461, 0.11676999, -0.12420141, 0.14249323, -0.16668058, 0.20000715, -0.24999999, 0.33333331],
    np.float32,
)
_SIN = np.array([(-1) ** n * math.pi ** (2 * n + 1) / math.factorial(2 * n + 1) for n in range(5, -1, -1)], np.float32)
_COS = np.array([(-1) ** n * math.pi ** (2 * n) / math.factorial(2 * n) for n in range(6, -1, -1)], np.float32)
_ROOT_HALF = np.int32(0x3F3504F3)  # the bits of sqrt(1/2)
_MANTISSA = np.int32(0x7FFFFF)
_LOG_2 = np.float32(math.log(2))


def gaussian_noise(x: Tensor, *, std: float, seed: int) -> Tensor:
    """Add independent normal noise to each voxel; leading axes get noise of their own.

    Args:
        x: Image, shape `(..., I, J, K)`, any intensity unit.
        std: SD in the image's unit, in [0, 1e6]; 0 changes nothing.
        seed: Of the noise, a whole number in [0, 2^63]. The CPU's noise and other devices' differ by rounding only.

    Raises:
        ValueError: A parameter outside its range, or `x` not finite floating-point voxels.
    """
    std = check_number("std", std, least=0, most=1e6)
    key = int(check_number("seed", seed, least=0, most=2**63, whole=True))
    if std == 0:
        return copied(x)
    return on_volumes(x, torch_kernel=lambda v: _by_torch(v, std, key), numba_kernel=lambda v: _by_numba(v, std, key))


class GaussianNoise(Artifact):
    """`gaussian_noise` as a transform.

    Args:
        std: SD in the image's unit.
        seed: Of the noise.
        **kwargs: See `Artifact`.
    """

    kernel = staticmethod(gaussian_noise)

    def __init__(self, std: Any, seed: Any, **kwargs: Any) -> None:
        super().__init__({"std": std, "seed": seed}, **kwargs)


class RandomGaussianNoise(RandomArtifact):
    """Noise of random SD.

    Args:
        std: Range of the SD in the image's unit.
        **kwargs: See `RandomArtifact`.
    """

    final = GaussianNoise
    identity: ClassVar[dict[str, float]] = {"std": 0.0}

    def __init__(self, std: float | Sequence[float] = (0.02, 0.1), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.std = Range.of("std", std, least=0, most=1e6)

    def draw_params(self, rng: np.random.Generator) -> Params:
        """Draw the SD and the noise's seed."""
        return {"std": self.std.draw(rng), "seed": int(rng.integers(2**53))}


def _by_torch(volumes: Tensor, std: float, seed: int) -> Tensor:
    blocks = -(-volumes.numel() // (4 * _COUNTERS))
    low, half = int(_LOW), int(_HALF)
    counter = torch.arange(blocks * _COUNTERS, device=volumes.device)
    a, b, c, d = counter & low, counter >> half, torch.zeros_like(counter), torch.zeros_like(counter)
    keys = [seed & low, seed >> half]
    for _ in range(_ROUNDS):  # a product past 2^63 wraps round, with the right bits
        p, q = a * int(_FACTORS[0]), c * int(_FACTORS[1])
        a, b, c, d = (q >> half & low) ^ b ^ keys[0], q & low, (p >> half & low) ^ d ^ keys[1], p & low
        keys = [(key + int(step)) & low for key, step in zip(keys, _STEPS, strict=True)]
    noise = []
    for first, second in ((a, b), (c, d)):
        radius = std * torch.sqrt(-2 * torch.log((first.float() + 0.5) * _PER_WORD.item()))
        angle = second.float() * (2 * math.pi * _PER_WORD.item())
        noise += [radius * torch.cos(angle), radius * torch.sin(angle)]
    ordered = torch.stack(noise).view(4, blocks, _COUNTERS).transpose(0, 1).reshape(-1)
    return volumes + ordered[: volumes.numel()].view_as(volumes)


def _by_numba(volumes: NDArray[np.float32], std: float, seed: int) -> NDArray[np.float32]:
    result = np.empty_like(volumes)
    x, y = volumes.ravel(), result.ravel()
    blocks = -(-x.size // (4 * _COUNTERS))
    in_slabs(lambda start, stop: _add_noise(x, y, np.float32(std), np.uint64(seed), start, stop), blocks, x.size)
    return result


@compiled(fastmath={"contract"})
def _add_noise(x, y, std, seed, start, stop):  # type: ignore[no-untyped-def]
    words = np.empty((4, _COUNTERS), np.uint32)
    noise = np.empty((4, _COUNTERS), np.float32)
    flat = noise.ravel()
    for block in range(start, stop):
        _philox(words, np.uint64(block) * np.uint64(_COUNTERS), seed)
        _box_muller(words[0], words[1].view(np.int32), noise[0], noise[1], std)
        _box_muller(words[2], words[3].view(np.int32), noise[2], noise[3], std)
        of_block = slice(block * flat.size, (block + 1) * flat.size)
        voxels, result = x[of_block], y[of_block]
        for n in range(result.size):
            result[n] = voxels[n] + flat[n]


@compiled(forceinline=True)
def _philox(words, first, seed):  # type: ignore[no-untyped-def]
    """Fill four rows of random words, from counters `first`, `first + 1`, ..."""
    row_a, row_b, row_c, row_d = words[0], words[1], words[2], words[3]
    for n in range(row_a.size):
        counter = first + np.uint64(n)
        a, b, c, d = counter & _LOW, counter >> _HALF, np.uint64(0), np.uint64(0)
        key, other = seed & _LOW, seed >> _HALF
        for _ in range(_ROUNDS):
            p, q = a * _FACTORS[0], c * _FACTORS[1]
            a, b, c, d = (q >> _HALF) ^ b ^ key, q & _LOW, (p >> _HALF) ^ d ^ other, p & _LOW
            key, other = (key + _STEPS[0]) & _LOW, (other + _STEPS[1]) & _LOW
        row_a[n], row_b[n], row_c[n], row_d[n] = np.uint32(a), np.uint32(b), np.uint32(c), np.uint32(d)


@compiled(fastmath={"contract"}, forceinline=True)
def _box_muller(words, turns, one, other, std):  # type: ignore[no-untyped-def]
    """Turn words into pairs of normal numbers, with polynomials, which the compiler vectorises, for log, sin and cos.

    `words` (unsigned) give the radius, `turns` (signed) half the angle, in halves of a turn.
    """
    zero, half, two = np.float32(0), np.float32(0.5), np.float32(2)
    for n in range(words.size):
        u = (np.float32(words[n]) + half) * _PER_WORD
        bits = np.float32(u).view(np.int32) - _ROOT_HALF
        exponent = np.float32(np.int32(bits) >> np.int32(23))
        m = np.int32((bits & _MANTISSA) + _ROOT_HALF).view(np.float32) - np.float32(1)
        p = zero
        for factor in _LOG:
            p = p * m + factor
        log = exponent * _LOG_2 + (m + m * m * (m * p - half))
        radius = std * np.sqrt(-two * log)
        t = np.float32(turns[n]) * _PER_WORD
        s, c = zero, zero
        for factor in _SIN:
            s = s * (t * t) + factor
        for factor in _COS:
            c = c * (t * t) + factor
        s *= t
        one[n] = radius * (np.float32(1) - two * s * s)
        other[n] = radius * (two * s * c)
