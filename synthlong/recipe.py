"""The recipe of a pair: the lesions of both visits, the box, the orientation, the artifacts. All randomness is here.

    Case, SynthesisConfig -> draw_recipe -> Recipe

A recipe is plain JSON; `pair.render` makes the pair of it, again and again the same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from synthlong.case import Case
from synthlong.derived import bounds_of, lesions_of, scaling_of
from synthlong.errors import ConfigError
from synthlong.event import LesionEvent, Placed, draw_events
from synthlong.lesions import LesionMap
from synthlong.orientation import AS_IT_LIES, Orientation, draw_orientation
from synthlong.protocol import AS_IT_IS, Tone
from synthlong.synthesis import SynthesisConfig

if TYPE_CHECKING:
    from synthlong.artifacts import RandomAcquisition

__all__ = ["Artifacts", "Box", "Recipe", "affine_of", "draw_recipe", "rng_of"]

VERSION = 3
_FARTHEST_MM = 0.9
_BRIGHTER = (0.1, 0.8)


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
    orientation: Orientation = AS_IT_LIES
    scaling: tuple[tuple[float, float], tuple[float, float]] = ((0.0, 1.0), (0.0, 1.0))
    origin_mm: tuple[float, float, float] = (-91.0, -126.0, -72.0)
    max_event_mm3: float = 3000.0
    margin: int = 5
    painter: str = "network"
    artifacts: Artifacts = Artifacts()
    flow: tuple[tuple[int, float], tuple[int, float]] = ((0, 0.0), (0, 0.0))
    tones: tuple[Tone, Tone] = (AS_IT_IS, AS_IT_IS)
    offset_mm: tuple[float, float, float] = (0.0, 0.0, 0.0)
    version: int = VERSION

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
        with _refusal():
            plain = _read(text)
            (mean0, sd0), (mean1, sd1) = plain["scaling"]
            x, y, z = plain.get("offset_mm", (0.0, 0.0, 0.0))
            (seed0, bright0), (seed1, bright1) = plain.get("flow", ((0, 0.0), (0, 0.0)))
            (contrast0, gamma0), (contrast1, gamma1) = plain.get("tones", (AS_IT_IS, AS_IT_IS))
            return cls(
                case_id=plain["case"],
                **_place(plain),
                events=tuple(LesionEvent.from_dict(e) for e in plain["events"]),
                scaling=((mean0, sd0), (mean1, sd1)),
                max_event_mm3=plain["max_event_mm3"],
                margin=plain["margin"],
                painter=plain["painter"],
                artifacts=Artifacts.from_dict(plain["artifacts"]),
                flow=((seed0, bright0), (seed1, bright1)),
                tones=((contrast0, gamma0), (contrast1, gamma1)),
                offset_mm=(x, y, z),
                version=plain["version"],
            )


def affine_of(text: str) -> NDArray[np.float64]:
    """Return `Recipe.from_json(text).affine` without reading the events.

    Raises:
        ConfigError: Not a recipe, or of a newer version.
    """
    with _refusal():
        return Recipe("", events=(), **_place(_read(text))).affine


def _read(text: str) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(text)
    if plain["version"] > VERSION:
        raise ConfigError(f"recipe version {plain['version']}: update synthlong, this one reads {VERSION}")
    return plain


def _place(plain: dict[str, Any]) -> dict[str, Any]:
    """Return where a box lies and how it is turned."""
    box, turn = plain["box"], plain["orientation"]
    return {
        "box": Box((box["start"][0], box["start"][1], box["start"][2]), box["size"], box["placed"]),
        "orientation": Orientation(tuple(turn["axes"]), tuple(turn["flips"])),
        "origin_mm": (plain["origin_mm"][0], plain["origin_mm"][1], plain["origin_mm"][2]),
    }


@contextmanager
def _refusal() -> Iterator[None]:
    """Say of what does not fit that it is no recipe."""
    try:
        yield
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ConfigError(f"not a recipe of synthlong ({type(error).__name__}: {error})") from error


def rng_of(seed: int, case_id: str, k: int) -> np.random.Generator:
    """Return the generator of a pair: any worker on any machine draws the same recipe from it.

    Args:
        seed: Of the run, 0 or more.
        case_id: The pair's case.
        k: Number of the pair in the run, from 0 on.
    """
    key = int.from_bytes(hashlib.sha256(case_id.encode()).digest()[:8], "little")
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(key, k)))


def draw_recipe(case: Case, config: SynthesisConfig, rng: np.random.Generator) -> Recipe:
    """Draw the recipe of one pair.

    Args:
        case: The case.
        config: How pairs are drawn.
        rng: Source of all randomness; see `rng_of`.

    Raises:
        InputError: The case has no place for a synthetic lesion; the config's prior or lesion bank cannot be used.
    """
    lesions = lesions_of(case, config.max_event_mm3)
    events, masks = draw_events(rng, config, case, lesions)
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


def _draw_box(
    rng: np.random.Generator,
    config: SynthesisConfig,
    case: Case,
    lesions: LesionMap,
    events: list[LesionEvent],
    masks: list[Placed | None],
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
