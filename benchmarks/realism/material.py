"""What is measured: a patient's healed scans, its real lesions, and synthetic ones beside them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from synthlong.bank import read_bank
from synthlong.boxes import crop
from synthlong.case import Case, patient_of
from synthlong.derived import lesions_of, profiles_of
from synthlong.inpainting import Inpainter, heal
from synthlong.lesions import LesionMap, grown
from synthlong.networks import default_precision
from synthlong.painting import LesionPainter
from synthlong.pair import painter_of, render
from synthlong.placement import allowed_of, site_mask
from synthlong.profile import Profile, draw_profile, profiles_in
from synthlong.recipe import draw_recipe, rng_of
from synthlong.synthesis import SynthesisConfig

__all__ = ["ALONE", "SIDE", "Fold", "Patch", "holes_of", "read_fold", "real_lesions", "repainted", "synthetic_lesions"]

SIDE, ALONE = 32, 5
LIMIT_MM3 = 3000.0
CONFIG = SynthesisConfig(
    with_new_lesions=1,
    new_mean=12,
    real_share=0,
    removed_share=0,
    vanished_mean=0,
    enlarging_mean=0,
    shrinking_mean=0,
    stable_mean=0,
    orientations="none",
    artifacts="none",  # the real lesions are seen without
)


@dataclass(frozen=True, eq=False)
class Patch:
    """A cube around one lesion or hole.

    Args:
        patient: Whose.
        image: float32 `(SIDE,) * 3`, brain mode 1.
        mask: bool, its voxels.
        centre: Voxel of the scan in its middle.
    """

    patient: str
    image: NDArray[np.float32]
    mask: NDArray[np.bool_]
    centre: tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class Fold:
    """Weights, and the patients to measure them on.

    Args:
        inpainter: Removes lesions.
        painter: Paints them.
        trained_on: Patients that either network saw.
        cases: Healed scans of the others, of all where there are no others.
    """

    inpainter: Inpainter
    painter: LesionPainter
    trained_on: tuple[str, ...]
    cases: tuple[Case, ...]


def read_fold(weights: Path | None, cases: list[Case]) -> Fold:
    """Read both networks (None: the shipped ones) and heal the cases that they have not seen."""
    precision = default_precision()
    paths = [(weights / f"{c.task}.safetensors") if weights else c.default_path() for c in (Inpainter, LesionPainter)]
    cards = [json.loads(p.with_suffix(".json").read_bytes()) for p in paths]
    seen = {p for card in cards for p in card["patients"] if p != card["held_out"]}
    inpainter = Inpainter.read(paths[0], precision=precision)
    unseen = [c for c in cases if patient_of(c.id) not in seen] or cases
    return Fold(
        inpainter,
        LesionPainter.read(paths[1], precision=precision),
        tuple(sorted(seen)),
        tuple(heal(c, inpainter) for c in unseen),
    )


def real_lesions(case: Case, *, alone: bool = True) -> Iterator[tuple[int, Patch]]:
    """Yield the number and the patch of each lesion that may change and lies alone, as synthetic ones do, or of all."""
    lesions = lesions_of(case, LIMIT_MM3)
    for number in np.flatnonzero(lesions.mutable) + 1:
        patch, labels = _around(case, case.flair, lesions, int(number))
        own = labels == number
        crowded = alone and (grown(own, ALONE) & (labels > 0) & ~own).any()
        if own.sum() == lesions.volumes_mm3[number - 1] and not crowded:
            yield int(number), patch


def _around(case: Case, image: NDArray, lesions: LesionMap, number: int) -> tuple[Patch, NDArray]:
    a, b, c = ((s.start + s.stop) // 2 for s in lesions.boxes[number - 1])
    labels, _ = crop(lesions.labels, (a, b, c), SIDE)
    return Patch(patient_of(case.id), crop(image, (a, b, c), SIDE)[0], labels == number, (a, b, c)), labels


def repainted(fold: Fold, case: Case, number: int, *, own: bool) -> Patch:
    """Return a real lesion's patch with the lesion removed and painted again, by its own profile or a drawn one."""
    assert case.healthy is not None
    lesions = lesions_of(case, LIMIT_MM3)
    patch, _ = _around(case, case.healthy, lesions, number)
    image = patch.image
    rng = rng_of(0, case.id, number)
    if own:
        if "all profiles" not in case.derived:
            case.derived["all profiles"] = profiles_in(case.flair, lesions)
        profile = Profile.from_row(case.derived["all profiles"][number - 1, 1:])
    else:
        volume = float(lesions.volumes_mm3[number - 1])
        profile = draw_profile(rng, profiles_of(case, LIMIT_MM3), volume_mm3=volume)
    painted = fold.painter.paint(image, patch.mask, seed=int(rng.integers(2**31)), profile=profile)
    return replace(patch, image=painted)


def config_like(case: Case, painter: str) -> SynthesisConfig:
    """Return a config that draws lesions as large as the case's own that lie alone."""
    sizes = np.log([patch.mask.sum() for _, patch in real_lesions(case)])
    if not sizes.size:
        return replace(CONFIG, painter=painter)
    median, spread = float(np.exp(np.median(sizes))), float(np.std(sizes))
    return replace(CONFIG, painter=painter, volume_median_mm3=max(median, 4.0), volume_log_sd=spread)


def synthetic_lesions(fold: Fold, case: Case, painter: str, count: int) -> Iterator[Patch]:
    """Yield patches around synthetic lesions at drawn places, as `generate` makes them."""
    config, bank, made = config_like(case, painter), read_bank(), 0
    brush = fold.painter if painter == "network" else painter_of(painter)
    for k in range(1000):
        recipe = draw_recipe(case, config, rng_of(7, case.id, k))
        pair = render(case, recipe, painter=brush, bank=bank, whole=True)
        for event in recipe.events:
            if event.kind != "new":
                continue
            if made == count:
                return
            assert event.site is not None
            patch = _of_label(case, pair.followup, pair.new_lesions, event.site.centre)
            if patch is not None:
                made += 1
                yield patch


def _of_label(case: Case, image: NDArray, mask: NDArray, inside: tuple[int, int, int]) -> Patch | None:
    """Return the patch of the lesion that holds a voxel; None where it is cut off."""
    from scipy import ndimage

    labels, _ = ndimage.label(crop(mask, inside, 2 * SIDE)[0], np.ones((3, 3, 3)))
    own = labels == labels[SIDE, SIDE, SIDE]
    box = ndimage.find_objects(own.astype(np.uint8))[0]
    i, j, k = ((s.start + s.stop) // 2 - SIDE + c for s, c in zip(box, inside, strict=True))
    shift = [a - c for a, c in zip((i, j, k), inside, strict=True)]
    half = SIDE // 2
    at = tuple(slice(SIDE + s - half, SIDE + s + half) for s in shift)
    if max(s.stop - s.start for s in box) > SIDE:
        return None
    return Patch(patient_of(case.id), crop(image, (i, j, k), SIDE)[0], own[at], (i, j, k))


def holes_of(case: Case, number: int) -> NDArray[np.bool_]:
    """Return lesion-shaped voxels of lesion-free tissue at places where lesions occur; `number` chooses them."""
    config, bank = config_like(case, "network"), read_bank()
    recipe = draw_recipe(case, config, rng_of(11, case.id, number))
    mask = np.zeros(case.shape, bool)
    for event in recipe.events:
        if event.site is not None:
            own, box = site_mask(event.site, bank, allowed_of(case, recipe.margin))
            mask[box] |= own
    return mask
