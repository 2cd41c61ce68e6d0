from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from synthlong import inpainting
from synthlong.bank import LesionBank, Shape
from synthlong.errors import InputError
from synthlong.hole import first_guess, hole_in, soft_hole
from synthlong.inpainting import HealthySampler, Inpainter, _fade, _windows, heal, put
from synthlong.networks import UNet, UNetConfig

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = UNetConfig(in_channels=3, out_channels=1, widths=(8, 16))


def inpainter(*, trained=True):
    torch.manual_seed(0)
    network = UNet(CONFIG).eval()
    if trained:
        torch.nn.init.normal_(network.head.weight, std=0.1)
    return Inpainter(network, sha256="none")


def bank():
    ball = np.linalg.norm(np.indices((5, 5, 5)) - 2, axis=0) <= 2
    return LesionBank.from_shapes([Shape(ball, (10, 0, 0)), Shape(ball[1:4], (-10, 5, 0))])


def test_fill_leaves_everything_else_bit_for_bit(small_case):
    x, mask = small_case.flair.copy(), small_case.lesions.copy()
    filled = inpainter().fill(x, mask)
    hole = soft_hole(mask) > 0
    assert filled.dtype == np.float32
    assert np.array_equal(filled[~hole], x[~hole])
    assert (filled >= 0).all()
    assert not np.array_equal(filled, x)
    assert np.array_equal(x, small_case.flair)
    assert np.array_equal(mask, small_case.lesions)
    assert np.array_equal(filled, inpainter().fill(x, mask))
    assert not np.array_equal(filled, inpainter().fill(x, mask, seed=1))


def test_fill_leaves_the_background_alone(small_case):
    mask = np.zeros(small_case.shape, np.uint8)
    mask[20, 20, 34:37] = 1  # at the brain's border
    hole = soft_hole(mask) > 0
    assert (small_case.flair[hole] == 0).any()
    filled = inpainter().fill(small_case.flair, mask)
    assert np.array_equal(filled == 0, small_case.flair == 0)


def test_fill_without_lesions_is_a_copy(small_case):
    filled = inpainter().fill(small_case.flair, np.zeros_like(small_case.lesions))
    assert np.array_equal(filled, small_case.flair)
    assert filled is not small_case.flair


def test_an_untrained_inpainter_gives_the_first_guess(small_case, monkeypatch):
    monkeypatch.setattr(inpainting, "roughen", lambda x, *_, **__: x)
    weight = hole_in(small_case.flair, small_case.lesions)
    guess = first_guess(small_case.flair, weight, sweeps=200)
    expected = small_case.flair + weight * (guess - small_case.flair)
    filled = inpainter(trained=False).fill(small_case.flair, small_case.lesions)
    assert np.abs(filled - expected).max() < 1e-6
    assert np.abs((filled - small_case.healthy)[small_case.lesions == 1]).mean() < 0.1


@pytest.mark.parametrize("shape", [(20, 17, 30), (40, 60, 22), (50, 49, 33)])
def test_fill_on_any_grid(shape):
    rng = np.random.default_rng(0)
    x = rng.uniform(0.8, 1.2, shape).astype(np.float32)
    mask = np.zeros(shape, bool)
    for at in ((0, 0, 0), np.array(shape) - 1, np.array(shape) // 2):
        mask[tuple(at)] = True
    filled = inpainter().fill(x, mask)
    hole = soft_hole(mask) > 0
    assert np.isfinite(filled).all()
    assert np.array_equal(filled[~hole], x[~hole])
    assert not np.array_equal(filled, x)


@settings(max_examples=40, deadline=None)
@given(st.tuples(*[st.integers(8, 120)] * 3), st.integers(0, 10**6))
def test_windows_cover_the_hole(shape, seed):
    rng = np.random.default_rng(seed)
    hole = np.zeros(shape, bool)
    for _ in range(4):
        hole[tuple(int(rng.integers(n)) for n in shape)] = True
    hole[-1, -1, -1] = True
    covered = np.zeros(shape, bool)
    windows = _windows(hole)
    for window in windows:
        covered[window] = True
        assert hole[window].any()
        assert all(s.stop - s.start == min(48, n) for s, n in zip(window, shape, strict=True))
    assert covered[hole].all()
    assert len({tuple(s.start for s in w) for w in windows}) == len(windows)
    assert _fade((48, 48, 20)).min() > 1e-4


def test_heal_adds_the_healthy_volume(small_case):
    sick = replace(small_case, healthy=None)
    healed = heal(sick, inpainter())
    assert sick.healthy is None
    assert healed.id == sick.id
    assert healed.flair is sick.flair
    assert np.array_equal(healed.healthy, inpainter().fill(sick.flair, sick.lesions))


def test_put_leaves_out_what_lies_beyond():
    mask = np.zeros((5, 5, 5), bool)
    put(mask, np.ones((3, 3, 3), bool), np.array([-1, 3, 1]))
    assert mask.sum() == 2 * 2 * 3
    assert mask[0:2, 3:5, 1:4].all()


@pytest.fixture
def spacious(small_case):
    """A case with one lesion in a corner of the brain, and room for patches of 16^3."""
    lesions = np.zeros_like(small_case.lesions)
    lesions[8:11, 20, 20] = 1
    return replace(small_case, lesions=lesions, flair=small_case.healthy.copy())


def sampler(*cases):
    return HealthySampler(list(cases), bank=bank(), frequency=[np.ones(c.shape, np.float32) for c in cases])


def test_healthy_samples(spacious):
    # lesions are marked by a value that tissue never has: no patch may show it
    marked = replace(spacious, flair=np.where(spacious.lesions, np.float32(9), spacious.flair))
    draws = sampler(marked)
    for n in range(20):
        sample = draws.draw(np.random.default_rng(n), side=16, varied=False)
        assert sample.inputs.shape == (3, 16, 16, 16)
        assert sample.target.shape == sample.weight.shape == (1, 16, 16, 16)
        assert sample.target.max() < 5
        assert (sample.target[sample.weight > 0] > 0).all()
        assert (sample.weight > 0.5).sum() >= 20
        away = sample.weight[0] == 0
        assert np.array_equal(sample.inputs[0][away], sample.target[0][away])
        assert np.array_equal(sample.inputs[1][away], sample.target[0][away])
        assert np.array_equal(sample.inputs[2], sample.weight[0])
        assert np.isfinite(sample.inputs).all()


def test_healthy_samples_vary_but_repeat(spacious):
    draws = sampler(spacious)
    first, again, other = (draws.draw(np.random.default_rng(n), side=16) for n in (1, 1, 2))
    for name in ("inputs", "target", "weight"):
        assert np.array_equal(getattr(first, name), getattr(again, name))
        assert getattr(first, name).dtype == np.float32
    assert not np.array_equal(first.target, other.target)
    assert (first.target[first.weight > 0] > 0).all()


def test_no_lesion_free_patch_is_an_error(small_case):
    full = replace(small_case, lesions=np.ones_like(small_case.lesions))
    full.lesions[:2] = 0
    full.brain[:2] = 1
    with pytest.raises(InputError, match="no lesion-free patches of 16"):
        sampler(full).draw(np.random.default_rng(0), side=16)
