"""Online hard example mining with a moving average: Schmidt-Mengin et al. (2022), doi 10.3389/fnins.2022.1004050.

    candidates -> errors of the average -> the hardest -> one step of the network -> the average follows

The average starts equal to the network; after each step w_average <- mu w_average + (1 - mu) w. With mu = 0 it is the
network. Without mining, the paper's baselines: each patch of a batch is positive with a fixed probability. There is
no augmentation. The paper names neither the error that ranks nor the loss: mean binary cross-entropy of a patch, and
binary cross-entropy + soft Dice of the batch, are ours.

Everything drawn at a step comes from (seed, step), and a checkpoint is taken after the average's update.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from synthlong.detection.networks import WIDEST_WINDOW, ConcatUNet, sees
from synthlong.errors import ConfigError
from synthlong.networks import UNetConfig, check_device
from synthlong.progress import StepProgress
from synthlong.publishing import make_place
from synthlong.training.ahead import Ahead
from synthlong.training.loop import LAYOUTS, Training, fit, seeded_weights
from synthlong.training.losses import LOSSES, errors_of, predicted
from synthlong.training.patches import Drawn, Patches
from synthlong.training.sides import drawn_from, read_sides, rng_at
from synthlong.training.training_config import TrainingConfig
from synthlong.weights import checkpoint_of

__all__ = ["Ohem", "OhemConfig", "train_ohem"]


@dataclass(frozen=True)
class OhemConfig(TrainingConfig):
    """How to train; the defaults are those of the paper where it names them. All else: see `TrainingConfig`.

    Args:
        mining: Learn from the hardest candidates; else from patches as they are drawn.
        momentum: mu of the moving average that mines, from 0 to below 1.
        candidates: Patches drawn for a step, with mining.
        positive_share: Share of the candidates with a new lesion; without mining, the probability of each patch.
        widths: Feature channels of each level of the network.
        learning_rate: Of Adam; a tenth after half of the steps, a hundredth after 80 %.
        window: Side of the windows in which `detect` shows the network a brain; kept with the weights.
        ranking: Error of a patch that ranks it: "bce", "dice" or "bce+dice".
        mining_precision: Of the errors that rank.
        validation_patches: Patches of the patients held out, as many of them positive as among 128 candidates.
    """

    side: int = 32
    steps: int = 30_000
    batch: int = 32
    learning_rate: float = 1e-3
    loss: str = "bce+dice"
    validation_patches: int = 256
    mining: bool = True
    momentum: float = 0.9
    candidates: int = 128
    positive_share: float = 0.3
    widths: tuple[int, ...] = (16, 32, 64)
    window: int = 32
    ranking: str = "bce"
    mining_precision: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.settle("mining_precision")
        self.check(("ranking",), lambda v: v in LOSSES, f"one of {', '.join(LOSSES)}")
        self.check(("momentum",), lambda v: 0 <= v < 1, "from 0 to below 1")
        self.check(("positive_share",), lambda v: 0 <= v <= 1, "from 0 to 1")
        self.check(("candidates",), lambda v: v >= 1, "1 or more")
        self.check(("batch",), lambda v: not self.mining or v <= self.candidates, "at most the candidates")
        dealt = f"a multiple of the {self.ranks} processes"
        self.check(("candidates",), lambda v: not self.mining or not v % self.ranks, dealt)
        try:
            object.__setattr__(self, "widths", self.network.widths)
            self.check_side(self.network.multiple)
            wanted = f"a multiple of {self.network.multiple}, at most {WIDEST_WINDOW}"
            self.check(("window",), lambda v: sees(v, self.network), wanted)
        except ValueError as error:
            raise ConfigError(str(error)) from error

    @property
    def network(self) -> UNetConfig:
        """Size of the network."""
        return UNetConfig(in_channels=ConcatUNet.channels, widths=self.widths)

    def learning_rate_at(self, step: int) -> float:
        """Return Adam's learning rate at a step."""
        return self.learning_rate * (1 if step < 0.5 * self.steps else 0.1 if step < 0.8 * self.steps else 0.01)

    def draw(self, patches: Patches, step: int, rank: int) -> Drawn:
        """Draw what one process sees at a step."""
        rng = rng_at(self.seed, step, rank)
        if self.mining:
            positive = round(self.positive_share * self.candidates)
            own = positive // self.ranks + (rank < positive % self.ranks)
            return patches.draw(rng, self.candidates // self.ranks, own)
        count = self.batch // self.ranks
        return patches.draw(rng, count, int(rng.binomial(count, self.positive_share)))


def train_ohem(
    source: Path,
    out: Path,
    *,
    config: OhemConfig,
    card: dict[str, Any],
    readers: int = 2,
    tensorboard: bool = True,
    progress: StepProgress | None = None,
) -> dict[str, Any]:
    """Train a `ConcatUNet`, write the weights with the best validation Dice and their card, return its figures.

    A checkpoint lies beside `out` while training runs; the same call goes on from it.

    Args:
        source: See `read_patches`.
        out: The `.safetensors` file.
        config: How to train.
        card: What the card says beside the figures.
        readers: Threads that read patches ahead; they change no bit.
        tensorboard: Log to a folder beside `out`.
        progress: Called as (step, steps, loss).

    Raises:
        InputError: Patches cannot be drawn, the checkpoint is damaged or of another training, the loss is not finite.
        ConfigError: An option that cannot be here.
    """
    check_device(config.device)
    make_place(out)
    training, held_out, about = read_sides(source, config)
    files = {"about": about, "checkpoint": checkpoint_of(out)}
    model = Ohem(config, training, held_out, readers=readers, progress=progress, **files)
    return fit(model, out, card=card, tensorboard=tensorboard)


class Ohem(Training):
    """The network, its average, and what a step does with them; see `train_ohem` for the arguments."""

    stage = "ohem"
    config: OhemConfig
    network: ConcatUNet

    def __init__(
        self, config: OhemConfig, training: Patches, held_out: Patches | None, *, readers: int = 1, **options: Any
    ) -> None:
        with seeded_weights(config.seed):
            network = ConcatUNet(config.network)
        network.window = config.window
        super().__init__(config, network, **options)
        self._training, self._held_out, self._readers = training, held_out, readers
        self.average = copy.deepcopy(network).requires_grad_(False)
        self.average.to(memory_format=LAYOUTS[config.mining_precision])  # type: ignore[call-overload]

    def batches(self) -> Ahead:
        """Return the candidates of each step."""
        steps = range(self.global_step, self.config.steps)
        return Ahead(self._training, self.config.draw, steps=steps, rank=self.global_rank, readers=self._readers)

    def validation(self) -> Drawn | None:
        """Return fixed patches, with the same share of positive ones for all that the paper compares."""
        return drawn_from(self._held_out, self.config, OhemConfig.positive_share)

    def training_step(self, drawn: tuple[Tensor, ...]) -> Tensor:
        """Return the loss on the hardest of the patches drawn, or on all of them."""
        if self.config.mining:
            hardest = self.hardest(*drawn)
            drawn = tuple(d[hardest] for d in drawn)
        return super().training_step(drawn)

    @torch.no_grad()
    def hardest(self, baseline: Tensor, followup: Tensor, truth: Tensor) -> Tensor:
        """Return which patches the average predicts worst, `batch` of them over all processes."""
        logits = predicted(self.average, (baseline, followup), self.config.mining_precision)
        errors = errors_of(logits, truth, self.config.ranking)
        return errors.argsort(descending=True, stable=True)[: self.config.batch // self.config.ranks]

    def optimizer_step(self, *arguments: Any, **options: Any) -> None:
        """Make a step, and let the average follow."""
        super().optimizer_step(*arguments, **options)
        self.follow()

    @torch.no_grad()
    def follow(self) -> None:
        """Move the average towards the network."""
        for average, own in zip(self.average.parameters(), self.network.parameters(), strict=True):
            average.lerp_(own, 1 - self.config.momentum)
