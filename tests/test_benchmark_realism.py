import math

import numpy as np
import pytest
from scipy import ndimage

from benchmarks.realism.__main__ import removal_table, repainting_table
from benchmarks.realism.material import SIDE, Patch
from benchmarks.realism.page import page_of, quiz_of
from benchmarks.realism.painting import beside_fluid, distances
from benchmarks.realism.twosample import telling_features, two_sample


def patches(patient, count, *, grain, seed):
    """Bright balls on tissue with grain of one SD."""
    rng = np.random.default_rng(seed)
    mask = np.linalg.norm(np.indices((SIDE,) * 3) - SIDE // 2, axis=0) <= 3
    made = []
    for _ in range(count):
        noise = ndimage.gaussian_filter(rng.standard_normal(mask.shape), 0.6)
        image = 1 + 0.3 * mask + grain * noise / noise.std()
        made.append(Patch(patient, image.astype(np.float32), mask, (0, 0, 0)))
    return made


@pytest.mark.parametrize("classifier", ["logistic", "boosting"])
def test_one_patient_gives_no_auc_and_no_crash(classifier):
    real, made = patches("a", 6, grain=0.05, seed=0), patches("a", 7, grain=0.05, seed=1)
    verdict = two_sample(real, made, classifier)
    assert math.isnan(verdict.auc)
    assert not verdict.patients
    assert telling_features(real, made)
    assert set(distances(real, made)) == {"contrast", "edge", "texture"}
    page, answers = quiz_of(real, made)
    assert sorted(answers) == ["made"] * 6 + ["real"] * 6
    assert page.count("<img") == 12


def test_nothing_to_measure():
    some = patches("a", 2, grain=0.05, seed=0)
    assert math.isnan(two_sample([], some, "logistic").auc)
    assert telling_features([], []) == []
    assert math.isnan(distances([], some)["edge"])
    assert math.isnan(beside_fluid([]))
    assert quiz_of([], some)[1] == []
    assert repainting_table([]) == ["no lesion lies alone"]
    assert any("0 holes" in line for line in removal_table([]))
    assert "<h2>none</h2>" in page_of("t", "", {"none": []})


@pytest.mark.parametrize(("grain", "low", "high"), [(0.05, 0.2, 0.8), (0.12, 0.99, 1.0)])
def test_two_patients_give_each_an_auc(grain, low, high):
    real = patches("a", 12, grain=0.05, seed=0) + patches("b", 12, grain=0.05, seed=1)
    made = patches("a", 12, grain=grain, seed=2) + patches("b", 12, grain=grain, seed=3)
    verdict = two_sample(real, made, "logistic")
    assert sorted(verdict.patients) == ["a", "b"]
    assert low <= verdict.auc <= high
    assert verdict.interval[0] <= verdict.auc <= verdict.interval[1]
    assert np.mean(list(verdict.patients.values())) == pytest.approx(verdict.auc)


def test_lesions_that_lie_beside_fluid_are_counted():
    far, near = patches("a", 2, grain=0.0, seed=0)
    far.image[:, :, : SIDE // 2 - 6] = 0.1
    near.image[:, :, : SIDE // 2 - 2] = 0.1
    assert beside_fluid([far]) == 0
    assert beside_fluid([far, near]) == 0.5
