"""The loop that every training runs in, on Lightning's Trainer.

    batches -> a step of Adam at its learning rate -> now and then: validation Dice, a checkpoint

The weights with the best validation Dice are kept. What a step sees depends on (seed, step), never on a place in a
data set, and a checkpoint holds all that the next step needs: a killed training goes on to the same weights, bit for
bit on one CPU thread.
"""

from __future__ import annotations

import logging
import math
import signal
import time
import warnings
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.fabric.plugins.environments import ClusterEnvironment, LightningEnvironment, SLURMEnvironment
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor

import synthlong
from synthlong.errors import InputError
from synthlong.lock import file_lock
from synthlong.networks import UNet
from synthlong.progress import StepProgress
from synthlong.signals import hold_signals
from synthlong.training.losses import errors_of, predicted
from synthlong.training.patches import Drawn
from synthlong.training.training_config import PRECISIONS, TrainingConfig
from synthlong.weights import finished, read_checkpoint, write_checkpoint, write_weights

__all__ = ["LAYOUTS", "Training", "fit", "seeded_weights"]

LAYOUTS = {"float32": torch.contiguous_format, "bf16": torch.channels_last_3d}


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
        progress: StepProgress | None = None,
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
        """What has to be the same for the same weights."""
        return {**self.config.as_dict(), **self.about}

    @property
    def best_point(self) -> dict[str, float]:
        """The point of the curve with the highest Dice, the last of equals; the last where nobody is held out."""
        return max(self.curve, key=lambda point: (point.get("dice", 0), point["step"]))

    @property
    def resumable(self) -> dict[str, Any]:
        """What has to be the same to go on."""
        return {**self.settings, "version": synthlong.__version__}

    def seconds(self) -> float:
        """Return how long the training took, interruptions left out."""
        return round(self._before_s + time.monotonic() - self._started_s, 1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam on the parameters that are not frozen."""
        learned = [w for w in self.network.parameters() if w.requires_grad]
        return torch.optim.Adam(learned, lr=self.config.learning_rate)

    def on_train_start(self) -> None:
        """Hold Ctrl-C and SIGTERM back until a step is done and saved; Lightning puts their handlers back."""
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
        self.log_dict({"step_loss": loss.detach(), "positive": positive, "rate": self._rate()})
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
        stopped = self._any_stopped()
        if done % config.checkpoint_every == 0 or stopped:
            self.trainer.save_checkpoint(self.checkpoint)
        if stopped:
            raise KeyboardInterrupt

    def _any_stopped(self) -> bool:
        """Whether a signal has come to this process or, among several, to any."""
        stopped = torch.tensor(float(bool(self.stopped_by)), device=self.device)
        return bool(self.trainer.strategy.reduce(stopped, reduce_op="sum") > 0)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what Lightning does not know of; each process calls it, the first one's is written."""
        own_losses = torch.tensor(self._losses, dtype=torch.float64, device=self.device)
        losses: Any = self.trainer.strategy.reduce(own_losses, reduce_op="mean")
        own = {"settings": self.resumable, "curve": self.curve, "best": self.best, "losses": losses.tolist()}
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
        if self.logger:  # at once: what `self.log` is given is written every 50 steps only
            dice = {"validation_dice": point["dice"]} if held_out else {}
            self.logger.log_metrics({"loss": point["loss"], **dice}, step=done)
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
    with _quiet():
        trainer = lightning.Trainer(
            accelerator={"cpu": "cpu", "cuda": "gpu"}[config.device],
            devices=config.devices,
            num_nodes=config.nodes,
            strategy="auto" if config.ranks == 1 else "ddp",
            precision=PRECISIONS[config.precision],  # type: ignore[arg-type]
            max_steps=config.steps,
            logger=TensorBoardLogger(out.parent, name=f"{out.stem}.tensorboard", version="") if tensorboard else False,
            use_distributed_sampler=False,
            limit_val_batches=0,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            plugins=[_Published(), *_environment(config)],
            default_root_dir=out.with_suffix(".none"),  # else it goes on from any hpc_ckpt_1.ckpt in this folder
        )
        with file_lock(out) if trainer.is_global_zero else nullcontext():
            if made := finished(out, model.settings, part="train", task=model.network.task):
                return {key: made[key] for key in ("curve", "best", "train", "seconds")}
            read_checkpoint(checkpoint, model.stage, model.resumable)  # raises unless it is of this training
            try:
                trainer.fit(model, ckpt_path=checkpoint if checkpoint.exists() else None)
            except SystemExit as stop:  # what Lightning makes of a KeyboardInterrupt
                if model.stopped_by:
                    signal.raise_signal(model.stopped_by[0])  # whose handler is again that of the caller
                raise KeyboardInterrupt from stop
            figures = {
                "curve": model.curve,
                "best": model.best_point,
                "train": config.as_dict(),
                "seconds": model.seconds(),
            }
            if trainer.is_global_zero:
                model.network.load_state_dict(model.best)
                write_weights(out, model.network, task=model.network.task, card={**card, **model.about, **figures})
                checkpoint.unlink(missing_ok=True)
    return figures


class _Published(TorchCheckpointIO):
    """Checkpoints that are whole or not there, whatever happens while they are written."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        write_checkpoint(Path(path), checkpoint)


def _environment(config: TrainingConfig) -> list[ClusterEnvironment]:
    """Return where the processes run, but for Slurm's signal on which Lightning writes checkpoints of its own."""
    if config.ranks == 1:
        return [LightningEnvironment()]
    return [SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() else []


@contextmanager
def seeded_weights(seed: int) -> Iterator[None]:
    """Let a network's first weights be drawn from a seed, and put torch's generator back."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        yield


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
