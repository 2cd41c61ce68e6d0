import numpy as np
import pytest
import torch
import torchio as tio
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.interpolate import make_interp_spline
from scipy.ndimage import map_coordinates, spline_filter1d
from transforms import check_replay, rand, with_threads

from synthlong.artifacts import downsampling
from synthlong.artifacts.downsampling import (
    AnisotropicDownsampling,
    RandomAnisotropicDownsampling,
    anisotropic_downsampling,
)


def grid(n, factor):
    """Places of the coarse samples, in voxels."""
    m = max(1, int(n / factor))
    return (n - 1) / 2 + (np.arange(m) - (m - 1) / 2) * factor


def reference(x, factor, axis, prefilter=False):
    """The same by scipy, in float64."""
    moved = np.moveaxis(np.asarray(x, np.float64), axis, -1)
    n, places = moved.shape[-1], grid(moved.shape[-1], factor)
    if prefilter:
        integral = make_interp_spline(np.arange(n + 1) - 0.5, np.cumsum(np.insert(moved, 0, 0, -1), -1), 1, axis=-1)
        low, high = np.maximum(places - factor / 2, -0.5), np.minimum(places + factor / 2, n - 0.5)
        samples = (integral(high) - integral(low)) / (high - low)
    else:
        samples = moved[..., np.floor(places + 0.5 + 1e-9).astype(int)]
    if len(places) == 1:
        return np.moveaxis(np.repeat(samples, n, axis=-1), -1, axis)
    at = [(np.arange(n) - places[0]) / factor]
    of_unit = [map_coordinates(unit, at, order=3, mode="mirror", prefilter=False) for unit in np.eye(len(places))]
    return np.moveaxis(spline_filter1d(samples, 3, axis=-1, mode="mirror") @ np.stack(of_unit), -1, axis)


@pytest.mark.parametrize("prefilter", [False, True])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_factor_1_changes_nothing(axis, prefilter):
    x = rand(2, 5, 6, 7)
    y = anisotropic_downsampling(x, factor=1, axis=axis, prefilter=prefilter)
    assert torch.equal(y, x)
    assert y.data_ptr() != x.data_ptr()


def test_a_line_stays_a_line():
    """Away from the borders, where it is reflected; samples of factor 3 lie on voxels."""
    x = torch.linspace(0, 1, 93).view(1, -1, 1).expand(3, -1, 4)
    for prefilter in (False, True):
        y = anisotropic_downsampling(x, factor=3, axis=1, prefilter=prefilter)
        assert (y - x)[:, 30:-30].abs().max() < 2e-6


def test_nearest_samples_are_kept_and_the_rest_forgotten():
    x = rand(9, 4, 4)
    places = grid(9, 3).astype(int)
    assert places.tolist() == [1, 4, 7]
    other = rand(9, 4, 4, seed=1)
    other[places] = x[places]
    y = anisotropic_downsampling(x, factor=3, axis=0)
    assert torch.allclose(y[places], x[places], atol=1e-6)
    assert torch.equal(anisotropic_downsampling(other, factor=3, axis=0), y)


@pytest.mark.parametrize("factor", [1.7, 2, 3.3, 4])
@pytest.mark.parametrize("n", [20, 21])
def test_means_do_not_shift(n, factor):
    """What happens to the mirror image is the mirror image of what happens."""
    x = rand(3, 4, n)
    y = anisotropic_downsampling(x, factor=factor, axis=2, prefilter=True)
    mirrored = anisotropic_downsampling(x.flip(2), factor=factor, axis=2, prefilter=True).flip(2)
    assert torch.allclose(y, mirrored, atol=2e-6)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 9, 64])
@pytest.mark.parametrize("factor", [1.001, 1.5, 2, 4.9, 64])
@pytest.mark.parametrize("prefilter", [False, True])
def test_a_constant_stays(n, factor, prefilter):
    y = anisotropic_downsampling(torch.full((2, 3, n), 7.0), factor=factor, axis=2, prefilter=prefilter)
    assert (y - 7).abs().max() < 1e-5


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    shape=st.lists(st.integers(1, 30), min_size=2, max_size=4),
    factor=st.floats(1, 64).map(lambda f: round(f, 3)) | st.sampled_from([1.5, 2.0, 2.5, 3.0, 4.0]),
    axis=st.integers(0, 2),
    prefilter=st.booleans(),
)
def test_equals_scipy(shape, factor, axis, prefilter):
    """To 5e-6 of the range: float32's rounding."""
    x = rand(*shape)
    y = anisotropic_downsampling(x, factor=factor, axis=axis, prefilter=prefilter)
    volume = x[..., None] if x.ndim == 2 else x
    expected = volume if factor == 1 else reference(volume, factor, volume.ndim - 3 + axis, prefilter)
    assert y.shape == x.shape
    assert np.abs(y.numpy() - np.reshape(np.asarray(expected), x.shape)).max() < 5e-6


@pytest.mark.parametrize(("axis", "factor"), [(0, 2.0), (1, 3.7), (2, 1.9)])
def test_equals_scipy_on_the_real_scan(real_case, axis, factor):
    x = torch.tensor(real_case.flair[60:120, 80:150, 60:110])
    for prefilter in (False, True):
        y = anisotropic_downsampling(x, factor=factor, axis=axis, prefilter=prefilter)
        assert np.abs(y.numpy() - reference(x, factor, axis, prefilter)).max() < 5e-6 * float(x.max())


@pytest.mark.parametrize(("axis", "factor"), [(0, 2.37), (1, 3.313), (2, 2.911)])
def test_equals_torchio_between_the_outer_samples(real_case, axis, factor):
    """To 1e-5 of the range; beyond, TorchIO has zeros. No sample lies half-way here, where its rounding decides."""
    x = torch.tensor(real_case.flair[41:140, 51:160, 41:130])
    other = tio.RandomAnisotropy(axes=axis, downsampling=(factor, factor), image_interpolation="bspline")
    difference = anisotropic_downsampling(x, factor=factor, axis=axis) - other(x[None])[0]
    places = grid(x.shape[axis], factor)
    inner = torch.arange(int(np.ceil(places[0])), int(places[-1]) + 1)
    assert difference.index_select(axis, inner).abs().max() < 1e-5 * x.max()


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("factor", [1.3, 2, 7.5])
@pytest.mark.parametrize("prefilter", [False, True])
def test_the_torch_kernel_does_the_same(axis, factor, prefilter):
    x = rand(2, 33, 1, 140)
    expected = downsampling._by_numba(x.numpy(), factor, axis, prefilter)
    y = downsampling._by_torch(x, factor, axis, prefilter)
    assert y.shape == x.shape
    assert np.abs(y.numpy() - expected).max() < 5e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types(dtype):
    x = rand(2, 9, 8, 7).to(dtype)
    y = anisotropic_downsampling(x, factor=2.2, axis=1)
    assert y.dtype == dtype
    assert torch.equal(y, anisotropic_downsampling(x.float(), factor=2.2, axis=1).to(dtype))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_layout_batch_and_input(axis):
    """Strides and leading volumes do not matter, to the bit; the input stays."""
    x = rand(3, 21, 13, 20).permute(0, 3, 2, 1)
    before = x.clone()
    for prefilter in (False, True):
        y = anisotropic_downsampling(x, factor=2.3, axis=axis, prefilter=prefilter)
        assert torch.equal(x, before)
        assert torch.equal(y, anisotropic_downsampling(x.contiguous(), factor=2.3, axis=axis, prefilter=prefilter))
        assert torch.equal(y[2], anisotropic_downsampling(x[2], factor=2.3, axis=axis, prefilter=prefilter))


def test_an_overflow_stays_in_its_line():
    x = torch.zeros(9, 300)
    x[::2, 0], x[1::2, 0] = 3e38, -3e38
    y = anisotropic_downsampling(x, factor=1.2, axis=0)
    assert not y[:, 0].isfinite().all()
    assert not y[:, 1:].any()


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_threads_do_not_matter(axis):
    x = rand(110, 101, 103)
    results = with_threads(1, 2, compute=lambda: anisotropic_downsampling(x, factor=1.8, axis=axis))
    assert torch.equal(*results)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"factor": 0.9}, r"factor = 0.9: must be a number in \[1, 64\]"),
        ({"factor": 65}, "factor = 65"),
        ({"factor": "2"}, "factor = '2'"),
        ({"axis": 3}, r"axis = 3: must be a whole number in \[0, 2\]"),
        ({"axis": -1}, "axis = -1"),
        ({"axis": 0.5}, "axis = 0.5"),
    ],
)
def test_wrong_parameters(wrong, message):
    params = {"factor": 2, "axis": 0, **wrong}
    with pytest.raises(ValueError, match=message):
        anisotropic_downsampling(rand(3, 3, 3), **params)
    with pytest.raises(ValueError, match=message):
        AnisotropicDownsampling(**params)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"factor": (0.5, 2)}, "factor = 0.5"),
        ({"factor": (3, 2)}, "the range must rise"),
        ({"axes": ()}, "axes = .*at least one"),
        ({"axes": (0, 3)}, "axes = 3"),
    ],
)
def test_wrong_ranges(wrong, message):
    with pytest.raises(ValueError, match=message):
        RandomAnisotropicDownsampling(**wrong)


def test_wrong_voxels():
    for x in (torch.full((2, 2, 2), torch.nan), torch.ones(2, 2, 2, dtype=torch.int16), torch.zeros(0, 2, 2)):
        with pytest.raises(ValueError, match="the image has"):
            anisotropic_downsampling(x, factor=2, axis=0)


def test_draws():
    rng = np.random.default_rng(0)
    drawn = [RandomAnisotropicDownsampling(axes=(0, 2)).draw_params(rng) for _ in range(500)]
    factors = [d["factor"] for d in drawn]
    assert 1.5 <= min(factors) < 1.55
    assert 3.95 < max(factors) <= 4
    assert {d["axis"] for d in drawn} == {0, 2}
    single = [RandomAnisotropicDownsampling(3, axes=1, prefilter=True).draw_params(rng) for _ in range(200)]
    assert all(1 <= d["factor"] <= 3 and d["axis"] == 1 and d["prefilter"] for d in single)


def test_replay_from_json():
    check_replay(RandomAnisotropicDownsampling(), "AnisotropicDownsampling")
