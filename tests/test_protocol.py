from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from synthlong.derived import scaling_of
from synthlong.pair import render
from synthlong.protocol import AS_IT_IS, toned
from synthlong.recipe import Recipe, draw_recipe, rng_of
from synthlong.synthesis import SynthesisConfig

grays = st.lists(st.floats(0, 3, width=32), min_size=2, max_size=30).map(lambda v: np.array(v, np.float32))
tones = st.tuples(*[st.floats(np.exp(-0.5), np.exp(0.5))] * 2)


@given(grays, tones)
def test_a_gray_scale_keeps_order_mode_and_background(x, tone):
    y = toned(x, tone)
    assert y.dtype == np.float32
    assert np.array_equal(y > 0, x > 0)
    assert (np.diff(y[np.argsort(x)]) >= 0).all()
    assert toned(np.ones(1, np.float32), tone) == pytest.approx(1, abs=1e-6)
    contrast, gamma = tone
    assert np.allclose(y[y > 0.01], (1 + contrast * (x.astype(float) ** gamma - 1))[y > 0.01], atol=1e-5)


def test_dark_voxels_of_the_brain_are_no_holes(small_case):
    x = np.array([-0.5, 0, 0.001, 0, 1], np.float32)
    y = toned(x, (0.8, 1.0), np.array([True, True, True, False, True]))
    assert np.allclose(y, [0.2, 0.2, 0.2008, 0, 1], atol=1e-6)
    flair = small_case.flair.copy()
    flair[20, 20, 20] = 0
    dark = replace(small_case, flair=flair, healthy=flair)
    recipe = draw_recipe(dark, SynthesisConfig(artifacts="none", orientations="none"), rng_of(0, dark.id, 0))
    recipe = replace(recipe, events=tuple(e for e in recipe.events if e.source == "real"), tones=((0.8, 1.0), AS_IT_IS))
    pair = render(dark, recipe, whole=True)
    assert pair.baseline[20, 20, 20] == pytest.approx(0.2, abs=1e-6)
    assert not pair.baseline[dark.brain == 0].any()


def test_as_it_is_changes_no_bit():
    x = np.random.default_rng(0).random(100, np.float32)
    assert np.array_equal(toned(x, AS_IT_IS), x)


def test_each_visit_has_its_own_and_the_masks_stay(small_case):
    config = SynthesisConfig(artifacts="none", protocol_spread=0.3)
    recipe = draw_recipe(small_case, config, rng_of(0, small_case.id, 1))
    plain = replace(recipe, tones=(AS_IT_IS, AS_IT_IS))
    assert (
        plain.events == draw_recipe(small_case, SynthesisConfig(artifacts="none"), rng_of(0, small_case.id, 1)).events
    )
    assert Recipe.from_json(recipe.to_json()) == recipe
    assert recipe.scaling == tuple(scaling_of(small_case, tone) for tone in recipe.tones)
    assert recipe.scaling[0] != recipe.scaling[1]
    before, after = (render(small_case, r, whole=True) for r in (plain, recipe))
    assert np.array_equal(after.baseline, toned(before.baseline, recipe.tones[0]))
    assert np.array_equal(after.followup, toned(before.followup, recipe.tones[1]))
    assert np.array_equal(after.evolution, before.evolution)


def test_tones_spread_as_far_as_asked(small_case):
    drawn = [draw_recipe(small_case, SynthesisConfig(protocol_spread=0.2), rng_of(0, "a", k)).tones for k in range(100)]
    logs = np.log(drawn)
    assert 0.19 < np.abs(logs).max() <= 0.2 + 1e-4
    assert np.abs(logs.mean(axis=0)).max() < 0.04
    assert abs(np.corrcoef(logs[:, 0, 0], logs[:, 1, 0])[0, 1]) < 0.3
    assert draw_recipe(small_case, SynthesisConfig(), rng_of(0, "a", 0)).tones == (AS_IT_IS, AS_IT_IS)
