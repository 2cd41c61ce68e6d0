"""What each of the three stages is told; see `stages`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from synthlong.detection.networks import SegmentationUNet
from synthlong.errors import ConfigError
from synthlong.networks import UNetConfig
from synthlong.synthesis import SynthesisConfig
from synthlong.training.patches import Drawn, Patches
from synthlong.training.sides import rng_at
from synthlong.training.training_config import TrainingConfig

__all__ = ["SYNTHESIS", "FinetuneConfig", "PretrainConfig", "SegmentConfig", "StageConfig"]

SYNTHESIS = SynthesisConfig(artifacts="kamraoui")
"""How pairs are made on the fly unless a config says otherwise."""

_WARM_UP = 0.03
"""Share of the steps in which the learning rate of the cosine schedule rises."""


@dataclass(frozen=True)
class StageConfig(TrainingConfig):
    """How to train a stage. All else: see `TrainingConfig`.

    Args:
        schedule: Of the learning rate: "constant", or "cosine" (ours): a rise over 3 % of the steps, a cosine to 0.
        positive_share: Share of the patches with a voxel of a lesion (a new one, from two visits); the others lie
            anywhere in the brain.
    """

    schedule: Literal["constant", "cosine"] = "constant"
    positive_share: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(("positive_share",), lambda v: 0 <= v <= 1, "from 0 to 1")

    def learning_rate_at(self, step: int) -> float:
        """Return Adam's learning rate at a step."""
        if self.schedule == "constant":
            return self.learning_rate
        rising = min((step + 1) / max(_WARM_UP * self.steps, 1), 1)
        return self.learning_rate * rising * (1 + math.cos(math.pi * step / self.steps)) / 2

    def draw(self, patches: Patches, step: int, rank: int) -> Drawn:
        """Draw what one process sees at a step: every `ranks`-th patch of the batch."""
        numbers = range(rank, self.batch, self.ranks)
        drawn = [patches.draw(rng_at(self.seed, step, n), 1, self._positives(step, n)) for n in numbers]
        return tuple(np.concatenate(parts) for parts in zip(*drawn, strict=True))

    def _positives(self, step: int, n: int) -> int:
        """Return 1 where a patch is positive: the first of a step, as many as the share has made whole by then."""
        before, after = (math.floor(s * self.batch * self.positive_share + 1e-9) for s in (step, step + 1))
        return int(n < after - before)


@dataclass(frozen=True)
class SegmentConfig(StageConfig):
    """How to train stage one. All else: see `StageConfig`.

    Args:
        widths: Feature channels of each level of the network; the later stages have the same.
        artifacts: Preset of `RandomAcquisition`, "kamraoui", "mild" or "clinical"; or "none".
        orientations: "all" 48, "mirror" (left-right) or "none".
    """

    widths: tuple[int, ...] = (16, 32, 64)
    artifacts: Literal["kamraoui", "mild", "clinical", "none"] = "kamraoui"
    orientations: Literal["all", "mirror", "none"] = "all"

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            object.__setattr__(self, "widths", self.network.widths)
            self.check_side(self.network.multiple)
        except ValueError as error:
            raise ConfigError(str(error)) from error

    @property
    def network(self) -> UNetConfig:
        """Size of the network."""
        return UNetConfig(in_channels=SegmentationUNet.channels, widths=self.widths)


@dataclass(frozen=True)
class PretrainConfig(StageConfig):
    """How to train stage two. All else: see `StageConfig`.

    Args:
        trainable: "decoder" (and the merge; the encoder stays as it is) or "all".
        synthesis: How pairs are made on the fly, of boxes of `side` voxels; shards say how theirs were made.
    """

    trainable: Literal["decoder", "all"] = "decoder"
    synthesis: SynthesisConfig = SYNTHESIS

    def as_dict(self) -> dict[str, Any]:
        """Return the config as plain JSON, without paths: hashes say which assets there were."""
        plain = super().as_dict()
        return {**plain, "synthesis": plain["synthesis"] | dict.fromkeys(SynthesisConfig.PATHS)}


@dataclass(frozen=True)
class FinetuneConfig(StageConfig):
    """How to train stage three. All else: see `StageConfig`.

    Args:
        trainable: "decoder" (and the merge; the encoder stays as it is) or "all".
        artifacts: Preset of `RandomAcquisition`, "kamraoui", "mild" or "clinical", drawn for each visit; or "none".
        orientations: "all" 48, "mirror" (left-right) or "none"; one for both visits.
        folds: Number of networks; each has another part of the patients for validation, a single one has none.
    """

    folds: int = 5
    trainable: Literal["decoder", "all"] = "decoder"
    artifacts: Literal["kamraoui", "mild", "clinical", "none"] = "kamraoui"
    orientations: Literal["all", "mirror", "none"] = "all"
