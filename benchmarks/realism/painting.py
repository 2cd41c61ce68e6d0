"""Painting: real lesions removed and painted again, and synthetic ones at drawn places, against the real ones."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.stats import ks_2samp

from synthlong.bank import read_bank
from synthlong.case import Case
from synthlong.hole import FLUID, soft_hole
from synthlong.lesions import find_lesions
from synthlong.placement import allowed_of, site_mask
from synthlong.prior import read_mask
from synthlong.profile import depth_in
from synthlong.recipe import draw_recipe, rng_of
from synthlong.synthesis import SynthesisConfig

from .material import Fold, Patch, real_lesions, repainted
from .measures import appearance

__all__ = [
    "PAINTERS",
    "beside_fluid",
    "distances",
    "measure_repainting",
    "places",
    "real_places",
    "repainted_lesions",
]

PAINTERS = ("network", "copypaste", "ellipsoid")


def measure_repainting(fold: Fold) -> list[dict[str, float]]:
    """Return error and looks of each real lesion painted again by its own profile, beside the real one's."""
    rows = []
    for case in fold.cases:
        for number, real in real_lesions(case):
            again = repainted(fold, case, number, own=True)
            wrong = np.abs(again.image - real.image)[soft_hole(real.mask) > 0.5].mean()
            looks = {"real": appearance(real), "again": appearance(again)}
            rows.append({"mae": float(wrong), **{f"{w} {k}": v for w, a in looks.items() for k, v in a.items()}})
    return rows


def repainted_lesions(fold: Fold) -> list[Patch]:
    """Return real lesions painted again by drawn profiles: nothing but the painter differs from the real ones."""
    return [repainted(fold, case, number, own=False) for case in fold.cases for number, _ in real_lesions(case)]


def distances(real: list[Patch], made: list[Patch]) -> dict[str, float]:
    """Return the KS distance of contrast, edge and texture, each patient by itself, averaged over the lesions."""
    found: dict[str, float] = {}
    patients = sorted({p.patient for p in real} & {p.patient for p in made})
    share = np.array([sum(p.patient == q for p in real) for q in patients], float)
    for name in ("contrast", "edge", "texture"):
        if not patients:
            found[name] = np.nan
            continue
        apart = [
            ks_2samp(*([appearance(p)[name] for p in group if p.patient == q] for group in (real, made))).statistic
            for q in patients
        ]
        found[name] = float((share * apart).sum() / share.sum())
    return found


def beside_fluid(patches: list[Patch]) -> float:
    """Return the share of lesions of which more than a twentieth of the voxels within 2 of the border are fluid."""
    touching = []
    for patch in patches:
        depth = depth_in(patch.mask)
        touching.append((patch.image[(depth < 0) & (depth > -2)] < FLUID).mean() > 0.05)
    return float(np.mean(touching)) if touching else np.nan


def places(cases: tuple[Case, ...], recipes: int) -> NDArray[np.float64]:
    """Return |x|, y, z in mm and log volume of the synthetic lesions that the default options draw."""
    rows, config, bank = [], SynthesisConfig(), read_bank()
    for case in cases:
        for k in range(recipes):
            for event in draw_recipe(case, config, rng_of(13, case.id, k)).events:
                if event.site is not None:
                    own, box = site_mask(event.site, bank, allowed_of(case, config.margin))
                    rows.append(_place(np.argwhere(own) + [b.start for b in box], case.affine))
    return np.array(rows)


def real_places(masks) -> NDArray[np.float64]:
    """Return the same of the lesions of mask files in MNI space."""
    from synthlong.atlas import mni_affine

    rows = []
    for path in masks:
        lesions = find_lesions(read_mask(path)[1] > 0, max_event_mm3=3000.0)
        for number, box in enumerate(lesions.boxes, start=1):
            if lesions.mutable[number - 1]:
                where = np.argwhere(lesions.labels[box] == number) + [b.start for b in box]
                rows.append(_place(where, mni_affine()))
    return np.array(rows)


def _place(where: NDArray, affine: NDArray) -> tuple[float, ...]:
    x, y, z = affine[:3, :3] @ where.mean(axis=0) + affine[:3, 3]
    return (abs(x), y, z, np.log(len(where)))
