"""A pair: two visits of one patient, rendered from a recipe, with exactly known changes.

    Case, Recipe -> render -> Pair

Each visit starts from the healthy brain and gets back the lesions that it has: a real one from the scan's own
voxels, a synthetic one from the painter; then fluid may become brighter in places, the baseline be translated by what
a registration leaves, and each get a gray scale of its own; both are turned, and last each goes through its own
acquisition. No randomness: the same case and recipe give the same pair.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from synthlong.bank import LesionBank, read_bank
from synthlong.boxes import Region, box_at, crop, on_grid, overlap, widened, within
from synthlong.case import Case
from synthlong.comparison import CopyPainter, EllipsoidPainter, donor_of, shapes_for
from synthlong.derived import lesions_of
from synthlong.errors import InputError
from synthlong.event import LesionEvent
from synthlong.flow import flow_field, flow_weight
from synthlong.frame import Frame, acquired
from synthlong.hole import REACH, faded, soft_hole
from synthlong.lesions import LesionMap, core
from synthlong.networks import default_precision
from synthlong.painting import LesionPainter
from synthlong.placement import allowed_of, site_mask
from synthlong.profile import Profile
from synthlong.protocol import toned
from synthlong.recipe import Recipe
from synthlong.resampling import shifted
from synthlong.tissue import GRAY

__all__ = ["ENLARGED", "NEW", "SHRUNK", "STABLE", "VANISHED", "Painter", "Pair", "painter_of", "render"]

STABLE, NEW, VANISHED, ENLARGED, SHRUNK = 1, 2, 3, 4, 5

_CONTEXTS = (32, 48, 64)
_CONTEXT_MARGIN = 6
_PROTECTED = 1.5
_PAD = REACH + 2


class Painter(Protocol):
    """What paints a synthetic lesion into a box of a scan; see `LesionPainter.paint`."""

    def paint(
        self, x: NDArray, mask: NDArray, *, seed: int, profile: Profile, donor: NDArray | None = None
    ) -> NDArray[np.float32]:
        """Return the box with its lesion."""


@dataclass(frozen=True, eq=False)
class Pair:
    """Two visits and the truth, all of one shape `(I, J, K)`.

    Args:
        baseline: float32, brain mode 1, background 0.
        followup: float32.
        new_lesions: uint8, 1 = lesion voxel at follow-up of a lesion absent at baseline.
        evolution: uint8, 0 none, 1 stable, 2 new, 3 vanished, 4 enlarged part, 5 shrunk part.
        lesions_baseline: uint8, all lesions at baseline.
        lesions_followup: uint8, all lesions at follow-up.
        affine: `(4, 4)`, voxel to MNI millimetres; turns with the voxels.
        recipe: What it was rendered from.
    """

    baseline: NDArray[np.float32]
    followup: NDArray[np.float32]
    new_lesions: NDArray[np.uint8]
    evolution: NDArray[np.uint8]
    lesions_baseline: NDArray[np.uint8]
    lesions_followup: NDArray[np.uint8]
    affine: NDArray[np.float64]
    recipe: Recipe


def render(
    case: Case,
    recipe: Recipe,
    *,
    painter: Painter | None = None,
    bank: LesionBank | None = None,
    whole: bool = False,
) -> Pair:
    """Render a pair.

    Away from lesions that change (more than `hole.REACH` voxels) both visits are equal bit for bit before artifacts,
    flow, offset and gray scales. The masks lie where the follow-up's lesions do.

    Args:
        case: The recipe's case, with its healthy volume.
        recipe: What to render.
        painter: Paints synthetic lesions; None: the recipe's, for the network with the shipped weights.
        bank: Lesion shapes; None: the shipped ones.
        whole: Render the case's whole grid instead of the recipe's box; orientations that would change the
            grid's shape are left out.

    Raises:
        InputError: The case is not the recipe's, or its healthy volume is missing.
    """
    if case.id != recipe.case_id:
        raise InputError(case.id, f"the recipe is for case '{recipe.case_id}'", "render it with that case")
    if case.healthy is None:
        raise InputError(case.id, "its healthy volume is missing", "make it with `inpainting.heal(case, inpainter)`")
    artifacts, frame = recipe.artifacts, Frame.of(case, recipe, whole=whole)
    steps = (artifacts.baseline, artifacts.followup)
    scans = [_Scan(case.flair, case.healthy)] * 2
    if artifacts.before_editing:
        scans = [_Scan(*(acquired(x, s, case.affine) for x in scan)) for scan, s in zip(scans, steps, strict=True)]
        steps = ((), ())
    scene = _Scene(case, scans, frame.wide)
    lesions = lesions_of(case, recipe.max_event_mm3)
    scene.put_back_real(lesions, recipe.events)
    synthetic = [e for e in recipe.events if e.source == "synthetic"]
    shapes = shapes_for(recipe.painter, case, lesions, bank or read_bank()) if synthetic else None
    for event in synthetic:
        assert shapes is not None
        copied = lesions if recipe.painter == "copypaste" else None
        scene.add_synthetic(
            event, allowed_of(case, recipe.margin), painter or painter_of(recipe.painter), shapes, copied
        )
    scene.brighten_fluid(recipe.flow)
    (first, last), evolution = scene.visits, scene.evolution
    if any(recipe.offset_mm):
        first = shifted(first, recipe.offset_mm)
    brain = case.brain[frame.wide] > 0
    first, last = (toned(v, tone, brain | (v > 0)) for v, tone in zip((first, last), recipe.tones, strict=True))
    return Pair(
        baseline=frame.acquire(first, steps[0], visit=0),
        followup=frame.acquire(last, steps[1], visit=1),
        new_lesions=frame.cut((evolution == NEW).astype(np.uint8)),
        evolution=frame.cut(evolution),
        lesions_baseline=frame.cut(scene.lesions[0].astype(np.uint8)),
        lesions_followup=frame.cut(scene.lesions[1].astype(np.uint8)),
        affine=frame.affine,
        recipe=recipe,
    )


class _Scan(NamedTuple):
    """What a visit is edited from, with and without the lesions."""

    flair: NDArray[np.float32]
    healthy: NDArray[np.float32]


class _Scene:
    """The part of both visits that lies in a region of the case's grid."""

    def __init__(self, case: Case, scans: list[_Scan], region: Region) -> None:
        self.case, self.scans, self.region = case, scans, region
        shape = tuple(r.stop - r.start for r in region)
        self.visits = [np.array(scan.flair[region], np.float32) for scan in scans]
        self.lesions = [np.zeros(shape, bool) for _ in range(2)]
        self.evolution = np.zeros(shape, np.uint8)

    def _record(
        self, before: NDArray[np.bool_], after: NDArray[np.bool_], event: LesionEvent, at: tuple[Region, Region]
    ) -> None:
        """Write one lesion's voxels (arrays of one box, `at` = where it meets the region) into the masks."""
        mine, theirs = at
        before, after = before[theirs], after[theirs]
        self.lesions[0][mine] |= before
        self.lesions[1][mine] |= after
        code = self.evolution[mine]
        code[before & after] = STABLE
        code[after & ~before] = NEW if event.kind == "new" else ENLARGED
        code[before & ~after] = VANISHED if event.kind == "vanished" else SHRUNK

    def put_back_real(self, lesions: LesionMap, events: tuple[LesionEvent, ...]) -> None:
        """Leave each visit the scan's own voxels but for the lesions that it lacks: healthy ones there."""
        case = self.case
        real = {e.lesion: e for e in events if e.source == "real"}
        if real.keys() != set(range(1, len(lesions) + 1)):
            problem = f"it has {len(lesions)} lesions, the recipe speaks of {len(real)}"
            raise InputError(case.id, problem, "render the scan and mask that the recipe was drawn from")
        wide = on_grid(widened(self.region, _PAD), case.shape)
        labels = lesions.labels[wide]
        if not labels.any():
            return
        present = [labels > 0, labels > 0]
        for number in np.unique(labels[labels > 0]):
            event, box = real[int(number)], lesions.boxes[int(number) - 1]
            own = lesions.labels[box] == number
            extents = [core(own, share) for share in (event.at_baseline, event.at_followup)]
            meet = _meet(box, wide)
            if meet:
                for visit, extent in zip(present, extents, strict=True):
                    visit[meet[0]] &= ~(own & ~extent)[meet[1]]
            meet = _meet(box, self.region)
            if meet:
                self._record(extents[0], extents[1], event, meet)
        shown = within(self.region, wide)
        hole = soft_hole(labels > 0)[shown]
        for image, scan, kept in zip(self.visits, self.scans, present, strict=True):
            removed = (labels > 0) & ~kept
            if removed.any():  # a neighbour that is removed does not eat into a lesion that stays
                weight = soft_hole(removed) * (1 - faded(kept, full=0, zero=_PROTECTED))
                image[...] = _mix(image, scan.healthy[self.region], weight[shown] / np.maximum(hole, 1e-6))

    def add_synthetic(
        self,
        event: LesionEvent,
        allowed: NDArray[np.bool_],
        painter: Painter,
        bank: LesionBank,
        copied: LesionMap | None,
    ) -> None:
        """Paint a synthetic lesion where it meets the region; `copied`: the lesions that its donor is one of."""
        assert event.site is not None
        assert event.seed is not None
        assert event.profile is not None
        widest = int(bank.extents[event.site.shape].max()) + REACH
        if not overlap(widened(box_at(event.site.centre, (0, 0, 0)), widest), self.region):
            return
        mask, box = site_mask(event.site, bank, allowed)
        if not overlap(widened(box, REACH), self.region):
            return
        extents = [core(mask, share) for share in (event.at_baseline, event.at_followup)]
        at = _meet(box, self.region)
        if at:
            self._record(extents[0], extents[1], event, at)
        side = next((c for c in _CONTEXTS if max(mask.shape) + 2 * _CONTEXT_MARGIN <= c), max(mask.shape) + 16)
        centre = tuple((b.start + b.stop) // 2 for b in box)
        matter, start = crop(self.case.tissue, centre, side)
        context_box = box_at(start, matter.shape)
        meet = _meet(context_box, self.region)
        wholes = [np.zeros(matter.shape, bool) for _ in extents]
        for whole, extent in zip(wholes, extents, strict=True):
            whole[within(box, context_box)] = extent
        if not meet or not (wholes[0] | wholes[1]).any():
            return
        mine, theirs = meet
        donor = donor_of(self.case, copied, event.site, bank, start, side) if copied else None
        look: dict[str, Any] = {"seed": event.seed, "profile": event.profile, "donor": donor}
        large = max(wholes, key=np.count_nonzero)
        hole = soft_hole(large)
        near = (hole > 0) & (matter >= GRAY)  # a lesion ends where CSF begins
        painted: dict[int, NDArray[np.float32]] = {}
        for visit, scan, whole in zip(self.visits, self.scans, wholes, strict=True):
            if not whole.any():
                continue
            context, _ = crop(scan.healthy, centre, side)
            if id(scan) not in painted:  # the same for both visits where they are edited from one scan
                painted[id(scan)] = painter.paint(context, large, **look)
            shown = painted[id(scan)]
            lost = large & ~whole
            if lost.any():  # painted anew near its smaller border only: farther inside both visits are equal
                smaller = painter.paint(context, whole, **look)
                shown = _mix(shown, smaller, soft_hole(lost) / np.maximum(hole, 1e-6))
            visit[mine] = np.where(near[theirs], shown[theirs], visit[mine])

    def brighten_fluid(self, flow: tuple[tuple[int, float], tuple[int, float]]) -> None:
        """Make each visit's fluid brighter in places, but for its lesions."""
        if not any(brighter for _, brighter in flow):
            return
        weight = flow_weight(self.case, self.region)
        for visit, lesions, (seed, brighter) in zip(self.visits, self.lesions, flow, strict=True):
            if brighter:
                beside = weight * (1 - faded(lesions, full=0, zero=_PROTECTED))
                visit += brighter * beside * flow_field(self.case.shape, self.region, seed=seed)


def _meet(box: Region, region: Region) -> tuple[Region, Region] | None:
    """Return what two boxes share as it lies in the region and in the box, None if that is nothing."""
    both = overlap(box, region)
    return (within(both, region), within(both, box)) if both else None


def _mix(a: NDArray, b: NDArray, share: NDArray) -> NDArray[np.float32]:
    """Return `a` where the share is 0, `b` where it is 1, bit for bit, and what lies between elsewhere."""
    return np.where(share == 1, b, a + share * (b - a))


@lru_cache(maxsize=3)
def painter_of(name: str) -> Painter:
    """Return the painter of that name, the network with the shipped weights."""
    if name != "network":
        return CopyPainter() if name == "copypaste" else EllipsoidPainter()
    return LesionPainter.read(precision=default_precision())
