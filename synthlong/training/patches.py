"""Where patches of two visits come from: shards, or whole scans.

    rng -> positive patches, then uniform ones: z-scored visits, and where lesions are new

A *positive* patch holds a voxel of a new lesion: one drawn from all those of a drawn pair, anywhere in the patch. A
*uniform* one lies at random within the brain's bounding box. In shards only the boxes that were themselves placed
uniformly give those: boxes around events are fuller of lesions than brains are.

Visits are z-scored by mean and standard deviation of the whole scan, background included, as `ConcatUNet.normalised`
does it; a box could not give them, so its recipe carries both (`Recipe.scaling`).
"""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

from synthlong.case import read_case
from synthlong.dataset.shards import ShardDataset, subjects_of
from synthlong.detection.networks import ConcatUNet
from synthlong.errors import ConfigError, InputError, InputWarning
from synthlong.hole import grown_box
from synthlong.manifest import check_ids, manifest_rows
from synthlong.recipe import Recipe

__all__ = ["Patches", "ScanPatches", "ShardPatches", "read_patches"]

Drawn = tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.uint8]]
"""Baseline, follow-up and new lesions, `(N, 1, S, S, S)` each."""


class Patches(Protocol):
    """Patches of some patients."""

    subjects: list[str]

    def draw(self, rng: np.random.Generator, count: int, positive: int) -> Drawn:
        """Draw `count` patches, the first `positive` of them positive, the others uniform."""

    def reopened(self) -> Self:
        """Return the same patches for use in another thread."""


def read_patches(source: Path, *, side: int, split: str, fold: int, folds: int) -> Patches:
    """Return the patches of a run's folder, or of a manifest of whole scans.

    Args:
        source: Folder that `synthlong generate` wrote, or a CSV file with columns `subject,baseline,followup,mask`.
        side: Edge of a patch in voxels.
        split: "train" or "validation", by patient.
        fold: Which of the `folds` parts of the patients is for validation.
        folds: Number of parts.

    Raises:
        InputError: It cannot be read, or it has no new lesions or no uniform boxes.
        ConfigError: `side` is larger than the boxes, or a fold that cannot be.
    """
    if not source.exists():
        raise InputError(source, "no such file or folder", "pass what `generate` wrote, or a manifest (CSV)")
    kind = ShardPatches if source.is_dir() else ScanPatches
    return kind(source, side=side, split=split, fold=fold, folds=folds)


class ShardPatches:
    """Patches of a run; see `read_patches`. Recipes and masks of all samples are read once when it is made."""

    def __init__(self, out: Path, *, side: int, split: str, fold: int, folds: int) -> None:
        keys = ("baseline", "followup", "new_lesions")
        self._samples = ShardDataset(out, keys=keys, split=split, fold=fold, folds=folds)
        self.subjects, self._side = self._samples.subjects, side
        self._scaling: list[tuple[tuple[float, float], tuple[float, float]]] = []
        placed, full = [], []
        labels = ShardDataset(out, keys=("new_lesions", "recipe"), split=split, fold=fold, folds=folds)
        for k in range(len(labels)):
            sample = labels[k]
            recipe = Recipe.from_json(sample["recipe"])
            if side > recipe.box.size:
                raise ConfigError(f"side = {side}: larger than the boxes of {recipe.box.size} voxels")
            self._scaling.append(recipe.scaling)
            placed.append(recipe.box.placed)
            full.append(bool(sample["new_lesions"].any()))
        self._uniform = np.flatnonzero([place == "uniform" for place in placed])
        self._positive = np.flatnonzero(full)
        if not len(self._uniform):
            problem = f"no box of its {split} patients was placed uniformly"
            raise InputError(out, problem, "generate pairs with `around_events` below 1")
        if not len(self._positive):
            raise InputError(out, f"no box of its {split} patients holds a new lesion", "generate more pairs")

    def reopened(self) -> Self:
        """Return the same patches for use in another thread."""
        other = copy.copy(self)
        other._samples = copy.copy(self._samples)
        return other

    def draw(self, rng: np.random.Generator, count: int, positive: int) -> Drawn:
        """Draw patches; see `Patches.draw`."""
        drawn = _room(count, self._side)
        for n in range(count):
            rows = self._positive if n < positive else self._uniform
            row = int(rows[rng.integers(len(rows))])
            sample = self._samples[row]
            new = sample["new_lesions"][0].numpy()
            voxels = np.flatnonzero(new) if n < positive else None
            patch = _draw_place(rng, self._side, tuple(slice(0, s) for s in new.shape), new.shape, voxels)
            for visit, name, (mean, sd) in zip(drawn[:2], ("baseline", "followup"), self._scaling[row], strict=True):
                visit[n, 0] = (sample[name][0].numpy()[patch] - np.float32(mean)) / np.float32(max(sd, 1e-6))
            drawn[2][n, 0] = new[patch]
        return drawn


class ScanPatches:
    """Patches of whole scans; see `read_patches`. They stay in memory, 65 MB for a pair on the MNI grid."""

    def __init__(self, manifest: Path, *, side: int, split: str, fold: int, folds: int) -> None:
        rows = list(manifest_rows(manifest, needed=("baseline", "followup", "mask"), optional=()))
        check_ids(manifest, [subject for subject, _, _ in rows])
        files = {subject: paths for subject, _, paths in rows}
        chosen = subjects_of(split, sorted(files), fold=fold, folds=folds)
        self.subjects, self._side = sorted(chosen), side
        self._scans = [_Scans.read(side=side, subject=subject, **files[subject]) for subject in self.subjects]
        self._positive = [scans for scans in self._scans if len(scans.voxels)]
        if not self._positive:
            raise InputError(manifest, f"none of its {split} patients has a new lesion", "add some, or choose a fold")

    def reopened(self) -> Self:
        """Return the same patches: threads may share them."""
        return self

    def draw(self, rng: np.random.Generator, count: int, positive: int) -> Drawn:
        """Draw patches; see `Patches.draw`."""
        drawn = _room(count, self._side)
        for n in range(count):
            among = self._positive if n < positive else self._scans
            scans = among[int(rng.integers(len(among)))]
            voxels = scans.voxels if n < positive else None
            patch = _draw_place(rng, self._side, scans.bounds, scans.new.shape, voxels)
            drawn[0][n, 0], drawn[1][n, 0] = scans.baseline[patch], scans.followup[patch]
            drawn[2][n, 0] = scans.new[patch]
        return drawn


@dataclass(frozen=True, eq=False)
class _Scans:
    """Both visits of a patient, z-scored, and where their lesions are new: mask and flat indices of its voxels."""

    baseline: NDArray[np.float32]
    followup: NDArray[np.float32]
    new: NDArray[np.uint8]
    voxels: NDArray[np.int64]
    bounds: tuple[slice, ...]

    @classmethod
    def read(cls, *, side: int, subject: str, baseline: Path, followup: Path, mask: Path) -> Self:
        """Read them as `detect` would see them."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "(?s).*no lesion in the mask", InputWarning)  # true of many patients
            before, after = (read_case(visit, mask, subject=subject) for visit in (baseline, followup))
        if before.shape != after.shape or not np.allclose(before.affine, after.affine, atol=1e-3):
            raise InputError(followup, "its grid is not that of the baseline", "resample one onto the other's grid")
        if min(after.shape) < side:
            raise InputError(followup, f"it has a side below the {side} voxels of a patch", "pass a larger scan")
        seen, bounds = ConcatUNet.normalised, grown_box((before.brain | after.brain) > 0, 0)
        return cls(seen(before.flair), seen(after.flair), after.lesions, np.flatnonzero(after.lesions), bounds)


def _room(count: int, side: int) -> Drawn:
    shape = (count, 1, side, side, side)
    return np.empty(shape, np.float32), np.empty(shape, np.float32), np.empty(shape, np.uint8)


def _draw_place(
    rng: np.random.Generator,
    side: int,
    bounds: tuple[slice, ...],
    shape: tuple[int, ...],
    voxels: NDArray[np.int64] | None,
) -> tuple[slice, ...]:
    """Draw where a patch lies in an array: with one of these voxels, or anywhere within bounds as far as they reach."""
    if voxels is None:
        low = np.array([b.start for b in bounds])
        start = rng.integers(low, np.maximum([b.stop - side for b in bounds], low) + 1)
    else:
        voxel = np.array(np.unravel_index(voxels[rng.integers(len(voxels))], shape))
        start = voxel - rng.integers(0, side, 3)
    start = np.clip(start, 0, np.array(shape) - side)
    return tuple(slice(int(s), int(s) + side) for s in start)
