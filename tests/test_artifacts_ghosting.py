import json

import numpy as np
import pytest
import torch
import torchio as tio
from hypothesis import given, settings
from hypothesis import strategies as st
from torchio.transforms.augmentation.intensity.random_ghosting import Ghosting
from transforms import with_threads

from synthlong.artifacts import ghosting, kspace
from synthlong.artifacts.base import softened
from synthlong.artifacts.ghosting import KSpaceGhosting, RandomKSpaceGhosting, kspace_ghosting

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("params", [{"ghosts": 0, "intensity": 0.7}, {"ghosts": 5, "intensity": 0}])
def test_no_ghosts_or_no_intensity_change_nothing(params):
    x = torch.rand(2, 9, 8, 7)
    y = kspace_ghosting(x, axis=1, **params)
    assert torch.equal(x, y)
    assert y.data_ptr() != x.data_ptr()


def test_nothing_left_to_weaken_changes_nothing():
    x = torch.rand(8, 9, 10)
    assert torch.equal(kspace_ghosting(x, ghosts=3, axis=0, intensity=1, restore=1), x)
    assert torch.equal(kspace_ghosting(x[:1], ghosts=3, axis=0, intensity=1), x[:1])


def test_a_delta_gets_shifted_copies():
    """A comb of planes is a comb of copies: of g, each has 1 / g of the height."""
    x = torch.zeros(64, 3, 2)
    x[10] = 1
    y = kspace_ghosting(x, ghosts=4, axis=0, intensity=0.8)
    expected = torch.full((64,), 0.8 / 64)  # the central plane, restored, is the mean
    expected[10] += 1 - 0.8 / 4
    expected[[26, 42, 58]] -= 0.8 / 4
    assert torch.allclose(y, expected[:, None, None].expand_as(y), atol=1e-6)


def test_the_mean_is_kept_and_waves_on_the_comb_are_weakened():
    along = torch.arange(40.0)
    for plane, factor in ((20, 1.0), (25, 0.7), (24, 1.0)):  # the centre; every fifth, on one side or both; the others
        wave = torch.cos(2 * torch.pi * (plane - 20) * along / 40).view(1, 1, 40).expand(2, 3, 40)
        y = kspace_ghosting(wave, ghosts=5, axis=2, intensity=0.3)
        assert torch.allclose(y, factor * wave, atol=1e-5)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    shape=st.tuples(*[st.integers(1, 14)] * 3),
    ghosts=st.integers(1, 12),
    axis=st.integers(0, 2),
    intensity=st.floats(0.01, 1.5),
    restore=st.none() | st.floats(0, 1),
    seed=st.integers(0, 2**32 - 1),
)
def test_equals_torchio(shape, ghosts, axis, intensity, restore, seed):
    x = torch.rand(2, *shape, generator=torch.Generator().manual_seed(seed))
    expected = Ghosting(ghosts, axis, intensity, restore)(x)
    y = kspace_ghosting(x, ghosts=ghosts, axis=axis, intensity=intensity, restore=restore)
    assert (y - expected).abs().max() < 1e-5  # of a range of 1


@pytest.mark.parametrize(
    "shape",
    [(64, 5, 4), (5, 64, 4), (4, 5, 64), (182, 4, 3), (4, 218, 3), (3, 4, 182), (4, 3, 218), (405, 4, 3), (3, 4, 512)],
)
@pytest.mark.parametrize("ghosts", [1, 4, 7, 10])
def test_equals_torchio_along_long_axes(shape, ghosts):
    """Products with a matrix or with its factors, and Fourier transforms."""
    x, axis = torch.rand(1, *shape), int(np.argmax(shape))
    for restore in (None, 0.2):
        expected = Ghosting(ghosts, axis, 0.8, restore)(x)
        y = kspace_ghosting(x, ghosts=ghosts, axis=axis, intensity=0.8, restore=restore)
        assert (y - expected).abs().max() < 1e-5


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_equals_torchio_on_a_scan(real_case, axis):
    x = torch.tensor(real_case.flair[None, 20:160, 30:190, 20:150])
    expected = Ghosting(6, axis, 0.9, None)(x)
    y = kspace_ghosting(x, ghosts=6, axis=axis, intensity=0.9)
    assert (y - expected).abs().max() < 1e-4 * (x.max() - x.min())
    assert (y - x).abs().max() > 0.1


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_products_and_transforms_agree(axis, monkeypatch):
    x = torch.rand(2, 30, 27, 32)
    results = []
    for faster in (True, False):
        monkeypatch.setattr(kspace, "_transform_is_faster", lambda *_, faster=faster: faster)
        results.append(kspace_ghosting(x, ghosts=4, axis=axis, intensity=0.7))
    assert torch.allclose(*results, atol=1e-6)
    assert not torch.equal(*results)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types(dtype):
    x = torch.rand(2, 12, 11, 10).to(dtype)
    y = kspace_ghosting(x, ghosts=3, axis=0, intensity=0.7)
    assert y.dtype == dtype
    assert torch.equal(y, kspace_ghosting(x.float(), ghosts=3, axis=0, intensity=0.7).to(dtype))


def test_strides_slices_and_extra_axes():
    x = torch.rand(10, 2, 3, 12, 11)
    before = x.clone()
    view = x.permute(1, 2, 3, 4, 0)
    for axis in range(3):
        y = kspace_ghosting(view, ghosts=3, axis=axis, intensity=0.7)
        assert torch.equal(y, kspace_ghosting(view.contiguous(), ghosts=3, axis=axis, intensity=0.7))
        assert torch.allclose(y[1, 2], kspace_ghosting(view[1, 2], ghosts=3, axis=axis, intensity=0.7), atol=1e-6)
    assert torch.equal(x, before)
    flat = kspace_ghosting(x[0, 0, 0], ghosts=3, axis=0, intensity=0.7)
    assert torch.equal(flat, kspace_ghosting(x[0, 0, 0][..., None], ghosts=3, axis=0, intensity=0.7)[..., 0])
    assert torch.equal(kspace_ghosting(x[0, 0, 0], ghosts=3, axis=2, intensity=0.7), x[0, 0, 0])


@pytest.mark.parametrize("ghosts", [4, 9])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_threads_do_not_change_bits(axis, ghosts):
    x = torch.rand(1, 100, 96, 126)
    one, again, two = with_threads(1, 1, 2, compute=lambda: kspace_ghosting(x, ghosts=ghosts, axis=axis, intensity=0.7))
    assert torch.equal(again, one)
    assert torch.equal(two, one)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"ghosts": -1}, r"ghosts = -1: must be a whole number in \[0, 10000\]"),
        ({"ghosts": 2.5}, "ghosts = 2.5"),
        ({"axis": 3}, r"axis = 3: must be a whole number in \[0, 2\]"),
        ({"axis": None}, "axis = None"),
        ({"intensity": -0.1}, r"intensity = -0.1: must be a number in \[0, 100\]"),
        ({"intensity": float("nan")}, "intensity = nan"),
        ({"restore": 1.1}, r"restore = 1.1: must be a number in \[0, 1\]"),
    ],
)
def test_wrong_parameters_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        kspace_ghosting(torch.rand(4, 4, 4), **{"ghosts": 4, "axis": 0, "intensity": 0.5, "restore": 0.1, **wrong})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"ghosts": (4, 2)}, "the range must rise"),
        ({"intensity": (-1, 1)}, "intensity = -1"),
        ({"restore": 2}, "restore = 2"),
        ({"axes": (0, 4)}, "axes = 4"),
        ({"axes": ()}, r"axes = \(\)"),
        ({"axes": "LR"}, "axes = 'LR'"),
    ],
)
def test_wrong_ranges_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        RandomKSpaceGhosting(**wrong)
    with pytest.raises(ValueError, match="intensity"):
        KSpaceGhosting(4, 0, -1)


def test_draws_stay_in_range():
    rng, random = np.random.default_rng(3), RandomKSpaceGhosting(axes=(0, 2), restore=(0.1, 0.3))
    draws = [random.draw_params(rng) for _ in range(500)]
    assert {draw["axis"] for draw in draws} == {0, 2}
    assert {draw["ghosts"] for draw in draws} == set(range(4, 11))
    for name, low, high in (("intensity", 0.5, 1), ("restore", 0.1, 0.3)):
        values = [draw[name] for draw in draws]
        assert low <= min(values) < low + 0.05 * (high - low)
        assert high - 0.05 * (high - low) < max(values) <= high
    assert json.loads(json.dumps(draws)) == draws
    assert RandomKSpaceGhosting(axes=1).draw_params(rng)["axis"] == 1
    assert RandomKSpaceGhosting().draw_params(rng)["restore"] is None


def test_severity_zero_is_the_identity():
    params = RandomKSpaceGhosting().draw_params(np.random.default_rng(0))
    x = torch.rand(8, 9, 10)
    assert torch.equal(kspace_ghosting(x, **softened(params, RandomKSpaceGhosting.identity, 0)), x)


def test_history_replays_the_bits():
    subject = tio.Subject(
        baseline=tio.ScalarImage(tensor=torch.rand(2, 16, 17, 12)),
        followup=tio.ScalarImage(tensor=torch.rand(1, 16, 17, 12)),
        lesions=tio.LabelMap(tensor=torch.ones(1, 16, 17, 12)),
    )
    result = RandomKSpaceGhosting(seed=4)(subject)
    ((name, arguments),) = result.applied_transforms
    again = getattr(ghosting, name)(**json.loads(json.dumps(arguments)))(subject)
    for image in ("baseline", "followup"):
        params = {parameter: arguments[parameter][image] for parameter in ("ghosts", "axis", "intensity", "restore")}
        expected = kspace_ghosting(subject[image].data, **params)
        assert torch.equal(result[image].data, expected)
        assert torch.equal(again[image].data, expected)
        assert not torch.equal(expected, subject[image].data)
    assert torch.equal(result["lesions"].data, subject["lesions"].data)
