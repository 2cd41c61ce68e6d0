"""Online hard example mining with a moving average: Schmidt-Mengin et al. (2022), doi 10.3389/fnins.2022.1004050.

    candidates -> errors of the average -> the hardest -> one step of the network -> the average follows

The average starts equal to the network; after each step w_average <- mu w_average + (1 - mu) w. With mu = 0 it is the
network. Without mining, the paper's baselines: each patch of a batch is positive with a fixed probability. There is
no augmentation. The paper names neither the error that ranks nor the loss: mean binary cross-entropy of a patch, and
binary cross-entropy + soft Dice of the batch, are ours.

Everything drawn at a step comes from (seed, step), and a checkpoint is taken after the average's update: a killed
training goes on to the same weights, bit for bit on one CPU thread.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import math
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import lightning
import numpy as np
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torch.nn import functional as F

from synthlong.detection.networks import ConcatUNet
from synthlong.errors import ConfigError, InputError
from synthlong.networks import UNetConfig, check_device, default_precision
from synthlong.options import Options
from synthlong.training.patches import Drawn, Patches, read_patches
from synthlong.weights import write_weights

__all__ = ["Ohem", "OhemConfig", "train_ohem"]

_PRECISIONS = {"float32": "32-true", "bf16": "bf16-mixed"}
_LAYOUTS = {"float32": torch.contiguous_format, "bf16": torch.channels_last_3d}
_LOSSES = ("bce", "dice", "bce+dice")
_TRAINING, _VALIDATION = 0, 1
"""First word of the spawn keys."""

_CPU_CHUNK = 4
"""Patches that a CPU predicts at once when none is learned from; their features then stay in the cache."""


@dataclass(frozen=True)
class OhemConfig(Options):
    """How to train; the defaults are those of the paper where it names them.

    Args:
        mining: Learn from the hardest candidates; else from patches as they are drawn.
        momentum: mu of the moving average that mines, from 0 to below 1.
        candidates: Patches drawn for a step, with mining.
        batch: Patches that a step learns from.
        positive_share: Share of the candidates with a new lesion; without mining, the probability of each patch.
        side: Edge of a patch in voxels.
        widths: Feature channels of each level of the network.
        steps: Optimiser steps.
        learning_rate: Of Adam; a tenth after half of the steps, a hundredth after 80 %.
        ranking: Error of a patch that ranks it: "bce", "dice" or "bce+dice".
        loss: The same names, for the step.
        precision: Of the step: "bf16", "float32" or "auto" (bf16 where the device computes it natively).
        mining_precision: Of the errors that rank.
        device: "cpu" or "cuda".
        devices: Processes or GPUs a node; candidates and batch are dealt out to them.
        nodes: Number of nodes.
        seed: Seed of everything drawn.
        fold: Which of the `folds` parts of the patients is for validation.
        folds: Number of parts.
        validation_patches: Patches of the patients held out, as many of them positive as among 128 candidates.
        report_every: Steps between measurements on those.
        checkpoint_every: Steps between checkpoints.
    """

    mining: bool = True
    momentum: float = 0.9
    candidates: int = 128
    batch: int = 32
    positive_share: float = 0.3
    side: int = 32
    widths: tuple[int, ...] = (16, 32, 64)
    steps: int = 30_000
    learning_rate: float = 1e-3
    ranking: str = "bce"
    loss: str = "bce+dice"
    precision: str = "auto"
    mining_precision: str = "auto"
    device: str = "cpu"
    devices: int = 1
    nodes: int = 1
    seed: int = 0
    fold: int = 0
    folds: int = 4
    validation_patches: int = 256
    report_every: int = 500
    checkpoint_every: int = 500

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "widths", tuple(int(width) for width in self.widths))
        self.check(("device",), lambda v: v in ("cpu", "cuda"), "cpu or cuda")
        for name in ("precision", "mining_precision"):
            self.check((name,), lambda v: v in ("auto", *_PRECISIONS), "auto, bf16 or float32")
            if getattr(self, name) == "auto":
                object.__setattr__(self, name, default_precision(self.device))
        self.check(("ranking", "loss"), lambda v: v in _LOSSES, f"one of {', '.join(_LOSSES)}")
        self.check(("momentum",), lambda v: 0 <= v < 1, "from 0 to below 1")
        self.check(("positive_share",), lambda v: 0 <= v <= 1, "from 0 to 1")
        self.check(("learning_rate",), lambda v: 0 < v < math.inf, "above 0")
        self.check(("seed", "fold"), lambda v: v >= 0, "0 or more")
        counts = ("candidates", "batch", "side", "steps", "devices", "nodes", "folds")
        self.check((*counts, "validation_patches", "report_every", "checkpoint_every"), lambda v: v >= 1, "1 or more")
        self.check(("batch",), lambda v: not self.mining or v <= self.candidates, "at most the candidates")
        self.check(("candidates", "batch"), lambda v: not v % self.ranks, f"a multiple of the {self.ranks} processes")
        try:
            multiple = self.network.multiple
        except ValueError as error:
            raise ConfigError(str(error)) from error
        self.check(("side",), lambda v: not v % multiple, f"a multiple of {multiple}")

    @property
    def network(self) -> UNetConfig:
        """Size of the network."""
        return UNetConfig(in_channels=ConcatUNet.channels, widths=self.widths)

    @property
    def ranks(self) -> int:
        """Number of processes."""
        return self.devices * self.nodes

    def learning_rate_at(self, step: int) -> float:
        """Return Adam's learning rate at a step."""
        return self.learning_rate * (1 if step < 0.5 * self.steps else 0.1 if step < 0.8 * self.steps else 0.01)

    def draw(self, patches: Patches, step: int, rank: int) -> Drawn:
        """Draw what one process sees at a step."""
        rng = np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(_TRAINING, step, rank)))
        if self.mining:
            count = self.candidates // self.ranks
            return patches.draw(rng, count, round(self.positive_share * count))
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
    progress: Callable[[int, int, float], None] | None = None,
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
    splits = [
        read_patches(source, side=config.side, split=split, fold=config.fold, folds=config.folds)
        for split in ("train", "validation")
    ]
    listing = source / "index.json" if source.is_dir() else source
    about = {
        "patients": splits[0].subjects,
        "held_out": splits[1].subjects,
        "source": hashlib.sha256(listing.read_bytes()).hexdigest(),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    checkpoint = out.with_suffix(".checkpoint")
    _check_resumable(checkpoint, {**config.as_dict(), **about})
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(config.seed)
        model = Ohem(config, *splits, about=about, checkpoint=checkpoint, readers=readers, progress=progress)
    with _quiet():
        trainer = lightning.Trainer(
            accelerator={"cpu": "cpu", "cuda": "gpu"}[config.device],
            devices=config.devices,
            num_nodes=config.nodes,
            strategy="auto" if config.ranks == 1 else "ddp",
            precision=_PRECISIONS[config.precision],  # type: ignore[arg-type]
            max_steps=config.steps,
            logger=TensorBoardLogger(out.parent, name=f"{out.stem}.tensorboard", version="") if tensorboard else False,
            use_distributed_sampler=False,
            limit_val_batches=0,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        try:
            trainer.fit(model, ckpt_path=checkpoint if checkpoint.exists() else None)
        except SystemExit as stop:  # what Lightning makes of Ctrl-C
            raise KeyboardInterrupt from stop
    figures = {"curve": model.curve, "best": model.best_point, "train": config.as_dict(), "seconds": model.seconds()}
    if trainer.is_global_zero:
        model.network.load_state_dict(model.best)
        write_weights(out, model.network, task=ConcatUNet.task, card={**card, **about, **figures})
        checkpoint.unlink(missing_ok=True)
    return figures


class Ohem(lightning.LightningModule):
    """The network, its average, and what a step does with them; see `train_ohem` for the arguments."""

    def __init__(
        self,
        config: OhemConfig,
        training: Patches,
        held_out: Patches,
        *,
        about: dict[str, Any],
        checkpoint: Path,
        readers: int = 1,
        progress: Callable[[int, int, float], None] | None = None,
    ) -> None:
        super().__init__()
        self.config, self._training, self._held_out = config, training, held_out
        self._settings, self._checkpoint = {**config.as_dict(), **about}, checkpoint
        self._readers, self._progress = readers, progress
        self.network = ConcatUNet(config.network)
        self.average = copy.deepcopy(self.network).requires_grad_(False)
        self.network.to(memory_format=_LAYOUTS[config.precision])  # type: ignore[call-overload]
        self.average.to(memory_format=_LAYOUTS[config.mining_precision])  # type: ignore[call-overload]
        self.curve: list[dict[str, float]] = []
        self.best: dict[str, Tensor] = {}
        self._losses: list[float] = []
        self._before_s, self._started_s = 0.0, time.monotonic()

    @property
    def best_point(self) -> dict[str, float]:
        """The point of the curve with the highest Dice, the first of equals."""
        return max(self.curve, key=lambda point: point["dice"])

    def seconds(self) -> float:
        """Return how long the training took, interruptions left out."""
        return round(self._before_s + time.monotonic() - self._started_s, 1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam on the network; the average has no gradient."""
        return torch.optim.Adam(self.network.parameters(), lr=self.config.learning_rate)

    def train_dataloader(self) -> _Ahead:
        """Return the patches of each step from the one at which the training begins or goes on."""
        return _Ahead(self._training, self.config, rank=self.global_rank, first=self.global_step, readers=self._readers)

    def training_step(self, drawn: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """Return the loss on the hardest of the patches drawn, or on all of them."""
        if self.config.mining:
            hardest = self.hardest(*drawn)
            drawn = (drawn[0][hardest], drawn[1][hardest], drawn[2][hardest])
        loss, truth = self.loss_on(*drawn), drawn[2]
        self._losses.append(loss.item())
        if not math.isfinite(self._losses[-1]):
            problem = f"the loss is not finite at step {self.global_step}"
            raise InputError(self._checkpoint, problem, "lower the learning rate")
        positive = truth.flatten(1).any(dim=1).float().mean()
        self.log_dict({"loss": loss.detach(), "positive": positive, "rate": self._rate()})
        return loss

    def loss_on(self, baseline: Tensor, followup: Tensor, truth: Tensor) -> Tensor:
        """Return the network's loss on a batch, as one item: its Dice is that of all voxels."""
        logits = self.network(baseline, followup).float()
        return _errors(logits[None], truth[None], self.config.loss)[0]

    @torch.no_grad()
    def hardest(self, baseline: Tensor, followup: Tensor, truth: Tensor) -> Tensor:
        """Return which patches the average predicts worst, `batch` of them over all processes."""
        logits = _predicted(self.average, baseline, followup, self.config.mining_precision)
        errors = _errors(logits, truth, self.config.ranking)
        return errors.argsort(descending=True, stable=True)[: self.config.batch // self.config.ranks]

    def optimizer_step(self, *arguments: Any, **options: Any) -> None:
        """Make a step at its learning rate, and let the average follow."""
        optimizer = self.trainer.optimizers[0]
        for group in optimizer.param_groups:
            group["lr"] = self._rate()
        super().optimizer_step(*arguments, **options)
        self.follow()

    @torch.no_grad()
    def follow(self) -> None:
        """Move the average towards the network."""
        for average, own in zip(self.average.parameters(), self.network.parameters(), strict=True):
            average.lerp_(own, 1 - self.config.momentum)

    def on_train_batch_end(self, *_: Any) -> None:
        """Measure and save where it is time to."""
        done, config = self.global_step, self.config
        if self._progress and self.trainer.is_global_zero:
            self._progress(done, config.steps, self._losses[-1])
        if done % config.report_every == 0 or done == config.steps:
            self._report(done)
        if done % config.checkpoint_every == 0:
            writing = self._checkpoint.with_suffix(".writing")
            self.trainer.save_checkpoint(writing)
            if self.trainer.is_global_zero:
                writing.replace(self._checkpoint)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what Lightning does not know of."""
        own = {"settings": self._settings, "curve": self.curve, "best": self.best, "losses": self._losses}
        checkpoint["ohem"] = {**own, "seconds": self.seconds()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take it back."""
        own = checkpoint["ohem"]
        self.curve, self.best, self._losses = own["curve"], own["best"], own["losses"]
        self._before_s, self._started_s = own["seconds"], time.monotonic()

    def _rate(self) -> float:
        return self.config.learning_rate_at(self.global_step)

    def _report(self, done: int) -> None:
        """Add a point to the curve, and keep the network if it is the best so far."""
        mean = torch.tensor(self._losses, dtype=torch.float64).mean().to(self.device)
        loss = float(self.trainer.strategy.reduce(mean, reduce_op="mean"))
        point = {"step": done, "loss": round(loss, 6), "dice": round(self._dice(), 6)}
        self.log("validation_dice", point["dice"])
        self.curve.append(point)
        self._losses = []
        if self.best_point is point:
            self.best = {name: t.detach().cpu().clone() for name, t in self.network.state_dict().items()}

    @torch.no_grad()
    def _dice(self) -> float:
        """Return the network's Dice over all voxels of fixed patches of the patients held out."""
        rng = np.random.default_rng(np.random.SeedSequence(self.config.seed, spawn_key=(_VALIDATION,)))
        count = self.config.validation_patches
        drawn = self._held_out.draw(rng, count, round(OhemConfig.positive_share * count))
        ranks = slice(self.global_rank, None, self.config.ranks)
        baseline, followup, truth = (torch.from_numpy(d[ranks]).to(self.device) for d in drawn)
        found = _predicted(self.network, baseline, followup, self.config.precision) > 0
        both = torch.stack([(found & (truth > 0)).sum(), found.sum() + (truth > 0).sum()]).double()
        hit, total = self.trainer.strategy.reduce(both, reduce_op="sum").tolist()
        return 2 * hit / max(total, 1)


def _errors(logits: Tensor, truth: Tensor, kind: str) -> Tensor:
    """Return the error of each item: mean binary cross-entropy, 1 - soft Dice, or both."""
    logits, target = logits.flatten(1), truth.flatten(1).float()
    errors = torch.zeros(len(logits), device=logits.device)
    if "bce" in kind:
        errors = errors + F.binary_cross_entropy_with_logits(logits, target, reduction="none").mean(dim=1)
    if "dice" in kind:
        p = logits.sigmoid()
        errors = errors + 1 - (2 * (p * target).sum(dim=1) + 1) / (p.sum(dim=1) + target.sum(dim=1) + 1)
    return errors


def _predicted(network: ConcatUNet, baseline: Tensor, followup: Tensor, precision: str) -> Tensor:
    """Return a network's logits in float32, predicted some patches at a time."""
    kind = baseline.device.type
    size = _CPU_CHUNK if kind == "cpu" else len(baseline)
    with torch.autocast(kind, torch.bfloat16, enabled=precision == "bf16"):
        parts = [network(b, f) for b, f in zip(baseline.split(size), followup.split(size), strict=True)]
    return torch.cat(parts).float()


class _Ahead:
    """The patches of each step, read ahead by threads with files of their own."""

    def __init__(self, patches: Patches, config: OhemConfig, *, rank: int, first: int, readers: int) -> None:
        self._patches, self._config, self._rank = patches, config, rank
        self._first, self._readers = first, max(readers, 1)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        own = threading.local()

        def read(step: int) -> tuple[Tensor, ...]:
            if not hasattr(own, "patches"):
                own.patches = self._patches.reopened()
            return tuple(torch.from_numpy(d) for d in self._config.draw(own.patches, step, self._rank))

        steps = iter(range(self._first, self._config.steps))
        with ThreadPoolExecutor(self._readers) as pool:
            waiting = deque(pool.submit(read, step) for step in islice(steps, self._readers + 1))
            while waiting:
                drawn = waiting.popleft().result()
                waiting.extend(pool.submit(read, step) for step in islice(steps, 1))
                yield drawn


def _check_resumable(path: Path, settings: dict[str, Any]) -> None:
    """Raise if there is a checkpoint that this training cannot go on from."""
    if not path.exists():
        return
    try:
        made = torch.load(path, weights_only=True, map_location="cpu")["ohem"]["settings"]
    except (OSError, EOFError, KeyError, TypeError, RuntimeError, UnpicklingError) as error:
        raise InputError(path, f"the checkpoint is damaged ({type(error).__name__})", "remove it") from error
    changed = [f"{key}: {made.get(key)} -> {settings[key]}" for key in settings if settings[key] != made.get(key)]
    if changed:
        raise InputError(path, f"the checkpoint is of another training ({'; '.join(changed)})", "remove it")


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what Lightning says of hardware, and a warning about its own code."""
    log = logging.getLogger("lightning.pytorch")
    level = log.level
    log.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)
            warnings.filterwarnings("ignore", "GPU available but not used")
            yield
    finally:
        log.setLevel(level)
