from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from synthlong.atlas import lesion_prior, sample_map
from synthlong.bank import LesionBank, Shape, read_bank
from synthlong.errors import InputError
from synthlong.hole import FLUID
from synthlong.placement import (
    PlacementMap,
    Site,
    allowed_of,
    draw_site,
    find_placements,
    site_mask,
    surroundings_weight,
    tissue_weight,
)
from synthlong.tissue import CSF

MARGIN = 5


@pytest.fixture(scope="module")
def drawn(real_case):
    """Weight of each voxel, and 5,000 times (wanted volume, site, mask, box), nothing placed before."""
    frequency, affine = lesion_prior()
    frequency = sample_map(frequency, affine, real_case.shape, real_case.affine)
    places = find_placements(real_case, frequency, gray_matter=0.3, margin=MARGIN)
    allowed = allowed_of(real_case, MARGIN)
    weight = frequency * tissue_weight(real_case.tissue, 0.3) * allowed * surroundings_weight(real_case)
    rng, bank, taken = np.random.default_rng(0), read_bank(), np.zeros_like(allowed)
    found = []
    while len(found) < 5000:
        wanted = float(np.clip(45 * np.exp(1.1 * rng.standard_normal()), 4, 3000))
        hit = draw_site(rng, places, allowed, taken, bank, real_case.affine, volume_mm3=wanted)
        if hit:
            found.append((wanted, *hit))
    assert not taken.any()
    return weight, found


def test_centres_follow_prior_times_tissue_times_surroundings(drawn):
    weight, found = drawn
    order = np.argsort(weight, axis=None, kind="stable")  # by rank: the prior has many equal values
    rising = np.cumsum(weight.ravel()[order], dtype=np.float64)
    bins = np.full(weight.shape, -1)
    bins.ravel()[order] = np.where(rising > 0, np.minimum(20 * rising / rising[-1], 19.5), -1)
    expected = np.bincount(bins[weight > 0], weight[weight > 0], minlength=20) / rising[-1]
    shares = np.bincount([bins[site.centre] for _, site, _, _ in found], minlength=20) / len(found)
    assert np.abs(expected - 0.05).max() < 1e-3
    assert (np.abs(shares / expected - 1) < 0.2).all()


def test_voxels_lie_in_gray_and_white_matter_clear_of_lesions(drawn, real_case):
    _, found = drawn
    far = ndimage.distance_transform_edt(real_case.lesions == 0) > MARGIN
    good = (real_case.brain > 0) & (real_case.tissue > CSF) & far
    for _, site, mask, box in found:
        assert mask.sum() > 3
        assert good[box][mask].all()
        assert mask[tuple(c - b.start for c, b in zip(site.centre, box, strict=True))]
        assert ndimage.label(mask, np.ones((3, 3, 3)))[1] == 1


def test_a_site_gives_its_mask_again(drawn, real_case):
    _, found = drawn
    allowed = allowed_of(real_case, MARGIN)
    for _, site, mask, box in found:
        again, same = site_mask(site, read_bank(), allowed)
        assert same == box
        assert np.array_equal(again, mask)


def test_volumes_are_near_the_wanted_ones(drawn):
    _, found = drawn
    ratio = np.log([mask.sum() / wanted for wanted, _, mask, _ in found])
    assert abs(np.median(ratio)) < 0.15
    assert abs(ratio.mean()) < 0.25
    assert np.abs(ratio).mean() < 0.5


def test_shapes_come_from_nearby_and_from_both_sides(drawn, real_case):
    _, found = drawn
    bank = read_bank()
    apart = []
    for _, site, _, _ in found[:500]:
        shape = bank[site.shape]
        own = np.array((shape.mirrored() if site.mirrored else shape).centre_mm)
        at = real_case.affine[:3, :3] @ site.centre + real_case.affine[:3, 3]
        assert own[0] * at[0] >= 0
        apart.append(np.linalg.norm(own - at))
    assert np.median(apart) < 40
    assert 0.3 < np.mean([site.mirrored for _, site, _, _ in found]) < 0.7


def test_tissue_weight():
    tissue = np.array([0, 1, 2, 3], np.uint8)
    assert tissue_weight(tissue, 0.25).tolist() == [0, 0, 0.25, 1]
    assert tissue_weight(tissue, 0).tolist() == [0, 0, 0, 1]


def slow_surroundings(case, at):
    """The exponent at one voxel, by sums over the cubes around it."""
    inside = np.argwhere(case.brain)
    box = tuple(slice(a, b + 1) for a, b in zip(inside.min(axis=0), inside.max(axis=0), strict=True))
    far = ndimage.distance_transform_edt(case.lesions == 0)
    tissue = ((case.brain > 0) & (case.flair >= FLUID) & (far >= 2.5))[box].astype(float)
    fluid = ((case.brain == 0) | (case.tissue <= CSF))[box].astype(float)

    def around(x, sd):
        reach = int(2.5 * sd + 0.5)
        line = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sd) ** 2)
        line /= line.sum()
        start = [a - b.start for a, b in zip(at, box, strict=True)]
        cube = np.pad(x, reach, mode="edge")[tuple(slice(s, s + 2 * reach + 1) for s in start)]
        return np.einsum("ijk,i,j,k", cube, line, line, line)

    near, farther = (around(tissue * case.flair[box], sd) / around(tissue, sd) for sd in (2, 5))
    return 7 * around(fluid, 6) - 6 * around(fluid, 1.5) + 8 * (near - farther) - 0.2


def test_surroundings_weight_is_the_slow_one(small_case):
    weight = surroundings_weight(small_case)
    assert weight.dtype == np.float32
    assert not weight[small_case.brain == 0].any()
    reached = set()
    for at in [(20, 20, 27), (20, 30, 20), (14, 20, 13), (20, 20, 36), (20, 24, 24), (29, 21, 20)]:
        exponent = slow_surroundings(small_case, at)
        assert weight[at] == pytest.approx(np.exp(np.clip(exponent, -1.5, 1.5)), rel=2e-3)
        reached.add(abs(exponent) > 1.5)
    assert False in reached


@settings(max_examples=10, deadline=None)
@given(st.floats(0.7, 1.5), st.integers(8, 12))
def test_surroundings_of_even_tissue_far_from_fluid_are_all_alike(level, half):
    side = 2 * half + 32
    inner = np.ones((side,) * 3, np.float32)
    case = SimpleNamespace(
        shape=inner.shape,
        brain=inner,
        flair=inner * np.float32(level),
        tissue=np.full(inner.shape, 3, np.uint8),
        lesions=np.zeros(inner.shape, np.uint8),
    )
    assert surroundings_weight(case) == pytest.approx(np.exp(-0.2), rel=1e-4)
    case.flair[side // 2, side // 2, side // 2] = case.brain[0, 0, 0] = 0
    assert surroundings_weight(case)[0, 0, 0] == 0


def test_allowed_is_worked_out_once(small_case):
    allowed = allowed_of(small_case, MARGIN)
    assert allowed_of(small_case, MARGIN) is allowed
    assert allowed_of(small_case, MARGIN + 1).sum() < allowed.sum()
    assert not (allowed & (ndimage.distance_transform_edt(small_case.lesions == 0) <= MARGIN)).any()
    assert not (allowed & (small_case.tissue < 2)).any()


def test_no_place_left(small_case):
    with pytest.raises(InputError, match="no place"):
        find_placements(small_case, np.zeros(small_case.shape, np.float32), gray_matter=0.3, margin=MARGIN)


def cube_bank(side):
    return LesionBank.from_shapes([Shape(np.ones((side,) * 3, bool), (10.0, 0.0, 0.0))])


def test_a_shape_is_cut_off_where_it_leaves_the_tissue():
    allowed = np.ones((20, 20, 20), bool)
    allowed[12] = False  # a wall: what lies beyond it is not the lesion
    mask, box = site_mask(Site(0, False, (10, 10, 10)), cube_bank(7), allowed)
    assert (box[0].start, box[0].stop) == (7, 14)
    assert mask.sum() == 5 * 49
    assert not mask[5:].any()


def test_a_shape_does_not_reach_across_a_fissure():
    allowed = np.zeros((20, 20, 20), bool)
    allowed[:10, :10] = allowed[10:, 10:] = True  # two banks that meet at an edge
    mask, box = site_mask(Site(0, False, (8, 8, 10)), cube_bank(7), allowed)
    assert mask.sum() == 5 * 5 * 7
    assert (box[0].start, box[1].start) == (5, 5)
    assert not mask[5:].any()


def test_a_shape_is_cut_off_at_the_grids_border():
    mask, box = site_mask(Site(0, True, (0, 19, 10)), cube_bank(5), np.ones((20, 20, 20), bool))
    assert box == (slice(0, 3), slice(17, 20), slice(8, 13))
    assert mask.all()


def test_a_centre_outside_the_tissue_gives_nothing():
    assert not site_mask(Site(0, False, (5, 5, 5)), cube_bank(3), np.zeros((10, 10, 10), bool))[0].any()


def test_the_shape_that_fits_is_taken():
    """Of two as likely, the one along the corridor, whichever is drawn first."""
    bank = LesionBank.from_shapes([Shape(np.ones(n, bool), (0.0, 0.0, 0.0)) for n in ((15, 5, 5), (5, 15, 5))])
    allowed, taken = np.zeros((40, 40, 40), bool), np.zeros((40, 40, 40), bool)
    allowed[:, 17:22, 17:22] = True
    places = PlacementMap(np.array([np.ravel_multi_index((20, 19, 19), allowed.shape)], np.int32), np.ones(1))
    for seed in range(20):
        rng = np.random.default_rng(seed)
        hit = draw_site(rng, places, allowed, taken, bank, np.eye(4), volume_mm3=375)
        assert hit
        assert hit[0].shape == 0


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6))
def test_taken_voxels_are_kept_clear(seed):
    rng = np.random.default_rng(seed)
    allowed, taken = np.ones((24, 24, 24), bool), np.zeros((24, 24, 24), bool)
    taken[:9] = True
    places = PlacementMap(np.arange(24**3, dtype=np.int32), np.arange(1, 24**3 + 1) / 24**3)
    hit = draw_site(rng, places, allowed, taken, cube_bank(3), np.eye(4), volume_mm3=27)
    if hit:
        site, mask, box = hit
        assert not (mask & taken[box]).any()
        assert site.centre[0] >= 10
