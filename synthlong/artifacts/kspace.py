"""k-space along one axis: to scale its planes is to filter the image along that axis alone.

    Re IFFT3(m(k_a) FFT3(x)) = IFFT_a(h FFT_a(x)),   h(k) = (m(k) + m(-k)) / 2

The transforms along the other two axes cancel; the real part of a real image's result keeps the part of the mask that
is even about the centre of k-space, which is real arithmetic: a transform of real numbers, or a product with the
symmetric circulant matrix of h, whichever is faster.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from synthlong.networks import exact_products, one_thread

__all__ = ["Mask", "add_filtered", "alone"]

Mask = tuple[float, ...]
"""A factor for each plane of k-space, from one end to the other; the centre is plane n // 2."""

_CACHED = 1 << 19  # voxels whose spectra stay near

_alone = threading.Lock()
"""Held while products have one torch thread, or on Intel's processors MKL's bits would depend on their number."""


def _free() -> None:
    """Make the lock anew: a process that was forked while another thread held it would wait for ever."""
    global _alone
    _alone = threading.Lock()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_free)


@contextmanager
def alone() -> Iterator[None]:
    """Compute with one torch thread, one caller at a time: the bits of sums would depend on the number of threads."""
    with _alone, one_thread():
        yield


def add_filtered(x: Tensor, images: Sequence[Tensor], masks: Sequence[Mask], *, axis: int, scale: float = 1) -> Tensor:
    """Return `x` plus `scale` times the sum of images whose k-space was multiplied by their masks.

    Args:
        x: Volumes `(N, I, J, K)`, contiguous float32.
        images: Of the same shape, contiguous.
        masks: One for each image, with as many planes as `axis` has voxels.
        axis: The planes are perpendicular to it, in {0, 1, 2}.
        scale: Any number.
    """
    n, after = x.shape[1 + axis], math.prod(x.shape[2 + axis :])
    pencils = (-1, n, after)  # all lines along the axis, side by side
    result, sources = x.clone(), [image.view(pencils) for image in images]
    widths = [2 * int(np.count_nonzero(_even_part(mask))) for mask in masks]
    if sources and _transform_is_faster(n, max(widths), after):
        _add_by_transform(result.view(pencils), sources, masks, scale)
    else:
        with alone(), exact_products():
            for source, mask in zip(sources, masks, strict=True):
                _add_by_product(result.view(pencils), source, _basis(mask).to(x.device), scale)
    return result


def _transform_is_faster(n: int, width: int, after: int) -> bool:
    """Tell whether Fourier transforms beat matrix products that are `width` wide, as measured on a CPU."""
    rest = n
    for prime in (2, 3, 5, 7, 11, 13):
        while rest % prime == 0:
            rest //= prime
    return n >= 400 or (after == 1 and rest == 1 and n >= 112 and width >= 112)


def _add_by_transform(result: Tensor, images: Sequence[Tensor], masks: Sequence[Mask], scale: float) -> None:
    _, n, after = result.shape
    gains = [torch.from_numpy(scale * _even_part(m)[: n // 2 + 1, None]).to(result) for m in masks]
    count = max(1, _CACHED // (n * after))
    for target, *sources in zip(result.split(count), *(image.split(count) for image in images), strict=True):
        spectrum = sum(torch.fft.rfft(source, dim=1).mul_(g) for source, g in zip(sources, gains, strict=True))
        target += torch.fft.irfft(spectrum, n=n, dim=1)


def _add_by_product(result: Tensor, image: Tensor, basis: Tensor, scale: float) -> None:
    """Add `basis @ basis.T @ line` of every line, in the order that costs less."""
    count, n, after = image.shape
    factors = [basis.T, basis] if 2 * basis.shape[1] < n else [basis @ basis.T]
    if after == 1:
        lines = image[..., 0]
        for factor in factors[:-1]:
            lines = lines @ factor.T
        result[..., 0].addmm_(lines, factors[-1].T, alpha=scale)
        return
    for factor in factors[:-1]:
        image = torch.bmm(factor.expand(count, -1, -1), image)
    result.baddbmm_(factors[-1].expand(count, -1, -1), image, alpha=scale)


@lru_cache(maxsize=32)
def _basis(mask: Mask) -> Tensor:
    """Return waves, `(n, rank)`, such that `basis @ basis.T` filters as the mask does."""
    even = _even_part(mask)
    waves = _waves(len(mask))[:, even > 0] * np.sqrt(even[even > 0])
    return torch.from_numpy(np.pad(waves, ((0, 0), (0, -waves.shape[1] % 8))).astype(np.float32))  # groups are faster


@lru_cache(maxsize=8)
def _waves(n: int) -> NDArray[np.float64]:
    """Return the orthonormal waves of a line of n voxels: cosines for k = 0 ... n / 2, sines for the others."""
    phase = 2 * np.pi / n * np.outer(np.arange(n), np.arange(n))
    waves = np.where(np.arange(n) <= n // 2, np.cos(phase), np.sin(phase)) * math.sqrt(2 / n)
    waves[:, [0, n // 2] if n % 2 == 0 else [0]] /= math.sqrt(2)  # these are alone
    return waves


def _even_part(mask: Mask) -> NDArray[np.float64]:
    """Return (m(k) + m(-k)) / 2 for k = 0, 1, ..., n - 1."""
    m = np.fft.ifftshift(np.asarray(mask, np.float64))
    return (m + np.roll(m[::-1], 1)) / 2
