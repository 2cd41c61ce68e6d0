"""Patches as another scanner would have made them, of a brain that lies otherwise.

    patch -> one orientation for its visits and its mask -> an acquisition of each visit's own -> background 0

As for synthetic pairs: `draw_orientation`, `artifacts.RandomAcquisition`. What the patches bring with them beyond their
faces (`Patches.margin`) is acquired, too, then left out: what moves in is the head around them, not nothing.
"""

from __future__ import annotations

from typing import Any, Self

import numpy as np
import torch

from synthlong.artifacts import RandomAcquisition, acquire
from synthlong.orientation import draw_orientation
from synthlong.training.patches import Drawn, Patches

__all__ = ["AugmentedPatches"]


class AugmentedPatches:
    """Patches of others, each turned and acquired anew.

    Args:
        patches: Of brain mode 1, background 0.
        artifacts: Preset of `RandomAcquisition`, or "none".
        orientations: "all" 48, "mirror" (left-right) or "none".
    """

    margin = 0

    def __init__(self, patches: Patches, *, artifacts: Any, orientations: str) -> None:
        self._patches, self.subjects, self._orientations = patches, patches.subjects, orientations
        self._artifacts = artifacts
        self._acquisition = None if artifacts == "none" else RandomAcquisition(artifacts)

    def reopened(self) -> Self:
        """Return the same patches for use in another thread."""
        return type(self)(self._patches.reopened(), artifacts=self._artifacts, orientations=self._orientations)

    def draw(self, rng: np.random.Generator, count: int, positive: int) -> Drawn:
        """Draw patches, then what happens to each; see `Patches.draw`."""
        drawn = self._patches.draw(rng, count, positive)
        *visits, truth = drawn
        for n in range(count):
            turn = draw_orientation(rng, self._orientations)
            for volumes in drawn:
                volumes[n, 0] = turn.apply(volumes[n, 0])
            if self._acquisition is None:
                continue
            affine = turn.apply_affine(np.eye(4), truth.shape[2:])
            for visit in visits:
                steps = self._acquisition.draw_params(rng)["steps"]
                visit[n] = acquire(torch.from_numpy(visit[n]), steps=steps, affine=affine, zero_background=True).numpy()
        beyond = self._patches.margin
        inner = (slice(None), slice(None), *(slice(beyond, n - beyond) for n in truth.shape[2:]))
        return tuple(np.ascontiguousarray(volumes[inner]) for volumes in drawn)
