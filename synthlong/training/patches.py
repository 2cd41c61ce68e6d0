"""Where patches come from: shards, or whole scans of two visits or one.

    rng -> positive patches, then uniform ones: the visits, and where lesions are new

A *positive* patch holds a voxel of a new lesion: one drawn from all those of a drawn pair, anywhere in the patch. A
*uniform* one lies at random within the brain's bounding box. In shards only the boxes that were themselves placed
uniformly give those: boxes around events are fuller of lesions than brains are. Of single visits it is any lesion.

Visits have brain mode 1, or, for `ConcatUNet`, are z-scored by mean and standard deviation over the MNI grid,
background included; a box could not give them, so its recipe carries both (`Recipe.scaling`).
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from synthlong.boxes import Region, box_at, box_of, crop
from synthlong.case import Case
from synthlong.dataset.shards import ShardDataset, subjects_of
from synthlong.detection.networks import ConcatUNet, LongitudinalUNet, SegmentationUNet
from synthlong.detection.visits import in_common_brain, read_pair
from synthlong.errors import ConfigError, InputError, InputWarning, short
from synthlong.manifest import CaseFiles, check_ids, find_cases, manifest_rows
from synthlong.nifti import read_nifti
from synthlong.recipe import Recipe

__all__ = ["PAIR", "Drawn", "Network", "Patches", "ScanPatches", "ShardPatches", "check_folds", "read_patches"]

PAIR = ("baseline", "followup", "mask")
"""Columns of a manifest of real pairs, beside the subject."""

Drawn = tuple[NDArray[Any], ...]
"""Visits, float32, then new lesions (or of one visit all of them), uint8; `(N, 1, S, S, S)` each."""

Network = type[LongitudinalUNet] | type[SegmentationUNet]

_AS_IT_IS = (0.0, 1.0)
_OTHER_FOLDS = "choose another number of folds, or add patients"


class Patches(Protocol):
    """Patches of some patients; `margin`: what is drawn is larger by so many voxels on each face."""

    subjects: list[str]
    margin: int

    def draw(self, rng: np.random.Generator, count: int, positive: int) -> Drawn:
        """Draw `count` patches, the first `positive` of them positive, the others uniform."""

    def reopened(self) -> Self:
        """Return the same patches for use in another thread."""


def read_patches(
    source: Path,
    *,
    side: int,
    split: str | None,
    fold: int,
    folds: int,
    network: Network = ConcatUNet,
    prefer: str | None = None,
    margin: int = 0,
) -> Patches:
    """Return the patches of a run's folder, or of whole scans.

    Args:
        source: Folder that `synthlong generate` wrote, or a CSV file with columns `subject,baseline,followup,mask`;
            for `SegmentationUNet` a manifest or folder of cases, see `find_cases`.
        side: Edge of a patch in voxels.
        split: "train" or "validation", by patient; None: all.
        fold: Which of the `folds` parts of the patients is for validation.
        folds: Number of parts.
        network: Whose intensities they have, and one visit or two.
        prefer: "sform" or "qform" where those of a scan disagree.
        margin: Voxels around each patch that come with it, 0 beyond the scan; the boxes of shards have none.

    Raises:
        InputError: It cannot be read, or it has no new lesions or no uniform boxes.
        ConfigError: `side` is larger than the boxes, or a fold that cannot be.
    """
    if not source.exists():
        raise InputError(source, "no such file or folder", "pass what `generate` wrote, or a manifest (CSV)")
    options: dict[str, Any] = {"side": side, "split": split, "fold": fold, "folds": folds}
    if issubclass(network, SegmentationUNet):
        return ScanPatches(source, _visits(source, prefer), wanted="lesion", margin=margin, **options)
    if source.is_dir():
        if not (source / "run.json").exists():
            way = "pass what `synthlong generate` wrote, or a CSV of pairs: subject,baseline,followup,mask"
            raise InputError(source, "holds no run of pairs", way)
        return ShardPatches(source, z_scored=network is ConcatUNet, **options)
    readers = _pairs(source, network.normalised, prefer)
    return ScanPatches(source, readers, wanted="new lesion", margin=margin, **options)


def check_folds(manifest: Path, folds: Sequence[int], *, of: int, prefer: str | None = None) -> None:
    """Raise an InputError if no patient held out in one of these folds has a new lesion: before the first training.

    The masks are looked at as they are. One that is lost whole where the baseline ends is refused when it is read,
    and every fold reads those of all patients.
    """
    having: dict[str, bool] = {}
    for subject, _, paths in manifest_rows(manifest, needed=PAIR, optional=()):
        mask = read_nifti(paths["mask"], prefer=prefer, allow_empty=True)
        having[subject] = bool(mask.data.any()) or having.get(subject, False)
    for fold in folds:
        if not any(having[subject] for subject in subjects_of("validation", sorted(having), fold=fold, folds=of)):
            raise InputError(manifest, f"none of the patients held out in fold {fold} has a new lesion", _OTHER_FOLDS)


class ShardPatches:
    """Patches of a run; see `read_patches`. Recipes and masks of all samples are read once when it is made."""

    margin = 0

    def __init__(
        self, out: Path, *, side: int, split: str | None, fold: int, folds: int, z_scored: bool = True
    ) -> None:
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
            self._scaling.append(recipe.scaling if z_scored else (_AS_IT_IS, _AS_IT_IS))
            placed.append(recipe.box.placed)
            full.append(bool(sample["new_lesions"].any()))
        self._uniform = np.flatnonzero([place == "uniform" for place in placed])
        self._positive = np.flatnonzero(full)
        if not len(self._uniform):
            problem = "no box of its patients was placed uniformly"
            raise InputError(out, problem, "generate pairs with `around_events` below 1")
        if not len(self._positive):
            raise InputError(out, "no box of its patients holds a new lesion", "generate more pairs")

    def reopened(self) -> Self:
        """Return the same patches for use in another thread."""
        other = copy.copy(self)
        other._samples = copy.copy(self._samples)
        return other

    def draw(self, rng: np.random.Generator, count: int, positive: int) -> Drawn:
        """Draw patches; see `Patches.draw`."""
        drawn = _room(count, self._side, visits=2)
        for n in range(count):
            rows = self._positive if n < positive else self._uniform
            row = int(rows[rng.integers(len(rows))])
            sample = self._samples[row]
            new = sample["new_lesions"][0].numpy()
            voxels = np.flatnonzero(new) if n < positive else None
            patch = _draw_place(rng, self._side, box_at((0, 0, 0), new.shape), new.shape, voxels)
            for visit, name, (mean, sd) in zip(drawn[:2], ("baseline", "followup"), self._scaling[row], strict=True):
                visit[n, 0] = (sample[name][0].numpy()[patch] - np.float32(mean)) / np.float32(max(sd, 1e-6))
            drawn[2][n, 0] = new[patch]
        return drawn


class ScanPatches:
    """Patches of whole scans; see `read_patches`. They stay in memory, 65 MB for a pair on the MNI grid.

    Args:
        source: Where they were listed, for messages.
        readers: What reads the scans of each patient.
        wanted: What positive patches hold.
        side: See `read_patches`, as the others.
        split: "train" or "validation"; None: all patients.
        fold: Part for validation.
        folds: Number of parts.
        margin: Voxels around each patch that come with it.
    """

    def __init__(
        self,
        source: Path,
        readers: dict[str, list[Callable[[], _Scans]]],
        *,
        wanted: str,
        side: int,
        split: str | None,
        fold: int,
        folds: int,
        margin: int,
    ) -> None:
        chosen = subjects_of(split, sorted(readers), fold=fold, folds=folds)
        self.subjects, self.margin, self._side = sorted(chosen), margin, side
        self._scans = [read() for subject in self.subjects for read in readers[subject]]
        for scans in self._scans:
            if min(scans.mask.shape) < side:
                problem = f"it has a side below the {side} voxels of a patch"
                raise InputError(scans.name, problem, "pass a larger scan")
        self._positive = [scans for scans in self._scans if len(scans.voxels)]
        if not self._positive:
            which = f"held out in fold {fold}" if split == "validation" else "learned from"
            way = _OTHER_FOLDS if split else f"add patients with a {wanted}"
            raise InputError(source, f"none of the patients {which} has a {wanted}", way)

    def reopened(self) -> Self:
        """Return the same patches: threads may share them."""
        return self

    def draw(self, rng: np.random.Generator, count: int, positive: int) -> Drawn:
        """Draw patches; see `Patches.draw`."""
        whole = self._side + 2 * self.margin
        drawn = _room(count, whole, visits=len(self._scans[0].visits))
        for n in range(count):
            among = self._positive if n < positive else self._scans
            scans = among[int(rng.integers(len(among)))]
            voxels = scans.voxels if n < positive else None
            patch = _draw_place(rng, self._side, scans.bounds, scans.mask.shape, voxels)
            centre = tuple(p.start + self._side // 2 for p in patch)
            volumes: tuple[NDArray[Any], ...] = (*scans.visits, scans.mask)
            for room, volume in zip(drawn, volumes, strict=True):
                room[n, 0], _ = crop(volume, centre, whole)
        return drawn


@dataclass(frozen=True, eq=False)
class _Scans:
    """The visits of a patient as a network sees them, and a mask of the last one, with flat indices of its voxels."""

    name: str
    visits: tuple[NDArray[np.float32], ...]
    mask: NDArray[np.uint8]
    voxels: NDArray[np.int64]
    bounds: Region

    @classmethod
    def of(cls, name: str, seen: Callable[[NDArray[np.float32]], NDArray[np.float32]], *cases: Case) -> Self:
        """Take what is needed from each visit."""
        mask = cases[-1].lesions
        visits = tuple(seen(case.flair) for case in cases)
        return cls(name, visits, mask, np.flatnonzero(mask), box_of(cases[-1].brain > 0, 0))


def _visits(source: Path, prefer: str | None) -> dict[str, list[Callable[[], _Scans]]]:
    """Return what reads the visits of each patient, each by itself."""
    readers: dict[str, list[Callable[[], _Scans]]] = {}
    for files in find_cases(source, prefer=prefer):
        readers.setdefault(files.patient, []).append(partial(_read_visit, files))
    return readers


def _pairs(
    manifest: Path, seen: Callable[[NDArray[np.float32]], NDArray[np.float32]], prefer: str | None
) -> dict[str, list[Callable[[], _Scans]]]:
    """Return what reads the pairs of each patient; a row is a pair, a patient with three visits has two.

    Raises:
        InputError: See `manifest_rows`; or ids differ in upper and lower case only.
    """
    readers: dict[str, list[Callable[[], _Scans]]] = {}
    for subject, _, paths in manifest_rows(manifest, needed=PAIR, optional=()):
        readers.setdefault(subject, []).append(partial(_read_pair, seen, subject=subject, prefer=prefer, **paths))
    check_ids(manifest, readers)
    return readers


def _read_visit(files: CaseFiles) -> _Scans:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*no lesion in the mask", InputWarning)  # true of some patients
        return _Scans.of(files.flair.name, lambda scan: scan, files.read())


def _read_pair(
    seen: Callable[[NDArray[np.float32]], NDArray[np.float32]],
    *,
    subject: str,
    baseline: Path,
    followup: Path,
    mask: Path,
    prefer: str | None,
) -> _Scans:
    """Read them as `detect` sees them."""
    whole = read_pair(baseline, followup, mask, subject=subject, prefer=prefer)
    visits = in_common_brain(*whole)
    before, after = (int(case.lesions.sum()) for case in (whole[1], visits[1]))
    if after < before:
        problem = f"{before - after} of {before} lesion voxels lie outside the baseline's brain"
        if not after:
            raise InputError(mask, problem, "leave this pair out, or pass a baseline that shows their place")
        warnings.warn(f"{short(mask)}: {problem} and are left out", InputWarning, stacklevel=2)
    return _Scans.of(followup.name, seen, *visits)


def _room(count: int, side: int, *, visits: int) -> Drawn:
    shape = (count, 1, side, side, side)
    return (*(np.empty(shape, np.float32) for _ in range(visits)), np.empty(shape, np.uint8))


def _draw_place(
    rng: np.random.Generator,
    side: int,
    bounds: Region,
    shape: tuple[int, ...],
    voxels: NDArray[np.int64] | None,
) -> Region:
    """Draw where a patch lies in an array: with one of these voxels, or anywhere within bounds as far as they reach."""
    if voxels is None:
        low = np.array([b.start for b in bounds])
        start = rng.integers(low, np.maximum([b.stop - side for b in bounds], low) + 1)
    else:
        voxel = np.array(np.unravel_index(voxels[rng.integers(len(voxels))], shape))
        start = voxel - rng.integers(0, side, 3)
    start = np.clip(start, 0, np.array(shape) - side)
    return box_at(start.tolist(), (side,) * 3)
