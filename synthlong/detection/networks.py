"""The networks that find lesions and new lesions, from the project's one U-Net block.

- `SegmentationUNet`: the lesions of one visit, stage one of Kamraoui et al. (2022), doi 10.3389/fnimg.2022.948235.
- `SiameseUNet`: new lesions. One encoder sees both visits, whose features meet level by level (the same, 2.2.1).
- `ConcatUNet`: new lesions. Both visits are channels (Schmidt-Mengin et al. 2022, doi 10.3389/fnins.2022.1004050).

Each gives one logit a voxel. A second class would add nothing: a softmax over two is the sigmoid of their difference,
and "the class with the higher mean probability" of an ensemble is "the mean sigmoid is above 0.5".
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from synthlong.atlas import MNI_VOXELS
from synthlong.networks import UNet, UNetConfig

__all__ = ["WIDEST_WINDOW", "ConcatUNet", "LongitudinalUNet", "SegmentationUNet", "SiameseUNet", "sees"]

WIDEST_WINDOW = 512
"""In voxels: wider than any head at 1 mm, and what memory bears."""

_AT_FIRST = 0.01


class _LogitUNet(UNet):
    """A U-Net whose head does not start at zero: it has no guess to keep, and zeros would stop the first gradient.

    Training starts from probabilities about 0.01 (Lin et al. 2017, doi 10.1109/ICCV.2017.324, section 4.1): from 0.5,
    the first steps push all voxels down so hard that features which speak for a lesion die.

    Args:
        config: Size, with `channels` input channels and one output; default: 16-32-64.
    """

    task: ClassVar[str]
    channels: ClassVar[int] = 1

    def __init__(self, config: UNetConfig | None = None) -> None:
        config = config or UNetConfig(in_channels=self.channels)
        if (config.in_channels, config.out_channels) != (self.channels, 1):
            raise ValueError(f"{type(self).__name__} has {self.channels} input channels and one output, got {config}")
        super().__init__(config)
        self.head.reset_parameters()
        nn.init.constant_(self.head.bias, math.log(_AT_FIRST / (1 - _AT_FIRST)))  # type: ignore[arg-type]


class SegmentationUNet(_LogitUNet):
    """All lesions of one visit: `(N, 1, I, J, K)`, brain mode 1, to logits of the same shape."""

    task = "segmentation"


def sees(window: int, config: UNetConfig) -> bool:
    """Return whether a network of this size can be shown windows of this side."""
    return 1 <= window <= WIDEST_WINDOW and not window % config.multiple


class LongitudinalUNet(_LogitUNet):
    """New lesions of two visits.

    A whole brain is seen in windows of `window` voxels a side; weights carry their own, see `sliding`.
    """

    window: int

    @staticmethod
    def normalised(scan: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return a whole scan `(I, J, K)` with brain mode 1 in the intensities that the network was made for."""
        return scan

    @abstractmethod
    def forward(self, baseline: Tensor, followup: Tensor) -> Tensor:  # type: ignore[override]
        """Map two visits, `(N, 1, I, J, K)` each, to the logits of new lesions; sides: see `config.multiple`."""


class ConcatUNet(LongitudinalUNet):
    """Both visits as channels, each z-scored by its own mean and standard deviation over the MNI grid.

    The U-Net of Schmidt-Mengin et al. 2022, doi 10.3389/fnins.2022.1004050: 16, 32 and 64 channels, windows of 32^3.

    Args:
        config: Its size; None: that of the paper.
    """

    task = "concat"
    channels = 2
    window = 32

    @staticmethod
    def normalised(scan: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the z-scored scan; its background, 0, becomes the smallest value.

        Background counts as much as around a brain on the MNI grid, however much of it the scan comes with.
        """
        voxels = max(MNI_VOXELS, np.count_nonzero(scan))
        mean = scan.sum(dtype=np.float64) / voxels
        sd = np.sqrt(max(np.square(scan, dtype=np.float64).sum() / voxels - mean**2, 0))
        return ((scan - mean) / max(sd, 1e-6)).astype(np.float32)

    def forward(self, baseline: Tensor, followup: Tensor) -> Tensor:  # type: ignore[override]
        """Map two visits to logits."""
        return super(LongitudinalUNet, self).forward(torch.cat([baseline, followup], dim=1))


class _Merge(nn.Conv3d):
    """A 1x1x1 convolution, which torch does not do well in channels_last and float32."""

    def forward(self, x: Tensor) -> Tensor:
        if x.is_contiguous():
            return super().forward(x)
        return F.linear(x.movedim(1, -1), self.weight.flatten(1), self.bias).movedim(-1, 1)


class SiameseUNet(LongitudinalUNet):
    """One encoder for both visits, brain mode 1; a 1x1x1 convolution a level brings both visits' features together.

    The way up and the skip connections see the merged features only. After Kamraoui et al. 2022, section 2.2.1, doi
    10.3389/fnimg.2022.948235; windows of 64^3.

    Args:
        config: Its size; None: that of `ConcatUNet`.
    """

    task = "siamese"
    window = 64

    def __init__(self, config: UNetConfig | None = None) -> None:
        super().__init__(config)
        self.merge = nn.ModuleList(_Merge(2 * width, width, 1) for width in self.config.widths)

    @classmethod
    def from_segmentation(cls, segmentation: SegmentationUNet) -> Self:
        """Return a network with a copy of the trained encoder; all else is drawn anew."""
        network = cls(segmentation.config)
        network.down.load_state_dict(segmentation.down.state_dict())
        return network

    def freeze_encoder(self) -> None:
        """Keep the encoder as it is in training; GroupNorm has no running statistics that could drift."""
        self.down.requires_grad_(False)

    def forward(self, baseline: Tensor, followup: Tensor) -> Tensor:  # type: ignore[override]
        """Map two visits to logits; both go through the encoder in one batch."""
        features = self.down(torch.cat([baseline, followup]))
        merged = [merge(torch.cat(f.chunk(2), dim=1)) for merge, f in zip(self.merge, features, strict=True)]
        return self.head(self.up(merged))
