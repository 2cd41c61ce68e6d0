import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nibabel.affines import apply_affine, voxel_sizes
from nibabel.processing import resample_from_to
from scipy import ndimage
from scipy.spatial.transform import Rotation

from synthlong.resampling import Grid, carry_labels, carry_mask, resample, shifted

FULL = np.ones((3, 3, 3))
SCANNER_MM = (0.72, 0.72, 4.0)

angles = st.tuples(*[st.floats(-40, 40)] * 3)
seeds = st.integers(0, 2**31 - 1)


def turned(angles_deg, *, spacing=(1, 1, 1), at=(0, 0, 0)):
    """Voxels turned about the axes, `at` mm."""
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", angles_deg, degrees=True).as_matrix() * spacing
    affine[:3, 3] = at
    return affine


def centred(shape, affine, middle_mm=(0, 0, 0)):
    """A grid whose middle lies at a point."""
    affine = affine.copy()
    affine[:3, 3] = np.array(middle_mm) - affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    return Grid(shape, affine)


def lesions_of(mask):
    labels, count = ndimage.label(mask, FULL)
    return labels, np.bincount(labels.ravel(), minlength=count + 1)[1:]


# --- grids


def test_sides_and_volume_are_nibabels():
    grid = Grid((4, 5, 6), turned((10, 20, 30), spacing=SCANNER_MM))
    assert grid.spacing_mm == pytest.approx(voxel_sizes(grid.affine))
    assert grid.voxel_mm3 == pytest.approx(np.prod(SCANNER_MM))
    assert Grid((4, 5, 6), np.diag([-1.0, -2, 3, 1])).voxel_mm3 == pytest.approx(6)


@given(angles, angles)
def test_a_step_goes_through_millimetres(one, other):
    target = Grid((7, 8, 9), turned(one, spacing=(0.9, 1.1, 3), at=(5, -7, 20)))
    source = Grid((9, 8, 7), turned(other, spacing=(1, 1, 2), at=(-30, 4, 1)))
    way = turned((3, -4, 5), at=(10, 20, -30))
    voxels = np.array([[0, 0, 0], [6, 0, 2], [3, 7, 8]])
    for between in (None, way):
        there = apply_affine(target.affine, voxels)
        there = there if between is None else apply_affine(between, there)
        expected = apply_affine(np.linalg.inv(source.affine), there)
        assert apply_affine(target.step_to(source, between), voxels) == pytest.approx(expected)


@settings(max_examples=50)
@given(st.lists(st.tuples(angles, angles), min_size=1, max_size=3), st.sampled_from([0.5, 1.0, 2.0]))
def test_the_grid_around_some_holds_all_of_them_and_no_more(placed, spacing_mm):
    grids = [Grid((8, 9, 4 + n), turned(a, spacing=SCANNER_MM, at=a)) for n, (a, _) in enumerate(placed)]
    ways = [turned(b, at=b) for _, b in placed]
    around = Grid.around(grids, ways, spacing_mm=spacing_mm)
    assert np.array_equal(around.affine[:3, :3], np.eye(3) * spacing_mm)
    corners = []
    for grid, way in zip(grids, ways, strict=True):
        ends = np.array(list(np.ndindex(2, 2, 2))) * grid.shape - 0.5
        in_space = apply_affine(np.linalg.inv(way), apply_affine(grid.affine, ends))
        corners.append(apply_affine(np.linalg.inv(around.affine), in_space))
    low, high = np.vstack(corners).min(axis=0), np.vstack(corners).max(axis=0)
    assert low == pytest.approx(-0.5, abs=1e-6)
    assert (high <= np.array(around.shape) - 0.5 + 2e-6).all()
    assert (high > np.array(around.shape) - 1.5).all()


def test_the_grid_around_an_upright_one_is_itself():
    grid = Grid((10, 11, 12), turned((0, 0, 0), at=(-4, 5, 6.25)))
    around = Grid.around([grid], [np.eye(4)], spacing_mm=1)
    assert around.shape == grid.shape
    assert around.affine == pytest.approx(grid.affine)


# --- volumes


def between(shape, step, source_shape, *, margin=0.0):
    """Source coordinates `(3, n)` of the target's voxels, and which lie within the source's centres."""
    at = apply_affine(step, np.indices(shape).reshape(3, -1).T).T
    upper = np.array(source_shape)[:, None] - 1 - margin
    return at, ((at >= margin) & (at <= upper)).all(axis=0)


@pytest.mark.parametrize("order", [0, 1, 3])
def test_the_same_grid_leaves_a_volume_unchanged(order):
    data = np.random.default_rng(0).normal(size=(9, 8, 7)).astype(np.float32)
    before = data.copy()
    same = resample(data, np.eye(4), data.shape, order=order)
    assert same.dtype == np.float32
    assert same == pytest.approx(data, abs=1e-5)
    assert np.array_equal(data, before)


@pytest.mark.parametrize("order", [0, 1, 3])
def test_whole_voxels_of_shift_and_zero_beyond(order):
    data = np.random.default_rng(0).uniform(1, 2, (9, 8, 7)).astype(np.float32)
    step = np.eye(4)
    step[:3, 3] = (2, 0, -3)
    expected = np.zeros((9, 8, 7), np.float32)
    expected[:7, :, 3:] = data[2:, :, :4]
    moved = resample(data, step, data.shape, order=order)
    beyond = np.zeros(data.shape, bool)
    beyond[8:], beyond[:, :, :2] = True, True
    assert not moved[beyond].any()
    inside = np.zeros(data.shape, bool)
    inside[:7, :, 3:] = True
    assert moved[inside] == pytest.approx(expected[inside], abs=1e-4)


@settings(max_examples=30, deadline=None)
@given(angles, st.sampled_from([1, 3]), seeds)
def test_ramps_stay_ramps(angles_deg, order, seed):
    slope = np.random.default_rng(seed).uniform(-1, 1, 3)
    source, target = centred((24, 22, 20), np.eye(4)), centred((16, 17, 18), turned(angles_deg, spacing=(0.8, 0.7, 1)))
    ramp = np.tensordot(slope, np.indices(source.shape), 1)
    step = target.step_to(source)
    at, inside = between(target.shape, step, source.shape, margin=0 if order == 1 else 6)
    found = resample(ramp, step, target.shape, order=order).ravel()
    assert inside.sum() > 100
    assert found[inside] == pytest.approx((slope @ at)[inside], abs=2e-3)


@pytest.mark.parametrize("order", [0, 1])
def test_the_same_as_nibabel(order):
    rng = np.random.default_rng(1)
    data = rng.normal(size=(20, 21, 12)).astype(np.float32)
    source = centred(data.shape, turned((5, -9, 14), spacing=(1, 1.2, 3)), (2, 3, 4))
    target = centred((22, 20, 24), turned((-3, 2, 1), spacing=(0.9, 1.0, 1.1)))
    step = target.step_to(source)
    expected = resample_from_to(nib.Nifti1Image(data, source.affine), (target.shape, target.affine), order=order)
    _, inside = between(target.shape, step, source.shape)
    found = resample(data, step, target.shape, order=order).ravel()
    assert inside.mean() > 0.5
    assert found[inside] == pytest.approx(expected.get_fdata().ravel()[inside], abs=1e-4)


def test_border_voxels_are_whole():
    """A voxel's outer half is as bright as its middle, on finer grids too."""
    finer = Grid((20, 20, 20), np.diag([0.5, 0.5, 0.5, 1.0]))
    finer.affine[:3, 3] = -0.25
    step = finer.step_to(Grid((10, 10, 10), np.eye(4)))
    for order in (0, 1, 3):
        assert resample(np.ones((10, 10, 10)), step, finer.shape, order=order) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("coarser", [2.0, 3.5])
def test_coarser_voxels_are_averages(coarser):
    """A Gaussian blob widens as by a kernel of one target voxel's FWHM, keeps its mass, and stays in its place."""
    shape, sd, at = (60, 60, 60), 1.5, np.array([28.3, 30.1, 31.4])
    blob = np.exp(-((np.indices(shape) - at[:, None, None, None]) ** 2).sum(axis=0) / (2 * sd**2))
    source = Grid(shape, np.eye(4))
    target = Grid.around([source], [np.eye(4)], spacing_mm=coarser)
    found = resample(blob, target.step_to(source), target.shape).astype(float)
    where = np.indices(target.shape) * coarser + (coarser - 1) / 2
    total = found.sum()
    centre = (where * found).reshape(3, -1).sum(axis=1) / total
    spread = np.sqrt((((where - centre[:, None, None, None]) ** 2) * found).reshape(3, -1).sum(axis=1) / total)
    assert total * coarser**3 == pytest.approx(blob.sum(), rel=0.01)
    assert centre == pytest.approx(at, abs=0.02)
    assert spread == pytest.approx(np.sqrt(sd**2 + (coarser**2 - 1) / (8 * np.log(2))), rel=0.015)


def test_nearest_neighbours_are_not_averaged():
    labels = np.random.default_rng(0).integers(0, 4, (12, 10, 8))
    assert np.array_equal(resample(labels, np.diag([2.0, 2, 2, 1]), (6, 5, 4), order=0), labels[::2, ::2, ::2])


def test_fine_stripes_do_not_come_out_coarse():
    stripes = np.indices((40, 8, 8))[0] % 2 * 2.0 - 1
    target = Grid((20, 8, 8), np.diag([2.0, 1, 1, 1]))
    step = target.step_to(Grid((40, 8, 8), np.eye(4)))
    assert np.abs(ndimage.affine_transform(stripes, step[:3, :3], step[:3, 3], (20, 8, 8))[3:-3]).min() > 0.9
    assert np.abs(resample(stripes, step, (20, 8, 8))[3:-3]).max() < 0.2


def test_a_turn_there_and_back():
    rng = np.random.default_rng(5)
    source = centred((40, 40, 40), np.eye(4))
    target = centred((40, 40, 40), turned((20, -15, 30)))
    data = ndimage.gaussian_filter(rng.normal(size=source.shape), 2)
    there = resample(data, target.step_to(source), target.shape)
    back = resample(there, source.step_to(target), source.shape)
    ball = np.linalg.norm(np.indices(source.shape) - 19.5, axis=0) < 14
    assert np.abs(back - data)[ball].max() < 0.01 * data[ball].std()
    assert np.abs(there - data)[ball].mean() > 0.3 * data[ball].std()


# --- lesions


def scattered(shape, seed, *, share=0.02):
    """Voxels and small clusters at random."""
    rng = np.random.default_rng(seed)
    mask = rng.random(shape) < share
    return mask | (ndimage.binary_dilation(mask) & (rng.random(shape) < 0.4))


@settings(max_examples=25, deadline=None)
@given(seeds, st.floats(0, 0.3))
def test_lesions_on_the_same_grid_stay_as_they_are(seed, share):
    mask = scattered((14, 13, 12), seed, share=share)
    before = mask.copy()
    same = carry_mask(mask, np.eye(4), mask.shape)
    assert same.dtype == np.uint8
    assert np.array_equal(same, mask)
    assert np.array_equal(mask, before)


@settings(max_examples=25, deadline=None)
@given(seeds, st.tuples(*[st.integers(-6, 6)] * 3))
def test_whole_voxels_of_shift_are_exact(seed, shift):
    mask = scattered((14, 13, 12), seed)
    step = np.eye(4)
    step[:3, 3] = shift
    wide = np.pad(mask, 6)
    expected = wide[tuple(slice(6 + s, 6 + s + n) for s, n in zip(shift, mask.shape, strict=True))]
    assert np.array_equal(carry_mask(mask, step, mask.shape), expected)


@settings(max_examples=15, deadline=None)
@given(seeds, st.permutations(range(3)), st.tuples(*[st.booleans()] * 3))
def test_other_orders_of_the_axes_are_exact(seed, axes, flips):
    mask = scattered((14, 13, 12), seed)
    orientation = np.array([(axis, -1 if flip else 1) for axis, flip in zip(axes, flips, strict=True)])
    expected = nib.orientations.apply_orientation(mask, orientation)
    step = nib.orientations.inv_ornt_aff(orientation, mask.shape)
    assert np.array_equal(carry_mask(mask, step, expected.shape), expected)


def test_no_lesion_gives_none():
    assert not carry_mask(np.zeros((5, 5, 5), bool), turned((3, 4, 5)), (6, 7, 8)).any()
    assert carry_mask(np.zeros((5, 5, 5), bool), np.eye(4), (6, 7, 8)).shape == (6, 7, 8)


def spread_out(seed, *, shape=(60, 60, 48), count=12):
    """Balls and single voxels, far enough apart not to meet on any grid; the mask and the lesions' voxel counts."""
    rng = np.random.default_rng(seed)
    mask = np.zeros(shape, bool)
    grid = np.indices(shape)
    places = [np.array(at) for at in np.ndindex(3, 3, 2)]
    for place in rng.permutation(len(places))[:count]:
        centre = 12 + places[place] * np.array([18, 18, 22]) + rng.uniform(-2, 2, 3)
        radius = rng.choice([0, 1.2, 2.3, 4.0])
        mask |= np.linalg.norm(grid - np.rint(centre).reshape(3, 1, 1, 1), axis=0) <= radius
    return mask


GRIDS = {
    "finer": ((0.6, 0.6, 0.6), (0, 0, 0)),
    "turned": ((1, 1, 1), (12, -20, 8)),
    "scanner": (SCANNER_MM, (0, 0, 0)),
    "oblique scanner": (SCANNER_MM, (15, -10, 20)),
    "coarse": ((2, 2, 2), (5, 5, 5)),
}


@settings(max_examples=6, deadline=None)
@given(seeds)
@pytest.mark.parametrize("name", GRIDS)
def test_each_lesion_is_there_with_its_volume_in_its_place(name, seed):
    spacing, angles_deg = GRIDS[name]
    mask = spread_out(seed)
    source = centred(mask.shape, turned((2, -3, 4)), (10, -20, 30))
    shape = tuple(int(n) for n in np.ceil(np.array([100, 100, 100]) / spacing))
    target = centred(shape, turned(angles_deg, spacing=spacing), (10, -20, 30))
    carried = carry_mask(mask, target.step_to(source), target.shape)
    assert set(np.unique(carried)) == {0, 1}
    labels, sizes = lesions_of(mask)
    where = np.argwhere(carried)
    back = apply_affine(np.linalg.inv(source.affine) @ target.affine, where)
    distance = ndimage.distance_transform_edt(labels == 0, return_distances=False, return_indices=True)
    nearest = labels[tuple(distance)]
    owner = nearest[tuple(np.clip(np.rint(back).astype(int), 0, np.array(mask.shape) - 1).T)]
    for number, size in enumerate(sizes, start=1):
        mine = back[owner == number]
        assert len(mine) == max(1, round(size / target.voxel_mm3))
        off = np.abs(mine.mean(axis=0) - np.argwhere(labels == number).mean(axis=0))
        assert np.linalg.norm(off) <= 0.62 * np.linalg.norm(spacing)  # little more than half a voxel's diagonal
        if len(mine) > 20:
            assert np.linalg.norm(off) <= 0.3 * max(spacing)


def test_single_voxels_survive_between_thick_slices():
    """Nearest neighbours and a threshold of one half both lose most of these."""
    mask = np.zeros((40, 40, 40), bool)
    mask[4:36:5, 4:36:5, 4:36:5] = True
    count = int(mask.sum())
    source, target = centred(mask.shape, np.eye(4)), centred((60, 60, 10), turned((0, 0, 0), spacing=SCANNER_MM))
    step = target.step_to(source)
    carried = carry_mask(mask, step, target.shape)
    assert carried.sum() == count  # a voxel each, of 2.07 mm3
    halves = ndimage.affine_transform(mask.astype(float), step[:3, :3], step[:3, 3], target.shape, order=1) >= 0.5
    assert lesions_of(halves)[1].size < 0.6 * count


def test_neighbours_stay_two_lesions():
    mask = np.zeros((20, 20, 20), bool)
    mask[5:8, 5:8, 5:8] = mask[10:13, 5:8, 5:8] = True
    step = np.diag([0.5, 0.5, 0.5, 1.0])
    carried = carry_mask(mask, step, (40, 40, 40))
    assert lesions_of(carried)[1].tolist() == [216, 216]


def test_half_a_voxel_of_shift_favours_no_side():
    """All voxels of a lesion's faces are equally near then; taking the first ones would let one end grow alone."""
    mask = np.zeros((60, 24, 24), bool)
    mask[5:20, 5:18, 5:18] = mask[40:55, 5:18, 5:18] = mask[20:40, 10:13, 10:13] = True
    for shift in ((0.5, 0, 0), (0, 0.5, 0), (0, 0, -0.5), (0.5, 0.5, 0.5)):
        step = np.eye(4)
        step[:3, 3] = shift
        carried = carry_mask(mask, step, mask.shape)
        assert carried.sum() == mask.sum()
        ends = carried[:25].sum(), carried[35:].sum()
        assert min(ends) > 0.95 * max(ends)
        off = np.argwhere(carried).mean(axis=0) - (np.argwhere(mask).mean(axis=0) - shift)
        assert np.abs(off).max() < 0.7


def test_what_lies_outside_vanishes_and_what_reaches_out_is_cut_off():
    mask = np.zeros((30, 30, 30), bool)
    mask[2:6, 10:14, 10:14] = True  # half of it below the target
    mask[14:17, 14:17, 14:17] = True
    mask[24:28, 24:28, 24:28] = True  # beyond it
    step = np.eye(4)
    step[:3, 3] = (4, 4, 4)
    carried = carry_mask(mask, step, (18, 18, 18))
    assert np.array_equal(carried, mask[4:22, 4:22, 4:22])
    step[:3, 3] = 100
    assert not carry_mask(mask, step, (18, 18, 18)).any()
    fine = carry_mask(mask, np.diag([0.5, 0.5, 0.5, 1.0]) + np.pad(np.full((3, 1), 3.75), ((0, 1), (3, 0))), (36,) * 3)
    assert fine[:4].sum() == pytest.approx(8 * 2 * 4 * 4, rel=0.05)


@settings(max_examples=15, deadline=None)
@given(seeds)
def test_numbered_lesions_lie_where_each_would_alone(seed):
    labels, count = ndimage.label(scattered((14, 13, 12), seed))
    step = turned((9, -6, 4), spacing=(0.9, 0.8, 2.5))
    carried = carry_labels(labels, step, (15, 16, 6))
    alone = np.zeros((15, 16, 6), int)
    for number in range(1, count + 1):
        alone[carry_mask(labels == number, step, alone.shape) > 0] = number
    assert np.array_equal(carried, alone)


def test_the_higher_number_stays_and_gaps_do_not_matter():
    labels = np.zeros((8, 8, 8), np.int32)
    labels[4, 4, 4], labels[4, 4, 5], labels[0, 0, 0] = 2, 5, 9
    carried = carry_labels(labels, np.diag([4.0, 4, 4, 1]), (2, 2, 2))
    assert (carried[1, 1, 1], carried[0, 0, 0]) == (5, 9)
    assert np.count_nonzero(carried) == 2


@pytest.mark.parametrize("subject", ["cs07", "cs19"])
@pytest.mark.parametrize("angles_deg", [(12, -8, 5), (25, 10, -20)])
def test_real_lesions_there_and_back(bundled, subject, angles_deg):
    image = nib.as_closest_canonical(nib.load(bundled(subject)[1]))
    mask = np.asarray(image.dataobj) > 0
    source = Grid(mask.shape, image.affine)
    scanner = centred((290, 340, 56), turned(angles_deg, spacing=SCANNER_MM), (0, -18, 10))
    there = carry_mask(mask, scanner.step_to(source), scanner.shape)
    back = carry_mask(there, source.step_to(scanner), source.shape)
    labels, sizes = lesions_of(mask)
    found = np.bincount(labels[back > 0], minlength=len(sizes) + 1)[1:] > 0
    assert found[sizes > 10].mean() >= 0.95
    assert found.mean() >= 0.75
    assert there.sum() * scanner.voxel_mm3 == pytest.approx(mask.sum(), rel=0.005)
    assert back.sum() == pytest.approx(mask.sum(), rel=0.005)
    for grid, carried in ((scanner, there), (source, back)):
        off = apply_affine(grid.affine, np.argwhere(carried)).mean(axis=0)
        off -= apply_affine(source.affine, np.argwhere(mask)).mean(axis=0)
        assert np.linalg.norm(off) < 0.5  # thin parts give to thick ones
    away = ndimage.distance_transform_edt(~mask)[back > 0]
    assert away.max() <= 4
    assert (away > 2).mean() < 0.02


# --- less than a voxel
offsets = st.tuples(*[st.floats(-0.9, 0.9)] * 3)


@given(offsets, seeds)
@settings(max_examples=20, deadline=None)
def test_shifted_as_by_splines(offset, seed):
    image = 1 + ndimage.gaussian_filter(np.random.default_rng(seed).standard_normal((24, 22, 20)), 2.0)
    theirs = ndimage.shift(image, offset, order=3, mode="nearest")
    inner = (slice(4, -4),) * 3
    spread = image[inner].std()
    assert np.abs(shifted(image, offset) - theirs)[inner].max() < 0.1 * spread


@given(offsets, seeds)
@settings(max_examples=20, deadline=None)
def test_shifting_leaves_the_background_and_darkens_no_border(offset, seed):
    brain = ndimage.gaussian_filter(np.random.default_rng(seed).standard_normal((24, 22, 20)), 3.0) > 0
    moved = shifted(brain.astype(np.float32), offset)
    assert moved.dtype == np.float32
    assert np.allclose(moved, brain, atol=1e-5)


def test_dark_brain_beside_bright_brain_is_no_background():
    rng = np.random.default_rng(0)
    image = np.where(rng.random((20, 20, 20)) < 0.5, 0.01, 1.5).astype(np.float32)
    image[:, :, :6] = 0
    moved = shifted(image, (0.4, -0.5, 0.3))
    assert np.array_equal(moved == 0, image == 0)
    assert moved.min() == 0


def test_a_voxel_or_more_is_no_matter_of_interpolation():
    with pytest.raises(ValueError, match="below a voxel"):
        shifted(np.ones((8, 8, 8), np.float32), (0, 1.0, 0))


def test_no_offset_changes_no_bit():
    image = np.random.default_rng(0).uniform(0.1, 1, (8, 9, 10)).astype(np.float32)
    assert np.array_equal(shifted(image, (0, 0, 0)), image)
