"""Removal: lesion-free tissue with lesion-shaped holes, filled and compared with what was there."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from skimage.metrics import structural_similarity
from skimage.restoration import inpaint_biharmonic

from synthlong.boxes import box_of
from synthlong.hole import FLUID, hole_in
from synthlong.tissue import WHITE

from .material import Fold, Patch, holes_of
from .measures import neighbours

__all__ = ["measure_removal"]

_MARGIN = 8


def measure_removal(fold: Fold, rounds: int) -> tuple[list[dict[str, float | str]], list[tuple[Patch, Patch]]]:
    """Return a row for each hole and method, and (tissue, filled tissue) around each hole."""
    from synthlong.boxes import crop
    from synthlong.case import patient_of

    from .material import SIDE

    rows: list[dict[str, float | str]] = []
    patches = []
    for case in fold.cases:
        for number in range(rounds):
            mask = holes_of(case, number) & (case.lesions == 0) & (case.flair >= FLUID)
            weight = hole_in(case.flair, mask)
            fills = {
                "mean fill": fold.inpainter.fill(case.flair, mask, seed=number, grain=False),
                "final fill": fold.inpainter.fill(case.flair, mask, seed=number),
            }
            labels, _ = ndimage.label(weight > 0, np.ones((3, 3, 3)))
            for own, box in enumerate(ndimage.find_objects(labels), start=1):
                wide = tuple(slice(max(b.start - _MARGIN, 0), b.stop + _MARGIN) for b in box)
                hole = np.where(labels[wide] == own, weight[wide], 0)
                if (hole > 0.5).sum() < 20:
                    continue
                truth = case.flair[wide]
                shown = {name: np.where(hole > 0, fill[wide], truth) for name, fill in fills.items()}
                shown |= {"biharmonic": _biharmonic(truth, hole), "local mean": _local_mean(truth, hole)}
                shown["truth, smoothed"] = _mixed(truth, ndimage.gaussian_filter(truth, 1.0), hole)
                white = (case.tissue[wide][hole > 0.5] == WHITE).mean() > 0.95
                for name, fill in shown.items():
                    rows.append(
                        {"case": case.id, "method": name, "white": float(white), **_compared(fill, truth, hole)}
                    )
                middle = tuple((s.start + s.stop) // 2 for s in box)
                i, j, k = middle
                at, _ = crop((labels == own) & mask, middle, SIDE)
                pair = [
                    Patch(patient_of(case.id), crop(x, middle, SIDE)[0], at, (i, j, k))
                    for x in (case.flair, fills["final fill"])
                ]
                if at.sum() > 3:
                    patches.append((pair[0], pair[1]))
    return rows, patches


def _mixed(x: NDArray, fill: NDArray, hole: NDArray) -> NDArray:
    return np.where(hole > 0, x + hole * (fill - x), x)


def _biharmonic(x: NDArray, hole: NDArray) -> NDArray:
    box = box_of(hole > 0, 4)
    part = inpaint_biharmonic(x[box].astype(np.float64), hole[box] > 0)
    fill = x.copy()
    fill[box] = np.maximum(part, 0)
    return _mixed(x, fill, hole)


def _local_mean(x: NDArray, hole: NDArray) -> NDArray:
    rim = ndimage.binary_dilation(hole > 0, iterations=2) & (hole == 0) & (x >= FLUID)
    return _mixed(x, np.full_like(x, x[rim].mean() if rim.any() else 1.0), hole)


def _compared(fill: NDArray, truth: NDArray, hole: NDArray) -> dict[str, float]:
    """Return errors where the hole is more than half, texture where it is whole, the seam at its rim."""
    inside, whole = hole > 0.5, hole == 1
    wrong = (fill - truth)[inside]
    _, similar = structural_similarity(truth, fill, data_range=1.0, gaussian_weights=True, full=True)
    found = {"mae": float(np.abs(wrong).mean()), "mse": float((wrong**2).mean()), "ssim": float(similar[inside].mean())}
    for name, x in (("fill", fill), ("truth", truth)):
        rest = x - ndimage.gaussian_filter(x, 1.5)
        found[f"power {name}"] = float((rest[whole] ** 2).mean()) if whole.any() else np.nan
        for lag in (1, 2, 3):
            found[f"lag {lag} {name}"] = float(np.mean([neighbours(rest, whole, a, lag) for a in range(3)]))
        found[f"seam {name}"] = _steps_across(x, hole > 0)
    return found


def _steps_across(x: NDArray, inside: NDArray[np.bool_]) -> float:
    """Return the mean step between neighbours of which one lies in the hole, over tissue."""
    steps = []
    for axis in range(3):
        n = x.shape[axis]
        a, b = (np.take(x, range(s, n - 1 + s), axis) for s in (0, 1))
        p, q = (np.take(inside, range(s, n - 1 + s), axis) for s in (0, 1))
        steps.append(np.abs(a - b)[(p != q) & (a >= FLUID) & (b >= FLUID)])
    return float(np.concatenate(steps).mean())
