import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from synthlong.atlas import MNI_SHAPE, mni_affine, tissue_maps
from synthlong.tissue import CSF, GRAY, WHITE, classify_tissue, fitted_tissue_maps, is_whole


def phantom(seed=0, noise=0.04):
    """Three slabs of known tissue with a small lesion, and maps that say little."""
    truth = np.repeat(np.array([CSF, GRAY, WHITE], np.uint8), 8)[:, None, None] * np.ones((1, 24, 24), np.uint8)
    brain = np.zeros(truth.shape, bool)
    brain[1:-1, 2:-2, 2:-2] = True
    lesions = np.zeros(truth.shape, bool)
    lesions[18:21, 10:13, 10:13] = True
    flair = np.choose(truth, (0.0, 0.3, 1.15, 0.95)) + np.where(lesions, 0.6, 0)
    flair = flair + np.random.default_rng(seed).normal(0, noise, truth.shape)
    maps = tuple(np.where(truth == label, 0.5, 0.25).astype(np.float32) for label in (CSF, GRAY, WHITE))
    return np.where(brain, flair, 0).astype(np.float32), brain, lesions, maps, truth


def test_three_known_tissues_are_found():
    flair, brain, lesions, maps, truth = phantom()
    labels = classify_tissue(flair, brain, lesions, maps)
    deep = ndimage.binary_erosion(brain) & ~ndimage.binary_dilation(lesions, iterations=2)
    for label in (CSF, GRAY, WHITE):
        apart = ndimage.binary_erosion(truth == label)  # partial volume aside
        assert (labels[deep & apart] == label).mean() > 0.97
    assert labels.dtype == np.uint8


def test_lesions_are_white_matter_and_the_background_is_nothing():
    flair, brain, lesions, maps, _ = phantom()
    labels = classify_tissue(np.where(lesions, np.float32(0.01), flair), brain, lesions, maps)
    assert (labels[lesions] == WHITE).all()
    assert not labels[~brain].any()
    assert labels[brain].all()


def test_the_scan_overrules_maps_that_know_of_no_csf():
    flair, brain, lesions, maps, truth = phantom()
    none = np.zeros_like(maps[0])
    labels = classify_tissue(flair, brain, lesions, (none, maps[1], maps[2]))
    core = ndimage.binary_erosion(brain, iterations=2) & (truth == CSF)
    assert (labels[core] == CSF).mean() > 0.95
    assert (labels[brain & (truth == WHITE)] != CSF).all()


@given(factor=st.integers(-20, 20))
@settings(max_examples=8, deadline=None)
def test_the_unit_does_not_matter(factor):
    flair, brain, lesions, maps, _ = phantom()
    once = classify_tissue(flair, brain, lesions, maps)
    assert np.array_equal(classify_tissue(flair * np.float32(2.0**factor), brain, lesions, maps), once)


def test_nothing_is_written_to_the_input():
    flair, brain, lesions, maps, _ = phantom()
    before = [a.copy() for a in (flair, brain, lesions, *maps)]
    classify_tissue(flair, brain, lesions, maps)
    assert all(np.array_equal(a, b) for a, b in zip(before, (flair, brain, lesions, *maps), strict=True))


@pytest.mark.parametrize("axis", range(3))
@pytest.mark.parametrize("side", [0, -1])
def test_a_brain_that_reaches_the_border_is_not_whole(axis, side):
    brain = np.zeros((8, 9, 10), bool)
    brain[1:-1, 1:-1, 1:-1] = True
    assert is_whole(brain)
    at = [slice(3, 6)] * 3
    at[axis] = side
    brain[tuple(at)] = True
    assert not is_whole(brain)
    at[(axis + 1) % 3] = at[(axis + 2) % 3] = 4
    touched = np.zeros((8, 9, 10), bool)
    touched[1:-1, 1:-1, 1:-1] = touched[tuple(at)] = True
    assert is_whole(touched)  # a grid that just fits


def test_maps_of_a_box_are_cut_out_of_the_atlas():
    affine = mni_affine()
    affine[:3, 3] += (60, 70, 80)
    box = (slice(60, 92), slice(70, 94), slice(80, 108))
    maps = fitted_tissue_maps(np.ones((32, 24, 28), bool), affine)
    assert all(np.array_equal(m, a[box]) for m, a in zip(maps, tissue_maps(), strict=True))


def test_maps_follow_the_size_of_a_rigidly_registered_brain():
    matter = tissue_maps()[1] + tissue_maps()[2] > 0.5
    scale, shift = np.array([0.85, 0.88, 0.82]), np.array([14.0, 12.0, 10.0])
    brain = ndimage.affine_transform(matter, np.diag(1 / scale), -shift / scale, MNI_SHAPE, order=0)
    csf, gm, wm = fitted_tissue_maps(brain, mni_affine())
    fitted = gm + wm > 0.5
    assert 2 * (fitted & brain).sum() / (fitted.sum() + brain.sum()) > 0.97
    assert csf.min() >= 0
    assert (csf + gm + wm).max() <= 1 + 1e-5


def test_maps_stay_for_a_brain_of_usual_size():
    matter = tissue_maps()[1] + tissue_maps()[2] > 0.5
    assert all(map(np.array_equal, fitted_tissue_maps(matter, mni_affine()), tissue_maps()))


def test_ventricles_and_sulci_of_this_scan_are_csf(real_case):
    brain = real_case.brain > 0
    deep = ndimage.binary_erosion(brain, iterations=5)
    csf = real_case.tissue == CSF
    dark = deep & (real_case.flair < 0.5) & (real_case.lesions == 0)
    assert dark.sum() > 3000
    assert csf[dark].mean() > 0.98
    assert csf[deep & (real_case.flair > 0.95)].mean() < 0.01
    # the largest piece well inside are the ventricles: near the midline, at the height of the thalamus
    pieces, _ = ndimage.label(deep & csf)
    largest = np.argwhere(pieces == np.bincount(pieces.ravel())[1:].argmax() + 1)
    x, y, z = largest.mean(axis=0) + real_case.affine[:3, 3]
    assert abs(x) < 8
    assert -45 < y < 25
    assert -10 < z < 35


def test_no_lesion_of_a_real_scan_is_csf_and_every_brain_voxel_has_a_label(real_case):
    assert (real_case.tissue[real_case.lesions > 0] == WHITE).all()
    assert np.array_equal(real_case.tissue > 0, real_case.brain > 0)


def test_white_matter_of_a_real_scan_lies_deeper_than_gray(real_case):
    depth = ndimage.distance_transform_edt(real_case.brain[::2, ::2, ::2])
    tissue = real_case.tissue[::2, ::2, ::2]
    assert depth[tissue == WHITE].mean() > 1.3 * depth[tissue == GRAY].mean()
