"""Detectors on real pairs of scans with masks of the new lesions, beside thresholded subtraction.

    synthlong prepare scans.csv -o cases
    python benchmarks/real_pairs.py cases/pairs.csv --weights concat.safetensors siamese.safetensors a.st+b.st

Files joined by `+` are an ensemble. Subtraction gets what no method may have: for each pair the threshold that suits
it best by the mean of Dice and lesion F1. Differences of visits with brain mode 1 are smoothed (Gaussian, SD 1.5
voxels), 4 voxels at the brain's border and lesions of 3 mm3 or less are left out: the best of 0.5, 1, 1.5 and of 0, 2,
4 on the pairs of `lo01` and `lo03`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from synthlong.case import Case
from synthlong.detection.inference import detect, read_detectors
from synthlong.detection.scores import LesionScores, lesion_scores
from synthlong.detection.visits import read_pair
from synthlong.manifest import manifest_rows
from synthlong.training.patches import PAIR

_SCORES = ("Dice", "F1_score", "SensL", "PPVL", "Sensitivity", "PPV", "NbTestedLesions", "VolTestedLesions")
_THRESHOLDS = np.arange(0.05, 1.0, 0.025)
_SMOOTHING, _BORDER = 1.5, 4


def read_pairs(manifest: Path) -> Iterator[tuple[str, Case, Case]]:
    """Yield each pair; the follow-up's lesions are the new ones."""
    for subject, _, paths in manifest_rows(manifest, needed=PAIR, optional=()):
        yield subject, *read_pair(**paths, subject=subject)


def subtracted(baseline: Case, followup: Case) -> tuple[float, LesionScores]:
    """Return the best threshold of the difference, and its scores."""
    difference = ndimage.gaussian_filter(followup.flair - baseline.flair, _SMOOTHING)
    brain = ndimage.binary_erosion((baseline.brain & followup.brain) > 0, iterations=_BORDER)
    difference[~brain] = 0
    scores = {float(threshold): scored(followup, without_specks(difference > threshold)) for threshold in _THRESHOLDS}
    best = max(scores, key=lambda threshold: goodness(scores[threshold]))
    return best, scores[best]


def goodness(scores: LesionScores) -> float:
    """Return the mean of Dice and lesion F1; without true lesions, less the more is found."""
    if scores.dice is None or scores.lesion_f1 is None:
        return -float(scores.tested_volume_mm3 or 0)
    return (scores.dice + scores.lesion_f1) / 2


def without_specks(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Drop lesions of 3 mm3 or less."""
    labels, count = ndimage.label(mask)
    return mask & (np.bincount(labels.ravel(), minlength=count + 1) > 3)[labels]


def scored(followup: Case, mask: NDArray) -> LesionScores:
    """Score a mask on the pair's 1 mm grid."""
    return lesion_scores(followup.lesions, mask, (1.0, 1.0, 1.0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", type=Path)
    parser.add_argument("--weights", nargs="+", default=[])
    parser.add_argument("--threshold", type=float, default=0.5)
    parser.add_argument("--window", type=int, help="default: what the weights say")
    parser.add_argument("--precision", default="auto")
    arguments = parser.parse_args()
    detectors = {w: read_detectors([Path(p) for p in w.split("+")]) for w in arguments.weights}
    options = {"threshold": arguments.threshold, "window": arguments.window, "precision": arguments.precision}
    print("pair,method,lesions,found," + ",".join(_SCORES))
    for subject, baseline, followup in read_pairs(arguments.pairs):
        lesions = ndimage.label(followup.lesions)[1]
        threshold, scores = subtracted(baseline, followup)
        results = {f"subtraction above {threshold:.3f}": (-1, scores)}
        for name, networks in detectors.items():
            found = detect(baseline, followup, networks, **options)
            results[name] = (len(found.lesions), scored(followup, found.mask))
        for name, (count, scores) in results.items():
            values = ",".join("" if v is None else f"{v:.3f}" for v in map(scores.as_dict().get, _SCORES))
            print(f"{subject},{name},{lesions},{count},{values}", flush=True)


if __name__ == "__main__":
    main()
