from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage

from synthlong.bank import LesionBank, Shape, read_bank
from synthlong.comparison import CopyPainter, EllipsoidPainter, donor_of, shapes_for
from synthlong.errors import InputError
from synthlong.hole import soft_hole
from synthlong.lesions import find_lesions
from synthlong.placement import Site, shape_at
from synthlong.profile import Profile

PROFILE = Profile((0.0, 0.1, 0.4, 0.5, 0.6), (0.05,) * 5)


@pytest.mark.parametrize("painter", [EllipsoidPainter(), CopyPainter()])
def test_plain_painters_keep_to_their_hole(small_case, painter):
    x, mask = small_case.healthy, small_case.lesions
    before = x.copy()
    painted = painter.paint(x, mask, seed=0, profile=PROFILE, donor=small_case.flair)
    away = soft_hole(mask) == 0
    assert painted.dtype == np.float32
    assert np.array_equal(painted[away], x[away])
    assert (painted[mask == 1] > x[mask == 1]).all()
    assert np.array_equal(x, before)
    nothing = painter.paint(x, np.zeros_like(mask), seed=0, profile=PROFILE, donor=small_case.flair)
    assert np.array_equal(nothing, x)


def test_an_ellipsoid_is_evenly_bright(small_case):
    mask = np.zeros_like(small_case.lesions)
    mask[24:33, 16:25, 16:25] = 1
    painted = EllipsoidPainter().paint(np.ones(mask.shape, np.float32), mask, seed=0, profile=PROFILE)
    core = ndimage.binary_erosion(mask, iterations=3)
    assert painted[core].std() < 1e-3
    assert painted[core].mean() == pytest.approx(1.5, abs=0.06)
    assert painted[24, 20, 20] == pytest.approx((1 + painted[core].mean()) / 2, abs=0.15)


def test_a_copied_lesion_is_the_real_one(small_case):
    painted = CopyPainter().paint(
        small_case.healthy, small_case.lesions, seed=0, profile=PROFILE, donor=small_case.flair
    )
    lesion = small_case.lesions == 1
    assert np.array_equal(painted[lesion], small_case.flair[lesion])
    with pytest.raises(ValueError, match="donor"):
        CopyPainter().paint(small_case.healthy, small_case.lesions, seed=0, profile=PROFILE)


@pytest.mark.parametrize("mirrored", [False, True])
def test_the_donor_lies_over_its_copy(small_case, mirrored):
    lesions = find_lesions(small_case.lesions, max_event_mm3=3000.0)
    own = shapes_for("copypaste", small_case, lesions, read_bank())
    assert len(own) == lesions.mutable.sum()
    assert shapes_for("copypaste", small_case, lesions, read_bank()) is own
    for n in range(len(own)):
        site = Site(n, mirrored, (17, 21, 23))
        voxels, first = shape_at(site, own)
        donor = donor_of(small_case, lesions, site, own, (8, 9, 10), 24)
        inside = tuple(slice(f - s, f - s + m) for f, s, m in zip(first, (8, 9, 10), voxels.shape, strict=True))
        number = np.flatnonzero(lesions.mutable)[n] + 1
        source = small_case.flair[lesions.boxes[number - 1]]
        assert donor.shape == (24, 24, 24)
        assert np.array_equal(donor[inside], source[::-1] if mirrored else source)
        assert (donor[inside][voxels] > 1.2).all()


def test_a_case_without_lesions_has_nothing_to_copy(small_case):
    none = replace(small_case, lesions=np.zeros_like(small_case.lesions))
    with pytest.raises(InputError, match="no lesion to copy"):
        shapes_for("copypaste", none, find_lesions(none.lesions, max_event_mm3=3000.0), read_bank())


def test_ellipsoids_have_the_volume_and_the_axes_of_their_shapes(small_case):
    rng = np.random.default_rng(0)
    rough = ndimage.gaussian_filter(rng.normal(size=(20, 14, 8)), 1.5) > -0.05
    bank = LesionBank.from_shapes([Shape(rough, (1.0, 2.0, 3.0)), Shape(np.ones((2, 1, 3), bool), (0.0, 0.0, 0.0))])
    lesions = find_lesions(small_case.lesions, max_event_mm3=3000.0)
    made = shapes_for("ellipsoid", small_case, lesions, bank)
    assert shapes_for("network", small_case, lesions, bank) is bank
    assert made.volumes_mm3 == pytest.approx(bank.volumes_mm3, rel=0.1, abs=3)
    assert made[0].centre_mm == (1.0, 2.0, 3.0)
    spread = [np.argwhere(b[0].voxels).std(axis=0) for b in (bank, made)]
    assert spread[1] / spread[1][0] == pytest.approx(spread[0] / spread[0][0], rel=0.1)
