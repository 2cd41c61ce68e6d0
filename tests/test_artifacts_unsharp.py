import numpy as np
import pytest
import torch
import torchio as tio
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from transforms import check_replay, rand, with_threads

from synthlong.artifacts import blur
from synthlong.artifacts.blur import gaussian_blur
from synthlong.artifacts.unsharp import RandomUnsharpMask, UnsharpMask, unsharp_mask


def reference(x, std, amount):
    """The same by scipy, in float64, for one volume or slice."""
    x = np.asarray(x, np.float64)
    return x + amount * (x - ndimage.gaussian_filter(x, std))


def worst(a, b):
    return np.abs(np.asarray(a) - np.asarray(b)).max()


@pytest.mark.parametrize("params", [{"std": 0}, {"std": (0, 0, 0), "amount": 3}, {"std": 1.5, "amount": 0}])
def test_std_0_or_amount_0_changes_nothing(params):
    x = rand(2, 5, 6, 7)
    x[0, 0, 0, 0] = -0.0
    y = unsharp_mask(x, **params)
    assert torch.equal(y.view(torch.int32), x.view(torch.int32))
    assert y.data_ptr() != x.data_ptr()


def test_a_wave_grows_by_what_the_blur_takes():
    """A cosine of frequency f blurred with SD s keeps exp(-(2 pi f s)^2 / 2) of its height."""
    n = torch.arange(96, dtype=torch.float64)
    wave = torch.cos(2 * torch.pi * (n + 0.5) / 12).float()  # reflection continues it
    kept = np.exp(-0.5 * (2 * np.pi / 12 * 1.5) ** 2)
    y = unsharp_mask(wave.expand(3, 4, 96), std=1.5, amount=2)
    assert worst(y, (1 + 2 * (1 - kept)) * wave.expand(3, 4, 96)) < 2e-4  # 4 SD are not all
    assert worst(unsharp_mask(torch.full((3, 4, 5), 7.0), std=1), 7) < 5e-6


def test_an_edge_overshoots():
    x = torch.zeros(5, 5, 40)
    x[..., 20:] = 1
    y = unsharp_mask(x, std=1.5)
    assert y.max() > 1.3
    assert y.min() < -0.3
    assert worst(y[..., :10], 0) < 1e-6
    assert worst(y + y.flip(2), 1) < 1e-6


def test_it_is_what_the_blur_takes_away():
    x = rand(20, 21, 22)
    y = unsharp_mask(x, std=(1, 0, 2), amount=0.7)
    assert worst(y, x + 0.7 * (x - gaussian_blur(x, std=(1, 0, 2)))) < 1e-6


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    shape=st.lists(st.integers(1, 14), min_size=2, max_size=3),
    std=st.lists(st.floats(0, 5) | st.sampled_from([0, 1, 1.75]), min_size=3, max_size=3),
    amount=st.floats(0, 10),
)
def test_equals_scipy(shape, std, amount):
    """To 1e-6 of the range, and of each amount of it: float32's rounding."""
    x = rand(*shape)
    y = unsharp_mask(x, std=std, amount=amount)
    assert y.shape == x.shape
    assert worst(y, reference(x, std[: x.ndim], amount)) < 1e-6 * (1 + amount)


@pytest.mark.parametrize(("std", "amount"), [(0.5, 1), (1.75, 1), ((0.6, 1.2, 3), 2.5)])
def test_equals_scipy_on_the_real_scan(real_case, std, amount):
    x = torch.tensor(real_case.flair)
    y = unsharp_mask(x, std=std, amount=amount)
    assert worst(y, reference(x, std, amount)) < 1e-6 * (1 + amount) * np.ptp(real_case.flair)


@pytest.mark.parametrize("shape", [(2, 33, 20, 45), (1, 1, 7, 8), (3, 4, 1, 1)])
def test_the_torch_kernel_does_the_same(shape):
    x = rand(*shape)
    for std, amount in (((1.0, 1.0, 1.0), 1.0), ((0.0, 2.1, 0.4), 2.0)):
        assert worst(blur._by_torch(x, std, amount), blur._by_numba(x.numpy(), std, amount)) < 5e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types(dtype):
    x = rand(2, 9, 8, 7).to(dtype)
    y = unsharp_mask(x, std=1.1)
    assert y.dtype == dtype
    assert torch.equal(y, unsharp_mask(x.float(), std=1.1).to(dtype))


def test_layout_batch_and_input():
    """Strides and leading volumes do not matter, to the bit; the input stays."""
    x = rand(3, 21, 13, 19).permute(0, 3, 2, 1)
    before = x.clone()
    y = unsharp_mask(x, std=1.2)
    assert torch.equal(x, before)
    assert torch.equal(y, unsharp_mask(x.contiguous(), std=1.2))
    assert torch.equal(y[2], unsharp_mask(x[2], std=1.2))


def test_threads_do_not_matter():
    x = rand(110, 101, 103)
    results = with_threads(1, 2, compute=lambda: unsharp_mask(x, std=1.3))
    assert torch.equal(*results)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"std": -1}, r"std = -1: must be a number in \[0, 100\]"),
        ({"std": (1, 2)}, r"std = \(1, 2\): .*one per axis"),
        ({"std": 0, "amount": -1}, r"amount = -1: must be a number in \[0, 100\]"),
        ({"amount": 101}, "amount = 101"),
        ({"amount": "1"}, "amount = '1'"),
    ],
)
def test_wrong_parameters(wrong, message):
    params = {"std": 1, **wrong}
    with pytest.raises(ValueError, match=message):
        unsharp_mask(rand(3, 3, 3), **params)
    with pytest.raises(ValueError, match=message):
        UnsharpMask(**params)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"std": (2, 1)}, "std = .*must rise"),
        ({"std_mm": -1}, "std_mm = -1"),
        ({"amount": -1}, "amount = -1"),
        ({"amount": (1, 200)}, "amount = 200"),
        ({"amount": (1, 2, 3)}, r"amount = \(1, 2, 3\)"),
    ],
)
def test_wrong_ranges(wrong, message):
    with pytest.raises(ValueError, match=message):
        RandomUnsharpMask(**wrong)


@pytest.mark.parametrize("x", [torch.full((2, 2, 2), torch.inf), torch.ones(2, 2, 2).int(), torch.zeros(0, 2, 2)])
@pytest.mark.parametrize("amount", [0, 1])
def test_wrong_voxels(x, amount):
    with pytest.raises(ValueError, match="the image has"):
        unsharp_mask(x, std=1, amount=amount)


def test_draws():
    rng = np.random.default_rng(0)
    drawn = [RandomUnsharpMask().draw_params(rng) for _ in range(500)]
    assert {d["amount"] for d in drawn} == {1}
    assert 0.5 <= min(d["std"] for d in drawn) < 0.52
    assert 1.73 < max(d["std"] for d in drawn) <= 1.75
    amounts = [RandomUnsharpMask(amount=(0.5, 2)).draw_params(rng)["amount"] for _ in range(300)]
    assert 0.5 <= min(amounts) < 0.55
    assert 1.95 < max(amounts) <= 2
    assert RandomUnsharpMask(((1, 1), (2, 2), (3, 3)), amount=2).draw_params(rng) == {"std": [1, 2, 3], "amount": 2}


def test_mm_follow_the_voxel_size():
    x = rand(1, 9, 10, 11)
    image = tio.ScalarImage(tensor=x, affine=np.diag([1.0, 2.0, 4.0, 1.0]))
    expected = unsharp_mask(x, std=(2, 1, 0.5), amount=2)
    assert torch.equal(UnsharpMask(std_mm=2, amount=2)(image).data, expected)
    assert torch.equal(RandomUnsharpMask(std_mm=(2, 2), amount=2)(image).data, expected)


@pytest.mark.parametrize("transform", [RandomUnsharpMask(amount=(0.5, 2)), RandomUnsharpMask(std_mm=(1, 3))])
def test_replay_from_json(transform):
    check_replay(transform, "UnsharpMask", affine=np.diag([1.0, 2.0, 1.0, 1.0]))


def test_one_width_in_one_unit():
    with pytest.raises(ValueError, match="std and std_mm: give one of them"):
        UnsharpMask(std=1, std_mm=2)
