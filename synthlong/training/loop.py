"""The loop that every training runs in, on Lightning's Trainer.

    batches -> a step of Adam at its learning rate -> now and then: validation Dice, a checkpoint

The weights with the best validation Dice are kept. What a step sees depends on (seed, step), never on a place in a
data set, and a checkpoint holds all that the next step needs: a killed training goes on to the same weights, bit for
bit on one CPU thread.
"""

from __future__ import annotations

import hashlib
import logging
import math
import signal
import threading
import time
import warnings
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator
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

from synthlong.dataset.prepared import plain_hash
from synthlong.detection.networks import ConcatUNet, SegmentationUNet
from synthlong.errors import InputError
from synthlong.manifest import find_cases, manifest_rows
from synthlong.networks import UNet, default_precision
from synthlong.options import Options
from synthlong.signals import hold_signals
from synthlong.training.patches import PAIR, Drawn, Network, Patches, read_patches
from synthlong.weights import differing, finished, write_weights

__all__ = [
    "LAYOUTS",
    "LOSSES",
    "Ahead",
    "Training",
    "TrainingConfig",
    "drawn_from",
    "errors_of",
    "fit",
    "predicted",
    "read_sides",
    "rng_at",
    "seeded_weights",
    "source_sha256",
]

LAYOUTS = {"float32": torch.contiguous_format, "bf16": torch.channels_last_3d}
LOSSES = ("bce", "dice", "bce+dice")

_PRECISIONS = {"float32": "32-true", "bf16": "bf16-mixed"}
_TRAINING, _VALIDATION = 0, 1
"""First word of the spawn keys."""

_CPU_CHUNK = 4
"""Patches that a CPU predicts at once when none is learned from; their features then stay in the cache."""

_GPU_VOXELS = 2**23
"""Voxels that a GPU does."""


@dataclass(frozen=True)
class TrainingConfig(Options):
    """What every training is told.

    Args:
        side: Edge of a patch in voxels.
        steps: Optimiser steps.
        batch: Patches that a step learns from.
        learning_rate: Of Adam, the highest.
        loss: "dice" (soft Dice of all voxels of the batch), "bce" (binary cross-entropy) or "bce+dice".
        precision: Of the step: "bf16", "float32" or "auto" (bf16 where the device computes it natively).
        device: "cpu" or "cuda".
        devices: Processes or GPUs a node; patches are dealt out to them.
        nodes: Number of nodes.
        seed: Seed of everything drawn.
        fold: Which of the `folds` parts of the patients is for validation.
        folds: Number of parts; 1: nobody is held out, and the last weights are kept.
        validation_patches: Fixed patches of the patients held out, whose Dice is measured.
        report_every: Steps between measurements on those.
        checkpoint_every: Steps between checkpoints.
    """

    side: int = 64
    steps: int = 20_000
    batch: int = 4
    learning_rate: float = 1e-4
    loss: str = "dice"
    precision: str = "auto"
    device: str = "cpu"
    devices: int = 1
    nodes: int = 1
    seed: int = 0
    fold: int = 0
    folds: int = 4
    validation_patches: int = 64
    report_every: int = 500
    checkpoint_every: int = 500

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(("device",), lambda v: v in ("cpu", "cuda"), "cpu or cuda")
        self.settle("precision")
        self.check(("loss",), lambda v: v in LOSSES, f"one of {', '.join(LOSSES)}")
        self.check(("learning_rate",), lambda v: 0 < v < math.inf, "above 0")
        self.check(("seed", "fold"), lambda v: v >= 0, "0 or more")
        self.check(("fold",), lambda v: v < self.folds, f"below the number of folds ({self.folds})")
        counts = ("batch", "side", "steps", "devices", "nodes", "folds")
        self.check((*counts, "validation_patches", "report_every", "checkpoint_every"), lambda v: v >= 1, "1 or more")
        self.check(("batch",), lambda v: not v % self.ranks, f"a multiple of the {self.ranks} processes")

    @property
    def ranks(self) -> int:
        """Number of processes."""
        return self.devices * self.nodes

    @abstractmethod
    def learning_rate_at(self, step: int) -> float:
        """Return Adam's learning rate at a step."""

    def settle(self, name: str) -> None:
        """Check a precision, and make "auto" definite."""
        self.check((name,), lambda v: v in ("auto", *_PRECISIONS), "auto, bf16 or float32")
        if getattr(self, name) == "auto":
            object.__setattr__(self, name, default_precision(self.device))

    def check_side(self, multiple: int) -> None:
        """Raise a ConfigError unless a network takes patches of this side."""
        self.check(("side",), lambda v: not v % multiple, f"a multiple of {multiple}")


class Training(lightning.LightningModule):
    """A network and what a step does with it; a subclass says what it sees.

    Args:
        config: How to train.
        network: From visits to one logit a voxel.
        about: What the data are, for the card; a training goes on only from a checkpoint with the same.
        checkpoint: File to go on from.
        progress: Called as (step, steps, loss).

    Attributes:
        stage: Name of the training, in its checkpoints.
        stopped_by: The signal that ended it between two steps, saved; else nothing.
    """

    stage: str

    def __init__(
        self,
        config: TrainingConfig,
        network: UNet,
        *,
        about: dict[str, Any],
        checkpoint: Path,
        progress: Callable[[int, int, float], None] | None = None,
    ) -> None:
        super().__init__()
        self.config, self.about, self.checkpoint, self._progress = config, about, checkpoint, progress
        self.network = network.train().to(memory_format=LAYOUTS[config.precision])  # type: ignore[call-overload]
        self.curve: list[dict[str, float]] = []
        self.best: dict[str, Tensor] = {}
        self._losses: list[float] = []
        self.stopped_by: list[int] = []
        self._before_s, self._started_s = 0.0, time.monotonic()

    @abstractmethod
    def batches(self) -> Iterable[tuple[Tensor, ...]]:
        """Return visits and truth of each step, for this process, from step `global_step` on."""

    @abstractmethod
    def validation(self) -> Drawn | None:
        """Return visits and truth of the patches held out, the same at each call; None: there are none."""

    @property
    def settings(self) -> dict[str, Any]:
        """What has to be the same to go on."""
        return {**self.config.as_dict(), **self.about}

    @property
    def best_point(self) -> dict[str, float]:
        """The point of the curve with the highest Dice, the first of equals; the last where nobody is held out."""
        return max(self.curve, key=lambda point: point.get("dice", point["step"]))

    def seconds(self) -> float:
        """Return how long the training took, interruptions left out."""
        return round(self._before_s + time.monotonic() - self._started_s, 1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam on the parameters that are not frozen."""
        learned = [w for w in self.network.parameters() if w.requires_grad]
        return torch.optim.Adam(learned, lr=self.config.learning_rate)

    def on_train_start(self) -> None:
        """Hold Ctrl-C and SIGTERM back until a step is done and saved; Lightning puts their handlers back."""
        if self.config.ranks == 1:
            hold_signals(self.stopped_by)

    def train_dataloader(self) -> Iterable[tuple[Tensor, ...]]:
        """Return the batches of each step from the one at which the training begins or goes on."""
        return self.batches()

    def training_step(self, drawn: tuple[Tensor, ...]) -> Tensor:
        """Return the loss on a batch."""
        loss, truth = self.loss_on(*drawn), drawn[-1]
        self._losses.append(loss.item())
        if not math.isfinite(self._losses[-1]):
            problem = f"the loss is not finite at step {self.global_step}"
            raise InputError(self.checkpoint, problem, "lower the learning rate")
        positive = truth.flatten(1).any(dim=1).float().mean()
        self.log_dict({"loss": loss.detach(), "positive": positive, "rate": self._rate()})
        return loss

    def loss_on(self, *drawn: Tensor) -> Tensor:
        """Return the network's loss on a batch, as one item: its Dice is that of all voxels."""
        *visits, truth = drawn
        logits = self.network(*visits).float()
        return errors_of(logits[None], truth[None], self.config.loss)[0]

    def optimizer_step(self, *arguments: Any, **options: Any) -> None:
        """Make a step at its learning rate."""
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = self._rate()
        super().optimizer_step(*arguments, **options)

    def on_train_batch_end(self, *_: Any) -> None:
        """Measure and save where it is time to."""
        done, config = self.global_step, self.config
        if self._progress and self.trainer.is_global_zero:
            self._progress(done, config.steps, self._losses[-1])
        if done % config.report_every == 0 or done == config.steps:
            self._report(done)
        if done % config.checkpoint_every == 0 or self.stopped_by:
            writing = self.checkpoint.with_suffix(".writing")
            self.trainer.save_checkpoint(writing)
            if self.trainer.is_global_zero:
                writing.replace(self.checkpoint)
        if self.stopped_by:
            raise KeyboardInterrupt

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what Lightning does not know of."""
        own = {"settings": self.settings, "curve": self.curve, "best": self.best, "losses": self._losses}
        checkpoint[self.stage] = {**own, "seconds": self.seconds()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take it back."""
        own = checkpoint[self.stage]
        self.curve, self.best, self._losses = own["curve"], own["best"], own["losses"]
        self._before_s, self._started_s = own["seconds"], time.monotonic()

    def _rate(self) -> float:
        return self.config.learning_rate_at(self.global_step)

    def _report(self, done: int) -> None:
        """Add a point to the curve, and keep the network if it is the best so far."""
        mean = torch.tensor(self._losses, dtype=torch.float64).mean().to(self.device)
        loss = float(self.trainer.strategy.reduce(mean, reduce_op="mean"))
        point = {"step": done, "loss": round(loss, 6)}
        if held_out := self.validation():
            point["dice"] = round(self._dice(held_out), 6)
            self.log("validation_dice", point["dice"])
        self.curve.append(point)
        self._losses = []
        if self.best_point is point:
            self.best = {name: t.detach().cpu().clone() for name, t in self.network.state_dict().items()}

    @torch.no_grad()
    def _dice(self, held_out: Drawn) -> float:
        """Return the network's Dice over all voxels of the patches held out."""
        ranks = slice(self.global_rank, None, self.config.ranks)
        *visits, truth = (torch.from_numpy(d[ranks]).to(self.device) for d in held_out)
        found = predicted(self.network, visits, self.config.precision) > 0
        both = torch.stack([(found & (truth > 0)).sum(), found.sum() + (truth > 0).sum()]).double()
        hit, total = self.trainer.strategy.reduce(both, reduce_op="sum").tolist()
        return 2 * hit / max(total, 1)


def fit(model: Training, out: Path, *, card: dict[str, Any], tensorboard: bool = True) -> dict[str, Any]:
    """Train, write the weights with the best validation Dice and their card, return its figures.

    Where there is a checkpoint, the training goes on from it; at the end it is removed. A training that is stopped by
    Ctrl-C or SIGTERM finishes its step and saves it. What was finished with the same settings stays as it is.

    Args:
        model: What to train.
        out: The `.safetensors` file.
        card: What the card says beside the figures.
        tensorboard: Log to a folder beside `out`.

    Raises:
        InputError: The checkpoint is damaged or of another training, the loss is not finite; or `out` or its card
            is there already, and of another training.
    """
    config, checkpoint = model.config, model.checkpoint
    if made := finished(out, model.settings, part="train", task=model.network.task):
        return {key: made[key] for key in ("curve", "best", "train", "seconds")}
    _check_resumable(checkpoint, model.stage, model.settings)
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
        except SystemExit as stop:  # what Lightning makes of a KeyboardInterrupt
            if model.stopped_by:
                signal.raise_signal(model.stopped_by[0])  # whose handler is again that of the caller
            raise KeyboardInterrupt from stop
    figures = {"curve": model.curve, "best": model.best_point, "train": config.as_dict(), "seconds": model.seconds()}
    if trainer.is_global_zero:
        model.network.load_state_dict(model.best)
        write_weights(out, model.network, task=model.network.task, card={**card, **model.about, **figures})
        checkpoint.unlink(missing_ok=True)
    return figures


class Ahead:
    """The batches of each step, read ahead by threads with files of their own.

    Args:
        patches: Where they come from.
        draw: Called with them and a step.
        steps: Which ones.
        readers: Number of threads; they change no bit.
    """

    def __init__(
        self, patches: Patches, draw: Callable[[Patches, int], Drawn], *, steps: range, readers: int = 1
    ) -> None:
        self._patches, self._draw, self._steps, self._readers = patches, draw, steps, max(readers, 1)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        own = threading.local()

        def read(step: int) -> tuple[Tensor, ...]:
            if not hasattr(own, "patches"):
                own.patches = self._patches.reopened()
            return tuple(torch.from_numpy(d) for d in self._draw(own.patches, step))

        steps = iter(self._steps)
        with ThreadPoolExecutor(self._readers) as pool:
            waiting = deque(pool.submit(read, step) for step in islice(steps, self._readers + 1))
            while waiting:
                drawn = waiting.popleft().result()
                waiting.extend(pool.submit(read, step) for step in islice(steps, 1))
                yield drawn


def errors_of(logits: Tensor, truth: Tensor, kind: str) -> Tensor:
    """Return the error of each item: mean binary cross-entropy, 1 - soft Dice, or both."""
    logits, target = logits.flatten(1), truth.flatten(1).float()
    errors = torch.zeros(len(logits), device=logits.device)
    if "bce" in kind:
        errors = errors + F.binary_cross_entropy_with_logits(logits, target, reduction="none").mean(dim=1)
    if "dice" in kind:
        p = logits.sigmoid()
        errors = errors + 1 - (2 * (p * target).sum(dim=1) + 1) / (p.sum(dim=1) + target.sum(dim=1) + 1)
    return errors


def predicted(network: UNet, visits: Iterable[Tensor], precision: str) -> Tensor:
    """Return a network's logits in float32, predicted some patches at a time."""
    visits = list(visits)
    kind = visits[0].device.type
    size = _CPU_CHUNK if kind == "cpu" else max(_GPU_VOXELS // visits[0][0].numel(), 1)
    with torch.autocast(kind, torch.bfloat16, enabled=precision == "bf16"):
        parts = [network(*chunks) for chunks in zip(*(v.split(size) for v in visits), strict=True)]
    return torch.cat(parts).float()


def rng_at(seed: int, step: int, which: int) -> np.random.Generator:
    """Return the generator of a step, one of several."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(_TRAINING, step, which)))


def read_sides(
    source: Path, config: TrainingConfig, network: Network = ConcatUNet
) -> tuple[Patches, Patches | None, dict[str, Any]]:
    """Return the patches to learn from, those of the patients held out if there are any, and what they are in words."""
    options: dict[str, Any] = {"side": config.side, "fold": config.fold, "folds": config.folds, "network": network}
    held_out = read_patches(source, split="validation", **options) if config.folds > 1 else None
    training = read_patches(source, split="train" if held_out else None, **options)
    about = {"patients": training.subjects, "held_out": held_out.subjects if held_out else []}
    return training, held_out, {**about, "source": source_sha256(source, pairs=network is not SegmentationUNet)}


def drawn_from(held_out: Patches | None, config: TrainingConfig, positive_share: float) -> Drawn | None:
    """Return the patches of the patients held out that a training is measured on."""
    if held_out is None:
        return None
    rng = np.random.default_rng(np.random.SeedSequence(config.seed, spawn_key=(_VALIDATION,)))
    return held_out.draw(rng, config.validation_patches, round(positive_share * config.validation_patches))


def source_sha256(source: Path, *, pairs: bool) -> str:
    """Return the SHA-256 of a run's index; of a manifest or folder of cases, a hash of all the files it lists.

    Args:
        source: Where the data are.
        pairs: A manifest lists pairs of visits, not cases.
    """
    if (source / "index.json").exists():
        return hashlib.sha256((source / "index.json").read_bytes()).hexdigest()
    if not pairs:
        return plain_hash({files.subject: files.hashes() for files in find_cases(source)})
    rows = manifest_rows(source, needed=PAIR, optional=())
    return plain_hash([[subject, *(_file_sha256(paths[role]) for role in PAIR)] for subject, _, paths in rows])


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def seeded_weights(seed: int) -> Iterator[None]:
    """Let a network's first weights be drawn from a seed, and put torch's generator back."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        yield


def _check_resumable(path: Path, stage: str, settings: dict[str, Any]) -> None:
    """Raise if there is a checkpoint that this training cannot go on from."""
    if not path.exists():
        return
    try:
        made = torch.load(path, weights_only=True, map_location="cpu")[stage]["settings"]
    except (OSError, EOFError, KeyError, TypeError, RuntimeError, UnpicklingError) as error:
        problem = f"the checkpoint is damaged or of another stage ({type(error).__name__})"
        raise InputError(path, problem, "remove it") from error
    if changed := differing(made, settings):
        raise InputError(path, f"the checkpoint is of another training ({changed})", "remove it")


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
