import numpy as np
import pytest
from scipy import ndimage

from synthlong.hole import first_guess, soft_hole
from synthlong.profile import depth_in
from synthlong.texture import Texture, mottle, roughen, texture_of


def grainy(shape, sd, widths, seed):
    """A flat image with grain, made without the module under test."""
    grain = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), widths, mode="wrap")
    return (1 + sd * grain / grain.std()).astype(np.float32)


def neighbours(x, axis):
    x = x - x.mean()
    n = x.shape[axis]
    return float((np.take(x, range(n - 1), axis) * np.take(x, range(1, n), axis)).mean() / (x**2).mean())


@pytest.mark.parametrize("correlation", [(0.0, 0.0, 0.0), (0.5, 0.5, 0.5), (0.7, 0.6, 0.85)])
def test_noise_has_the_correlation_asked_for(correlation):
    noise = Texture(0.1, correlation).noise((64, 64, 64), seed=1)
    rest = noise - ndimage.gaussian_filter(noise, 1.5)
    assert rest.std() == pytest.approx(1, abs=0.02)
    assert noise.std() == pytest.approx(Texture(1.0, correlation).whole_sd, rel=0.02)
    assert [neighbours(rest, a) for a in range(3)] == pytest.approx(correlation, abs=0.06)
    assert np.array_equal(noise, Texture(0.1, correlation).noise((64, 64, 64), seed=1))
    assert not np.array_equal(noise, Texture(0.1, correlation).noise((64, 64, 64), seed=2))


def test_texture_is_measured_on_tissue_alone():
    x = grainy((48, 48, 48), 0.05, (0.5, 0.5, 0.5), seed=0)
    x[:, :10], x[:10] = 0.2, 0  # CSF, background
    left_out = np.zeros(x.shape, np.uint8)
    left_out[30:40, 30:40, 30:40] = 1
    x[left_out > 0] += np.random.default_rng(1).normal(0, 0.5, left_out.sum()).astype(np.float32)
    texture = texture_of(x, left_out)
    assert texture.sd == pytest.approx(0.05, rel=0.1)
    assert texture.correlation == pytest.approx([neighbours(x[12:, 12:28, 12:], a) for a in range(3)], abs=0.1)


def test_a_few_bright_spots_are_no_texture():
    x = grainy((48, 48, 48), 0.05, (0.5, 0.5, 0.5), seed=0)
    spots = np.random.default_rng(1).random(x.shape) < 5e-4
    even, spotted = (texture_of(image, np.zeros(x.shape)) for image in (x, x + 3 * spots.astype(np.float32)))
    assert spotted.sd == pytest.approx(even.sd, rel=0.05)
    assert spotted.correlation == pytest.approx(even.correlation, abs=0.05)


def test_texture_of_little_tissue_is_that_of_all_of_it():
    few = grainy((48, 48, 48), 0.05, (0.5, 0.5, 0.5), seed=0)[:7, :7, :7]
    assert texture_of(few, np.zeros(few.shape)).sd == pytest.approx(0.05, rel=0.25)


def test_texture_of_an_image_without_tissue_is_none():
    nothing = np.zeros((12, 12, 12), np.float32)
    assert texture_of(nothing, nothing).sd == 0
    assert np.array_equal(roughen(nothing, nothing + 1, texture_of(nothing, nothing), seed=0), nothing)


def test_roughen_gives_a_smooth_fill_the_grain_around():
    x = grainy((48, 48, 48), 0.06, (0.6, 0.6, 0.6), seed=3)
    weight = np.zeros(x.shape, np.float32)
    weight[14:34, 14:34, 14:34] = 1
    smooth = np.where(weight > 0, np.float32(1), x)
    rough = roughen(smooth, weight, texture_of(x, weight), seed=4)
    assert np.array_equal(rough[weight == 0], smooth[weight == 0])
    inner = (slice(18, 30),) * 3
    assert rough[inner].std() == pytest.approx(0.06, rel=0.15)
    assert neighbours(rough[inner], 0) == pytest.approx(neighbours(x, 0), abs=0.12)


def test_roughen_adds_little_to_what_is_rough_already():
    x = grainy((40, 40, 40), 0.06, (0.6, 0.6, 0.6), seed=5)
    added = roughen(x, np.ones_like(x), texture_of(x, np.zeros_like(x)), seed=6) - x
    assert added.std() < 0.025


def test_mottle_is_as_strong_as_asked_for():
    x = np.full((40, 40, 40), 2, np.float32)
    weight = np.ones_like(x)
    weight[:, :4] = 0
    spread = np.full_like(x, 0.1)
    spread[20:] = 0.2
    texture = Texture(0.05, (0.6, 0.6, 0.6))
    uneven = mottle(x, weight, texture, spread=spread, there=np.zeros_like(x), seed=1) - x
    assert not uneven[:, :4].any()
    assert uneven[:20, 4:].std() == pytest.approx(0.1, rel=0.1)
    assert uneven[20:, 4:].std() == pytest.approx(0.2, rel=0.1)
    there = np.random.default_rng(0).normal(0, 0.08, x.shape)
    less = mottle(x, weight, texture, spread=spread, there=there, seed=1) - x
    assert less[:20, 4:].std() == pytest.approx(np.sqrt(0.1**2 - 0.08**2), rel=0.15)
    assert np.array_equal(mottle(x, weight, texture, spread=0 * spread, there=there, seed=1), x)
    dark = mottle(x * np.float32(0.05), weight, texture, spread=spread, there=np.zeros_like(x), seed=1)
    assert dark.min() == 0


def test_grain_fills_up_what_has_faded_at_a_soft_edge():
    x = np.full((64, 24, 24), 1, np.float32)
    weight = np.broadcast_to(np.linspace(0, 1, 64, dtype=np.float32)[:, None, None], x.shape)
    texture = Texture(0.05, (0.5, 0.5, 0.5))
    spread = np.full_like(x, 0.1)
    own = 1 - weight
    grain = mottle(x, weight, texture, spread=spread, there=np.zeros_like(x), seed=2) - x
    total = np.sqrt(grain.std(axis=(1, 2)) ** 2 + (0.1 * own[:, 0, 0]) ** 2)
    assert total == pytest.approx(np.full(64, 0.1), rel=0.3)


def spread_about_mean(x, where):
    return float((x - ndimage.gaussian_filter(x, 1.5))[where].std())


@pytest.mark.parametrize("radius", [1.5, 3, 6])
def test_roughen_fills_up_the_soft_edge_of_a_hole(radius):
    ball = np.linalg.norm(np.indices((32, 32, 32)) - 16, axis=0) <= radius
    weight, depth = soft_hole(ball), depth_in(ball)
    before, after = [], []
    for seed in range(20):
        x = grainy(ball.shape, 0.06, (0.6, 0.6, 0.6), seed)
        smooth = x + weight * (first_guess(x, weight) - x)
        rough = roughen(smooth, weight, texture_of(x, weight > 0), seed=seed + 100)
        layers = [np.abs(depth - d) <= 0.5 for d in (-1.5, -0.5, 0.5)]
        before.append([spread_about_mean(x, layer) for layer in layers])
        after.append([spread_about_mean(rough, layer) for layer in layers])
    assert np.mean(after, axis=0) == pytest.approx(np.mean(before, axis=0), rel=0.08)


def test_roughen_takes_the_wall_of_a_ventricle_for_no_grain():
    ball = np.linalg.norm(np.indices((40, 32, 32)) - [[[[16]]], [[[16]]], [[[16]]]], axis=0) <= 3
    weight = soft_hole(ball)
    near, far = [], []
    for seed in range(20):
        x = grainy(ball.shape, 0.06, (0.6, 0.6, 0.6), seed)
        x[21:] = 0.3  # 2 voxels beyond the mask
        smooth = np.where(weight > 0, np.float32(1), x)
        added = np.abs(roughen(smooth, weight, texture_of(x, weight > 0), seed=seed + 100) - smooth)
        near.append(added[18][ball[18]].mean())
        far.append(added[14][ball[14]].mean())
    assert np.mean(near) == pytest.approx(np.mean(far), rel=0.1)


def test_roughen_takes_the_grain_of_the_tissue_nearby():
    x = grainy((96, 32, 32), 0.06, (0.6, 0.6, 0.6), seed=5)
    x[:48] = 1 + (x[:48] - 1) / 2  # white matter, the rest is gray
    ball = np.zeros(x.shape, bool)
    for place in (16, 80):
        ball |= np.linalg.norm(np.indices(x.shape) - np.reshape((place, 16, 16), (3, 1, 1, 1)), axis=0) <= 4
    weight = soft_hole(ball)
    smooth = x + weight * (first_guess(x, weight) - x)
    rough = [roughen(smooth, weight, texture_of(x, weight > 0), seed=seed) for seed in range(10)]
    for half in (np.s_[:48], np.s_[48:]):
        spreads = [spread_about_mean(r[half], ball[half]) for r in rough]
        assert np.mean(spreads) == pytest.approx(spread_about_mean(x[half], ~ball[half]), rel=0.15)
