"""A lesion's profile: how much brighter than the tissue around it is, by depth below its border.

    image in a hole = first guess + profile(depth) + what the network adds + texture

Contrast, edge and brightness of the core in five numbers, unevenness in five more. In training they are those of the
lesion that is painted again; in use they are drawn after a real lesion's, so that synthetic lesions vary as real
ones do.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from synthlong.boxes import box_of, on_grid, widened
from synthlong.hole import REACH, first_guess, hole_in
from synthlong.lesions import SMALLEST_EVENT_MM3, LesionMap, grown

__all__ = [
    "LEVELS",
    "Profile",
    "contrast_of",
    "depth_in",
    "draw_profile",
    "profile_of",
    "profiles_in",
    "raised",
    "soft_depth",
    "typical",
    "visible",
]

LEVELS = (-1.5, -0.5, 0.5, 1.5, 2.5)
"""Depths below the border that a profile speaks of, voxels; negative outside, where edges are soft."""

_OUTLINE = 0.7
_RIM = -2.5
_HALO = 2
_LOG_VOLUME_SD = 0.4
_JITTER = 0.08
_FEWEST = 4
_FAINTEST = 0.1


class Profile(NamedTuple):
    """How one lesion differs from the tissue around it, brain mode 1.

    Args:
        levels: Mean excess over the first guess at each of `LEVELS`.
        spreads: SD of the voxels at each level.
    """

    levels: tuple[float, ...]
    spreads: tuple[float, ...]

    @property
    def row(self) -> tuple[float, ...]:
        """All numbers, the levels first."""
        return (*self.levels, *self.spreads)

    @classmethod
    def from_row(cls, row: Iterable[float]) -> Profile:
        """Return the profile with this row."""
        numbers = [float(r) for r in row]
        return cls(tuple(numbers[: len(LEVELS)]), tuple(numbers[len(LEVELS) :]))


def depth_in(mask: NDArray) -> NDArray[np.float32]:
    """Return each voxel's depth below the border of a mask, negative outside; beside a face it is half a voxel.

    Args:
        mask: Lesion voxels, neither none nor all.
    """
    mask = np.asarray(mask) != 0
    inner, outer = ndimage.distance_transform_edt(mask), ndimage.distance_transform_edt(~mask)
    return np.where(mask, inner - 0.5, 0.5 - outer).astype(np.float32)


def soft_depth(mask: NDArray) -> NDArray[np.float32]:
    """Return the depth below a smoother border than the mask's: masks are cut along voxels, lesions are not.

    `depth_in` under a Gaussian of SD 0.7 voxels, stretched to the mean and SD that it had over the mask and 2.5 voxels
    around it. It explains the looks of real lesions better than the mask's own border: see `docs/realism.md`.

    Args:
        mask: Lesion voxels, neither none nor all.
    """
    mask = np.asarray(mask) != 0
    box = box_of(mask, REACH + 4)
    hard = np.maximum(depth_in(mask[box]), -REACH - 1)
    soft = ndimage.gaussian_filter(hard, _OUTLINE, mode="nearest")
    near = hard > _RIM
    stretch = hard[near].std() / max(float(soft[near].std()), 1e-3)
    depth = np.full(mask.shape, -REACH - 1, np.float32)
    depth[box] = np.maximum(hard[near].mean() + stretch * (soft - soft[near].mean()), -REACH - 1)
    return depth


def profile_of(excess: NDArray, depth: NDArray, counts: NDArray[np.bool_]) -> Profile:
    """Measure a lesion; a level that a small one lacks is that of the level above.

    Args:
        excess: Image minus first guess, brain mode 1.
        depth: See `soft_depth`.
        counts: Voxels that count.
    """
    levels: list[float] = []
    spreads: list[float] = []
    nearest = np.clip(np.floor(depth), LEVELS[0] - 0.5, LEVELS[-1] - 0.5) + 0.5
    for level in LEVELS:
        here = counts & (nearest == level) & (depth >= LEVELS[0] - 0.5)
        levels.append(float(excess[here].mean()) if here.any() else (levels[-1] if levels else 0.0))
        enough = np.count_nonzero(here) >= _FEWEST
        spreads.append(float(excess[here].std(ddof=1)) if enough else (spreads[-1] if spreads else 0.0))
    return Profile(tuple(levels), tuple(spreads))


def contrast_of(profile: Profile, depth: NDArray, mask: NDArray[np.bool_]) -> float:
    """Return the mean of a profile over a lesion's voxels, at least one, of these depths."""
    return float(np.interp(depth[mask], LEVELS, profile.levels).mean())


def raised(guess: NDArray, profile: Profile, depth: NDArray, where: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Return a first guess with a profile on it at the voxels `where`."""
    bright = guess.astype(np.float32)
    bright[where] += np.interp(depth[where], LEVELS, profile.levels).astype(np.float32)
    return bright


def profiles_in(flair: NDArray, lesions: LesionMap) -> NDArray[np.float32]:
    """Measure a scan's lesions: logarithm of the volume in mm3, then profile, `(n, 1 + 2 * len(LEVELS))`.

    Args:
        flair: The scan, brain mode 1.
        lesions: Its lesions.
    """
    weight = hole_in(flair, lesions.labels)
    beyond = hole_in(flair, grown(lesions.labels, _HALO))
    excess = flair - first_guess(flair, np.maximum(weight, beyond), sweeps=200)
    rows = []
    for number, box in enumerate(lesions.boxes, start=1):
        wide = on_grid(widened(box, 5), flair.shape)
        labels = lesions.labels[wide]
        counts = (weight[wide] > 0) & ((labels == number) | (labels == 0))
        profile = profile_of(excess[wide], soft_depth(labels == number), counts)
        rows.append((np.log(lesions.volumes_mm3[number - 1]), *profile.row))
    return np.array(rows, np.float32).reshape(len(rows), 1 + 2 * len(LEVELS))


def typical(lesions: LesionMap) -> NDArray[np.bool_]:
    """Return which lesions are like those that are painted: over 3 mm3, no other lesion within 3 voxels."""
    alone = []
    for number, box in enumerate(lesions.boxes, start=1):
        wide = on_grid(widened(box, 4), lesions.labels.shape)
        labels = lesions.labels[wide]
        others = (labels > 0) & (labels != number)
        alone.append(not (others & grown(labels == number, 3)).any())
    return np.array(alone, bool) & (lesions.volumes_mm3 > SMALLEST_EVENT_MM3)


def visible(profiles: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the profiles of lesions that can be told from the tissue around them; see `profiles_in`."""
    inside = np.array(LEVELS) > 0
    return profiles[profiles[:, 1 : 1 + len(LEVELS)][:, inside].mean(axis=1) >= _FAINTEST]


def draw_profile(
    rng: np.random.Generator,
    measured: NDArray[np.float32],
    *,
    volume_mm3: float,
    contrast: tuple[float, float] = (1.0, 1.0),
) -> Profile:
    """Draw a profile after that of a real lesion of about the same volume, a little brighter or darker.

    Args:
        rng: Source of randomness.
        measured: See `profiles_in`; at least one lesion.
        volume_mm3: Of the lesion to be painted.
        contrast: Range of a factor on all of it.
    """
    score = -0.5 * ((measured[:, 0].astype(np.float64) - np.log(volume_mm3)) / _LOG_VOLUME_SD) ** 2
    chance = np.cumsum(np.exp(score - score.max()))
    donor = int(np.searchsorted(chance, rng.random() * chance[-1], side="right"))
    drawn = measured[min(donor, len(measured) - 1), 1:] * np.exp(_JITTER * rng.standard_normal())
    drawn = drawn * (rng.uniform(*contrast) if contrast[0] < contrast[1] else contrast[0])
    return Profile.from_row(round(float(p), 4) for p in drawn)
