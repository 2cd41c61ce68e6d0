"""Networks slide over two visits, and their probabilities are averaged.

Windows lie on a regular lattice, the last of an axis moved inside; overlaps are averaged evenly (Schmidt-Mengin et al.
2022, section 2.2), and so are the networks of an ensemble (Kamraoui et al. 2022, section 2.6).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from synthlong.boxes import Region, box_at
from synthlong.detection.networks import WIDEST_WINDOW, LongitudinalUNet, sees
from synthlong.errors import ConfigError
from synthlong.networks import ConvBlock, check_device, default_precision, one_thread
from synthlong.progress import Progress

__all__ = ["ensemble_of", "probability_map", "window_of"]

_BF16_ERROR = 0.1
"""How far bf16 may move a probability; the shipped networks' are moved by up to 0.07."""


def ensemble_of(networks: LongitudinalUNet | Sequence[LongitudinalUNet]) -> Sequence[LongitudinalUNet]:
    """Return one network or several as a sequence, or raise a ConfigError if they are of several kinds, or none."""
    networks = [networks] if isinstance(networks, LongitudinalUNet) else networks
    kinds = {type(network) for network in networks}
    if len(kinds) != 1:
        raise ConfigError(f"networks = {sorted(kind.__name__ for kind in kinds)}: pass one or several of one kind")
    return networks


def window_of(networks: Sequence[LongitudinalUNet], window: int | None = None) -> int:
    """Return the side of the windows that all of these networks see: the one asked for, or that of their weights.

    Raises:
        ConfigError: One that a network cannot see, or weights that differ in it.
    """
    if window is None:
        own = {network.window for network in networks}
        if len(own) > 1:
            widths = " and ".join(map(str, sorted(own)))
            raise ConfigError(f"window: the weights are for windows of {widths} voxels; choose one")
        window = own.pop()
    if not all(sees(window, network.config) for network in networks):
        multiple = max(network.config.multiple for network in networks)
        raise ConfigError(f"window = {window}: must be a multiple of {multiple}, from {multiple} to {WIDEST_WINDOW}")
    return window


def probability_map(
    networks: LongitudinalUNet | Sequence[LongitudinalUNet],
    baseline: NDArray[np.float32],
    followup: NDArray[np.float32],
    brain: NDArray,
    *,
    window: int | None = None,
    stride: int | None = None,
    mirrored: bool = False,
    threshold: float = 0.5,
    precision: str = "auto",
    device: str = "cpu",
    progress: Progress | None = None,
) -> NDArray[np.float32]:
    """Return the probability of a new lesion, `(I, J, K)`, 0 outside the brain.

    It is that of MONAI's `sliding_window_inference(mode="constant", overlap=1 - stride / window)` on the whole grid;
    windows without brain are left out, and a grid smaller than a window is padded with its darkest value. On a CPU
    each torch thread works on windows of its own, always as many at a time, so that the number of threads changes no
    bit, and a window's result does not depend on the others.

    Args:
        networks: One network, or an ensemble of one kind.
        baseline: `(I, J, K)`, in the intensities of the networks' `normalised`.
        followup: The same for the second visit.
        brain: Non-zero in the brain.
        window: Side in voxels, see `window_of`.
        stride: Voxels from a window to the next, at most `window`; default: three quarters of it.
        mirrored: Show the networks each window's left-right mirror image, too, and average.
        threshold: Where the map will be cut; matters to precision "auto" only.
        precision: "float32"; "bf16"; or "auto": where the device computes bf16 natively, it finds the voxels that are
            clearly below the threshold; all others get float32's values, so that the mask is that of float32. If
            those differ from bf16's by more than 0.1 anywhere, bf16 is too coarse for the network, and not used.
        device: Torch device.
        progress: Called as (stage, done, total).

    Raises:
        ConfigError: An option outside its range, or networks of different kinds.
    """
    networks = ensemble_of(networks)
    window = window_of(networks, window)
    stride = max(window * 3 // 4, 1) if stride is None else stride
    if not 1 <= stride <= window:
        raise ConfigError(f"stride = {stride}: must be from 1 to the window's {window}")
    if precision not in ("auto", "bf16", "float32"):
        raise ConfigError(f"precision = {precision!a}: must be auto, bf16 or float32")
    check_device(device)
    short = [max(window - n, 0) for n in brain.shape]
    beyond = [(s // 2, s - s // 2) for s in short]
    visits = [np.pad(v, beyond, constant_values=v.min()).astype(np.float32, copy=False) for v in (baseline, followup)]
    inside = np.pad(brain != 0, beyond)
    slider = _Slider(networks, visits, window=window, mirrored=mirrored, device=device, progress=progress)
    windows = [w for w in _lattice(inside.shape, window, stride) if inside[w].any()]
    if precision == "auto" and default_precision(device) == "bf16":
        mean = _as_in_float32(slider, windows, inside, threshold)
    else:
        mean = slider.mean(windows, "bf16" if precision == "bf16" else "float32")
    mean[~inside] = 0
    return mean[box_at([before for before, _ in beyond], brain.shape)]


def _as_in_float32(
    slider: _Slider, windows: list[Region], inside: NDArray[np.bool_], threshold: float
) -> NDArray[np.float32]:
    """Return the mean probability over the windows: bf16's where that is clearly below the threshold, else float32's.

    At least the most likely voxel is computed twice: how far both differ says whether bf16 can be relied on.
    """
    mean = slider.mean(windows, "bf16")
    suspect = inside & (mean >= min(threshold - _BF16_ERROR, float(mean[inside].max(initial=0))))
    exact = slider.mean([w for w in windows if suspect[w].any()], "float32", stage="windows again")
    if np.max(np.abs(exact - mean), where=suspect, initial=0) > _BF16_ERROR:
        return slider.mean(windows, "float32", stage="windows again")
    return np.where(suspect, exact, mean)


class _Slider:
    """Networks, ready to slide over two visits."""

    def __init__(
        self,
        networks: Sequence[LongitudinalUNet],
        visits: list[NDArray[np.float32]],
        *,
        window: int,
        mirrored: bool,
        device: str,
        progress: Progress | None,
    ) -> None:
        self.networks = [_fast(copy.deepcopy(network)).to(device).eval() for network in networks]
        self.visits = torch.from_numpy(np.stack(visits)).to(device)
        self.device = torch.device(device)
        self.window = window
        self.mirrored = mirrored
        self.progress = progress

    def mean(self, windows: list[Region], precision: str, *, stage: str = "windows") -> NDArray[np.float32]:
        """Return the mean probability over the windows that hold a voxel, 0 where none does."""
        total = np.zeros(self.visits.shape[1:], np.float32)
        count = np.zeros(self.visits.shape[1:], np.float32)
        size = _batch_size(self.window, precision, self.device)
        batches = [windows[i : i + size] for i in range(0, len(windows), size)]
        workers = torch.get_num_threads() if self.device.type == "cpu" else 1
        with one_thread(), ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            results = pool.map(lambda batch: self._probability(batch, size, precision), batches)
            for done, (batch, of_batch) in enumerate(zip(batches, results, strict=True), start=1):
                for window, probability in zip(batch, of_batch, strict=False):
                    total[window] += probability
                    count[window] += 1
                if self.progress:
                    self.progress(stage, min(done * size, len(windows)), len(windows))
        return total / np.maximum(count, 1)

    def _probability(self, windows: list[Region], size: int, precision: str) -> NDArray[np.float32]:
        """Return the networks' mean probability in windows; the last is repeated until they are `size`."""
        windows = windows + windows[-1:] * (size - len(windows))
        x = torch.stack([self.visits[:, i, j, k] for i, j, k in windows])[:, :, None]
        with torch.inference_mode(), torch.autocast(self.device.type, torch.bfloat16, enabled=precision == "bf16"):
            probabilities = self._each(x)
            if self.mirrored:
                probabilities += [probability.flip(2) for probability in self._each(x.flip(3))]
            return torch.stack(probabilities).mean(dim=0)[:, 0].cpu().numpy()

    def _each(self, x: Tensor) -> list[Tensor]:
        """Return each network's probability, `(N, 1, S, S, S)`, for both visits `(N, 2, 1, S, S, S)`."""
        return [network(x[:, 0], x[:, 1]).float().sigmoid() for network in self.networks]


def _batch_size(window: int, precision: str, device: torch.device) -> int:
    """Return as many windows as a CPU's cache holds, but not one in float32, for which torch has a slow kernel."""
    of_32 = 64 if device.type != "cpu" else 8 if precision == "bf16" else 2
    return max(of_32 * 32**3 // window**3, 1 if precision == "bf16" else 2)


class _Norm(nn.Module):
    """GroupNorm of features in channels_last, where torch's own is up to 7e-4 off in float32: enough to turn voxels."""

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        if x.dtype != torch.float32:
            return norm(x)
        n, channels, groups = len(x), norm.num_channels, norm.num_groups
        y = x.movedim(1, -1).reshape(n, -1, channels)
        moments = torch.stack([y.sum(dim=1), (y * y).sum(dim=1)]).view(2, n, groups, -1).mean(dim=-1) / y.shape[1]
        mean, square = moments.repeat_interleave(channels // groups, dim=-1)
        scale = norm.weight * (square - mean * mean + norm.eps).rsqrt()
        shift = norm.bias - mean * scale
        return torch.addcmul(shift[:, None], y, scale[:, None]).view(x.movedim(1, -1).shape).movedim(-1, 1)


def _fast(network: LongitudinalUNet) -> LongitudinalUNet:
    """Return the network with weights, and thereby all features, in channels_last."""
    for block in [module for module in network.modules() if isinstance(module, ConvBlock)]:
        for place, layer in enumerate(block):
            if isinstance(layer, nn.GroupNorm):
                block[place] = _Norm(layer)
    return network.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]


def _lattice(shape: tuple[int, ...], window: int, stride: int) -> Iterator[Region]:
    """Yield windows that cover a grid: `stride` apart, the last of each axis moved inside."""
    starts = [[*range(0, n - window, stride), n - window] for n in shape]
    for corner in product(*starts):
        yield box_at(corner, (window,) * 3)
