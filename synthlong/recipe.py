"""The recipe of a pair: the lesions of both visits, the box, the orientation, the artifacts. All randomness is here.

    Case, SynthesisConfig -> draw_recipe -> Recipe

A recipe is plain JSON; `pair.render` makes the pair of it, again and again the same.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from synthlong.atlas import MNI_VOXELS, lesion_prior, sample_map
from synthlong.case import Case
from synthlong.comparison import shapes_for
from synthlong.errors import ConfigError
from synthlong.hole import grown_box
from synthlong.lesions import SMALLEST_EVENT_MM3, LesionBank, LesionMap, core, find_lesions, grown, read_bank
from synthlong.placement import PlacementMap, Site, allowed_of, draw_site, find_placements
from synthlong.profile import Profile, draw_profile, profiles_in, typical
from synthlong.protocol import AS_IT_IS, Tone, toned
from synthlong.synthesis import SynthesisConfig

if TYPE_CHECKING:
    from synthlong.artifacts import RandomAcquisition

__all__ = ["Artifacts", "Box", "LesionEvent", "Orientation", "Recipe", "draw_orientation", "draw_recipe", "rng_of"]

VERSION = 3
_PLACEMENT_TRIES = 20
_FEWEST_PROFILES = 8
_FARTHEST_MM = 0.9
_BRIGHTER = (0.1, 0.8)
_GRAYS = 2000


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


@dataclass(frozen=True)
class Box:
    """The rendered cube.

    Args:
        start: First voxel on the case's grid; may lie beyond it (padded with background).
        size: Side in voxels.
        placed: "uniform" over the brain, or around an "event".
    """

    start: tuple[int, int, int]
    size: int
    placed: Literal["uniform", "event"]


@dataclass(frozen=True)
class Orientation:
    """An orthogonal orientation: axes permuted, then some reversed.

    Args:
        axes: Axis of the source for each axis of the result.
        flips: Whether each axis of the result is reversed.
    """

    axes: tuple[int, int, int] = (0, 1, 2)
    flips: tuple[bool, bool, bool] = (False, False, False)

    def apply(self, array: NDArray) -> NDArray:
        """Return the turned array, contiguous."""
        steps = tuple(slice(None, None, -1 if f else 1) for f in self.flips)
        return np.ascontiguousarray(array.transpose(self.axes)[steps])

    @property
    def inverse(self) -> Orientation:
        """The orientation that turns back."""
        i, j, k = (self.axes.index(a) for a in range(3))
        return Orientation((i, j, k), (self.flips[i], self.flips[j], self.flips[k]))

    def apply_affine(self, affine: NDArray[np.float64], shape: tuple[int, ...]) -> NDArray[np.float64]:
        """Return the affine of the turned array; `shape` is that before turning."""
        turn = np.zeros((4, 4))
        turn[3, 3] = 1
        for new, (old, flip) in enumerate(zip(self.axes, self.flips, strict=True)):
            turn[old, new] = -1 if flip else 1
            turn[old, 3] = shape[old] - 1 if flip else 0
        return affine @ turn


@dataclass(frozen=True)
class Artifacts:
    """What the acquisition did to each visit.

    Args:
        baseline: Steps of `artifacts.acquire`: name and parameters of each artifact, plain JSON; none = untouched.
        followup: The same for the follow-up.
        before_editing: Whether the scan has them already when its lesions are edited, on its whole grid. Else they
            come last, on the turned box, where "axial" is what its affine says.
    """

    baseline: tuple[Any, ...] = ()
    followup: tuple[Any, ...] = ()
    before_editing: bool = False

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> Artifacts:
        """Read what `dataclasses.asdict` gave."""
        return cls(tuple(plain["baseline"]), tuple(plain["followup"]), plain["before_editing"])


@dataclass(frozen=True)
class Recipe:
    """All that is needed, with the case, to render a pair.

    Args:
        case_id: The case.
        box: The rendered cube.
        events: Every lesion of both visits.
        orientation: Applied after the lesions, to both visits and all masks.
        scaling: Mean and SD of the scan on the MNI grid in the pair's intensities, at each visit, for z-scores;
            without flow and artifacts.
        origin_mm: MNI coordinates of the case's first voxel; its grid is RAS+ at 1 mm.
        max_event_mm3: Limit at which real lesions were split, which their numbers depend on.
        margin: Voxels kept free around real lesions, where synthetic ones are cut off.
        painter: Of the synthetic lesions; see `SynthesisConfig`. Its shapes are those that the sites count.
        artifacts: Acquisition artifacts of each visit.
        flow: Seed of each visit's bright fluid and how much brighter it is at most; 0: it has none. See `flow`.
        tones: Gray scale of each visit; see `protocol`.
        offset_mm: Translation of the baseline against the follow-up and the masks, along the case's axes; below 1.
        version: Of this format.
    """

    case_id: str
    box: Box
    events: tuple[LesionEvent, ...]
    orientation: Orientation = Orientation()
    scaling: tuple[tuple[float, float], tuple[float, float]] = ((0.0, 1.0), (0.0, 1.0))
    origin_mm: tuple[float, float, float] = (-91.0, -126.0, -72.0)
    max_event_mm3: float = 3000.0
    margin: int = 5
    painter: str = "network"
    artifacts: Artifacts = Artifacts()
    flow: tuple[tuple[int, float], tuple[int, float]] = ((0, 0.0), (0, 0.0))
    tones: tuple[Tone, Tone] = (AS_IT_IS, AS_IT_IS)
    offset_mm: tuple[float, float, float] = (0.0, 0.0, 0.0)
    version: int = field(default=VERSION)

    @property
    def affine(self) -> NDArray[np.float64]:
        """Affine `(4, 4)` of the box, turned with its voxels, to MNI millimetres."""
        box = np.eye(4)
        box[:3, 3] = np.array(self.origin_mm) + self.box.start
        return self.orientation.apply_affine(box, (self.box.size,) * 3)

    def to_json(self) -> str:
        """Return canonical JSON: sorted keys, no spaces, ASCII."""
        plain = {
            "artifacts": asdict(self.artifacts),
            "box": {"placed": self.box.placed, "size": self.box.size, "start": list(self.box.start)},
            "case": self.case_id,
            "events": [e.as_dict() for e in self.events],
            "flow": [list(f) for f in self.flow],
            "margin": self.margin,
            "max_event_mm3": self.max_event_mm3,
            "offset_mm": list(self.offset_mm),
            "origin_mm": list(self.origin_mm),
            "painter": self.painter,
            "orientation": {"axes": list(self.orientation.axes), "flips": list(self.orientation.flips)},
            "scaling": [list(s) for s in self.scaling],
            "tones": [list(t) for t in self.tones],
            "version": self.version,
        }
        return json.dumps(plain, sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        """Read what `to_json` wrote.

        Raises:
            ConfigError: Not a recipe, or of a newer version.
        """
        try:
            plain = json.loads(text)
            if plain["version"] > VERSION:
                raise ConfigError(f"recipe version {plain['version']}: update synthlong, this one reads {VERSION}")
            box, turn = plain["box"], plain["orientation"]
            (mean0, sd0), (mean1, sd1) = plain["scaling"]
            x, y, z = plain.get("offset_mm", (0.0, 0.0, 0.0))
            (seed0, bright0), (seed1, bright1) = plain.get("flow", ((0, 0.0), (0, 0.0)))
            (contrast0, gamma0), (contrast1, gamma1) = plain.get("tones", (AS_IT_IS, AS_IT_IS))
            return cls(
                case_id=plain["case"],
                box=Box((box["start"][0], box["start"][1], box["start"][2]), box["size"], box["placed"]),
                events=tuple(LesionEvent.from_dict(e) for e in plain["events"]),
                orientation=Orientation(tuple(turn["axes"]), tuple(turn["flips"])),
                scaling=((mean0, sd0), (mean1, sd1)),
                origin_mm=(plain["origin_mm"][0], plain["origin_mm"][1], plain["origin_mm"][2]),
                max_event_mm3=plain["max_event_mm3"],
                margin=plain["margin"],
                painter=plain["painter"],
                artifacts=Artifacts.from_dict(plain["artifacts"]),
                flow=((seed0, bright0), (seed1, bright1)),
                tones=((contrast0, gamma0), (contrast1, gamma1)),
                offset_mm=(x, y, z),
                version=plain["version"],
            )
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise ConfigError(f"not a recipe of synthlong ({type(error).__name__}: {error})") from error


def rng_of(seed: int, case_id: str, k: int) -> np.random.Generator:
    """Return the generator of pair k: any worker on any machine draws the same recipe from it."""
    key = int.from_bytes(hashlib.sha256(case_id.encode()).digest()[:8], "little")
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(key, k)))


def lesions_of(case: Case, max_event_mm3: float) -> LesionMap:
    """Return the case's numbered lesions, worked out once."""
    key = ("lesions", float(max_event_mm3))
    if key not in case.derived:
        case.derived[key] = find_lesions(case.lesions, max_event_mm3=max_event_mm3)
    return case.derived[key]


def profiles_of(case: Case, max_event_mm3: float) -> NDArray[np.float32]:
    """Return the profiles of the case's typical lesions, worked out once; see `profile`."""
    key = ("profiles", float(max_event_mm3))
    if key not in case.derived:
        lesions = lesions_of(case, max_event_mm3)
        case.derived[key] = profiles_in(case.flair, lesions)[typical(lesions)]
    return case.derived[key]


def placements_of(case: Case, config: SynthesisConfig) -> PlacementMap:
    """Return where synthetic lesions of the case may lie, worked out once."""
    key = ("placements", config.prior, config.gray_matter, config.margin)
    if key not in case.derived:
        frequency, affine = lesion_prior(Path(config.prior) if config.prior else None)
        frequency = sample_map(frequency, affine, case.shape, case.affine)
        places = find_placements(case, frequency, gray_matter=config.gray_matter, margin=config.margin)
        case.derived[key] = places
    return case.derived[key]


def draw_recipe(case: Case, config: SynthesisConfig, rng: np.random.Generator) -> Recipe:
    """Draw the recipe of one pair.

    Args:
        case: The case.
        config: How pairs are drawn.
        rng: Source of all randomness; see `rng_of`.
    """
    bank = read_bank(Path(config.lesion_bank) if config.lesion_bank else None)
    lesions = lesions_of(case, config.max_event_mm3)
    wanted = _draw_counts(rng, config)
    events = _draw_real(rng, config, lesions, wanted)
    masks: list[_Placed | None] = [None] * len(events)
    for event, placed in _draw_synthetic(rng, config, case, bank, wanted):
        events.append(event)
        masks.append(placed)
    recipe = Recipe(
        case_id=case.id,
        box=_draw_box(rng, config, case, lesions, events, masks),
        events=tuple(events),
        orientation=draw_orientation(rng, config.orientations),
        origin_mm=(float(case.affine[0, 3]), float(case.affine[1, 3]), float(case.affine[2, 3])),
        max_event_mm3=float(config.max_event_mm3),
        margin=config.margin,
        painter=config.painter,
        artifacts=_draw_artifacts(rng, config),
        offset_mm=_draw_offset(rng, config),
        flow=(_draw_flow(rng, config), _draw_flow(rng, config)),
        tones=(_draw_tone(rng, config), _draw_tone(rng, config)),
    )
    return replace(recipe, scaling=(scaling_of(case, recipe.tones[0]), scaling_of(case, recipe.tones[1])))


_Placed = tuple[NDArray[np.bool_], tuple[slice, ...]]
_AT = {"new": (0.0, 1.0), "vanished": (1.0, 0.0), "stable": (1.0, 1.0)}


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
) -> list[tuple[LesionEvent, _Placed]]:
    """Draw the synthetic lesions, each clear of all others."""
    if not any(wanted.values()):
        return []
    places = placements_of(case, config)
    profiles = profiles_of(case, config.max_event_mm3)
    if len(profiles) < _FEWEST_PROFILES:
        profiles = np.concatenate([profiles, bank.profiles])
    bank = shapes_for(config.painter, case, lesions_of(case, config.max_event_mm3), bank)
    allowed = allowed_of(case, config.margin)
    taken = np.zeros(allowed.shape, bool)
    drawn: list[tuple[LesionEvent, _Placed]] = []
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


def _take(taken: NDArray[np.bool_], mask: NDArray[np.bool_], box: tuple[slice, ...], margin: int) -> None:
    """Mark a lesion and its surroundings as taken."""
    wide = tuple(
        slice(max(b.start - margin, 0), min(b.stop + margin, n)) for b, n in zip(box, taken.shape, strict=True)
    )
    pad = [(b.start - w.start, w.stop - b.stop) for b, w in zip(box, wide, strict=True)]
    taken[wide] |= grown(np.pad(mask, pad), margin)


def _draw_box(
    rng: np.random.Generator,
    config: SynthesisConfig,
    case: Case,
    lesions: LesionMap,
    events: list[LesionEvent],
    masks: list[_Placed | None],
) -> Box:
    """Draw the cube: around a voxel of an event, or anywhere over the brain."""
    size = config.box
    eventful = [n for n, e in enumerate(events) if e.kind == "new"]
    eventful = eventful or [n for n, e in enumerate(events) if e.kind not in ("stable", "removed")]
    eventful = eventful or [n for n, e in enumerate(events) if e.kind == "stable"]
    around = rng.random() < config.around_events and bool(eventful)
    if around:
        n = eventful[int(rng.integers(len(eventful)))]
        placed = masks[n]
        if placed is None:
            number = events[n].lesion
            assert number is not None
            box = lesions.boxes[number - 1]
            placed = (lesions.labels[box] == number, box)
        where = np.argwhere(placed[0]) + [b.start for b in placed[1]]
        inset = min(size // 8, 8)
        start = where[int(rng.integers(len(where)))] - rng.integers(inset, size - inset, 3)
    else:
        low, high = bounds_of(case)
        last = np.maximum(high - size, low)
        start = rng.integers(low, last + 1)
    fixed = [
        int(np.clip(s, 0, n - size)) if n >= size else (n - size) // 2 for s, n in zip(start, case.shape, strict=True)
    ]
    return Box((fixed[0], fixed[1], fixed[2]), size, "event" if around else "uniform")


def bounds_of(case: Case) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return first and last + 1 voxel of the brain along each axis, worked out once."""
    if "bounds" not in case.derived:
        box = grown_box(case.brain > 0, 0)
        case.derived["bounds"] = (np.array([b.start for b in box]), np.array([b.stop for b in box]))
    return case.derived["bounds"]


def scaling_of(case: Case, tone: Tone = AS_IT_IS) -> tuple[float, float]:
    """Return mean and SD of the scan on the MNI grid in a gray scale; the few lesion voxels do not move them."""
    grays, share = histogram_of(case)
    shown = toned(grays, tone).astype(np.float64)
    mean = float(shown @ share)
    sd = float(np.sqrt((shown - mean) ** 2 @ share + mean**2 * (1 - share.sum())))  # the rest is background
    return float(f"{mean:.6g}"), float(f"{sd:.6g}")


def histogram_of(case: Case) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Return the intensities above 0 in narrow bins, and how much of the MNI grid is in each, worked out once."""
    if "histogram" not in case.derived:
        brain = case.flair[case.flair > 0]
        counts, edges = np.histogram(brain, _GRAYS)
        total, _ = np.histogram(brain, edges, weights=brain.astype(np.float64))
        full = counts > 0
        share = counts[full] / max(MNI_VOXELS, len(brain))
        case.derived["histogram"] = (total[full] / counts[full]).astype(np.float32), share
    return case.derived["histogram"]


def draw_orientation(rng: np.random.Generator, among: str) -> Orientation:
    """Draw an orientation among "all" 48, by "mirror" only (left-right), or "none"."""
    if among == "none":
        return Orientation()
    if among == "mirror":
        return Orientation(flips=(bool(rng.random() < 0.5), False, False))
    i, j, k = (int(a) for a in rng.permutation(3))
    a, b, c = (bool(f) for f in rng.random(3) < 0.5)
    return Orientation((i, j, k), (a, b, c))


def _draw_artifacts(rng: np.random.Generator, config: SynthesisConfig) -> Artifacts:
    """Draw each visit's own acquisition."""
    if config.artifacts == "none":
        return Artifacts()
    before = config.artifacts == "before_editing"
    acquisition = _acquisition("kamraoui" if before else config.artifacts)
    first, last = (tuple(acquisition.draw_params(rng)["steps"]) for _ in range(2))
    return Artifacts(first, last, before)


def _draw_offset(rng: np.random.Generator, config: SynthesisConfig) -> tuple[float, float, float]:
    """Draw the residual misregistration."""
    if not config.registration_sd_mm:
        return 0.0, 0.0, 0.0
    x, y, z = np.clip(config.registration_sd_mm * rng.standard_normal(3), -_FARTHEST_MM, _FARTHEST_MM).round(3)
    return float(x), float(y), float(z)


def _draw_flow(rng: np.random.Generator, config: SynthesisConfig) -> tuple[int, float]:
    """Draw the bright fluid of a visit."""
    if not config.flow_share or rng.random() >= config.flow_share:
        return 0, 0.0
    return int(rng.integers(2**31)), round(float(rng.uniform(*_BRIGHTER)), 3)


def _draw_tone(rng: np.random.Generator, config: SynthesisConfig) -> Tone:
    """Draw the gray scale of a visit."""
    if not config.protocol_spread:
        return AS_IT_IS
    contrast, gamma = np.exp(rng.uniform(-config.protocol_spread, config.protocol_spread, 2)).round(4)
    return float(contrast), float(gamma)


@lru_cache(maxsize=4)
def _acquisition(preset: Any) -> RandomAcquisition:
    from synthlong.artifacts import RandomAcquisition

    return RandomAcquisition(preset)
