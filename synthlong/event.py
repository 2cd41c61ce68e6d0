"""The lesions of both visits: what each is made of, how much of it each visit shows, and which a pair has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from synthlong.bank import LesionBank, read_bank
from synthlong.boxes import Region, on_grid, widened
from synthlong.case import Case
from synthlong.comparison import shapes_for
from synthlong.derived import lesions_of, placements_of, profiles_of
from synthlong.lesions import SMALLEST_EVENT_MM3, LesionMap, core, grown
from synthlong.placement import Site, allowed_of, draw_site
from synthlong.profile import Profile, draw_profile, visible
from synthlong.synthesis import SynthesisConfig

__all__ = ["LesionEvent", "Placed", "draw_events"]

Placed = tuple[NDArray[np.bool_], Region]
"""A lesion's voxels in a box of the case's grid, and the box."""

_PLACEMENT_TRIES = 20
_FEWEST_PROFILES = 8
_AT = {"new": (0.0, 1.0), "vanished": (1.0, 0.0), "stable": (1.0, 1.0)}


@dataclass(frozen=True)
class LesionEvent:
    """One lesion over both visits.

    Args:
        source: "real": a lesion of the case; "synthetic": a placed shape of the bank.
        at_baseline: Share of its voxels present at baseline, the inner ones: 0 absent, 1 whole.
        at_followup: Share present at follow-up.
        voxels: Its voxels at baseline and at follow-up.
        lesion: Number of the real lesion.
        site: Place and shape of the synthetic one.
        seed: Seed of the synthetic one's noise.
        profile: The synthetic one's contrast by depth; see `profile`.
    """

    source: Literal["real", "synthetic"]
    at_baseline: float = 1.0
    at_followup: float = 1.0
    voxels: tuple[int, int] = (0, 0)
    lesion: int | None = None
    site: Site | None = None
    seed: int | None = None
    profile: Profile | None = None

    @property
    def kind(self) -> str:
        """One of "new", "vanished", "enlarging", "shrinking", "stable", "removed"."""
        before, after = self.at_baseline, self.at_followup
        if before == after:
            return "stable" if before else "removed"
        if not before or not after:
            return "vanished" if before else "new"
        return "enlarging" if after > before else "shrinking"

    def as_dict(self) -> dict[str, Any]:
        """Return plain JSON."""
        plain: dict[str, Any] = {"at": [self.at_baseline, self.at_followup], "voxels": list(self.voxels)}
        if self.source == "real":
            return {"lesion": self.lesion, **plain}
        assert self.site is not None
        assert self.profile is not None
        shape = {"shape": self.site.shape, "mirrored": self.site.mirrored, "centre": list(self.site.centre)}
        return {**shape, "seed": self.seed, "profile": list(self.profile.row), **plain}

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> LesionEvent:
        """Read what `as_dict` gave."""
        before, after = plain["at"]
        first, last = plain["voxels"]
        common: dict[str, Any] = {"at_baseline": before, "at_followup": after, "voxels": (first, last)}
        if "lesion" in plain:
            return cls("real", lesion=plain["lesion"], **common)
        i, j, k = plain["centre"]
        site, profile = Site(plain["shape"], plain["mirrored"], (i, j, k)), Profile.from_row(plain["profile"])
        return cls("synthetic", site=site, seed=plain["seed"], profile=profile, **common)


def draw_events(
    rng: np.random.Generator, config: SynthesisConfig, case: Case, lesions: LesionMap
) -> tuple[list[LesionEvent], list[Placed | None]]:
    """Draw every lesion of a pair: the case's own, then synthetic ones, these with where they lie.

    Args:
        rng: Source of all randomness.
        config: How pairs are drawn.
        case: The case.
        lesions: Its own.
    """
    wanted = _draw_counts(rng, config)
    events = _draw_real(rng, config, lesions, wanted)
    masks: list[Placed | None] = [None] * len(events)
    bank = read_bank(config.lesion_bank)
    for event, placed in _draw_synthetic(rng, config, case, bank, wanted):
        events.append(event)
        masks.append(placed)
    return events, masks


def _draw_counts(rng: np.random.Generator, config: SynthesisConfig) -> dict[str, int]:
    """Draw how many lesions of each kind the pair has beside the unchanged real ones."""
    new = 0
    if rng.random() < config.with_new_lesions:
        new = min(int(rng.geometric(1 / config.new_mean)), config.new_max)
    means = {
        "vanished": config.vanished_mean,
        "enlarging": config.enlarging_mean,
        "shrinking": config.shrinking_mean,
        "stable": config.stable_mean,
    }
    return {"new": new, **{kind: int(rng.poisson(mean)) for kind, mean in means.items()}}


def _draw_extent(rng: np.random.Generator, config: SynthesisConfig, kind: str) -> tuple[float, float]:
    """Draw the shares of a lesion present at baseline and at follow-up."""
    if kind in _AT:
        return _AT[kind]
    small = round(float(rng.uniform(*config.core_share)), 3)
    return (small, 1.0) if kind == "enlarging" else (1.0, small)


def _draw_real(
    rng: np.random.Generator, config: SynthesisConfig, lesions: LesionMap, wanted: dict[str, int]
) -> list[LesionEvent]:
    """Draw the fate of every real lesion, and take those that change off the wanted ones."""
    free = list(rng.permutation(np.flatnonzero(lesions.mutable)))
    fates: dict[int, tuple[float, float]] = {}
    for kind in ("new", "vanished", "enlarging", "shrinking"):
        taken = min(int(rng.binomial(wanted[kind], config.real_share)), len(free))
        wanted[kind] -= taken
        for _ in range(taken):
            fates[int(free.pop())] = _draw_extent(rng, config, kind)
    removed = rng.random(len(lesions)) < config.removed_share
    events = []
    for n in range(len(lesions)):
        gone = removed[n] and lesions.volumes_mm3[n] <= config.max_event_mm3
        at = fates.get(n, (0.0, 0.0) if gone else (1.0, 1.0))
        own = lesions.labels[lesions.boxes[n]] == n + 1 if 0 < min(at) < 1 else None
        whole = int(lesions.volumes_mm3[n])
        voxels = (_extent(own, whole, at[0]), _extent(own, whole, at[1]))
        events.append(LesionEvent("real", *at, voxels, lesion=n + 1))
    return events


def _extent(own: NDArray[np.bool_] | None, whole: int, share: float) -> int:
    return int(core(own, share).sum()) if own is not None else round(whole * share)


def _draw_synthetic(
    rng: np.random.Generator, config: SynthesisConfig, case: Case, bank: LesionBank, wanted: dict[str, int]
) -> list[tuple[LesionEvent, Placed]]:
    """Draw the synthetic lesions, each clear of all others."""
    if not any(wanted.values()):
        return []
    places = placements_of(case, config)
    profiles = visible(profiles_of(case, config.max_event_mm3))
    if len(profiles) < _FEWEST_PROFILES:
        profiles = np.concatenate([profiles, visible(bank.profiles)])
    bank = shapes_for(config.painter, case, lesions_of(case, config.max_event_mm3), bank)
    allowed = allowed_of(case, config.margin)
    taken = np.zeros(allowed.shape, bool)
    drawn: list[tuple[LesionEvent, Placed]] = []
    for kind in (k for k, n in wanted.items() for _ in range(n)):
        at = _draw_extent(rng, config, kind)
        volume = config.volume_median_mm3 * np.exp(config.volume_log_sd * rng.standard_normal())
        volume = float(np.clip(volume, SMALLEST_EVENT_MM3 + 1, config.max_event_mm3))
        for _ in range(_PLACEMENT_TRIES):
            found = draw_site(rng, places, allowed, taken, bank, case.affine, volume_mm3=volume)
            if found:
                break
        else:
            continue  # the brain is full of lesions: one fewer
        site, mask, box = found
        voxels = (int(core(mask, at[0]).sum()), int(core(mask, at[1]).sum()))
        seed = int(rng.integers(2**31))
        profile = draw_profile(rng, profiles, volume_mm3=float(mask.sum()), contrast=config.contrast)
        drawn.append((LesionEvent("synthetic", *at, voxels, site=site, seed=seed, profile=profile), (mask, box)))
        _take(taken, mask, box, config.margin)
    return drawn


def _take(taken: NDArray[np.bool_], mask: NDArray[np.bool_], box: Region, margin: int) -> None:
    """Mark a lesion and its surroundings as taken."""
    wide = on_grid(widened(box, margin), taken.shape)
    pad = [(b.start - w.start, w.stop - b.stop) for b, w in zip(box, wide, strict=True)]
    taken[wide] |= grown(np.pad(mask, pad), margin)
