"""The U-Net that all networks of the project are built from (Ronneberger et al. 2015; Cicek et al. 2016).

A level is two times convolution + GroupNorm + ReLU; max pooling goes down, trilinear interpolation up, and
the encoder's features are concatenated on the way (Schmidt-Mengin et al. 2022, section 2.3).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import pairwise
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from synthlong.errors import ConfigError

__all__ = [
    "ConvBlock",
    "Decoder",
    "Encoder",
    "GroupNorm",
    "UNet",
    "UNetConfig",
    "arithmetic",
    "check_device",
    "default_precision",
    "exact_products",
    "infer",
    "one_thread",
    "settled",
]


_Config = TypeVar("_Config", bound=Any)
"""A dataclass with `device` and `precision`."""


@dataclass(frozen=True)
class UNetConfig:
    """Size of a U-Net.

    Args:
        in_channels: Input channels.
        out_channels: Output channels.
        widths: Feature channels of each level, finest first; each is divisible by 8.
    """

    in_channels: int = 1
    out_channels: int = 1
    widths: tuple[int, ...] = (16, 32, 64)

    def __post_init__(self) -> None:
        if not self.widths or any(isinstance(w, str) or w < 8 or w % 8 for w in self.widths):
            raise ValueError(f"widths must be multiples of 8, got {self.widths}")
        object.__setattr__(self, "widths", tuple(int(w) for w in self.widths))
        if self.in_channels < 1 or self.out_channels < 1:
            raise ValueError("in_channels and out_channels must be at least 1")

    def as_dict(self) -> dict[str, int | list[int]]:
        """Return the config as plain JSON."""
        return {**asdict(self), "widths": list(self.widths)}

    @property
    def multiple(self) -> int:
        """Sides of the input must be multiples of this."""
        return 2 ** (len(self.widths) - 1)


class _GroupNorm(torch.autograd.Function):
    """GroupNorm of features in channels_last on a CPU: torch's, with a gradient of our own.

    With z = (x - mean) rstd, s = weight and means over a group's voxels and channels:
    dx = rstd (s dy - mean(s dy) - z mean(s dy z)).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        n, channels = x.shape[:2]
        y, mean, rstd = torch.native_group_norm(x, weight, bias, n, channels, x[0, 0].numel(), groups, eps)
        ctx.save_for_backward(x, weight, mean.float(), rstd.float())
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        x, weight, mean, rstd = ctx.saved_tensors
        (n, channels), (groups, voxels) = x.shape[:2], (mean.shape[1], x[0, 0].numel())
        many = math.gcd(voxels, 512 // channels or 1)  # voxels to a row: sums over short rows are slow
        rows = (n, voxels // many, many * channels)
        xs, dys = (t.movedim(1, -1).reshape(rows) for t in (x, dy))
        pairs = zip(xs, dys, strict=True)  # one by one, to stay in the cache
        sums = torch.stack([torch.stack([t.sum(dim=0, dtype=torch.float32) for t in (b, a * b)]) for a, b in pairs])
        of_dy, of_x_dy = sums.view(n, 2, many, groups, -1).sum(dim=2).unbind(dim=1)

        scale = weight.float().view(groups, -1)
        mean, rstd = mean[..., None], rstd[..., None]
        mean_dy, mean_x_dy = ((total * scale).mean(dim=-1, keepdim=True) / voxels for total in (of_dy, of_x_dy))
        slope = (mean_dy * mean - mean_x_dy) * rstd**3
        offset = -slope * mean - mean_dy * rstd
        of_channels = (t.expand_as(of_dy).reshape(n, -1) for t in (offset, slope, rstd * scale))
        factors = [t.repeat(1, many).to(x.dtype) for t in of_channels]
        dx = torch.empty(rows, dtype=x.dtype)
        for out, a, b, c0, c1, c2 in zip(dx, xs, dys, *factors, strict=True):
            torch.addcmul(c0, a, c1, out=out).addcmul_(b, c2)
        dweight = ((of_x_dy - of_dy * mean) * rstd).sum(dim=0).flatten().to(weight.dtype)
        dbias = of_dy.sum(dim=0).flatten().to(weight.dtype)
        return dx.view(n, *x.shape[2:], channels).movedim(-1, 1), dweight, dbias, None, None


class GroupNorm(nn.GroupNorm):
    """GroupNorm with a fast gradient in channels_last on a CPU: torch's own takes a third of a training's time."""

    def forward(self, x: Tensor) -> Tensor:
        """Map `(N, C, I, J, K)` to the same."""
        last = x.is_contiguous(memory_format=torch.channels_last_3d) and not x.is_contiguous()
        if last and x.device.type == "cpu" and torch.is_grad_enabled():
            return _GroupNorm.apply(x, self.weight, self.bias, self.num_groups, self.eps)
        return super().forward(x)


class ConvBlock(nn.Sequential):
    """Two times 3x3x3 convolution, GroupNorm (8 groups) and ReLU."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        layers: list[nn.Module] = []
        for c in (in_channels, out_channels):
            layers += [nn.Conv3d(c, out_channels, 3, padding=1, bias=False), GroupNorm(8, out_channels)]
            layers += [nn.ReLU(inplace=True)]
        super().__init__(*layers)


class Encoder(nn.ModuleList):
    """The way down: a block a level, max pooling between them."""

    def __init__(self, in_channels: int, widths: Sequence[int]) -> None:
        super().__init__(ConvBlock(a, b) for a, b in pairwise((in_channels, *widths)))

    def forward(self, x: Tensor) -> list[Tensor]:
        """Map `(N, in_channels, I, J, K)` to the features of each level, finest first."""
        features: list[Tensor] = []
        for block in self:
            x = block(F.max_pool3d(x, 2) if features else x)
            features.append(x)
        return features


class Decoder(nn.ModuleList):
    """The way up: trilinear interpolation, the encoder's features beside it, a block."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__(ConvBlock(a + b, a) for a, b in pairwise(widths))

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Map the features of each level, finest first, to `(N, widths[0], I, J, K)`."""
        *skips, x = features
        for block, skip in zip(reversed(self), reversed(skips), strict=True):
            x = F.interpolate(x, scale_factor=2, mode="trilinear", align_corners=False)
            if x.requires_grad:
                x.register_hook(_in_its_layout)
            x = block(torch.cat([skip, x], dim=1))
        return x


def _in_its_layout(dy: Tensor) -> Tensor:
    """Return a gradient in the layout of its features: of a part of a concatenation, interpolation's is slow."""
    channels_last = dy.stride(1) == 1
    return dy.contiguous(memory_format=torch.channels_last_3d if channels_last else torch.contiguous_format)


class UNet(nn.Module):
    """A 3-D U-Net; the last convolution starts at zero, so that a residual network starts as the identity."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        self.down = Encoder(config.in_channels, config.widths)
        self.up = Decoder(config.widths)
        self.head = nn.Conv3d(config.widths[0], config.out_channels, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """Map `(N, in_channels, I, J, K)` to `(N, out_channels, I, J, K)`; sides: see `config.multiple`."""
        return self.head(self.up(self.down(x)))


def check_device(device: str) -> None:
    """Raise a ConfigError if torch cannot compute on a device here."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"device = {device!a}: not usable here; use cpu, or cuda:0 with a CUDA build of torch"
        ) from error


def default_precision(device: str = "cpu") -> Literal["bf16", "float32"]:
    """Return "bf16" where the device computes it natively, else "float32"."""
    if device.startswith("cuda"):
        return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "float32"
    native = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # not in every torch
    return "bf16" if any(getattr(torch.cpu, name, bool)() for name in native) else "float32"


def settled(config: _Config) -> _Config:
    """Return a config whose device is usable here, with precision "auto" made definite for it.

    Raises:
        ConfigError: Torch cannot compute on its device.
    """
    check_device(config.device)
    if config.precision != "auto":
        return config
    return replace(config, precision=default_precision(config.device))


def infer(network: UNet, x: NDArray, *, precision: str, device: str = "cpu") -> NDArray[np.float32]:
    """Run a network on one image, so that the result depends on that image alone.

    In float32 a batch of one takes another kernel with other bits, so it is doubled; in bf16 it does not.

    Args:
        network: In evaluation mode, on `device`.
        x: `(C, I, J, K)`; any sides (padded with 0 to the multiple that the network needs).
        precision: "bf16" or "float32".
        device: Torch device.

    Returns:
        `(out_channels, I, J, K)`.
    """
    sides = x.shape[1:]
    short_of = [-n % network.config.multiple for n in sides]
    padded = np.pad(x, [(0, 0), *[(0, s) for s in short_of]]).astype(np.float32, copy=False)
    batch = torch.from_numpy(padded)[None].to(device)
    if precision == "float32":
        batch = batch.repeat(2, 1, 1, 1, 1)
    batch = batch.to(memory_format=torch.channels_last_3d)
    kind = torch.device(device).type
    with torch.inference_mode(), torch.autocast(kind, torch.bfloat16, enabled=precision == "bf16"):
        y = network(batch)[0].float().cpu().numpy()
    return np.ascontiguousarray(y[:, : sides[0], : sides[1], : sides[2]])


@cache
def arithmetic(device: str) -> str:
    """Return a digest of what a small network gives on a device: it differs where processors or GPUs round otherwise.

    Processors that torch calls alike may still multiply bf16 by other instructions, whose bits are others.
    """
    rng = np.random.default_rng(0)
    with torch.random.fork_rng(devices=[]):
        network = UNet(UNetConfig(in_channels=3)).to(device).eval()
    with torch.no_grad():
        for weights in network.parameters():
            weights.copy_(torch.from_numpy(0.2 * rng.standard_normal(weights.shape, np.float32)))
    x = rng.standard_normal((3, 32, 32, 32), np.float32)
    precisions = dict.fromkeys(["float32", default_precision(device)])
    with one_thread():
        results = [infer(network, x, precision=precision, device=device) for precision in precisions]
    return hashlib.sha256(np.stack(results).tobytes()).hexdigest()[:12]


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one torch thread, as the workers of a run do: with two, the bits of a result change."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def exact_products() -> Iterator[None]:
    """Multiply float32 matrices as float32, whatever this process has told torch of their precision."""
    if not hasattr(torch.backends.mkldnn, "matmul"):  # torch < 2.9
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)
        return
    kinds: list[Any] = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]
    precisions = [kind.fp32_precision for kind in kinds]  # the older way to ask raises where this newer one was used
    try:
        for kind in kinds:
            kind.fp32_precision = "ieee"
        yield
    finally:
        for kind, precision in zip(kinds, precisions, strict=True):
            kind.fp32_precision = precision
