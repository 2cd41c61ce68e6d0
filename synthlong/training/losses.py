"""What a network gets wrong: errors of patches, and the logits that they are of."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from synthlong.networks import UNet

__all__ = ["LOSSES", "errors_of", "predicted"]

LOSSES = ("bce", "dice", "bce+dice")

_CPU_CHUNK = 4
"""Patches that a CPU predicts at once when none is learned from; their features then stay in the cache."""

_GPU_VOXELS = 2**23
"""Voxels that a GPU does."""


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
