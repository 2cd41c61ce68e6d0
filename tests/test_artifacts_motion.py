import json
from itertools import pairwise

import numpy as np
import pytest
import torch
import torchio as tio
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from scipy.spatial.transform import Rotation
from transforms import with_threads

from synthlong.artifacts import motion
from synthlong.artifacts.base import softened
from synthlong.artifacts.motion import KSpaceMotion, RandomKSpaceMotion, kspace_motion

pytestmark = pytest.mark.usefixtures("one_thread")

TWO = {
    "degrees": [[2.5, -3, 2], [-1, 4, 3]],
    "translation_mm": [[1, -2, 0.7], [2, 1, -3]],
    "times": [0.3, 0.7],
}


def moved(x, degrees, translation_mm, spacing):
    """Turned about the centre and shifted, by scipy; outside 0, faded in over one voxel as trilinear weights do."""
    rotation = Rotation.from_euler("xyz", degrees, degrees=True).as_matrix()
    side = np.diag(spacing)
    matrix = np.linalg.inv(side) @ rotation.T @ side
    centre = (np.array(x.shape) - 1) / 2
    offset = centre - matrix @ (centre + np.array(translation_mm) / spacing)
    flat = np.array(x.shape) == 1
    matrix[flat], offset[flat] = 0, 0
    return ndimage.affine_transform(x, matrix, offset, order=1, mode="grid-constant")


def reference(x, *, degrees, translation_mm, times, axis, spacing_mm=(1, 1, 1)):
    """The definition: whole Fourier transforms in float64, and planes of k-space put together."""
    x = np.asarray(x, np.float64)
    n = x.shape[axis]
    poses = list(zip(degrees, translation_mm, strict=True))
    edges = [0, *(int(time * n) for time in times), n]
    kspace = np.zeros(x.shape, complex)
    for start, stop in pairwise(edges):
        image = x if start <= n // 2 < stop else moved(x, *poses.pop(0), np.array(spacing_mm))
        planes = (slice(None),) * axis + (slice(start, stop),)
        kspace[planes] = np.fft.fftshift(np.fft.fftn(image))[planes]
    assert not poses
    return np.fft.ifftn(np.fft.ifftshift(kspace)).real


def best_shift(a, b):
    """Voxels by which `b` is `a` moved: the peak of their cross-correlation, between voxels by a parabola."""
    spectra = (torch.fft.rfftn(image - image.mean()) for image in (a, b))
    correlation = torch.fft.irfftn(next(spectra).conj() * next(spectra), s=a.shape).numpy()
    peak = np.array(np.unravel_index(correlation.argmax(), correlation.shape))
    shift = []
    for axis, n in enumerate(correlation.shape):
        step = np.eye(3, dtype=int)[axis]
        low, mid, high = (float(correlation[tuple((peak + s * step) % correlation.shape)]) for s in (-1, 0, 1))
        shift.append((peak[axis] + n // 2) % n - n // 2 + (low - high) / (2 * (low - 2 * mid + high)))
    return np.array(shift)


@pytest.fixture(scope="module")
def scan(real_case):
    """A 64^3 crop with brain, and the rest as background."""
    i, j, k = (n // 2 for n in real_case.flair.shape)
    return torch.tensor(real_case.flair[i - 32 : i + 32, j - 40 : j + 24, k - 20 : k + 44])


@pytest.mark.parametrize(
    "params",
    [
        {"degrees": [], "translation_mm": [], "times": []},
        {"degrees": [[0, 0, 0]], "translation_mm": [[0, 0, 0]], "times": [0.2]},
        {"degrees": np.zeros((2, 3)), "translation_mm": np.zeros((2, 3)), "times": np.array([0.1, 0.9])},
    ],
)
def test_no_movement_changes_nothing(params):
    x = torch.rand(2, 9, 8, 7)
    y = kspace_motion(x, axis=1, **params)
    assert torch.equal(x, y)
    assert y.data_ptr() != x.data_ptr()


def test_movement_in_a_segment_without_planes_changes_nothing():
    x = torch.rand(9, 8, 7)
    assert torch.equal(kspace_motion(x, degrees=[[5, 5, 5]], translation_mm=[[1, 1, 1]], times=[1.0], axis=0), x)
    assert torch.equal(kspace_motion(x[:1], **TWO, axis=0), x[:1])


def test_a_wave_of_which_one_side_is_acquired_in_another_pose_is_half_moved():
    wave = torch.cos(2 * torch.pi * 10 / 32 * torch.arange(32.0))
    profile = torch.zeros(20)
    profile[5:9] = torch.tensor([1.0, 3.0, 2.0, 1.0])
    x = wave[:, None, None] * profile[:, None]
    y = kspace_motion(x, degrees=[[0, 0, 0]], translation_mm=[[0, 6, 0]], times=[0.3], axis=0, spacing_mm=(1, 3, 1))
    assert torch.allclose(y, wave[:, None, None] * ((profile + profile.roll(2)) / 2)[:, None], atol=1e-5)


def test_only_the_outer_planes_of_kspace_change():
    x = torch.rand(40, 12, 10)
    y = kspace_motion(x, **TWO, axis=0)
    difference = np.abs(np.fft.fftshift(np.fft.fft((y - x).double().numpy(), axis=0), axes=0)).max(axis=(1, 2))
    assert difference[13:28].max() < 1e-5 < 0.1 < difference[:12].min()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    shape=st.tuples(*[st.integers(1, 13)] * 3),
    axis=st.integers(0, 2),
    count=st.integers(0, 4),
    spread=st.sampled_from([3.0, 40.0, 180.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_equals_the_definition(shape, axis, count, spread, seed):
    rng = np.random.default_rng(seed)
    params = {
        "degrees": rng.uniform(-spread, spread, (count, 3)) * (rng.random((count, 3)) < 0.7),
        "translation_mm": rng.uniform(-4, 4, (count, 3)) * (rng.random((count, 3)) < 0.7),
        "times": np.sort(rng.random(count)),
        "axis": axis,
        "spacing_mm": rng.uniform(0.4, 3, 3),
    }
    x = rng.random(shape, np.float32)
    y = kspace_motion(torch.tensor(x), **params).numpy()
    assert np.abs(y - reference(x, **params)).max() < 1e-5  # of a range of 1


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_equals_the_definition_on_a_scan(scan, axis):
    for spacing in ((1, 1, 1), (1, 1, 2.5)):
        y = kspace_motion(scan, **TWO, axis=axis, spacing_mm=spacing)
        expected = reference(scan, **TWO, axis=axis, spacing_mm=spacing)
        assert np.abs(y.numpy() - expected).max() < 1e-4 * float(scan.max())
        assert (y - scan).std() > 0.01


@pytest.mark.parametrize("shape", [(182, 6, 5), (6, 218, 5), (5, 6, 182), (5, 6, 218), (401, 4, 3), (3, 4, 405)])
def test_equals_the_definition_along_long_axes(shape):
    """Products and Fourier transforms, of lengths with small and with large prime factors."""
    x, axis = torch.rand(shape, generator=torch.Generator().manual_seed(0)), int(np.argmax(shape))
    assert np.abs(kspace_motion(x, **TWO, axis=axis).numpy() - reference(x, **TWO, axis=axis)).max() < 1e-5


def test_rotation_is_rigid_in_mm_and_about_the_centre():
    spacing = np.array([1.0, 1.5, 3.0])
    grid = (np.indices((41, 31, 17)).transpose(1, 2, 3, 0) - [20, 15, 8]) * spacing
    x = torch.tensor(np.exp(-((grid / [5, 3, 4]) ** 2).sum(-1) / 2), dtype=torch.float32)
    pose = motion._pose([20, -10, 30], [0, 0, 0], x.shape, spacing)
    turned = (x + motion._changes_by_numba(x[None], [pose])[0][0]).double().numpy()
    weight = turned / turned.sum()
    assert np.abs((grid * weight[..., None]).sum((0, 1, 2))).max() < 1e-3  # mm
    spread = np.einsum("ijka,ijkb,ijk->ab", grid, grid, weight)
    rotation = Rotation.from_euler("xyz", [20, -10, 30], degrees=True).as_matrix()
    assert np.allclose(spread, rotation @ np.diag([25, 9, 16]) @ rotation.T, atol=2)  # trilinear blurs a little


def test_masks_stay_true_over_200_draws(scan):
    rng, random = np.random.default_rng(0), RandomKSpaceMotion()
    shifts, changes = [], []
    for _ in range(200):
        y = kspace_motion(scan, **random.draw_params(rng))
        shifts.append(np.abs(best_shift(scan, y)).max())
        changes.append(float((y - scan).abs().mean()))
    assert max(shifts) < 0.5
    assert np.median(changes) > 0.01
    assert best_shift(scan, scan.roll(2, 1)) == pytest.approx([0, 2, 0], abs=0.01)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(shape=st.tuples(*[st.integers(1, 20)] * 3), seed=st.integers(0, 2**32 - 1))
def test_kernels_agree(shape, seed):
    rng = np.random.default_rng(seed)
    volumes = torch.tensor(rng.random((2, *shape), np.float32))
    poses = [motion._pose(rng.uniform(-9, 9, 3), rng.uniform(-3, 3, 3), shape, rng.uniform(0.5, 3, 3)) for _ in "ab"]
    pairs = zip(motion._changes_by_numba(volumes, poses), motion._changes_by_torch(volumes, poses), strict=True)
    assert all((a - b).abs().max() < 1e-4 for a, b in pairs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types(dtype):
    x = torch.rand(2, 12, 11, 10).to(dtype)
    y = kspace_motion(x, **TWO, axis=0)
    assert y.dtype == dtype
    assert torch.equal(y, kspace_motion(x.float(), **TWO, axis=0).to(dtype))


def test_strides_slices_and_extra_axes():
    x = torch.rand(10, 2, 3, 12, 11)
    before = x.clone()
    view = x.permute(1, 2, 3, 4, 0)
    y = kspace_motion(view, **TWO, axis=2)
    assert torch.equal(y, kspace_motion(view.contiguous(), **TWO, axis=2))
    assert torch.equal(y[1, 2], kspace_motion(view[1, 2], **TWO, axis=2))
    assert torch.equal(x, before)
    flat = kspace_motion(x[0, 0, 0], **TWO, axis=0)
    assert torch.equal(flat, kspace_motion(x[0, 0, 0][..., None], **TWO, axis=0)[..., 0])
    assert (flat - x[0, 0, 0]).abs().max() > 0.05


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_threads_do_not_change_bits(axis):
    x = torch.rand(1, 100, 96, 126)
    one, again, two = with_threads(1, 1, 2, compute=lambda: kspace_motion(x, **TWO, axis=axis))
    assert torch.equal(again, one)
    assert torch.equal(two, one)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"degrees": [[400, 0, 0], [0, 0, 0]]}, r"degrees = 400: must be a number in \[-360, 360\]"),
        ({"degrees": [1, 2]}, r"degrees = \[1, 2\]: must be a list of threes"),
        ({"degrees": 3}, "degrees = 3: must be a list of threes"),
        ({"translation_mm": [[1, 2], [3, 4]]}, "translation_mm"),
        ({"translation_mm": [[0, 0, 1e5], [0, 0, 0]]}, "translation_mm = 100000.0"),
        ({"times": [0.3, 1.5]}, r"times = 1.5: must be a number in \[0, 1\]"),
        ({"times": 0.3}, "times = 0.3: must be a list"),
        ({"times": [0.7, 0.3]}, "times = .*: must not fall"),
        ({"times": [0.3]}, "must be of one length, at most 100, not 2, 2 and 1"),
        ({"axis": 3}, r"axis = 3: must be a whole number in \[0, 2\]"),
        ({"spacing_mm": 0}, "spacing_mm = 0"),
    ],
)
def test_wrong_parameters_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        kspace_motion(torch.rand(4, 4, 4), **{**TWO, "axis": 0, **wrong})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"degrees": "much"}, "degrees = 'much'"),
        ({"degrees": (5, -5)}, "the range must rise"),
        ({"translation_mm": -1}, "translation_mm = -1"),
        ({"movements": 1.5}, "movements = 1.5: must be a whole number"),
        ({"axes": (0, 4)}, "axes = 4"),
        ({"axes": ()}, r"axes = \(\)"),
    ],
)
def test_wrong_ranges_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        RandomKSpaceMotion(**wrong)
    with pytest.raises(ValueError, match="times"):
        KSpaceMotion([[1, 1, 1]], [[1, 1, 1]], [2.0], 0)


def test_draws_stay_in_range():
    rng, random = np.random.default_rng(3), RandomKSpaceMotion(movements=(0, 4), axes=(0, 2))
    draws = [random.draw_params(rng) for _ in range(500)]
    assert {draw["axis"] for draw in draws} == {0, 2}
    assert {len(draw["times"]) for draw in draws} == {0, 1, 2, 3, 4}
    for name, most in (("degrees", 5), ("translation_mm", 4)):
        assert {len(draw[name]) - len(draw["times"]) for draw in draws} == {0}
        values = np.concatenate([np.ravel(draw[name]) for draw in draws])
        assert -most <= values.min() < -0.95 * most
        assert 0.95 * most < values.max() <= most
    times = np.concatenate([draw["times"] for draw in draws])
    assert all(draw["times"] == sorted(draw["times"]) for draw in draws)
    assert 0 <= times.min() < 0.02 < 0.98 < times.max() < 1
    assert np.abs(times - 0.5).min() >= 0.05 - 1e-6  # too short a segment about the centre would move the whole image
    assert json.loads(json.dumps(draws)) == draws


def test_severity_zero_is_the_identity():
    params = RandomKSpaceMotion().draw_params(np.random.default_rng(0))
    x = torch.rand(8, 9, 10)
    assert torch.equal(kspace_motion(x, **softened(params, RandomKSpaceMotion.identity, 0)), x)
    half = softened(params, RandomKSpaceMotion.identity, 0.5)
    assert np.allclose(half["degrees"], np.array(params["degrees"]) / 2)
    assert half["times"] == params["times"]


def test_history_replays_the_bits():
    affine = np.diag([1, 1.2, 3, 1])
    subject = tio.Subject(
        baseline=tio.ScalarImage(tensor=torch.rand(2, 16, 17, 12), affine=affine),
        followup=tio.ScalarImage(tensor=torch.rand(1, 16, 17, 12), affine=affine),
        lesions=tio.LabelMap(tensor=torch.ones(1, 16, 17, 12), affine=affine),
    )
    result = RandomKSpaceMotion(seed=4)(subject)
    ((name, arguments),) = result.applied_transforms
    again = getattr(motion, name)(**json.loads(json.dumps(arguments)))(subject)
    for image in ("baseline", "followup"):
        params = {
            parameter: arguments[parameter][image] for parameter in ("degrees", "translation_mm", "times", "axis")
        }
        expected = kspace_motion(subject[image].data, **params, spacing_mm=(1, 1.2, 3))
        assert torch.equal(result[image].data, expected)
        assert torch.equal(again[image].data, expected)
        assert not torch.equal(expected, subject[image].data)
    assert torch.equal(result["lesions"].data, subject["lesions"].data)
