import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage, sparse
from scipy.sparse.linalg import spsolve

from synthlong.hole import FLUID, REACH, corrupt, faded, first_guess, hole_in, noise, soft_hole


def blob(seed, side=14, voxels=6):
    rng = np.random.default_rng(seed)
    mask = np.zeros((side, side - 2, side + 1), bool)
    mask[tuple(rng.integers(0, n, voxels) for n in mask.shape)] = True
    return mask


def slow_hole(mask, full=1.0, zero=2.5):
    distance = ndimage.distance_transform_edt(~mask) if mask.any() else np.full(mask.shape, np.inf)
    x = np.clip((zero - distance) / (zero - full), 0, 1)
    return (x * x * (3 - 2 * x)).astype(np.float32)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 30))
def test_soft_hole_is_the_slow_one(seed, voxels):
    mask = blob(seed, voxels=voxels)
    before = mask.copy()
    weight = soft_hole(mask)
    assert weight.dtype == np.float32
    assert np.array_equal(weight, slow_hole(mask))
    assert np.array_equal(mask, before)
    assert (weight[mask] == 1).all()


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6))
def test_soft_hole_of_a_union_is_the_largest_of_both(seed):
    a, b = blob(seed), blob(seed + 1)
    assert np.array_equal(soft_hole(a | b), np.maximum(soft_hole(a), soft_hole(b)))


def test_soft_hole_is_1_on_face_neighbours_and_0_at_reach():
    mask = np.zeros((11, 11, 11), np.uint8)
    mask[5, 5, 5] = 7
    weight = soft_hole(mask)
    assert weight[5, 5, 4] == 1
    assert 0 < weight[5, 5, 7] < weight[5, 6, 6] < 1
    distance = np.linalg.norm(np.indices(mask.shape) - 5, axis=0)
    assert not weight[distance >= 2.5].any()
    assert distance[weight > 0].max() < REACH


def test_faded_can_be_narrower():
    mask = blob(3)
    assert np.array_equal(faded(mask, full=0, zero=1.5), slow_hole(mask, 0, 1.5))


def test_noise_depends_on_its_arguments_alone():
    a = noise((30, 30, 30), 5, mean=1.0, sd=0.2)
    np.random.default_rng(5).standard_normal(10)
    assert np.array_equal(a, noise((30, 30, 30), 5, mean=1.0, sd=0.2))
    assert not np.array_equal(a, noise((30, 30, 30), 6, mean=1.0, sd=0.2))
    assert a.mean() == pytest.approx(1.0, abs=0.01)
    assert a.std() == pytest.approx(0.2, abs=0.01)


def solve(x, weight):
    """The discrete Laplace equation in the hole, by a direct solver; CSF and background neighbours are skipped."""
    inside = weight > 0
    number = np.full(x.shape, -1)
    number[inside] = np.arange(inside.sum())
    n = int(inside.sum())
    matrix, right = sparse.lil_matrix((n, n)), np.zeros(n)
    for row, at in enumerate(np.argwhere(inside)):
        for step in ((1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, -1, 0), (0, 0, 1), (0, 0, -1)):
            to = tuple(at + step)
            if min(to) < 0 or any(t >= m for t, m in zip(to, x.shape, strict=True)):
                continue
            if inside[to]:
                matrix[row, row] += 1
                matrix[row, number[to]] -= 1
            elif x[to] >= FLUID:
                matrix[row, row] += 1
                right[row] += x[to]
    filled = x.astype(np.float64)
    filled[inside] = spsolve(matrix.tocsr(), right)
    return filled


@pytest.mark.parametrize("centre", [(8, 8, 8), (1, 8, 8), (8, 0, 15)])
def test_first_guess_solves_the_laplace_equation(centre):
    rng = np.random.default_rng(1)
    x = rng.uniform(0.5, 1.5, (16, 16, 16)).astype(np.float32)
    x[:, :7] = 0  # background
    x[10:] *= 0.5  # CSF, half of it
    mask = np.linalg.norm(np.indices(x.shape) - np.reshape(centre, (3, 1, 1, 1)), axis=0) < 3
    weight, before = soft_hole(mask), x.copy()
    filled = first_guess(x, weight)
    assert np.array_equal(x, before)
    assert filled.dtype == np.float32
    assert np.array_equal(filled[weight == 0], x[weight == 0])
    assert np.abs(filled - solve(x, weight)).max() < 2e-3


def test_hole_stops_at_csf_and_background():
    x = np.ones((20, 20, 20), np.float32)
    x[11:], x[:, :9] = 0.3, 0
    mask = np.zeros(x.shape, bool)
    mask[9:12, 8:11, 10] = True  # one voxel deep in CSF, one in the background
    weight = hole_in(x, mask)
    assert np.array_equal(weight[x == 0], np.zeros((x == 0).sum()))
    assert (weight[mask & (x > 0)] == 1).all()
    csf = (x == np.float32(0.3)) & ~mask
    assert not weight[csf].any()
    rest = (x == 1) & ~mask
    assert np.array_equal(weight[rest], soft_hole(mask)[rest])


def test_first_guess_does_not_darken_beside_a_ventricle():
    x = np.full((20, 20, 20), 1.1, np.float32)
    x[12:] = 0.2
    mask = np.zeros(x.shape, bool)
    mask[8:12, 8:12, 8:12] = True
    filled = first_guess(x, hole_in(x, mask))
    assert np.abs(filled - x).max() < 1e-3


def test_first_guess_continues_a_ramp():
    x = np.broadcast_to(np.linspace(1, 2, 20, dtype=np.float32)[:, None, None], (20, 20, 20)).copy()
    mask = np.zeros(x.shape, bool)
    mask[8:12, 8:12, 8:12] = True
    holed = np.where(mask, 9, x).astype(np.float32)
    assert np.abs(first_guess(holed, soft_hole(mask)) - x).max() < 1e-3


def test_first_guess_without_a_hole_or_without_tissue():
    x = np.ones((8, 8, 8), np.float32)
    nothing = first_guess(x, np.zeros_like(x))
    assert np.array_equal(nothing, x)
    assert nothing is not x
    assert not first_guess(np.zeros_like(x), np.ones_like(x)).any()


def test_the_noise_has_the_mean_and_sd_of_the_brain_around():
    rng = np.random.default_rng(3)
    x = rng.uniform(0.5, 1.5, (16, 16, 16)).astype(np.float32)
    x[:6] = 0  # background does not count
    mask = np.zeros(x.shape, bool)
    mask[10:13, 7:10, 7:10] = True
    weight = soft_hole(mask)
    for image in (x, np.where(mask, 9, x).astype(np.float32)):  # nor does the hole
        brain = image[(weight == 0) & (image > 0)]
        white = noise(x.shape, 3, mean=float(brain.mean()), sd=float(brain.std()))
        assert np.allclose(corrupt(image, weight, mask, seed=3)[0, mask], white[mask], atol=1e-5)


def test_corrupt_changes_the_hole_alone():
    rng = np.random.default_rng(2)
    x = rng.uniform(0.5, 1.5, (16, 16, 16)).astype(np.float32)
    mask = np.zeros(x.shape, bool)
    mask[7:9, 7:9, 7:9] = True
    weight, before = soft_hole(mask), x.copy()
    seen = corrupt(x, weight, mask, seed=3)
    assert seen.shape == (3, 16, 16, 16)
    assert seen.dtype == np.float32
    assert np.array_equal(x, before)
    for channel in seen[:2]:
        assert np.array_equal(channel[weight == 0], x[weight == 0])
    assert np.array_equal(seen[2], mask)
    assert np.array_equal(seen, corrupt(x, weight, mask, seed=3))
    # what the hole held does not show where it is full
    other = np.where(mask, 5, x).astype(np.float32)
    assert np.abs(corrupt(other, weight, mask, seed=3)[:2, mask] - seen[:2, mask]).max() < 1e-5
