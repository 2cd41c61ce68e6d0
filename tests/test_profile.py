import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from synthlong.lesions import find_lesions
from synthlong.profile import (
    LEVELS,
    Profile,
    contrast_of,
    depth_in,
    draw_profile,
    profile_of,
    profiles_in,
    raised,
    soft_depth,
    typical,
    visible,
)

PROFILE = Profile((0.02, 0.1, 0.3, 0.5, 0.6), (0.0,) * 5)


def ball(radius, side=24):
    grid = np.indices((side,) * 3) - side // 2
    return np.linalg.norm(grid, axis=0) <= radius


def test_depth_is_half_a_voxel_on_either_side_of_a_face():
    mask = np.zeros((9, 9, 9), bool)
    mask[3:6] = True
    assert depth_in(mask)[:, 4, 4].tolist() == [-2.5, -1.5, -0.5, 0.5, 1.5, 0.5, -0.5, -1.5, -2.5]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 2))
def test_a_soft_depth_is_the_depth_but_for_the_outline(seed, axis):
    rng = np.random.default_rng(seed)
    mask = ndimage.gaussian_filter(rng.standard_normal((26, 24, 25)), 2) > 0.05
    mask[:7] = mask[-7:] = mask[:, :7] = mask[:, -7:] = mask[..., :7] = mask[..., -7:] = False
    mask[12, 12, 12] = True
    before = mask.copy()
    soft, hard = soft_depth(mask), np.maximum(depth_in(mask), -4)
    near = hard > -2.5
    assert np.array_equal(mask, before)
    assert soft.dtype == np.float32
    assert soft[near].mean() == pytest.approx(hard[near].mean(), abs=1e-4)
    assert soft[near].std() == pytest.approx(hard[near].std(), abs=1e-4)
    slow = ndimage.gaussian_filter(hard.astype(np.float64), 0.7, mode="nearest")  # the whole array, not a box
    stretch = hard[near].std() / slow[near].std()
    slow = hard[near].mean() + stretch * (slow - slow[near].mean())
    assert soft == pytest.approx(np.maximum(slow, -4), abs=1e-3)
    assert soft_depth(np.flip(mask, axis)) == pytest.approx(np.flip(soft, axis), abs=1e-4)


def test_a_soft_depth_has_no_steps_along_an_oblique_border():
    i, j, k = np.indices((28, 28, 28)) - 14
    slope = i + 0.4 * j
    within = np.maximum(np.maximum(abs(j), abs(k)), abs(i)) < 9
    mask = (slope <= 0) & within
    middle = (np.maximum(np.maximum(abs(j), abs(k)), abs(i)) < 4) & (abs(slope) < 3)
    exact = -slope / np.hypot(1, 0.4)

    def off(depth):
        line = np.polynomial.Polynomial.fit(exact[middle], depth[middle], 1)
        return np.abs(depth[middle] - line(exact[middle])).mean()

    assert off(soft_depth(mask)) < 0.6 * off(depth_in(mask))


def test_a_raised_guess_is_as_bright_as_its_profile_says():
    mask = np.zeros((20, 12, 12), bool)
    mask[:10] = True  # a flat border: depths are whole and a half
    depth, everywhere = depth_in(mask), np.ones(mask.shape, bool)
    bright = raised(np.ones(mask.shape), PROFILE, depth, everywhere)
    assert bright.dtype == np.float32
    assert bright[12:6:-1, 5, 5] == pytest.approx([1.02, 1.02, 1.1, 1.3, 1.5, 1.6])
    again = profile_of(bright - 1, depth, everywhere)
    assert again.levels == pytest.approx(PROFILE.levels, abs=1e-6)
    assert again.spreads == pytest.approx([0] * 5, abs=1e-6)
    rough = bright - 1 + np.random.default_rng(0).normal(0, 0.2, bright.shape)
    assert profile_of(rough, depth, everywhere).spreads == pytest.approx([0.2] * 5, rel=0.2)
    assert contrast_of(PROFILE, depth, depth > 0) == pytest.approx((0.3 + 0.5 + 8 * 0.6) / 10)
    assert np.array_equal(raised(bright, PROFILE, depth, ~everywhere), bright)


def test_levels_that_a_small_lesion_lacks_are_those_above():
    mask = np.zeros((9, 9, 9), bool)
    mask[4, 4, 4] = True
    profile = profile_of(np.where(mask, 0.7, 0.1), depth_in(mask), np.ones(mask.shape, bool))
    assert profile.levels == pytest.approx((0.1, 0.1, 0.7, 0.7, 0.7))
    assert profile.spreads == pytest.approx((0,) * 5, abs=1e-9)
    rough = np.random.default_rng(0).normal(0, 0.2, mask.shape)
    spreads = profile_of(rough, depth_in(mask), np.ones(mask.shape, bool)).spreads
    assert spreads[1] > 0.05
    assert spreads[1:] == (spreads[1],) * 4


def test_profiles_of_a_scan_are_those_that_it_was_made_with():
    labels = np.zeros((56, 24, 24), np.uint8)
    labels[:24][ball(4)] = labels[28:52][ball(6)] = 1
    x = np.full(labels.shape, 1, np.float32)
    depth = depth_in(labels)
    for part, factor in ((slice(0, 26), 1.0), (slice(26, 56), 2.0)):
        profile = Profile(tuple(factor * p for p in PROFILE.levels), (0.0,) * 5)
        x[part] = raised(x[part], profile, depth[part], depth[part] > -2)
    measured = profiles_in(x, find_lesions(labels, max_event_mm3=3000.0))
    assert np.exp(measured[:, 0]) == pytest.approx([ball(4).sum(), ball(6).sum()], rel=1e-4)
    inner = [LEVELS.index(level) + 1 for level in (0.5, 1.5, 2.5)]
    assert measured[0, inner] == pytest.approx(PROFILE.levels[2:], abs=0.06)
    assert measured[1][inner] == pytest.approx(2 * np.array(PROFILE.levels[2:]), abs=0.12)
    assert measured[:, 2] == pytest.approx([0.1, 0.2], abs=0.06)  # half a voxel outside the mask


def test_a_faint_halo_around_a_lesion_is_not_taken_for_tissue():
    labels = ball(4, 32).astype(np.uint8)
    depth = depth_in(labels)
    x = raised(np.ones(labels.shape), PROFILE, depth, depth > -2)
    x[(depth < -2) & (depth > -4)] += 0.1
    measured = profiles_in(x, find_lesions(labels, max_event_mm3=3000.0))
    assert measured[0, 3:6] == pytest.approx(PROFILE.levels[2:], abs=0.085)


def test_a_drawn_profile_is_that_of_a_lesion_of_its_size():
    measured = np.array([[np.log(10), *[0.2] * 10], [np.log(1000), *[0.8] * 10]], np.float32)
    rng = np.random.default_rng(0)
    for volume, contrast in ((12.0, 0.2), (800.0, 0.8)):
        profiles = [draw_profile(rng, measured, volume_mm3=volume) for _ in range(200)]
        drawn = np.array([p.row for p in profiles])
        assert drawn.mean() == pytest.approx(contrast, rel=0.03)
        assert 0.03 < drawn[:, 0].std() / contrast < 0.15
        assert np.array_equal(drawn, drawn.round(4))
    again = [draw_profile(np.random.default_rng(3), measured, volume_mm3=50.0) for _ in range(2)]
    assert again[0] == again[1]


def test_visible_lesions_are_brighter_than_tissue_inside():
    """By 0.1 on average below the border; what lies outside does not count."""
    inside = np.array([0.0, 0.05, 0.09, 0.11, 0.5], np.float32)
    rows = np.zeros((5, 11), np.float32)
    rows[:, 0], rows[:, 1:3], rows[:, 3:6] = np.arange(5), 9, inside[:, None]
    assert visible(rows)[:, 0].tolist() == [3, 4]


def test_typical_lesions_lie_alone():
    labels = np.zeros((40, 20, 20), np.uint8)
    labels[4:7, 5:8, 5:8] = labels[9:12, 5:8, 5:8] = labels[20:23, 5:8, 5:8] = labels[30, 5, 5] = 1
    lesions = find_lesions(labels, max_event_mm3=3000.0)
    assert typical(lesions).tolist() == [False, False, True, False]
