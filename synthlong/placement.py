"""Where a synthetic lesion may lie, and which shape it has there.

A lesion's centre is drawn with probability lesion prior x tissue x surroundings: white matter counts fully, gray
matter less, CSF, background and the neighbourhood of existing lesions not at all (Kamraoui et al. 2022, section 2.3);
the surroundings are weighed as in `surroundings_weight`.
Its shape is a real one of about the wanted volume, found nearby in some patient, cut off where it would leave
the tissue. A shape that does not fit is drawn again, its centre is not, so the places follow the map.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from synthlong.bank import LesionBank, Shape
from synthlong.boxes import Region, box_at, box_of, on_grid, within
from synthlong.case import Case
from synthlong.errors import InputError
from synthlong.hole import FLUID, soft_hole
from synthlong.lesions import SMALLEST_EVENT_MM3, grown
from synthlong.tissue import GRAY, WHITE

__all__ = [
    "PlacementMap",
    "Site",
    "allowed_of",
    "draw_site",
    "find_placements",
    "shape_at",
    "site_mask",
    "surroundings_weight",
    "tissue_weight",
]

_LOG_VOLUME_SD = 0.2
_DISTANCE_SD_MM = 15.0
_SHAPES_TRIED = 8
_KEPT_ENOUGH = 0.7
_USUAL_PULL, _STRONGEST_PULL = 0.2, 1.5


@dataclass(frozen=True, eq=False)
class PlacementMap:
    """Where centres of synthetic lesions may lie.

    Args:
        voxels: int32 `(n,)`, flat indices into the case's grid.
        cumulative: float64 `(n,)`, cumulative probability.
    """

    voxels: NDArray[np.int32]
    cumulative: NDArray[np.float64]


@dataclass(frozen=True)
class Site:
    """One placed shape.

    Args:
        shape: Index into the lesion bank.
        mirrored: Whether its mirror image is taken.
        centre: Voxel of the case's grid where its deepest voxel lies.
    """

    shape: int
    mirrored: bool
    centre: tuple[int, int, int]


def tissue_weight(tissue: NDArray[np.uint8], gray_matter: float) -> NDArray[np.float32]:
    """Return 1 in white matter, `gray_matter` in gray matter, 0 elsewhere."""
    return np.where(tissue == WHITE, 1, np.where(tissue == GRAY, gray_matter, 0)).astype(np.float32)


def surroundings_weight(case: Case) -> NDArray[np.float32]:
    """Return how much more often lesions lie in such surroundings than the prior and the tissue say.

        exp(7 x fluid around - 6 x fluid beside + 8 x (tissue near by - tissue farther off))

    Fluid is its share under Gaussians of SD 6 and 1.5 voxels, tissue the mean of its voxels under Gaussians of SD 2 and
    5, brain mode 1, without existing lesions and their edges. The prior knows where ventricles usually are, this where
    they are here; most lesions do not touch them; and lesions lie where white matter is bright already. The exponent
    is that of a logistic regression (`docs/realism.md`), about its mean, within [-1.5, 1.5].

    Args:
        case: The case.
    """
    weight = np.zeros(case.shape, np.float32)
    box = box_of(case.brain > 0, 0)
    brain, flair = case.brain[box] > 0, case.flair[box]
    counts = (brain & (flair >= FLUID) & (soft_hole(case.lesions[box]) == 0)).astype(np.float32)

    def around(x: NDArray, sd: float) -> NDArray[np.float32]:
        return ndimage.gaussian_filter(np.asarray(x, np.float32), sd, truncate=2.5, mode="nearest")

    near, far = (around(counts * flair, sd) / np.maximum(around(counts, sd), 1e-3) for sd in (2, 5))
    fluid = ~brain | (case.tissue[box] < GRAY)
    pull = 7 * around(fluid, 6) - 6 * around(fluid, 1.5) + 8 * (near - far) - _USUAL_PULL
    weight[box] = np.exp(np.clip(pull, -_STRONGEST_PULL, _STRONGEST_PULL)) * brain
    return weight


def allowed_of(case: Case, margin: int) -> NDArray[np.bool_]:
    """Return where synthetic lesions may lie, worked out once: gray and white matter clear of lesions.

    Args:
        case: The case.
        margin: Voxels kept free around the case's own lesions.
    """
    key = ("allowed", margin)
    if key not in case.derived:
        case.derived[key] = (case.brain > 0) & (case.tissue >= GRAY) & ~grown(case.lesions, margin)
    return case.derived[key]


def find_placements(case: Case, frequency: NDArray[np.float32], *, gray_matter: float, margin: int) -> PlacementMap:
    """Work out where synthetic lesions of a case may lie.

    Args:
        case: The case.
        frequency: Lesion prior on the case's grid.
        gray_matter: Weight of gray matter beside white matter's 1, in [0, 1].
        margin: Voxels kept free around the case's own lesions.

    Raises:
        InputError: No place is left.
    """
    weight = frequency * tissue_weight(case.tissue, gray_matter) * allowed_of(case, margin)
    weight *= surroundings_weight(case)
    voxels = np.flatnonzero(weight).astype(np.int32)
    if not voxels.size:
        raise InputError(case.id, "no place for a synthetic lesion", "check that the scan lies in MNI152 space")
    total = np.cumsum(weight.ravel()[voxels], dtype=np.float64)
    return PlacementMap(voxels, total / total[-1])


def draw_site(
    rng: np.random.Generator,
    places: PlacementMap,
    allowed: NDArray[np.bool_],
    taken: NDArray[np.bool_],
    bank: LesionBank,
    affine: NDArray[np.float64],
    *,
    volume_mm3: float,
) -> tuple[Site, NDArray[np.bool_], Region] | None:
    """Draw a centre, then a shape for it; None if the centre's surroundings are taken already.

    Args:
        rng: Source of randomness.
        places: Where centres may lie.
        allowed: Voxels that lesions may cover, `(I, J, K)`; a shape is cut off elsewhere.
        taken: Voxels too near to synthetic lesions placed before; a shape that reaches one is not used.
        bank: Shapes.
        affine: Of the case's grid.
        volume_mm3: Wanted volume.

    Returns:
        The site, its voxels within their bounding box, and that box.
    """
    drawn = int(np.searchsorted(places.cumulative, rng.random(), side="right"))
    flat = places.voxels[min(drawn, places.voxels.size - 1)]
    i, j, k = (int(c) for c in np.unravel_index(int(flat), allowed.shape))
    if taken[i, j, k]:
        return None
    at_mm = affine[:3, :3] @ (i, j, k) + affine[:3, 3]
    side = np.where(np.sign(bank.centres_mm[:, 0]) * np.sign(at_mm[0]) < 0, -1, 1)
    apart = bank.centres_mm * np.stack([side, np.ones_like(side), np.ones_like(side)], axis=1) - at_mm
    score = -0.5 * ((bank.log_volumes - np.log(volume_mm3)) / _LOG_VOLUME_SD) ** 2
    score -= 0.5 * (apart**2).sum(axis=1) / _DISTANCE_SD_MM**2
    cumulative = np.cumsum(np.exp(score - score.max()))
    best: tuple[float, Site, NDArray[np.bool_], Region] | None = None
    for _ in range(_SHAPES_TRIED):
        index = int(np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right"))
        index = min(index, len(bank) - 1)
        site = Site(index, bool(side[index] < 0), (i, j, k))
        mask, box = site_mask(site, bank, allowed)
        kept = mask.sum() / float(bank.volumes_mm3[index])
        fits = mask.sum() > SMALLEST_EVENT_MM3 and not (mask & taken[box]).any()
        if fits and (best is None or kept > best[0]):
            best = (kept, site, mask, box)
        if best is not None and best[0] >= _KEPT_ENOUGH:
            break
    return best[1:] if best else None


def site_mask(site: Site, bank: LesionBank, allowed: NDArray[np.bool_]) -> tuple[NDArray[np.bool_], Region]:
    """Return the voxels of a placed shape that lie in allowed tissue and hang together with its centre.

    By their faces: by corners they would reach across fissures.

    Returns:
        bool array within a box of the case's grid, and that box.
    """
    voxels, start = shape_at(site, bank)
    placed = box_at(start, voxels.shape)
    box = on_grid(placed, allowed.shape)
    parts, _ = ndimage.label(voxels[within(box, placed)] & allowed[box])
    own = parts[tuple(c - b.start for c, b in zip(site.centre, box, strict=True))]
    return (parts == own) & (own > 0), box


def shape_at(site: Site, bank: LesionBank) -> tuple[NDArray[np.bool_], list[int]]:
    """Return a placed shape, not cut off, and where on the case's grid its first voxel lies."""
    shape: Shape = bank[site.shape]
    voxels = (shape.mirrored() if site.mirrored else shape).voxels
    depth = ndimage.distance_transform_edt(np.pad(voxels, 1))[1:-1, 1:-1, 1:-1]
    anchor = np.unravel_index(int(depth.argmax()), voxels.shape)
    return voxels, [int(c - a) for c, a in zip(site.centre, anchor, strict=True)]
