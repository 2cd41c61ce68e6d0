"""A case: one patient's FLAIR scan with its lesion mask, in one array convention.

    NIfTI -> read_case -> Case

MNI152 space, RAS+, 1 mm; intensities scaled so that the mode over brain tissue (no lesion, no CSF) is 1 and
the background is 0. What a user hands in is checked here, in `nifti`, `grid`, `looks` and `mask`.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from synthlong.errors import InputError, InputWarning, short
from synthlong.grid import SMALLEST_SIDE_MM, WorkingGrid
from synthlong.hole import FLUID
from synthlong.looks import check_looks
from synthlong.mask import WRONG_MASK, check_binary, check_csf, check_labels, check_mask, clip_to_brain, read_beside
from synthlong.nifti import Volume, read_nifti, sidecar_of
from synthlong.resampling import Native
from synthlong.tissue import CSF, classify_tissue, fitted_tissue_maps

__all__ = [
    "BRAIN_MODE",
    "MOST_NEGATIVE",
    "Case",
    "background_of",
    "mode_as_source",
    "mode_of",
    "patient_of",
    "read_case",
    "read_lesions",
    "stated_mode",
]

BRAIN_MODE = "BrainMode"
"""Key of the JSON beside a FLAIR that states the mode of its brain tissue, in the scan's own units."""

MOST_NEGATIVE = 0.01
"""Share of a scan's voxels that may be negative by interpolation; with more it was z-scored."""

_BRIGHTEST = 300.0  # beyond that it is damage; and float16, in which pairs are stored, ends at 65504
_KNOT_GRID = 4096
_MOST_CORNERS = 6
_VISIT = re.compile("_(?:ses|run|acq|rec|ce|dir|echo|part)-")


@dataclass(frozen=True, eq=False)
class Case:
    """A scan with its lesions, in MNI152 space, RAS+ at 1 mm; all arrays have one shape `(I, J, K)`.

    Args:
        id: Subject.
        flair: float32, brain mode 1, background 0.
        lesions: uint8, 1 in a lesion.
        brain: uint8, 1 in the brain.
        tissue: uint8, 0 background, 1 CSF, 2 gray matter, 3 white matter.
        affine: `(4, 4)`, voxel to MNI millimetres.
        healthy: float32, `flair` without its lesions, or None before inpainting.
        healthy_file: Where `healthy` may lie; see `inpainting.heal`.
        native: Grid of the scan before `synthlong prepare`, and the way there; None if it was not prepared.
        scan_mean: Mean of the scan over its whole grid, in its own units.
        scan_sd: Standard deviation of the scan over its whole grid, in its own units.
        sources: SHA-256 of each file that was read, by role; and the `BrainMode` that was stated, if so.
        derived: Results worked out from the arrays, by the parameters they depend on.
    """

    id: str
    flair: NDArray[np.float32]
    lesions: NDArray[np.uint8]
    brain: NDArray[np.uint8]
    tissue: NDArray[np.uint8]
    affine: NDArray[np.float64]
    healthy: NDArray[np.float32] | None = None
    healthy_file: Path | None = None
    native: Native | None = None
    scan_mean: float = 0.0
    scan_sd: float = 1.0
    sources: dict[str, str] = field(default_factory=dict)
    derived: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("lesions", "brain", "tissue", "healthy"):
            array = getattr(self, name)
            if array is not None and array.shape != self.flair.shape:
                raise ValueError(f"{name} has shape {array.shape}, flair {self.flair.shape}")

    @property
    def shape(self) -> tuple[int, int, int]:
        """Grid size in voxels."""
        i, j, k = self.flair.shape
        return i, j, k


def read_case(
    flair: str | Path,
    mask: str | Path | None = None,
    *,
    subject: str | None = None,
    brain: str | Path | None = None,
    tissue: str | Path | None = None,
    prefer: str | None = None,
) -> Case:
    """Read a FLAIR scan, and its lesion mask if there is one, in MNI152 space, any orientation and voxel size.

    Where a JSON beside the FLAIR states its `BrainMode`, as `synthlong export` writes it, intensities are divided by
    that: what artifacts did to a visit's gray scale stays.

    Args:
        flair: FLAIR, NIfTI. Skull-stripped: without `brain`, its non-zero voxels are the brain.
        mask: Lesion mask on the same grid: zero, and one other value; None: no lesion is known.
        subject: Case id; default: the file name up to its first `_`, without `sub-`.
        brain: Brain mask on the same grid.
        tissue: Labels on the same grid (0 background, 1 CSF, 2 GM, 3 WM); default: ICBM maps and the scan.
        prefer: "sform" or "qform" where the two disagree.

    Raises:
        InputError: A file that cannot be used; the message names it, the problem and the way out.
    """
    flair = Path(flair)
    image = read_nifti(flair, prefer=prefer)
    lesion = None if mask is None else read_beside(Path(mask), image, prefer=prefer)
    if lesion is not None:
        check_mask(lesion, image)
    others = {"brain": brain, "tissue": tissue}
    extra = {
        role: read_beside(Path(path), image, prefer=prefer, allow_empty=False)
        for role, path in others.items()
        if path is not None
    }
    grid = WorkingGrid.of(image)
    raw = image.data
    if "brain" not in extra and (background := background_of(image)):
        text = f"its background is {background:.4g}, taken for 0"
        warnings.warn(f"{short(flair)}: {text}", InputWarning, stacklevel=2)
        raw = raw - np.float32(background)
    brain_mask = extra["brain"].data != 0 if "brain" in extra else raw != 0
    if "brain" in extra:
        check_binary(extra["brain"])
        if lesion is not None and np.array_equal(brain_mask, lesion.data != 0):
            raise InputError(lesion.path, "the lesion mask is the brain mask", WRONG_MASK)
    labels = None
    if "tissue" in extra:
        check_labels(extra["tissue"])
        check_csf(extra["tissue"], image)
        labels = grid.resample_labels(extra["tissue"].data)
    inside = np.zeros_like(brain_mask) if lesion is None else clip_to_brain(lesion, brain_mask)
    scan_mean, scan_sd = float(raw.mean(dtype=np.float64)), float(raw.std(dtype=np.float64))
    stated = mode = stated_mode(flair)
    clean = _without_negatives(raw, brain_mask, flair) if mode is None else np.where(brain_mask, np.maximum(raw, 0), 0)
    values = grid.resample(clean)
    brain_mask, inside = grid.resample_mask(brain_mask), grid.carry_lesions(inside)
    inside &= brain_mask
    values = np.where(brain_mask, np.maximum(values, 0), 0).astype(np.float32)
    if brain_mask.sum() < SMALLEST_SIDE_MM**3 // 4:
        problem = f"only {brain_mask.sum()} mm3 of brain"
        raise InputError(flair, problem, "pass the whole brain, or a larger box of it")
    if np.median(values[brain_mask]) == 0:
        raise InputError(flair, "it is 0 in most of the brain mask", "check the brain mask")
    maps = fitted_tissue_maps(brain_mask, grid.affine)
    check_looks(flair, values, brain_mask, maps, grid.affine)
    if labels is None:
        labels = classify_tissue(values, brain_mask, inside, maps)
    labels = np.where(brain_mask, labels, 0).astype(np.uint8)
    tissue_values = values[brain_mask & ~inside & (labels != CSF)]
    if tissue_values.size < 1000 or tissue_values.min() == tissue_values.max():
        problem = "too little brain tissue outside lesions and CSF"
        raise InputError(flair, problem, "check the brain mask and the labels")
    if mode is None:
        mode = mode_of(tissue_values)
    if mode < 0.1 * tissue_values.mean(dtype=np.float64):
        raise InputError(flair, "much of its brain tissue is 0", "check the brain mask and the labels")
    values /= np.float32(mode)
    if (most := float(values.max())) > _BRIGHTEST:
        problem = f"its brightest voxel is {most:.3g} times the mode of the brain"
        raise InputError(flair, problem, f"check the scan, or clip it at {_BRIGHTEST:g} times the mode")
    if "tissue" not in extra:  # thin sulci, too dark to be tissue whatever their surroundings say
        labels[brain_mask & ~inside & (values < FLUID)] = CSF
    if lesion is not None:
        _warn_empty(lesion, inside)
    read = {"flair": image, **({} if lesion is None else {"mask": lesion}), **extra}
    return Case(
        id=subject if subject is not None else _subject_of(flair),
        flair=values,
        lesions=inside.astype(np.uint8),
        brain=brain_mask.astype(np.uint8),
        tissue=labels,
        affine=grid.affine,
        scan_mean=scan_mean,
        scan_sd=scan_sd,
        sources={**{role: volume.sha256 for role, volume in read.items()}, **mode_as_source(stated)},
    )


def read_lesions(mask: Path, flair: Path, *, prefer: str | None = None) -> NDArray[np.uint8]:
    """Read a lesion mask by itself: the lesions of `read_case(flair, mask)`, and none is an answer, too.

    Args:
        mask: Lesion mask on the grid of `flair`.
        flair: Skull-stripped FLAIR, NIfTI; its non-zero voxels are the brain.
        prefer: "sform" or "qform" where the two disagree.

    Raises:
        InputError: A file that cannot be used.
    """
    image = read_nifti(flair, prefer=prefer)
    lesion = read_beside(mask, image, prefer=prefer)
    check_mask(lesion, image)
    grid, brain = WorkingGrid.of(image), image.data != background_of(image)
    inside = grid.carry_lesions(clip_to_brain(lesion, brain)) & grid.resample_mask(brain)
    return inside.astype(np.uint8)


def _warn_empty(mask: Volume, inside: NDArray[np.bool_]) -> None:
    if not inside.any():
        text = "no lesion in the mask: only synthetic lesions will change"
        warnings.warn(f"{short(mask.path)}: {text}", InputWarning, stacklevel=3)


def background_of(scan: Volume) -> float:
    """Return a scan's background: another value than 0 after z-scoring, or after rounding to whole numbers."""
    corners = scan.data[np.ix_(*[[0, n - 1] for n in scan.data.shape])]
    values, counts = np.unique(corners, return_counts=True)
    return float(values[counts.argmax()]) if counts.max() >= _MOST_CORNERS else 0.0


def _without_negatives(raw: NDArray, brain: NDArray[np.bool_], path: Path) -> NDArray[np.float32]:
    """Shift z-scored scans to start at 0; clip a few negative voxels."""
    inside = raw[brain]
    negative = int((inside < 0).sum())
    shift = 0.0
    if negative > MOST_NEGATIVE * inside.size:
        shift = float(np.percentile(inside, 0.5))
        text = f"{negative / inside.size:.0%} of the brain is negative; shifted by {-shift:.4g}"
        warnings.warn(f"{short(path)}: {text}", InputWarning, stacklevel=3)
    elif negative:
        warnings.warn(f"{short(path)}: {negative} negative voxels set to 0", InputWarning, stacklevel=3)
    return np.where(brain, np.maximum(raw - shift, 0), 0).astype(np.float32)


def mode_as_source(mode: float | None) -> dict[str, str]:
    """Return what `Case.sources` has of a stated mode: it decides the case as the files do."""
    return {} if mode is None else {BRAIN_MODE: repr(mode)}


def stated_mode(path: Path) -> float | None:
    """Return the mode of brain tissue that the JSON beside a scan states, in the scan's units; None if it does not."""
    try:
        mode = json.loads(sidecar_of(path).read_bytes()).get(BRAIN_MODE)
    except (OSError, ValueError, AttributeError):
        return None
    return float(mode) if isinstance(mode, (int, float)) and 0 < mode < math.inf else None


def mode_of(values: NDArray[np.float32]) -> float:
    """Return the mode by a Gaussian kernel density estimate (Silverman's bandwidth, on a fine grid)."""
    low, high = np.percentile(values, (0.1, 99.9))
    counts, edges = np.histogram(values, bins=_KNOT_GRID, range=(float(low), float(high)))
    sd = float(values.std(dtype=np.float64))
    bandwidth = 0.9 * (min(sd, np.subtract(*np.percentile(values, (75, 25))) / 1.349) or sd) * values.size**-0.2
    sigma = bandwidth / (edges[1] - edges[0])
    density = ndimage.gaussian_filter1d(counts.astype(float), sigma, mode="constant")
    best = int(density.argmax())
    return float(edges[best] + edges[best + 1]) / 2


def patient_of(case_id: str) -> str:
    """Return a case's patient: its id without session, run, or how it was acquired, in BIDS' words."""
    return _VISIT.split(case_id)[0]


def _subject_of(path: Path) -> str:
    return path.name.split("_")[0].split(".")[0].removeprefix("sub-")
