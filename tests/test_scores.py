import json
import math
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from synthlong.detection import lesion_scores
from synthlong.detection.distance import distance_mm
from synthlong.detection.scores import KEYS

GOLDEN = Path(__file__).parent / "golden" / "lesion_scores"
CASES = {case["name"]: case for case in json.loads((GOLDEN / "cases.json").read_text())["cases"]}
SPACINGS = [
    (1, 1, 1),
    (1, 1, 1.2),
    (1, 1, 1.5),
    (0.9, 0.9, 3),
    (0.5, 0.5, 0.5),
    (1.3, 0.7, 2.1),
    (0.1, 3, 10),
    (2, 2, 2),
]
STEPS = [(1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, -1, 0), (0, 0, 1), (0, 0, -1)]


def golden_masks(name):
    shape = CASES[name]["shape"]
    with np.load(GOLDEN / "masks.npz") as packed:
        flat = [np.unpackbits(packed[f"{name}__{side}"])[: math.prod(shape)] for side in ("gt", "pred")]
    return [mask.astype(bool).reshape(shape) for mask in flat]


def plain_scores(truth, prediction, spacing):
    """The rules one by one, on sets of voxels."""
    spacing = [float(np.float32(s)) for s in spacing]
    shape, voxel_mm3 = truth.shape, spacing[0] * spacing[1] * spacing[2]
    every = set(product(*map(range, shape)))
    one, two = (set(map(tuple, np.argwhere(m).tolist())) for m in (truth, prediction))
    one, two = (set() if mask == every else mask for mask in (one, two))
    fewest = math.floor(3.0 / voxel_mm3) + 1
    lesions, others = plain_lesions(one, fewest), plain_lesions(two, fewest)
    scores = dict.fromkeys(KEYS)
    if not one:
        scores["NbTestedLesions"] = len(others)
        scores["VolTestedLesions"] = sum(map(len, others)) * voxel_mm3
        return scores
    tp, fp, fn = len(one & two), len(two - one), len(one - two)
    tn = len(every) - tp - fp - fn
    jaccard = tp / (tp + fp + fn)
    scores |= {"Jaccard": jaccard, "Dice": 2 * jaccard / (1 + jaccard), "Sensitivity": tp / (tp + fn)}
    scores |= {"Specificity": tn / (tn + fp), "PPV": tp / (tp + fp) if two else math.nan, "NPV": tn / (tn + fn)}
    scores["RelativeVolumeError"] = 100 * (len(two) - len(one)) / len(one)
    sensl = plain_detected(lesions, others) / len(lesions) if lesions else math.nan
    ppvl = plain_detected(others, lesions) / len(others) if others else 0
    f1 = 2 * ppvl * sensl / (ppvl + sensl) if ppvl + sensl > 0 else 0
    scores |= {"PPVL": ppvl, "SensL": sensl, "F1_score": f1}
    names = ("HausdorffDistance", "ContourMeanDistance", "SurfaceDistance")
    scores |= dict(zip(names, plain_distances(one, two, every, spacing), strict=True))
    return scores


def plain_lesions(mask, fewest):
    left, found = set(mask), []
    while left:
        lesion, edge = set(), {left.pop()}
        while edge:
            lesion |= edge
            edge = {neighbour for voxel in edge for neighbour in beside(voxel)} & left
            left -= edge
        if len(lesion) >= fewest:
            found.append(lesion)
    return sorted(found, key=lambda lesion: (-len(lesion), min(voxel[::-1] for voxel in lesion)))


def beside(voxel):
    return [tuple(a + b for a, b in zip(voxel, step, strict=True)) for step in STEPS]


def plain_detected(lesions, others):
    anywhere, detected = set().union(*lesions), 0
    for lesion in lesions:
        overlap = [len(lesion & other) for other in others]
        row = sum(overlap)
        if not row / len(lesion) > 0.10:
            continue
        w, good = 0.0, True
        for j in sorted(range(len(others)), key=lambda j: (-overlap[j], j)):
            if not w < 0.65:
                break
            if len(others[j] - anywhere) / len(others[j]) > 0.70:
                good = False
                break
            w += overlap[j] / row
        detected += good
    return detected


def plain_distances(one, two, every, spacing):
    if not two:
        return [math.nan] * 3

    def nearest(voxels, targets):
        def apart(a, b):
            return math.sqrt(sum((s * (p - q)) ** 2 for s, p, q in zip(spacing, a, b, strict=True)))

        return [min(apart(voxel, target) for target in targets) for voxel in voxels]

    edges = [{v for v in mask if any(n in every and n not in mask for n in beside(v))} for mask in (one, two)]
    there, back = nearest(edges[0], edges[1]), nearest(edges[1], edges[0])
    mean = max(sum(there) / len(there), sum(back) / len(back))
    return max(nearest(one, two) + nearest(two, one)), mean, (sum(there) + sum(back)) / len(there + back)


def same(got, wanted):
    assert list(got) == list(wanted)
    assert [k for k in got if got[k] is None] == [k for k in wanted if wanted[k] is None]
    for key in got:
        if wanted[key] is not None:
            assert got[key] == pytest.approx(float(wanted[key]), rel=0, abs=1e-6, nan_ok=True), key


@pytest.mark.parametrize("name", CASES)
def test_the_challenges_program_says_the_same(name):
    wanted = CASES[name]["outputs"]
    if wanted["SurfaceDistance"] not in (None, "nan"):
        wanted = wanted | {"SurfaceDistance": CASES[name]["debug"]["surface_distance_without_running_min"]}
    same(lesion_scores(*golden_masks(name), CASES[name]["spacing"]).as_dict(), wanted)


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith(("realistic", "noise"))])
@pytest.mark.parametrize("spacing", [(1, 1, 1), (0.9, 1.1, 2.5)])
def test_swapped_golden_masks_agree_with_the_plain_rules(name, spacing):
    """Swapping brings each limit (10, 65 and 70 %) to the predicted lesions."""
    truth, prediction = golden_masks(name)
    same(lesion_scores(prediction, truth, spacing).as_dict(), plain_scores(prediction, truth, spacing))


def boxes(shape):
    """Masks made of a few boxes, most of them small, some touching by an edge or a corner only."""
    box = st.tuples(*[st.tuples(st.integers(0, n - 1), st.sampled_from([1, 1, 2, 3])) for n in shape])

    def drawn(places):
        mask = np.zeros(shape, bool)
        for place in places:
            mask[tuple(slice(start, start + side) for start, side in place)] = True
        return mask

    return st.lists(box, max_size=8).map(drawn)


@given(st.data(), st.tuples(*[st.integers(1, 7)] * 3), st.sampled_from(SPACINGS))
@settings(max_examples=300, deadline=None)
def test_scores_of_random_boxes_agree_with_the_plain_rules(data, shape, spacing):
    truth, prediction = data.draw(boxes(shape)), data.draw(boxes(shape))
    same(lesion_scores(truth, prediction, spacing).as_dict(), plain_scores(truth, prediction, spacing))


TEETH = st.lists(st.tuples(st.sampled_from([1, 2, 3, 4, 7, 10, 13]), st.integers(-12, 12)), min_size=1, max_size=4)


@given(TEETH, st.integers(10, 40), st.tuples(st.integers(0, 40), st.integers(0, 20), st.integers(-12, 12)))
@settings(max_examples=300, deadline=None)
def test_scores_of_combs_agree_with_the_plain_rules(teeth, length, second):
    """True lesions along one axis, predicted ones along it and off it: overlaps often are at a limit, or tie."""
    truth, prediction = np.zeros((2, 60, 25, 1), bool)
    truth[:length, 12] = True
    start, run, row = second
    truth[start : start + run, 12 + row] = True
    at = 0
    for width, depth in teeth:
        prediction[at : at + width, 12] = True
        prediction[at, 12 + min(depth, 0) : 13 + max(depth, 0)] = True
        at += width + 1
    one = lesion_scores(truth, prediction, (1, 1, 1)).as_dict()
    other = lesion_scores(prediction, truth, (1, 1, 1)).as_dict()
    same(one, plain_scores(truth, prediction, (1, 1, 1)))
    same(other, plain_scores(prediction, truth, (1, 1, 1)))


@pytest.mark.parametrize(
    ("spacing", "fewest"),
    [
        ((1, 1, 1), 4),
        ((1, 1, 1.5), 3),
        ((1, 1, 3), 2),
        ((1, 1, 4), 1),
        ((0.5, 0.5, 0.5), 25),
        ((1, 1, 0.6), 5),  # 3 / 0.6 is 5, but 4.9999998 in float32
        ((1, 1, 0.3), 10),  # and 9.9999996
        ((1, 1, 0.2), 15),
        ((1, 1, 0.7), 5),
    ],
)
def test_lesions_of_3_mm3_or_less_do_not_count(spacing, fewest):
    prediction = np.zeros((30, 5, 5), bool)
    for size, row in ((fewest - 1, 0), (fewest, 2)):
        prediction[:size, row, row] = True
        scores = lesion_scores(np.zeros_like(prediction), prediction, spacing)
        assert scores.tested_lesions == row / 2
    assert scores.tested_volume_mm3 == pytest.approx(fewest * np.prod(spacing))


@pytest.mark.parametrize("bad_first", [False, True])
def test_equal_lesions_are_visited_by_first_voxel_the_first_axis_running_fastest(bad_first):
    """Overlaps of 10, 4, 4 and 2: one of the equal two, lesions of the same size, is enough to reach 65 %."""
    truth, prediction = np.zeros((2, 30, 40, 3), bool)
    truth[:23, 20, 1] = True
    prediction[:10, 20, 1] = prediction[21:25, 20, 1] = True
    good, bad = slice(11, 15), slice(16, 20)
    for tooth in (good, bad):
        prediction[tooth, 20, 1] = prediction[tooth.start, 20:37, 1] = True
    truth[good.start, 27:37, 1] = True  # another lesion: the good one is 30 % outside, the bad one 80 %
    if bad_first:
        prediction[bad.start, 19, 1] = prediction[good.start + 1, 30, 1] = True
    scores = lesion_scores(truth, prediction, (1, 1, 1))
    same(scores.as_dict(), plain_scores(truth, prediction, (1, 1, 1)))
    assert scores.lesion_sensitivity == (0.5 if bad_first else 1)


@given(
    st.tuples(*[st.integers(1, 9)] * 3), st.tuples(*[st.floats(0.1, 10)] * 3), st.integers(0, 99), st.floats(0.01, 0.9)
)
@settings(max_examples=100, deadline=None)
def test_distance_maps_are_those_of_scipy(shape, spacing, seed, share):
    mask = np.random.default_rng(seed).random(shape) < share
    mask.flat[seed % mask.size] = True
    wanted = ndimage.distance_transform_edt(~mask, sampling=spacing)
    np.testing.assert_allclose(distance_mm(mask, np.array(spacing)), wanted, rtol=1e-12)


def test_without_a_voxel_the_distance_is_infinite():
    assert np.isinf(distance_mm(np.zeros((3, 4, 5), bool), np.ones(3))).all()


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int16, np.float32])
@pytest.mark.parametrize("order", ["C", "F"])
def test_any_number_but_0_is_lesion_and_nothing_is_written_to_the_input(dtype, order):
    masks = golden_masks("noise_field_a")
    wanted = lesion_scores(*masks, (1, 1, 1.2))
    given = [np.asarray(mask * 7, dtype=dtype, order=order) for mask in masks]
    for mask in given:
        mask.flags.writeable = False
    assert lesion_scores(*given, (1, 1, 1.2)) == wanted
    assert lesion_scores(*(mask.tolist() for mask in given), np.array([1, 1, 1.2])) == wanted


def test_empty_space_around_adds_background_only():
    masks = [np.pad(mask, 1) for mask in golden_masks("realistic_b")]
    near = lesion_scores(*masks, (0.9, 0.9, 3)).as_dict()
    far = lesion_scores(*(np.pad(mask, 9) for mask in masks), (0.9, 0.9, 3)).as_dict()
    assert {k for k in KEYS[:13] if near[k] != pytest.approx(far[k], rel=1e-12)} == {"Specificity", "NPV"}


@pytest.mark.parametrize(
    ("truth", "prediction", "spacing", "said"),
    [
        (np.zeros((4, 4)), np.zeros((4, 4)), (1, 1, 1), "truth must be 3-D"),
        (np.zeros((4, 4, 4)), np.zeros((4, 4, 4), complex), (1, 1, 1), "prediction must be 3-D, numbers"),
        (np.zeros((4, 4, 4)), np.full((4, 4, 4), np.nan), (1, 1, 1), "prediction holds NaN"),
        (np.zeros((4, 4, 4)), np.zeros((4, 4, 5)), (1, 1, 1), r"\(4, 4, 4\), prediction \(4, 4, 5\)"),
        (np.zeros((4, 4, 4)), np.zeros((4, 4, 4)), (1, 1), "spacing_mm"),
        (np.zeros((4, 4, 4)), np.zeros((4, 4, 4)), (1, 1, 0), "spacing_mm"),
        (np.zeros((4, 4, 4)), np.zeros((4, 4, 4)), (1, 1, -1), "spacing_mm"),
        (np.zeros((4, 4, 4)), np.zeros((4, 4, 4)), (1, 1, math.inf), "spacing_mm"),
        (np.zeros((4, 4, 4)), np.zeros((4, 4, 4)), (1, math.nan, 1), "spacing_mm"),
        (np.zeros((4, 4, 4)), np.zeros((4, 4, 4)), (1, 1e300, 1), "spacing_mm"),
    ],
)
def test_what_cannot_be_scored_is_refused(truth, prediction, spacing, said):
    with pytest.raises(ValueError, match=said):
        lesion_scores(truth, prediction, spacing)
