"""Where new lesions are: networks slide over both visits, their probabilities are averaged.

    two Cases -> detect -> Detection

Windows lie on a regular lattice, the last of an axis moved inside; overlaps are averaged evenly and the mask is where
the mean exceeds 0.5 (Schmidt-Mengin et al. 2022, section 2.2). Ensembles are averaged, too (Kamraoui et al. 2022,
section 2.6). No rule on intensities comes after the networks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor, nn

import synthlong
from synthlong.case import Case
from synthlong.detection.networks import WIDEST_WINDOW, ConcatUNet, LongitudinalUNet, SiameseUNet, sees
from synthlong.detection.visits import check_same_grid, in_common_brain
from synthlong.errors import ConfigError, InputError
from synthlong.networks import ConvBlock, check_device, default_precision, one_thread
from synthlong.weights import read_weights

__all__ = [
    "DEFAULT_DETECTOR",
    "DetectedLesion",
    "Detection",
    "check_limits",
    "detect",
    "probability_map",
    "read_detectors",
    "shipped_detector",
    "window_of",
]

DEFAULT_DETECTOR = ConcatUNet.task
"""Which of the shipped networks is used where none is named."""

_BF16_ERROR = 0.1

_Window = tuple[slice, ...]
_Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class DetectedLesion:
    """One new lesion: 6-connected, as the scores of MSSEG-2 count lesions.

    Args:
        volume_mm3: Its volume.
        voxels: The same in voxels.
        centre_mm: Its centre of mass in MNI space (RAS).
        probability: Mean over its voxels.
        highest_probability: The highest of them.
    """

    volume_mm3: float
    voxels: int
    centre_mm: tuple[float, float, float]
    probability: float
    highest_probability: float


@dataclass(frozen=True, eq=False)
class Detection:
    """New lesions of a follow-up, on its grid.

    Args:
        labels: int32 `(I, J, K)`, n in the n-th of `lesions`, 0 elsewhere.
        probability: float32 `(I, J, K)`, 0 outside the brain.
        lesions: Largest first.
    """

    labels: NDArray[np.int32]
    probability: NDArray[np.float32]
    lesions: tuple[DetectedLesion, ...]

    @property
    def mask(self) -> NDArray[np.uint8]:
        """1 in a new lesion."""
        return (self.labels > 0).astype(np.uint8)

    def as_dict(self) -> dict[str, Any]:
        """Return the lesions as plain JSON."""
        volume = sum(lesion.volume_mm3 for lesion in self.lesions)
        return {
            "new_lesions": len(self.lesions),
            "volume_mm3": round(volume, 3),
            "lesions": [asdict(lesion) for lesion in self.lesions],
        }


def detect(
    baseline: Case,
    followup: Case,
    networks: Sequence[LongitudinalUNet],
    *,
    threshold: float = 0.5,
    min_volume_mm3: float = 3.0,
    window: int | None = None,
    mirrored: bool = True,
    precision: str = "auto",
    device: str = "cpu",
    progress: _Progress | None = None,
) -> Detection:
    """Find the lesions of the follow-up that the baseline does not have.

    The networks see what is brain in both visits, nothing else: `visits.in_common_brain`. The windows begin at that
    brain's bounding box: over the MNI grid, 64^3 windows would be three times as many.

    Args:
        baseline: First visit.
        followup: Second visit, on the same grid.
        networks: One network, or an ensemble of one kind; see `read_detectors`.
        threshold: A voxel belongs to a new lesion where the probability is higher.
        min_volume_mm3: Lesions of this volume or less are dropped; 0 keeps all.
        window: See `probability_map`.
        mirrored: See `probability_map`; twice the time, and a little better on real pairs.
        precision: See `probability_map`.
        device: Torch device.
        progress: Called as (stage, done, total).

    Raises:
        InputError: The visits lie on different grids, or their brains do not meet.
        ConfigError: An option outside its range.
    """
    check_same_grid(baseline, followup)
    check_limits(threshold, min_volume_mm3)
    visits = in_common_brain(baseline, followup)
    brain = visits[0].brain
    box = ndimage.find_objects(brain)[0]
    normalised = _check_alike(networks).normalised
    before, after = (normalised(visit.flair)[box] for visit in visits)
    probability = np.zeros(brain.shape, np.float32)
    probability[box] = probability_map(
        networks,
        before,
        after,
        brain[box],
        window=window,
        mirrored=mirrored,
        threshold=threshold,
        precision=precision,
        device=device,
        progress=progress,
    )
    return _detection(probability, followup.affine, threshold=threshold, min_volume_mm3=min_volume_mm3)


def check_limits(threshold: float, min_volume_mm3: float) -> None:
    """Raise a ConfigError if one of the limits of `detect` is outside its range."""
    if not 0 <= threshold < 1:
        raise ConfigError(f"threshold = {threshold}: must be from 0 to below 1")
    if not min_volume_mm3 >= 0:
        raise ConfigError(f"min_volume_mm3 = {min_volume_mm3}: must be 0 or more")


def read_detectors(paths: Sequence[Path] = ()) -> tuple[LongitudinalUNet, ...]:
    """Read the weights of one network, or of an ensemble of one kind; without paths, of `shipped_detector`.

    Raises:
        InputError: See `read_weights`; or the networks are of different kinds.
    """
    networks: list[LongitudinalUNet] = []
    for path in paths or (shipped_detector(),):
        network, _ = read_weights(path, task=(ConcatUNet.task, SiameseUNet.task))
        assert isinstance(network, LongitudinalUNet)
        if networks and type(network) is not type(networks[0]):
            problem = f"weights of the {network.task}, beside those of the {networks[0].task}"
            raise InputError(path, problem, "pass weights of one kind")
        networks.append(network)
    return tuple(networks)


def shipped_detector(name: str = DEFAULT_DETECTOR) -> Path:
    """Return the path of shipped weights, "concat" or "siamese"."""
    return Path(synthlong.__file__).parent / "assets" / f"{name}.safetensors"


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
    networks: Sequence[LongitudinalUNet],
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
    progress: _Progress | None = None,
) -> NDArray[np.float32]:
    """Return the probability of a new lesion, `(I, J, K)`, 0 outside the brain.

    It is that of MONAI's `sliding_window_inference(mode="constant", overlap=1 - stride / window)` on the whole grid;
    windows without brain are left out, and a grid smaller than a window is padded with its darkest value. On a CPU
    each torch thread works on windows of its own, always as many at a time, so that the number of threads changes no
    bit, and a window's result does not depend on the others.

    Args:
        networks: One network, or an ensemble of one kind.
        baseline: `(I, J, K)`, in the intensities of `networks[0].normalised`.
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
    _check_alike(networks)
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
    return mean[tuple(slice(a, a + n) for (a, _), n in zip(beyond, brain.shape, strict=True))]


def _as_in_float32(
    slider: _Slider, windows: list[_Window], inside: NDArray[np.bool_], threshold: float
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
        progress: _Progress | None,
    ) -> None:
        self.networks = [_fast(copy.deepcopy(network)).to(device).eval() for network in networks]
        self.visits = torch.from_numpy(np.stack(visits)).to(device)
        self.device = torch.device(device)
        self.window = window
        self.mirrored = mirrored
        self.progress = progress

    def mean(self, windows: list[_Window], precision: str, *, stage: str = "windows") -> NDArray[np.float32]:
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

    def _probability(self, windows: list[_Window], size: int, precision: str) -> NDArray[np.float32]:
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


def _lattice(shape: tuple[int, ...], window: int, stride: int) -> Iterator[_Window]:
    """Yield windows that cover a grid: `stride` apart, the last of each axis moved inside."""
    starts = [[*range(0, n - window, stride), n - window] for n in shape]
    for corner in product(*starts):
        yield tuple(slice(start, start + window) for start in corner)


def _check_alike(networks: Sequence[LongitudinalUNet]) -> type[LongitudinalUNet]:
    kinds = {type(network) for network in networks}
    if len(kinds) != 1:
        raise ConfigError(f"networks = {sorted(kind.__name__ for kind in kinds)}: pass one or several of one kind")
    return kinds.pop()


def _detection(
    probability: NDArray[np.float32], affine: NDArray[np.float64], *, threshold: float, min_volume_mm3: float
) -> Detection:
    """List the 6-connected lesions above a threshold, leaving out small ones."""
    labels, count = ndimage.label(probability > threshold)
    voxel_mm3 = float(abs(np.linalg.det(affine[:3, :3])))
    found = []
    for number, box in enumerate(ndimage.find_objects(labels), start=1):
        own = labels[box] == number
        voxels = int(own.sum())
        if voxels * voxel_mm3 <= min_volume_mm3:
            continue
        inside = probability[box][own]
        where = np.argwhere(own).mean(axis=0) + [s.start for s in box]
        x, y, z = (affine[:3, :3] @ where + affine[:3, 3]).round(2).tolist()
        highest = round(float(inside.max()), 4)
        mean = round(float(inside.mean(dtype=np.float64)), 4)
        found.append((DetectedLesion(round(voxels * voxel_mm3, 3), voxels, (x, y, z), mean, highest), number))
    found.sort(key=lambda pair: -pair[0].voxels)
    ranks = np.zeros(count + 1, np.int32)
    ranks[[number for _, number in found]] = np.arange(1, len(found) + 1)
    return Detection(ranks[labels], probability, tuple(lesion for lesion, _ in found))
