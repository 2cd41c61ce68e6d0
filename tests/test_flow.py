from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from synthlong.flow import flow_field, flow_weight
from synthlong.pair import render
from synthlong.recipe import Box, Recipe, draw_recipe, rng_of
from synthlong.synthesis import SynthesisConfig
from synthlong.tissue import CSF

SHAPE = (40, 36, 30)
WHOLE = tuple(slice(0, n) for n in SHAPE)
ARRAYS = ("flair", "lesions", "brain", "tissue", "healthy")
MASKS = ("new_lesions", "evolution", "lesions_baseline", "lesions_followup")

parts = st.tuples(*[st.tuples(st.integers(0, n - 1), st.integers(1, n)) for n in SHAPE]).map(
    lambda ends: tuple(slice(min(a, b - 1), max(a + 1, b)) for a, b in ends)
)


@given(parts, st.integers(0, 2**31 - 1))
@settings(deadline=None)
def test_a_field_is_the_same_from_any_region(part, seed):
    field = flow_field(SHAPE, part, seed=seed)
    assert field.dtype == np.float32
    assert np.allclose(field, flow_field(SHAPE, WHOLE, seed=seed)[part], atol=1e-6)


@given(st.tuples(*[st.integers(0, n - 1) for n in SHAPE]), st.integers(0, 2**31 - 1))
@settings(deadline=None, max_examples=20)
def test_a_field_is_noise_on_knots_five_voxels_apart_under_a_gaussian(at, seed):
    knots = [np.arange(-5, n + 10, 5) for n in SHAPE]
    noise = np.random.default_rng(seed).standard_normal([len(k) for k in knots])
    near = [np.exp(-0.5 * ((x - k) / 3.5) ** 2) for x, k in zip(at, knots, strict=True)]
    value = np.einsum("ijk,i,j,k", noise, *near) / np.prod([np.linalg.norm(n) for n in near])
    assert flow_field(SHAPE, WHOLE, seed=seed)[at] == pytest.approx(np.clip(value - 0.5, 0, 1), abs=1e-6)


def test_a_field_is_smooth_and_zero_in_most_places():
    fields = np.stack([flow_field((60, 60, 60), (slice(0, 60),) * 3, seed=seed) for seed in range(20)])
    assert (fields == 0).mean() == pytest.approx(0.69, abs=0.03)  # a Gaussian variable below 0.5
    assert fields.mean() == pytest.approx(0.169, abs=0.02)  # and its mean excess over that, up to 1
    assert fields.max() == 1
    assert np.diff(fields, axis=1).std() < 0.2
    per_place = fields.mean(axis=0)
    assert per_place.std() < 0.15  # no place is brighter than others


def test_fluid_and_the_surface_may_be_brighter(small_case):
    whole = tuple(slice(0, n) for n in small_case.shape)
    weight = flow_weight(small_case, whole)
    brain = small_case.brain > 0
    depth = ndimage.distance_transform_cdt(np.pad(brain, 1, mode="edge"), "taxicab")[1:-1, 1:-1, 1:-1]
    from_fluid = ndimage.distance_transform_edt(small_case.tissue != CSF)
    assert not weight[~brain].any()
    assert weight[brain & (depth == 1)].min() > 0.4
    assert weight[(depth > 8) & (from_fluid > 5)].max(initial=0) < 1e-3
    part = (slice(3, 30), slice(0, 22), slice(9, None))
    part = tuple(slice(p.start, p.stop or n) for p, n in zip(part, small_case.shape, strict=True))
    assert np.array_equal(flow_weight(small_case, part), weight[part])


def test_fluid_is_csf_and_three_voxels_below_the_surface_with_a_soft_edge(small_case):
    low = (slice(12, None), slice(None), slice(None))  # a brain that the grid cuts: there is no surface
    case = replace(small_case, **{name: getattr(small_case, name)[low] for name in ARRAYS})
    brain = case.brain > 0
    below = ndimage.distance_transform_cdt(brain, "taxicab")
    fluid = ((brain & (below <= 3)) | (case.tissue == CSF)).astype(float)
    expected = ndimage.gaussian_filter(fluid, 0.7) * brain
    weight = flow_weight(case, tuple(slice(0, n) for n in case.shape))
    assert weight == pytest.approx(expected, abs=1e-5)
    assert weight[8, 20, 20] == pytest.approx(1, abs=1e-3)  # the middle of the ventricle


def test_each_visit_has_its_own_and_its_lesions_stay(small_case):
    config = SynthesisConfig(artifacts="none", orientations="none", with_new_lesions=0, stable_mean=0)
    drawn = [draw_recipe(small_case, config, rng_of(0, small_case.id, k)) for k in range(20)]
    plain: Recipe = next(r for r in drawn if not any(e.source == "synthetic" for e in r.events))
    before = render(small_case, plain, whole=True)
    after = render(small_case, replace(plain, flow=((3, 0.0), (7, 0.5))), whole=True)
    assert np.array_equal(after.baseline, before.baseline)
    assert all(np.array_equal(getattr(after, k), getattr(before, k)) for k in MASKS)
    change = after.followup - before.followup
    assert change.max() > 0.2
    assert change.min() >= 0
    assert not change[after.lesions_followup > 0].any()


@pytest.mark.parametrize("start", [(3, 12, 9), (-4, 14, 8)])
def test_the_box_is_a_crop_of_the_whole_with_flow_and_offset(small_case, start):
    config = SynthesisConfig(
        artifacts="none", orientations="none", stable_mean=0, with_new_lesions=0, removed_share=0.5
    )
    drawn = [draw_recipe(small_case, config, rng_of(0, small_case.id, k)) for k in range(20)]
    plain: Recipe = next(r for r in drawn if not any(e.source == "synthetic" for e in r.events))
    recipe = replace(plain, box=Box(start, 24, "uniform"), flow=((3, 0.6), (7, 0.5)), offset_mm=(0.5, -0.4, 0.3))
    box, whole = render(small_case, recipe), render(small_case, recipe, whole=True)
    for name in ("baseline", "followup", *MASKS):
        cut = getattr(whole, name)[tuple(slice(max(s, 0), s + 24) for s in start)]
        inside = tuple(slice(24 - n, 24) for n in cut.shape)
        assert np.allclose(getattr(box, name)[inside], cut, atol=1e-5)
