import numpy as np
import pytest
import torch
import torchio as tio
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from transforms import check_replay, rand, with_threads

from synthlong.artifacts import acquire, blur
from synthlong.artifacts.blur import GaussianBlur, RandomGaussianBlur, gaussian_blur


def reference(x, std):
    """The same by scipy, in float64, for one volume or slice."""
    return ndimage.gaussian_filter(np.asarray(x, np.float64), std)


def worst(a, b):
    return np.abs(np.asarray(a) - np.asarray(b)).max()


@pytest.mark.parametrize("std", [0, 0.0, (0, 0, 0)])
def test_std_0_changes_nothing(std):
    x = rand(2, 5, 6, 7)
    x[0, 0, 0, 0] = -0.0
    y = gaussian_blur(x, std=std)
    assert torch.equal(y.view(torch.int32), x.view(torch.int32))
    assert y.data_ptr() != x.data_ptr()


def test_a_point_becomes_a_gaussian():
    """Truncated at 4 SD, which is 6 voxels here; what it weighs stays."""
    x = torch.zeros(17, 18, 19)
    x[8, 9, 9] = 5
    y = gaussian_blur(x, std=1.4).numpy()
    g = np.exp(-0.5 * (np.arange(-6, 7) / 1.4) ** 2)
    g /= g.sum()
    assert worst(y[2:15, 3:16, 3:16], 5 * np.einsum("i,j,k->ijk", g, g, g)) < 1e-7
    assert np.count_nonzero(y) == 13**3
    assert y.sum() == pytest.approx(5, rel=1e-6)


def test_a_plane_stays_away_from_the_edges_and_a_constant_everywhere():
    i, j, k = (torch.arange(n, dtype=torch.float32) for n in (25, 26, 27))
    x = 0.3 * i[:, None, None] - 0.1 * j[:, None] + 0.2 * k
    y = gaussian_blur(x, std=(1, 2, 0.5))
    assert worst(y[4:-4, 8:-8, 2:-2], x[4:-4, 8:-8, 2:-2]) < 5e-6
    assert worst(gaussian_blur(torch.full((3, 1, 5), 7.0), std=1.7), 7) < 5e-6


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_an_axis_with_std_0_is_untouched(axis):
    """Its slices do not know of each other."""
    x, std = rand(7, 8, 9), [1.2, 1.2, 1.2]
    std[axis] = 0
    order = torch.randperm(x.shape[axis], generator=torch.Generator().manual_seed(0))
    x.select(axis, 3)[:] += 1000
    y = gaussian_blur(x, std=std)
    alone = gaussian_blur(x.index_select(axis, order), std=std)
    assert torch.allclose(alone, y.index_select(axis, order), rtol=1e-6, atol=1e-6)
    assert worst(y, reference(x, std)) < 1e-3


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    shape=st.lists(st.integers(1, 14), min_size=2, max_size=3),
    std=st.lists(st.floats(0, 5) | st.sampled_from([0, 0.01, 0.125, 1, 1.5, 1.75]), min_size=3, max_size=3),
)
def test_equals_scipy(shape, std):
    """To 1e-6 of the range: float32's rounding."""
    x = rand(*shape)
    y = gaussian_blur(x, std=std)
    assert y.shape == x.shape
    assert worst(y, reference(x, std[: x.ndim])) < 1e-6


@pytest.mark.parametrize("std", [100, (0.3, 60, 7.9), (25, 0, 100)])
@pytest.mark.parametrize("shape", [(3, 5, 2), (1, 1, 4), (20, 21)])
def test_equals_scipy_where_the_kernel_is_wider_than_the_image(shape, std):
    x = rand(*shape)
    expected = reference(x, std if np.isscalar(std) else std[: x.ndim])
    assert worst(gaussian_blur(x, std=std), expected) < 2e-6
    volumes = x.reshape(1, *shape, *[1] * (3 - x.ndim))
    assert worst(blur._by_torch(volumes, np.broadcast_to(std, 3).tolist(), -1).reshape(shape), expected) < 2e-6


@pytest.mark.parametrize("std", [0.5, 1.75, (0.6, 1.2, 3)])
def test_equals_scipy_on_the_real_scan(real_case, std):
    x = torch.tensor(real_case.flair)
    assert worst(gaussian_blur(x, std=std), reference(x, std)) < 1e-6 * np.ptp(real_case.flair)


@pytest.mark.parametrize("shape", [(2, 33, 20, 45), (1, 1, 7, 8), (3, 4, 1, 1), (1, 64, 64, 64)])
@pytest.mark.parametrize("std", [(1.0, 1.0, 1.0), (0.0, 2.1, 0.4), (6.0, 0.0, 0.0)])
@pytest.mark.parametrize("amount", [-1.0, 1.5])
def test_the_torch_kernel_does_the_same(shape, std, amount):
    x = rand(*shape)
    y = blur._by_torch(x, std, amount)
    assert y.shape == x.shape
    assert worst(y, blur._by_numba(x.numpy(), std, amount)) < 5e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types(dtype):
    x = rand(2, 9, 8, 7).to(dtype)
    y = gaussian_blur(x, std=1.1)
    assert y.dtype == dtype
    assert torch.equal(y, gaussian_blur(x.float(), std=1.1).to(dtype))


def test_layout_batch_and_input():
    """Strides and leading volumes do not matter, to the bit; the input stays."""
    x = rand(3, 21, 13, 19).permute(0, 3, 2, 1)
    before = x.clone()
    y = gaussian_blur(x, std=(1, 1.5, 0.7))
    assert torch.equal(x, before)
    assert torch.equal(y, gaussian_blur(x.contiguous(), std=(1, 1.5, 0.7)))
    assert torch.equal(y[2], gaussian_blur(x[2], std=(1, 1.5, 0.7)))
    assert torch.equal(y, gaussian_blur(x.reshape(3, 1, 1, 19, 13, 21), std=(1, 1.5, 0.7)).reshape(x.shape))


def test_threads_do_not_matter():
    x = rand(110, 101, 103)
    results = with_threads(1, 2, compute=lambda: gaussian_blur(x, std=1.3))
    assert torch.equal(*results)


@pytest.mark.parametrize("wrong", [-0.1, 101, "1", None, (1, 2), (1, 2, -3), float("nan")])
def test_wrong_std(wrong):
    message = r"std = .*(must be a number in \[0, 100\]|one per axis)"
    with pytest.raises(ValueError, match=message):
        gaussian_blur(rand(3, 3, 3), std=wrong)
    with pytest.raises(ValueError, match=message):
        GaussianBlur(wrong)


@pytest.mark.parametrize("wrong", [-1, (2, 1), (0, 101), "wide", ((0, 1), (0, 1), (0, -1))])
def test_wrong_ranges(wrong):
    with pytest.raises(ValueError, match=r"^std = "):
        RandomGaussianBlur(wrong)
    with pytest.raises(ValueError, match=r"^std_mm = "):
        RandomGaussianBlur(std_mm=wrong)


def test_wrong_mm():
    with pytest.raises(ValueError, match=r"std_mm = 200: must be a number in \[0, 100\]"):
        GaussianBlur(std_mm=200)


@pytest.mark.parametrize("x", [torch.full((2, 2, 2), torch.nan), torch.ones(2, 2, 2).int(), torch.zeros(0, 2, 2)])
@pytest.mark.parametrize("std", [0, 1])
def test_wrong_voxels(x, std):
    with pytest.raises(ValueError, match="the image has"):
        gaussian_blur(x, std=std)


def test_draws():
    rng = np.random.default_rng(0)
    drawn = [RandomGaussianBlur().draw_params(rng)["std"] for _ in range(500)]
    assert 0.5 <= min(drawn) < 0.52
    assert 1.73 < max(drawn) <= 1.75
    each = np.array([RandomGaussianBlur(((0, 1), (2, 3), 4)).draw_params(rng)["std"] for _ in range(200)])
    assert (each >= [0, 2, 0]).all()
    assert (each <= [1, 3, 4]).all()
    assert len(np.unique(each)) > 500
    assert RandomGaussianBlur(std_mm=(2, 2)).draw_params(rng) == {"std_mm": 2}


def test_mm_follow_the_voxel_size():
    x = rand(1, 9, 10, 11)
    image = tio.ScalarImage(tensor=x, affine=np.diag([-1.0, 2.0, 4.0, 1.0])[[0, 2, 1, 3]])
    y = GaussianBlur(std_mm=2)(image).data
    assert torch.equal(y, gaussian_blur(x, std=(2, 1, 0.5)))
    assert torch.equal(
        RandomGaussianBlur(std_mm=((2, 2), (1, 1), (0, 0)))(image).data, gaussian_blur(x, std=(2, 0.5, 0))
    )


@pytest.mark.parametrize(
    "transform",
    [RandomGaussianBlur(), RandomGaussianBlur(((0, 1), (1, 2), (2, 3))), RandomGaussianBlur(std_mm=(1, 3))],
)
def test_replay_from_json(transform):
    check_replay(transform, "GaussianBlur", affine=np.diag([1.0, 2.0, 1.0, 1.0]))


def test_one_width_in_one_unit():
    with pytest.raises(ValueError, match="std and std_mm: give one of them"):
        GaussianBlur(std=1, std_mm=2)
    with pytest.raises(ValueError, match="step GaussianBlur: std and std_mm"):
        acquire(rand(4, 4, 4), steps=[("GaussianBlur", {"std": 1, "std_mm": 2})])


def test_voxels_without_size_are_named():
    x = rand(1, 4, 4, 4)
    x.affine = np.diag([1.0, 1, 0, 1])
    with pytest.raises(ValueError, match="the affine gives voxels of 1 x 1 x 0 mm"):
        GaussianBlur(std_mm=1)(x)


def test_doubles_beyond_float32_are_not_called_infinite():
    with pytest.raises(ValueError, match=r"voxels beyond 3.4e38, the largest of float32"):
        gaussian_blur(torch.full((3, 3, 3), 1e39, dtype=torch.float64), std=1)
