"""The image under an artifact: checked, taken as float32 volumes `(N, I, J, K)`, and given back in its own type."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from synthlong.compiling import compiled
from synthlong.networks import exact_products

__all__ = ["copied", "in_slabs", "on_volumes"]

_WORTH_A_THREAD = 1 << 20  # voxels


def on_volumes(
    x: Tensor,
    *,
    torch_kernel: Callable[[Tensor], Tensor],
    numba_kernel: Callable[[NDArray[np.float32]], NDArray[np.float32]] | None = None,
) -> Tensor:
    """Run a kernel on an image and return a new image of the same shape, dtype and device.

    Args:
        x: Image, shape `(..., I, J, K)`, or one slice `(I, J)`; any floating-point dtype, strides and device.
            Computed in float32 (autocast or not), without gradient.
        torch_kernel: From contiguous float32 volumes `(N, I, J, K)`, which it must not change, to new ones of the
            same shape, on any device.
        numba_kernel: The same for C-contiguous arrays, used on the CPU; None: `torch_kernel` runs there too.

    Raises:
        ValueError: `x` has integers, no voxels, NaN or infinite values, or fewer than two axes.
    """
    volumes = _volumes(x)
    device = volumes.device.type
    with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
        if device != "cpu":
            with exact_products():
                result = torch_kernel(volumes)
        elif numba_kernel is not None:
            result = torch.from_numpy(numba_kernel(volumes.numpy()))
        else:
            result = torch_kernel(volumes)
    return result.reshape(x.shape).to(x.dtype)


def copied(x: Tensor) -> Tensor:
    """Return the same voxels in a new tensor, checked as `on_volumes` does: what identity parameters give."""
    _volumes(x)
    return x.detach().as_subclass(Tensor).clone()


def in_slabs(kernel: Callable[[int, int], None], count: int, voxels: int) -> None:
    """Call `kernel(start, stop)` on slabs that cover `range(count)`, in torch's number of threads where that pays."""
    threads = min(torch.get_num_threads(), count) if voxels >= _WORTH_A_THREAD else 1
    if threads == 1:
        kernel(0, count)
        return
    edges = [count * n // threads for n in range(threads + 1)]
    with ThreadPoolExecutor(threads) as pool:  # made anew: a pool kept alive would not survive a fork
        for done in [pool.submit(kernel, a, b) for a, b in pairwise(edges)]:
            done.result()


def _volumes(x: Tensor) -> Tensor:
    """Return `x` as contiguous float32 volumes `(N, I, J, K)`."""
    if not isinstance(x, Tensor):
        raise ValueError(f"x must be a torch.Tensor, not {type(x).__name__}; convert it with torch.as_tensor")
    if not x.is_floating_point():
        raise ValueError(f"the image has {str(x.dtype).removeprefix('torch.')} voxels; convert it with x.float()")
    shape = (*x.shape, 1) if x.ndim == 2 else tuple(x.shape)
    if len(shape) < 3 or not x.numel():
        raise ValueError(f"the image has shape {tuple(x.shape)}; it must be (..., I, J, K) or (I, J), with voxels")
    volumes = x.detach().as_subclass(Tensor).to(torch.float32).contiguous().view(-1, *shape[-3:])
    if volumes.device.type == "cpu":
        finite = _all_finite(volumes.view(torch.int32).numpy().ravel())
    else:
        finite = bool(torch.isfinite(volumes).all())
    if not finite:
        if torch.isfinite(x).all():
            raise ValueError("the image has voxels beyond 3.4e38, the largest of float32; divide it by its mode")
        bad = int((~torch.isfinite(x)).sum())
        raise ValueError(f"the image has {bad} NaN or infinite voxels; replace them, e.g. with torch.nan_to_num")
    return volumes


@compiled("boolean(int32[::1])")  # typed: numba's own start is paid when importing
def _all_finite(bits: NDArray[np.int32]) -> bool:  # type: ignore[no-untyped-def, unused-ignore]
    """Tell whether no float32, given as its bits, has the exponent of NaN and infinity."""
    worst = np.int32(0)
    for n in range(bits.size):
        worst = max(worst, bits[n] & np.int32(0x7F800000))
    return worst != np.int32(0x7F800000)
