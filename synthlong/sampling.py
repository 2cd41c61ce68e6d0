"""What the trainers of both synthesis networks draw: a sample, its orientation and its varied appearance.

Six scans of four patients do not span the scanners of the world: contrast, resolution, noise and brightness
of each training patch are varied, the target along with the input.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from synthlong.protocol import toned

__all__ = ["MOST_DRAWS", "Sample", "Variation", "draw_variation", "vary"]


MOST_DRAWS = 2000
"""Patches that a sampler draws in vain before it gives up."""


@dataclass(frozen=True, eq=False)
class Sample:
    """One training sample: `inputs` (3, S, S, S), `target` and `weight` of the loss (1, S, S, S)."""

    inputs: NDArray[np.float32]
    target: NDArray[np.float32]
    weight: NDArray[np.float32]


@dataclass(frozen=True)
class Variation:
    """Appearance of a scan; the defaults change nothing.

    Args:
        gain: Factor on all intensities.
        contrast: Factor on the distance from 1, the brain's mode.
        gamma: Exponent.
        blur: SD of a Gaussian blur per axis, voxels.
        noise_sd: SD of added noise.
        seed: Seed of that noise.
    """

    gain: float = 1.0
    contrast: float = 1.0
    gamma: float = 1.0
    blur: tuple[float, float, float] = (0.0, 0.0, 0.0)
    noise_sd: float = 0.0
    seed: int = 0


def draw_variation(rng: np.random.Generator) -> Variation:
    """Draw an appearance."""
    blur = np.zeros(3)
    if rng.random() < 0.5:
        blur[:] = rng.uniform(0, 0.6)
        blur[rng.integers(3)] += rng.uniform(0, 0.9)  # thick slices
    return Variation(
        gain=float(rng.uniform(0.85, 1.15)),
        contrast=float(np.exp(rng.uniform(-0.35, 0.35))),
        gamma=float(np.exp(rng.uniform(-0.25, 0.25))),
        blur=(float(blur[0]), float(blur[1]), float(blur[2])),
        noise_sd=float(rng.uniform(0, 0.05)) if rng.random() < 0.5 else 0.0,
        seed=int(rng.integers(2**31)),
    )


def vary(x: NDArray[np.float32], look: Variation) -> NDArray[np.float32]:
    """Return a patch with another appearance; background (0) stays 0, intensities stay above 0."""
    brain = x > 0
    y = (toned(x, (look.contrast, look.gamma)) * look.gain).astype(np.float32)
    if any(look.blur):
        y = ndimage.gaussian_filter(y, look.blur, truncate=3) * brain
    if look.noise_sd:
        white = np.random.default_rng(look.seed).standard_normal(x.shape, np.float32)
        y = np.where(brain, np.maximum(y + np.float32(look.noise_sd) * white, 0.01), 0)
    return y.astype(np.float32, copy=False)
