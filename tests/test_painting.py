from dataclasses import replace

import numpy as np
import pytest
import torch

from synthlong.errors import InputError
from synthlong.hole import first_guess, hole_in, soft_hole
from synthlong.networks import UNet, UNetConfig
from synthlong.painting import LesionPainter, LesionSampler, raised_by_own
from synthlong.profile import Profile, contrast_of, soft_depth
from synthlong.weights import write_weights

pytestmark = pytest.mark.usefixtures("one_thread")

PROFILE = Profile((0.0, 0.1, 0.4, 0.5, 0.6), (0.05,) * 5)
CONFIG = UNetConfig(in_channels=3, out_channels=1, widths=(8, 16))


def network():
    torch.manual_seed(0)
    made = UNet(CONFIG).eval()
    torch.nn.init.normal_(made.head.weight, std=0.1)
    return made


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_paint_changes_the_lesion_alone(small_case, precision):
    painter = LesionPainter(network(), sha256="none", precision=precision)
    x = small_case.healthy[4:36, 4:36, 4:36].copy()
    mask = small_case.lesions[4:36, 4:36, 4:36].copy()
    before = x.copy()
    painted = painter.paint(x, mask, seed=4, profile=PROFILE)
    assert painted.dtype == np.float32
    hole = soft_hole(mask) > 0
    assert np.array_equal(painted[~hole], x[~hole])
    assert (painted[mask == 1] != x[mask == 1]).mean() > 0.9
    assert (painted >= 0).all()
    assert np.array_equal(x, before)
    assert np.array_equal(painted, painter.paint(x, mask, seed=4, profile=PROFILE))
    assert not np.array_equal(painted, painter.paint(x, mask, seed=5, profile=PROFILE))


def test_paint_leaves_the_background_and_empty_masks_alone(small_case):
    painter = LesionPainter(network(), sha256="none")
    mask = np.zeros((40, 40, 40), np.uint8)
    assert np.array_equal(painter.paint(small_case.healthy, mask, seed=0, profile=PROFILE), small_case.healthy)
    mask[20, 20, 34:38] = 1
    painted = painter.paint(small_case.healthy, mask, seed=0, profile=PROFILE)
    assert np.array_equal(painted == 0, small_case.healthy == 0)


@pytest.mark.parametrize("radius", [1.2, 2.5, 5])
def test_a_lesion_is_brighter_than_what_was_there(radius):
    """In bright cortex, too, which a first guess from its surroundings does not know of."""
    painter = LesionPainter(network(), sha256="none")
    away = np.linalg.norm(np.indices((40, 40, 40)) - 19.5, axis=0)
    x = (1 + 0.02 * np.random.default_rng(0).standard_normal(away.shape)).astype(np.float32)
    x[away < radius + 1] += 0.5
    mask = away <= radius
    faint = Profile((0.0, 0.05, 0.2, 0.25, 0.3), (0.03,) * 5)
    wanted = contrast_of(faint, soft_depth(mask), mask)
    for seed in range(5):
        change = painter.paint(x, mask, seed=seed, profile=faint) - x
        assert change[mask].mean() > 0.7 * wanted
        assert not change[soft_hole(mask) == 0].any()


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 6), (1, 2, 5)])
def test_thin_lesions_are_painted(shape):
    """Their smoothed border is nowhere below their surface."""
    painter = LesionPainter(network(), sha256="none")
    x, mask = np.ones((24, 24, 24), np.float32), np.zeros((24, 24, 24), bool)
    mask[tuple(slice(12, 12 + n) for n in shape)] = True
    painted = painter.paint(x, mask, seed=0, profile=PROFILE)
    assert np.isfinite(painted).all()
    assert (painted - x)[mask].mean() > 0.05


def test_read(tmp_path):
    path = tmp_path / "g.safetensors"
    sha256 = write_weights(path, network(), task="generator", card={})
    painter = LesionPainter.read(path)
    assert painter.sha256 == sha256
    x, mask = np.ones((16, 16, 16), np.float32), np.zeros((16, 16, 16))
    mask[7:9, 7:9, 7:9] = 1
    direct = LesionPainter(network(), sha256)
    assert np.array_equal(
        painter.paint(x, mask, seed=1, profile=PROFILE), direct.paint(x, mask, seed=1, profile=PROFILE)
    )
    write_weights(path, network(), task="inpainter", card={})
    with pytest.raises(InputError, match="of the inpainter"):
        LesionPainter.read(path)


def test_lesion_samples(small_case):
    sampler = LesionSampler([small_case])
    for n in range(20):
        sample = sampler.draw(np.random.default_rng(n), side=16, varied=False)
        assert sample.inputs.shape == (3, 16, 16, 16)
        assert sample.target.shape == sample.weight.shape == (1, 16, 16, 16)
        lesion = sample.inputs[2] > 0
        assert lesion.sum() >= 4
        assert (sample.weight[0][lesion] == 1).all()
        assert (sample.target[sample.weight > 0] > 0).all()
        assert (sample.target[0][lesion] > 1.2).all()  # the mask moves with its scan
        away = sample.weight[0] == 0
        assert np.array_equal(sample.inputs[0][away], sample.target[0][away])
        assert np.array_equal(sample.inputs[1][away], sample.target[0][away])


def test_lesion_samples_vary_but_repeat(small_case):
    sampler = LesionSampler([small_case])
    first, again, other = (sampler.draw(np.random.default_rng(n), side=16) for n in (1, 1, 2))
    for name in ("inputs", "target", "weight"):
        assert np.array_equal(getattr(first, name), getattr(again, name))
        assert getattr(first, name).dtype == np.float32
    assert not np.array_equal(first.target, other.target)
    assert (first.target[first.weight > 0] > 0).all()


def test_the_first_guess_of_a_sample_has_each_lesions_own_contrast(small_case):
    x = small_case.healthy.copy()
    x[small_case.lesions > 0] += 0.3
    half = (np.indices(x.shape)[0] > 24) & (small_case.lesions > 0)
    x[half] += 0.3
    labels = small_case.lesions + half
    weight = hole_in(x, labels)
    plain = first_guess(x, weight)
    guess = raised_by_own(x, plain, labels, weight)
    assert np.array_equal(guess[weight == 0], plain[weight == 0])
    for number, contrast in ((1, 0.3), (2, 0.6)):
        there = labels == number
        assert (guess - plain)[there].mean() == pytest.approx((x - plain)[there].mean(), rel=0.2)
        assert (guess - small_case.healthy)[there].mean() == pytest.approx(contrast, abs=0.12)


def test_no_lesions_to_learn_from(small_case):
    none = replace(small_case, lesions=np.zeros_like(small_case.lesions))
    with pytest.raises(InputError, match="no lesions"):
        LesionSampler([none]).draw(np.random.default_rng(0), side=16)
    tiny = none.lesions.copy()
    tiny[28, 20, 20] = 1
    with pytest.raises(InputError, match="small: no lesions to learn from"):
        LesionSampler([replace(none, lesions=tiny)]).draw(np.random.default_rng(0), side=16)
