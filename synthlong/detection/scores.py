"""Lesion scores of the MSSEG-2 challenge: one predicted mask of new lesions against the truth.

Voxels are scored as they are. Lesions are 6-connected components of more than 3 mm3, numbered by decreasing size.
One counts as detected where more than 10 % of it is covered by lesions of the other mask, and those that cover it,
taken from the largest overlap down to 65 % of what is covered, each lie at most 70 % outside all lesions of its mask.
SensL is the share of true lesions detected by predicted ones, PPVL the share of predicted lesions detected by true
ones. Commowick et al. (2018), Objective evaluation of multiple sclerosis lesion segmentation using a data management
and processing infrastructure, doi 10.1038/s41598-018-31911-7. Limits and ties are those of the challenge's program;
its average surface distance carries a running minimum from point to point, ours does not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage

from synthlong.boxes import box_of
from synthlong.detection.distance import distance_mm

__all__ = ["KEYS", "LesionScores", "lesion_scores"]

KEYS = (
    *("Jaccard", "Dice", "Sensitivity", "Specificity", "PPV", "NPV", "RelativeVolumeError"),
    *("HausdorffDistance", "ContourMeanDistance", "SurfaceDistance"),
    *("PPVL", "SensL", "F1_score", "NbTestedLesions", "VolTestedLesions"),
)
"""The challenge's names, in its order."""

_LARGEST_DROPPED_MM3 = 3.0
_COVERED, _REACHED, _OUTSIDE = 0.10, 0.65, 0.70


@dataclass(frozen=True)
class LesionScores:
    """Scores of one patient: the last two if there are no true lesions, else all others; None where not computed.

    Args:
        jaccard: Overlap of voxels, intersection over union.
        dice: Overlap of voxels, intersection over mean size.
        sensitivity: Share of true lesion voxels that are predicted.
        specificity: Share of true background voxels that are predicted as such.
        ppv: Share of predicted lesion voxels that are true; nan if none is predicted.
        npv: Share of predicted background voxels that are true.
        relative_volume_error: Of the predicted volume, in percent of the true one.
        hausdorff_mm: Largest distance from a lesion voxel of one mask to the nearest of the other. As the next two,
            nan if nothing is predicted.
        contour_mean_mm: Mean distance from one mask's contour voxels to the other's contour, the larger of the two.
        surface_mm: Mean of that distance over the voxels of both contours.
        lesion_ppv: PPVL; 0 if no lesion of more than 3 mm3 is predicted.
        lesion_sensitivity: SensL; nan if no true lesion has more than 3 mm3.
        lesion_f1: Harmonic mean of these two; 0 if both are 0 or one is nan.
        tested_lesions: Number of predicted lesions of more than 3 mm3.
        tested_volume_mm3: Their volume.
    """

    jaccard: float | None = None
    dice: float | None = None
    sensitivity: float | None = None
    specificity: float | None = None
    ppv: float | None = None
    npv: float | None = None
    relative_volume_error: float | None = None
    hausdorff_mm: float | None = None
    contour_mean_mm: float | None = None
    surface_mm: float | None = None
    lesion_ppv: float | None = None
    lesion_sensitivity: float | None = None
    lesion_f1: float | None = None
    tested_lesions: int | None = None
    tested_volume_mm3: float | None = None

    def as_dict(self) -> dict[str, float | None]:
        """Return the scores under the challenge's names, in its order."""
        return dict(zip(KEYS, astuple(self), strict=True))


def lesion_scores(truth: ArrayLike, prediction: ArrayLike, spacing_mm: Sequence[float]) -> LesionScores:
    """Score a predicted lesion mask.

    Args:
        truth: True lesions, shape `(I, J, K)`, numbers or booleans, not 0 in a lesion. A mask without background is
            taken as empty, as the challenge does.
        prediction: Predicted lesions on the same grid.
        spacing_mm: Voxel sizes along the three axes, positive; rounded to float32, as a NIfTI header holds them.

    Raises:
        ValueError: The masks are not 3-D, differ in shape or hold NaN, or the spacing is not three positive numbers.
    """
    truth, prediction = _checked_mask(truth, "truth"), _checked_mask(prediction, "prediction")
    if truth.shape != prediction.shape:
        raise ValueError(f"truth has shape {truth.shape}, prediction {prediction.shape}: resample one like the other")
    spacing = _checked_spacing(spacing_mm)
    voxel_mm3 = float(spacing[0] * spacing[1] * spacing[2])
    fewest = math.floor(_LARGEST_DROPPED_MM3 / voxel_mm3) + 1
    either = truth | prediction
    voxels = either.size
    if either.any():
        box = box_of(either, 1)
        truth, prediction = truth[box], prediction[box]
    predicted, predicted_sizes = _number_lesions(prediction, fewest)
    if not truth.any():
        volume_mm3 = int(predicted_sizes.sum()) * voxel_mm3
        return LesionScores(tested_lesions=len(predicted_sizes), tested_volume_mm3=volume_mm3)
    true, true_sizes = _number_lesions(truth, fewest)
    n_true, n_predicted, hits = (int(np.count_nonzero(mask)) for mask in (truth, prediction, truth & prediction))
    background = voxels - n_true - n_predicted + hits
    jaccard = hits / (n_true + n_predicted - hits)
    distances_mm = _distances_mm(truth, prediction, spacing) if n_predicted else (math.nan,) * 3
    sensitivity, ppv = _detected_shares(true, true_sizes, predicted, predicted_sizes)
    return LesionScores(
        jaccard=jaccard,
        dice=2 * jaccard / (1 + jaccard),
        sensitivity=hits / n_true,
        specificity=background / (voxels - n_true),
        ppv=hits / n_predicted if n_predicted else math.nan,
        npv=background / (voxels - n_predicted),
        relative_volume_error=100 * (n_predicted - n_true) / n_true,
        hausdorff_mm=distances_mm[0],
        contour_mean_mm=distances_mm[1],
        surface_mm=distances_mm[2],
        lesion_ppv=ppv,
        lesion_sensitivity=sensitivity,
        lesion_f1=2 * ppv * sensitivity / (ppv + sensitivity) if ppv + sensitivity > 0 else 0.0,
    )


def _checked_mask(array: ArrayLike, name: str) -> NDArray[np.bool_]:
    array = np.asarray(array)
    if array.ndim != 3 or array.dtype.kind not in "biuf":
        raise ValueError(f"{name} must be 3-D, numbers or booleans, not {array.ndim}-D {array.dtype}")
    if array.dtype.kind == "f" and np.isnan(array).any():
        raise ValueError(f"{name} holds NaN: replace it, for example by 0")
    mask: NDArray[np.bool_] = array != 0
    return np.zeros_like(mask) if mask.all() else mask


def _checked_spacing(spacing_mm: Sequence[float]) -> NDArray[np.float64]:
    with np.errstate(all="ignore"):
        spacing = np.asarray(spacing_mm, np.float64).astype(np.float32)
    if spacing.shape != (3,) or not (np.isfinite(spacing) & (spacing > 0)).all():
        raise ValueError(f"spacing_mm must be three positive numbers, not {spacing_mm}")
    return spacing.astype(np.float64)


def _number_lesions(mask: NDArray[np.bool_], fewest: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Label the 6-connected components of `fewest` voxels or more, 1 the largest; return their sizes too.

    Of equal size, that one comes first whose first voxel does, the first axis running fastest.
    """
    labels, n = ndimage.label(mask)
    flat = labels.ravel(order="F")
    inside = np.flatnonzero(flat)[::-1]
    first = np.zeros(n + 1, np.int64)
    first[flat[inside]] = inside  # the last assignment stays
    sizes = np.bincount(flat[inside], minlength=n + 1)
    order = np.lexsort((first, -sizes))
    order = order[sizes[order] >= fewest]
    number = np.zeros(n + 1, np.int64)
    number[order] = np.arange(1, len(order) + 1)
    return number[labels], sizes[order]


def _detected_shares(
    true: NDArray[np.int64], true_sizes: NDArray, predicted: NDArray[np.int64], predicted_sizes: NDArray
) -> tuple[float, float]:
    """Return SensL and PPVL."""
    both = (true > 0) & (predicted > 0)
    pairs, overlap = np.unique(true[both] * (len(predicted_sizes) + 1) + predicted[both], return_counts=True)
    i, j = np.divmod(pairs, len(predicted_sizes) + 1)
    found = _count_detected(i - 1, j - 1, overlap, true_sizes, predicted_sizes)
    real = _count_detected(j - 1, i - 1, overlap, predicted_sizes, true_sizes)
    return (
        found / len(true_sizes) if len(true_sizes) else math.nan,
        real / len(predicted_sizes) if len(predicted_sizes) else 0.0,
    )


def _count_detected(i: NDArray, j: NDArray, overlap: NDArray, sizes: NDArray, other_sizes: NDArray) -> int:
    """Count the lesions of one mask that those of the other detect.

    Args:
        i: Lesion of the one mask, from 0, for each pair of lesions that meet.
        j: Lesion of the other mask, likewise.
        overlap: Their common voxels.
        sizes: Voxels of each lesion of the one mask.
        other_sizes: Voxels of each lesion of the other.
    """
    covered = np.bincount(i, overlap, len(sizes))
    outside = (other_sizes - np.bincount(j, overlap, len(other_sizes))) / other_sizes
    detected = covered / sizes > _COVERED
    reached = np.zeros(len(sizes))
    for pair in np.lexsort((j, -overlap, i)):
        lesion = i[pair]
        if reached[lesion] < _REACHED:
            detected[lesion] &= outside[j[pair]] <= _OUTSIDE
            reached[lesion] += overlap[pair] / covered[lesion]
    return int(np.count_nonzero(detected))


def _distances_mm(
    truth: NDArray[np.bool_], prediction: NDArray[np.bool_], spacing: NDArray[np.float64]
) -> tuple[float, float, float]:
    """Return the Hausdorff, the contour mean and the average symmetric surface distance."""
    farthest, along = [], []
    one, two = (truth, _contour(truth)), (prediction, _contour(prediction))
    for (mask, contour), (other, other_contour) in ((one, two), (two, one)):
        distance = distance_mm(other_contour, spacing)
        farthest.append(float(distance.max(where=mask & ~other, initial=0)))
        along.append(distance[contour])
    return max(farthest), max(float(a.mean()) for a in along), float(np.concatenate(along).mean())


def _contour(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return the voxels with background beside a face; beyond the array there is none."""
    inner = mask.copy()
    for axis in range(3):
        whole, kept = np.moveaxis(mask, axis, 0), np.moveaxis(inner, axis, 0)
        kept[1:] &= whole[:-1]
        kept[:-1] &= whole[1:]
    return mask & ~inner
