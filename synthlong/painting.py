"""The lesion generator: a lesion painted into a scan.

A 3-D U-Net with the scan, its lesion voxels replaced by noise, and the lesion mask as inputs learns to
restore the scan with its lesions (Kamraoui et al. 2022, section 2.3.2, doi 10.3389/fnimg.2022.948235). Given
a mask where there is none, it paints one. As in `inpainting`, it corrects a smooth first guess; here that has
the lesion's `profile` on it, so that it need not guess a scan's contrast and edges.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from synthlong.boxes import crop
from synthlong.case import Case
from synthlong.errors import InputError
from synthlong.hole import FLUID, corrupt, first_guess, hole_in
from synthlong.lesions import find_lesions
from synthlong.networks import UNetConfig
from synthlong.orientation import draw_orientation
from synthlong.profile import LEVELS, Profile, contrast_of, profile_of, raised, soft_depth
from synthlong.sampling import MOST_DRAWS, Sample, draw_variation, vary
from synthlong.texture import mottle, texture_of
from synthlong.weights import TrainedNetwork

__all__ = ["LesionPainter", "LesionSampler"]

NETWORK = UNetConfig(in_channels=3, out_channels=1)
_LEAST = 0.75
"""Of a lesion's contrast: by so much it is brighter than what was there, however bright that was."""


class LesionPainter(TrainedNetwork):
    """The network that adds lesions; see `paint`. `LesionPainter.read()` gives the shipped one."""

    task = "generator"

    def paint(
        self, x: NDArray, mask: NDArray, *, seed: int, profile: Profile, donor: NDArray | None = None
    ) -> NDArray[np.float32]:
        """Return a box with a lesion painted into it; 2.5 voxels from the mask on it stays bit for bit.

        Args:
            x: Box of a scan, shape `(I, J, K)`, brain mode 1, background 0; about 8 voxels around the lesion.
            mask: The lesion's voxels.
            seed: Seed of the noise.
            profile: The lesion's contrast by depth, and how uneven it is.
            donor: Ignored; only `comparison.CopyPainter` uses one.
        """
        mask = np.asarray(mask) != 0
        weight = hole_in(x, mask)
        if not weight.any():
            return np.array(x, np.float32)
        depth = soft_depth(mask)
        level = first_guess(x, weight)
        guess = raised(level, profile, depth, weight > 0)
        seen = corrupt(x, weight, mask, seed=seed, guess=guess)
        painted = np.maximum(guess + self.change(seen), 0)
        # the profile fades by itself: the hole's edge takes it away only where little is left of the hole
        wanted = level + np.minimum(2 * weight, 1) * (guess - level)
        faded = wanted + weight * (painted - guess) + (1 - weight) * (x - level)
        smooth = np.where(weight > 0, np.maximum(faded, 0), x).astype(np.float32, copy=False)
        texture = texture_of(x, weight > 0)
        spread = np.interp(depth, LEVELS, profile.spreads).astype(np.float32)
        rough = mottle(smooth, weight, texture, spread=spread, there=smooth - wanted, seed=seed)
        brighter = float((rough - x)[mask].mean())
        lacking = np.float32(max(_LEAST * contrast_of(profile, depth, mask) - brighter, 0))
        return np.where(weight > 0, rough + weight * lacking, x).astype(np.float32, copy=False)


class LesionSampler:
    """Training samples: patches around real lesions, all their lesion voxels to be painted again.

    Args:
        cases: Scans with lesions.
    """

    def __init__(self, cases: list[Case]) -> None:
        self.cases = cases
        self._lesions = [find_lesions(c.lesions, max_event_mm3=3000.0) for c in cases]
        self._voxels = [
            [np.argwhere(m.labels[box] == n) + [s.start for s in box] for n, box in enumerate(m.boxes, start=1)]
            for m in self._lesions
        ]
        self._usable = [n for n, m in enumerate(self._lesions) if len(m)]

    def draw(self, rng: np.random.Generator, *, side: int, varied: bool = True) -> Sample:
        """Draw one sample of `side`^3 voxels, around a lesion drawn by the cube root of its volume."""
        for _ in range(MOST_DRAWS if self._usable else 0):
            n = self._usable[int(rng.integers(len(self._usable)))]
            pull = np.cbrt(self._lesions[n].volumes_mm3)
            voxels = self._voxels[n][int(np.searchsorted(np.cumsum(pull) / pull.sum(), rng.random()))]
            shift = rng.integers(-5, 6, 3)
            centre = tuple(voxels[rng.integers(len(voxels))] + shift)
            target, _ = crop(self.cases[n].flair, centre, side)
            labels, _ = crop(self._lesions[n].labels, centre, side)
            turn = draw_orientation(rng, "all" if varied else "none").apply
            target, labels = turn(target), turn(labels)
            mask = labels > 0
            weight, tissue = hole_in(target, mask), target >= FLUID
            if varied:
                target = vary(target, draw_variation(rng))
            if (weight == 0).mean() < 0.3 or mask.sum() < 4:
                continue  # almost nothing but lesion
            guess = raised_by_own(target, first_guess(target, weight, tissue=tissue), labels, weight)
            inputs = corrupt(target, weight, mask, seed=int(rng.integers(2**31)), guess=guess)
            return Sample(inputs, target[None], weight[None])
        names = ", ".join(c.id for c in self.cases)
        raise InputError(names, f"no lesions to learn from in patches of {side}^3 voxels", "pass scans with lesions")


def raised_by_own(x: NDArray, guess: NDArray, labels: NDArray, weight: NDArray) -> NDArray[np.float32]:
    """Return a first guess that has on it the profile of each lesion of the image itself.

    Args:
        x: Image, shape `(I, J, K)`.
        guess: Its first guess.
        labels: Its lesions, numbered; 0 elsewhere.
        weight: The hole.
    """
    depth, excess = soft_depth(labels > 0), x - guess
    at = ndimage.distance_transform_edt(labels == 0, return_distances=False, return_indices=True)
    nearest = labels[tuple(at)]
    for number in np.unique(labels[labels > 0]):
        here = (nearest == number) & (weight > 0)
        guess = raised(guess, profile_of(excess, depth, here), depth, here)
    return guess
