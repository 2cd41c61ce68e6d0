"""What drawing and rendering need of a case beside its arrays: each worked out once, and kept in `Case.derived`."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from synthlong.atlas import MNI_VOXELS, lesion_prior, sample_map
from synthlong.boxes import box_of
from synthlong.case import Case
from synthlong.lesions import LesionMap, find_lesions
from synthlong.placement import PlacementMap, find_placements
from synthlong.profile import profiles_in, typical
from synthlong.protocol import AS_IT_IS, Tone, toned
from synthlong.synthesis import SynthesisConfig

__all__ = ["bounds_of", "histogram_of", "lesions_of", "placements_of", "profiles_of", "scaling_of"]

_GRAYS = 2000


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
        frequency, affine = lesion_prior(config.prior)
        frequency = sample_map(frequency, affine, case.shape, case.affine)
        places = find_placements(case, frequency, gray_matter=config.gray_matter, margin=config.margin)
        case.derived[key] = places
    return case.derived[key]


def bounds_of(case: Case) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return first and last + 1 voxel of the brain along each axis, worked out once."""
    if "bounds" not in case.derived:
        box = box_of(case.brain > 0, 0)
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
