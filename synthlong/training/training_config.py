"""What every training is told."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

from synthlong.networks import default_precision
from synthlong.options import Options
from synthlong.training.losses import LOSSES

__all__ = ["PRECISIONS", "TrainingConfig"]

PRECISIONS = {"float32": "32-true", "bf16": "bf16-mixed"}
"""Lightning's names of them."""


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
        prefer: "sform" or "qform" where those of a scan disagree.
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
    prefer: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(("device",), lambda v: v in ("cpu", "cuda"), "cpu or cuda; --devices says how many")
        self.settle("precision")
        self.check(("loss",), lambda v: v in LOSSES, f"one of {', '.join(LOSSES)}")
        self.check(("prefer",), lambda v: v in (None, "sform", "qform"), "sform or qform")
        self.check(("learning_rate",), lambda v: 0 < v <= 1, "above 0, at most 1")
        self.check(("seed", "fold"), lambda v: v >= 0, "0 or more")
        counts = ("batch", "side", "steps", "devices", "nodes", "folds")
        self.check((*counts, "validation_patches", "report_every", "checkpoint_every"), lambda v: v >= 1, "1 or more")
        self.check(("fold",), lambda v: v < self.folds, f"below the number of folds ({self.folds})")
        self.check(("batch",), lambda v: not v % self.ranks, f"a multiple of the {self.ranks} processes")
        self.check(("validation_patches",), lambda v: v >= self.ranks, f"at least the {self.ranks} processes")

    @property
    def ranks(self) -> int:
        """Number of processes."""
        return self.devices * self.nodes

    @abstractmethod
    def learning_rate_at(self, step: int) -> float:
        """Return Adam's learning rate at a step."""

    def settle(self, name: str) -> None:
        """Check a precision, and make "auto" definite."""
        self.check((name,), lambda v: v in ("auto", *PRECISIONS), "auto, bf16 or float32")
        if getattr(self, name) == "auto":
            object.__setattr__(self, name, default_precision(self.device))

    def check_side(self, multiple: int) -> None:
        """Raise a ConfigError unless a network takes patches of this side."""
        self.check(("side",), lambda v: not v % multiple, f"a multiple of {multiple}")
