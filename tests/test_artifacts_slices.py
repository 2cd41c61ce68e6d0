import numpy as np
import pytest
import torch
import torchio as tio
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from scipy.spatial.transform import Rotation
from transforms import check_replay, rand, with_threads

from synthlong.artifacts.base import softened
from synthlong.artifacts.slices import (
    RandomSliceThickness,
    SliceThickness,
    _by_numba,
    _by_torch,
    slice_thickness,
)


def worst(a, b):
    return np.abs(np.asarray(a) - np.asarray(b)).max()


def reference(x, size, axis):
    """The same by scipy, in float64, for one volume."""
    return ndimage.uniform_filter1d(np.asarray(x, np.float64), size, axis)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_size_1_changes_nothing(axis):
    x = rand(2, 5, 6, 7)
    y = slice_thickness(x, size=1, axis=axis)
    assert torch.equal(y, x)
    assert y.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize(("size", "lit"), [(2, [4, 5]), (3, [3, 4, 5]), (4, [3, 4, 5, 6]), (5, [2, 3, 4, 5, 6])])
def test_which_slices_see_a_slice(axis, size, lit):
    """Slice 4 is in the window n - size // 2 ... n + (size - 1) // 2 of these n: even sizes move up by half a voxel."""
    x = torch.zeros(9, 9, 9)
    x.select(axis, 4)[:] = size
    expected = torch.zeros(9, 9, 9)
    expected.index_fill_(axis, torch.tensor(lit), 1)
    assert worst(slice_thickness(x, size=size, axis=axis), expected) < 1e-6


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("size", [2, 3, 4, 7])
def test_a_ramp_moves_by_half_a_voxel_or_not(axis, size):
    ramp = torch.arange(30, dtype=torch.float32)
    x = ramp.expand(4, 5, 30).movedim(2, axis)
    y = slice_thickness(x, size=size, axis=axis).movedim(axis, 2)
    shift = 0 if size % 2 else 0.5
    assert worst(y[..., 8:-8], (ramp - shift).expand(4, 5, 30)[..., 8:-8]) < 5e-6


def test_edges_reflect():
    x = torch.tensor([[[1.0, 2, 4]]])
    assert worst(slice_thickness(x, size=2, axis=2), [[[1, 1.5, 3]]]) < 1e-6
    assert worst(slice_thickness(x, size=4, axis=2), [[[6 / 4, 8 / 4, 11 / 4]]]) < 1e-6


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    shape=st.tuples(*[st.integers(1, 14)] * 3),
    size=st.integers(1, 6) | st.integers(7, 64),
    axis=st.integers(0, 2),
)
def test_equals_scipy(shape, size, axis):
    """To 5e-7 of the range: float32's rounding."""
    x = rand(*shape)
    y = slice_thickness(x, size=size, axis=axis)
    assert y.shape == x.shape
    assert worst(y, reference(x, size, axis)) < 5e-7


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("size", [2, 3, 4, 11])
def test_equals_scipy_on_the_real_scan(real_case, size, axis):
    x = torch.tensor(real_case.flair)
    assert worst(slice_thickness(x, size=size, axis=axis), reference(x, size, axis)) < 5e-7 * np.ptp(real_case.flair)


@pytest.mark.parametrize("size", [2, 3, 5])
def test_a_slice_has_two_axes(size):
    x = rand(12, 17)
    for axis in (0, 1):
        assert worst(slice_thickness(x, size=size, axis=axis), reference(x, size, axis)) < 5e-7
    assert worst(slice_thickness(x, size=size, axis=2), x) < 5e-7


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("size", [2, 3, 4, 5, 64])
@pytest.mark.parametrize("shape", [(2, 33, 20, 145), (3, 1, 7, 2)])
def test_the_torch_kernel_does_the_same(shape, size, axis):
    x = rand(*shape)
    y = _by_torch(x, size, axis)
    assert y.shape == x.shape
    assert worst(y, _by_numba(x.numpy(), size, axis)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types(dtype):
    x = rand(2, 9, 8, 7).to(dtype)
    y = slice_thickness(x, size=3, axis=1)
    assert y.dtype == dtype
    assert torch.equal(y, slice_thickness(x.float(), size=3, axis=1).to(dtype))


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("size", [2, 4, 9])
def test_layout_batch_and_input(axis, size):
    """Strides and leading volumes do not matter, to the bit; the input stays."""
    x = rand(3, 21, 13, 19).permute(0, 3, 2, 1)
    before = x.clone()
    y = slice_thickness(x, size=size, axis=axis)
    assert torch.equal(x, before)
    assert torch.equal(y, slice_thickness(x.contiguous(), size=size, axis=axis))
    assert torch.equal(y[2], slice_thickness(x[2], size=size, axis=axis))


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("size", [2, 3, 4, 9])
def test_threads_do_not_matter(axis, size):
    x = rand(111, 101, 103)
    results = with_threads(1, 2, 3, compute=lambda: slice_thickness(x, size=size, axis=axis))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"size": 0}, r"size = 0: must be a whole number in \[1, 64\]"),
        ({"size": 65}, "size = 65"),
        ({"size": 2.5}, "size = 2.5"),
        ({"size": "2"}, "size = '2'"),
        ({"axis": 3}, r"axis = 3: must be a whole number in \[0, 2\]"),
        ({"axis": -1}, "axis = -1"),
        ({"axis": None}, "axis = None"),
    ],
)
def test_wrong_parameters(wrong, message):
    params = {"size": 2, "axis": 0, **wrong}
    with pytest.raises(ValueError, match=message):
        slice_thickness(rand(3, 3, 3), **params)
    with pytest.raises(ValueError, match=message):
        SliceThickness(**params)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"size": (0, 2)}, "size = 0"),
        ({"size": (4, 2)}, "size = .*must rise"),
        ({"size": (1.5, 2)}, "size = 1.5"),
        ({"axis": "coronal"}, "axis = 'coronal': must be 0, 1, 2 or 'axial'"),
        ({"axis": 3}, "axis = 3"),
    ],
)
def test_wrong_ranges(wrong, message):
    with pytest.raises(ValueError, match=message):
        RandomSliceThickness(**wrong)


def test_the_function_knows_no_affine():
    with pytest.raises(ValueError, match="axis = 'axial'"):
        slice_thickness(rand(3, 3, 3), size=2, axis="axial")


@pytest.mark.parametrize("x", [torch.full((2, 2, 2), torch.nan), torch.ones(2, 2, 2).int(), torch.zeros(0, 2, 2)])
@pytest.mark.parametrize("size", [1, 2])
def test_wrong_voxels(x, size):
    with pytest.raises(ValueError, match="the image has"):
        slice_thickness(x, size=size, axis=0)


def test_draws():
    rng = np.random.default_rng(0)
    drawn = [RandomSliceThickness().draw_params(rng) for _ in range(300)]
    assert {d["size"] for d in drawn} == {2, 3, 4}
    assert {type(d["size"]) for d in drawn} == {int}
    assert {d["axis"] for d in drawn} == {"axial"}
    assert RandomSliceThickness(5, axis=1).draw_params(rng) == {"size": 5, "axis": 1}
    sizes = {softened({"size": size, "axis": 2}, RandomSliceThickness.identity, 0.5)["size"] for size in (1, 2, 3, 4)}
    assert sizes == {1, 2}


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_axial_is_found_from_the_affine(axis):
    x = rand(1, 8, 9, 10)
    tilt = Rotation.from_euler("xyz", (20, 10, -15), degrees=True).as_matrix()
    affine = np.eye(4)
    affine[:3, :3] = np.roll(tilt * (1, -1, 1), axis - 2, axis=1) * (3, 1, 2)
    image = tio.ScalarImage(tensor=x, affine=affine)
    expected = slice_thickness(x, size=3, axis=axis)
    assert torch.equal(SliceThickness(3)(image).data, expected)
    assert torch.equal(RandomSliceThickness((3, 3))(image).data, expected)
    assert torch.equal(SliceThickness(3)(x), slice_thickness(x, size=3, axis=2)), "a bare tensor's axes are RAS"


def test_replay_from_json():
    check_replay(RandomSliceThickness(), "SliceThickness", affine=np.diag([1.0, 2.0, 1.0, 1.0])[[2, 0, 1, 3]])
