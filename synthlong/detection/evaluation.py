"""A cohort's scores: masks on disk, means over patients, one method against another.

Patients with new lesions are scored by overlap and by lesions found, patients without by what is predicted there all
the same; no mean mixes them. Where a score is nan (PPV if nothing is predicted, SensL if no true lesion has more than
3 mm3), its patient is left out of that mean and counted. Cohort tables as in Kamraoui et al. (2022), doi
10.3389/fnimg.2022.948235.
"""

from __future__ import annotations

import csv
import io
import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.stats import wilcoxon

from synthlong.detection.scores import KEYS, LesionScores, lesion_scores
from synthlong.errors import InputError, InputWarning, short
from synthlong.mask import check_binary, read_beside
from synthlong.nifti import Volume, read_nifti
from synthlong.progress import Progress
from synthlong.publishing import publish

__all__ = [
    "WITHOUT_NEW",
    "WITH_NEW",
    "Average",
    "Comparison",
    "average",
    "compare",
    "evaluate",
    "measured",
    "write_scores",
]

WITH_NEW = ("Dice", "F1_score", "Avg. Score", "SensL", "PPVL", "PPV", "Sensitivity")
"""What is averaged over patients with new lesions; "Avg. Score" is the mean of Dice and F1_score."""

WITHOUT_NEW = ("NbTestedLesions", "VolTestedLesions")
"""What is averaged over patients without: number and volume (mm3) of predicted lesions."""

Scores = Mapping[str, LesionScores]
"""By patient."""


@dataclass(frozen=True)
class Average:
    """A score over patients.

    Args:
        mean: nan without patients.
        sem: Standard error of the mean, from the sample's SD; nan for fewer than two patients.
        patients: Number of patients averaged.
        undefined: Number of patients left out because their score is nan.
    """

    mean: float
    sem: float
    patients: int
    undefined: int


@dataclass(frozen=True)
class Comparison:
    """Two methods by one score: the paired Wilcoxon signed-rank test, two-sided.

    Args:
        difference: Mean of the first minus the second over the patients; nan without patients.
        p: 1 if no patient differs. Exact up to 50 patients, or 13 where differences tie; else the normal
            approximation.
        patients: Number of patients that have this score, not nan, by both methods.
        differing: Number of those whose scores differ: the others say nothing to the test.
    """

    difference: float
    p: float
    patients: int
    differing: int

    @property
    def least_p(self) -> float:
        """The smallest p that so many differing patients can give: all of them in favour of one method."""
        return 2.0 ** (1 - max(self.differing, 1))


def evaluate(
    truth: str | Path,
    prediction: str | Path,
    *,
    prefer: str | None = None,
    progress: Progress | None = None,
) -> dict[str, LesionScores]:
    """Score predicted masks of new lesions by patient, the name of the truth's file without its ending.

    Args:
        truth: NIfTI mask, or a folder of them.
        prediction: The same; in two folders, masks of one file name belong together.
        prefer: "sform" or "qform", the one to use where a file's two disagree.
        progress: Called with "patients", the number done and the number of all.

    Raises:
        InputError: A mask is missing on either side, unreadable, not binary, or not on the other's grid.
    """
    pairs = _find_pairs(Path(truth), Path(prediction))
    scores = {}
    for done, (patient, (true, predicted)) in enumerate(pairs.items(), start=1):
        image = read_nifti(true, prefer=prefer, allow_empty=True)
        beside = read_beside(predicted, image, prefer=prefer)
        scores[patient] = lesion_scores(_lesions_in(image), _lesions_in(beside), _spacing_mm(image))
        if progress:
            progress("patients", done, len(pairs))
    return scores


def measured(scores: Scores, score: str) -> dict[str, float]:
    """Return one score, of `KEYS` or "Avg. Score", by patient; nan included, patients without it left out."""
    found = {}
    for patient, single in scores.items():
        row = single.as_dict()
        dice, f1 = row["Dice"], row["F1_score"]
        row["Avg. Score"] = None if dice is None or f1 is None else (dice + f1) / 2
        if (value := row[score]) is not None:
            found[patient] = value
    return found


def average(scores: Scores, score: str) -> Average:
    """Average one score over the patients that have it."""
    found = np.array(list(measured(scores, score).values()), np.float64)
    values = found[~np.isnan(found)]
    n = len(values)
    sem = float(values.std(ddof=1)) / math.sqrt(n) if n > 1 else math.nan
    return Average(_mean(values), sem, patients=n, undefined=len(found) - n)


def compare(scores: Scores, others: Scores, score: str) -> Comparison:
    """Test one score of two methods over the patients that have it by both."""
    one, two = measured(scores, score), measured(others, score)
    difference = np.array([one[patient] - two[patient] for patient in one if patient in two], np.float64)
    difference = difference[~np.isnan(difference)].round(12)  # rounding errors must not break ties
    differing = difference[difference != 0]
    p = float(wilcoxon(differing).pvalue) if differing.size else 1.0
    return Comparison(_mean(difference), p, patients=difference.size, differing=differing.size)


def write_scores(path: str | Path, methods: Mapping[str, Scores]) -> None:
    """Write a CSV table, a row per patient: empty where a score is not computed, `nan` where it is undefined.

    Args:
        path: The file, written whole or not at all.
        methods: Scores by the name of the method. With more than one, a column `method` follows `patient`.

    Raises:
        OutputError: The file cannot be written.
    """
    named = len(methods) > 1
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["patient", *(["method"] if named else []), *KEYS])
    for method, scores in methods.items():
        for patient, single in scores.items():
            table.writerow([patient, *([method] if named else []), *single.as_dict().values()])
    publish(path, text.getvalue().encode())


def _find_pairs(truth: Path, prediction: Path) -> dict[str, tuple[Path, Path]]:
    """Return the two masks of each patient."""
    for one, other in ((truth, prediction), (prediction, truth)):
        if one.is_dir() and not other.is_dir():
            raise InputError(other, f"is not a folder as {short(one)} is", "give two folders or two files")
    if not truth.is_dir():
        return {_patient(truth): (truth, prediction)}
    true, predicted = _names_in(truth), _names_in(prediction)
    if alone := [truth / name for name in true - predicted] + [prediction / name for name in predicted - true]:
        names = ", ".join(sorted(short(path) for path in alone))
        raise InputError(prediction, f"no mask of the same name for {names}", "name a patient's two masks alike")
    if not true:
        raise InputError(truth, "holds no .nii or .nii.gz file", "give a folder of masks")
    pairs = {_patient(truth / name): (truth / name, prediction / name) for name in sorted(true)}
    if len(pairs) < len(true):
        raise InputError(truth, "holds a patient twice, as .nii and as .nii.gz", "keep one of them")
    return pairs


def _names_in(folder: Path) -> set[str]:
    names = {path.name for path in folder.iterdir()}
    return {name for name in names if name.lower().endswith((".nii", ".nii.gz")) and not name.startswith(".")}


def _patient(path: Path) -> str:
    return re.sub(r"\.nii(\.gz)?$", "", path.name, flags=re.IGNORECASE)


def _lesions_in(volume: Volume) -> NDArray[np.bool_]:
    check_binary(volume)
    mask: NDArray[np.bool_] = volume.data != 0
    if mask.all():
        text = f"{short(volume.path)}: no voxel is 0; such a mask counts as empty, as in the challenge"
        warnings.warn(text, InputWarning, stacklevel=3)
    return mask


def _spacing_mm(volume: Volume) -> list[float]:
    """Return the header's voxel sizes, digit by digit, unless they contradict the affine."""
    sides = np.linalg.norm(volume.affine[:3, :3], axis=0)
    stated = np.asarray(volume.header["pixdim"][1:4], np.float64)
    return list(stated if np.allclose(stated, sides, rtol=1e-3) else sides)


def _mean(values: NDArray[np.float64]) -> float:
    return float(values.mean()) if values.size else math.nan
