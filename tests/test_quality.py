import json
from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage

from synthlong.atlas import MNI_SHAPE, tissue_maps
from synthlong.pictures import GRAY_TOP
from synthlong.preparation.quality import (
    Figures,
    agreement,
    correlation,
    figures_of,
    flags_of,
    halfway_flags,
    halfway_picture,
    picture_of,
    snr_of,
)
from synthlong.preparation.registration import mni_scan
from synthlong.resampling import Grid

GOOD = Figures(
    brain_ml=1300.0,
    snr=20.0,
    overlap=0.95,
    template=0.8,
    agreement=0.95,
    lesions=3,
    lesions_ml=1.5,
    lesions_prepared=3,
)
CUBES = np.ones(3)
RED, BLUE = (255, 79, 79), (74, 163, 255)


# --- noise


@pytest.fixture(scope="module")
def head():
    """A brain with slopes and an edge of its own, 300 bright, within a darker head."""
    grid = np.indices((48, 48, 40)) - np.reshape((24, 24, 20), (3, 1, 1, 1))
    brain = np.linalg.norm(grid, axis=0) < 17
    return np.where(brain, 300 + 2.0 * grid[0] + 1.5 * grid[2] - 0.05 * grid[1] ** 2, 60), brain


@pytest.mark.parametrize("sd", [3, 10, 40])
def test_signal_over_known_noise(head, sd):
    scan, brain = head
    noisy = scan + np.random.default_rng(sd).normal(0, sd, scan.shape)
    assert snr_of(noisy, brain, CUBES) == pytest.approx(np.median(scan[brain]) / sd, rel=0.1)


def test_only_the_brain_counts(head):
    scan, brain = head
    noisy = scan + np.random.default_rng(0).normal(0, 10, scan.shape)
    outside = np.where(brain, noisy, np.random.default_rng(1).normal(5000, 900, scan.shape))
    plain = snr_of(noisy, brain, CUBES)
    assert snr_of(outside, brain, CUBES) == plain
    assert snr_of(noisy * 7, brain, CUBES) == pytest.approx(plain)


def test_the_order_of_the_axes_is_of_no_account(head):
    """Between thick slices anatomy differs, along the finest sides it does not; of equal sides the first counts."""
    scan, brain = head
    noisy = scan * (1 + np.arange(48)[:, None, None] % 2) + np.random.default_rng(0).normal(0, 10, scan.shape)
    plain = snr_of(noisy, brain, np.array([3, 0.8, 0.8]))
    assert plain > 20
    assert snr_of(noisy, brain, CUBES) < 5
    for axis in (1, 2):
        sides = np.insert([0.8, 0.8], axis, 3)
        assert snr_of(np.moveaxis(noisy, 0, axis), np.moveaxis(brain, 0, axis), sides) == plain


def test_a_scan_without_noise_is_no_division_by_zero(head):
    scan, brain = head
    assert snr_of(np.full(scan.shape, 9.0), brain, CUBES) > 1e6


# --- likeness


def test_correlation_is_pearsons():
    rng = np.random.default_rng(3)
    one = rng.normal(size=(10, 10, 10))
    other = 0.6 * one + 0.8 * rng.normal(size=one.shape)
    where = rng.random(one.shape) < 0.5
    a, b = one[where] - one[where].mean(), other[where] - other[where].mean()
    expected = (a * b).sum() / np.sqrt((a**2).sum() * (b**2).sum())
    assert correlation(one, other, where) == pytest.approx(expected)
    assert correlation(one, 5 - 2 * one, where) == pytest.approx(-1)
    assert correlation(one, np.ones_like(one), where) == 0
    assert correlation(one, other, np.zeros(one.shape, bool)) == 0
    lone = np.zeros(one.shape, bool)
    lone[0, 0, 0] = True
    assert correlation(one, other, lone) == 0


def test_visits_are_compared_with_the_first():
    rng = np.random.default_rng(4)
    first = rng.normal(size=(8, 8, 8))
    same, other = 2 * first + 1, rng.normal(size=first.shape)
    inside = np.ones(first.shape, bool)
    inside[0] = False
    same[0] = 99  # outside the first visit's brain
    brains = [inside, np.ones_like(inside), np.ones_like(inside)]
    best, one, two = agreement([first, same, other], brains)
    assert one == pytest.approx(1)
    assert two == pytest.approx(np.corrcoef(first[1:].ravel(), other[1:].ravel())[0, 1])
    assert best == one  # the bad visit is flagged, the first is not
    assert agreement([first], [inside]) == [None]


# --- figures and flags


@pytest.mark.parametrize(
    ("change", "flag"),
    [
        ({"brain_ml": 699.4}, "brain of 699 ml"),
        ({"brain_ml": 2300.0}, "brain of 2300 ml"),
        ({"overlap": 0.899}, "overlap with the MNI brain 0.90"),
        ({"template": 0.08}, "correlation with the template 0.08"),
        ({"agreement": 0.79}, "correlation of the visits 0.79"),
        ({"snr": 4.9}, "signal-to-noise ratio 4.9"),
    ],
)
def test_each_figure_raises_its_flag(change, flag):
    assert flags_of(replace(GOOD, **change)) == [flag]


def test_what_is_well_raises_none():
    assert flags_of(GOOD) == []
    assert flags_of(replace(GOOD, agreement=None)) == []
    assert flags_of(replace(GOOD, brain_ml=700.0, overlap=0.9, agreement=0.8, snr=5.0)) == []
    assert flags_of(replace(GOOD, brain_ml=2200.0)) == []


def test_all_that_is_wrong_is_flagged():
    assert len(flags_of(replace(GOOD, brain_ml=2201.0, overlap=0.0, template=0.0, agreement=0.0, snr=0.0))) == 5


@pytest.fixture(scope="module")
def template():
    """The MNI brain and a FLAIR of it, straight from the maps: CSF dark, gray matter bright."""
    csf, gray, white = tissue_maps()
    return csf + gray + white > 0.5, (0.1 * csf + 1.2 * gray + white).astype(np.float32)


def test_figures_of_a_scan_and_what_was_made_of_it(template):
    usual, image = template
    rng = np.random.default_rng(6)
    scan = np.full((30, 30, 10), 200.0) + rng.normal(0, 10, (30, 30, 10))
    brain = np.zeros(scan.shape, bool)
    brain[5:25, 5:25] = True
    lesions = np.zeros(scan.shape, np.uint8)
    lesions[6:8, 6, 3] = lesions[8, 7, 4] = lesions[20, 20, 5] = 1  # the first two touch at an edge
    carried = np.zeros(MNI_SHAPE, np.uint8)
    carried[90, 100, 90] = 1
    half = usual.copy()
    half[91:] = False
    figures = figures_of(
        scan,
        brain,
        Grid((30, 30, 10), np.diag([1, 1, 4, 1])),
        lesions,
        prepared=image,
        prepared_brain=half,
        prepared_lesions=carried,
        agreement=0.9,
    )
    assert figures.brain_ml == pytest.approx(20 * 20 * 10 * 4 / 1000)
    assert figures.snr == pytest.approx(20, rel=0.1)
    assert figures.overlap == pytest.approx(2 * half.sum() / (half.sum() + usual.sum()))
    assert figures.template > 0.95
    assert (figures.lesions, figures.lesions_prepared, figures.agreement) == (2, 1, 0.9)
    assert figures.lesions_ml == pytest.approx(4 * 4 / 1000)
    plain = figures.as_dict()
    assert json.loads(json.dumps(plain)) == plain
    assert plain["overlap"] == round(figures.overlap, 4)
    assert replace(figures, agreement=None).as_dict()["agreement"] is None


# --- the picture

SIDES = (182, 182, 218)  # of the three panels, voxels: axial, coronal, sagittal
HIGHEST = 218


def panels_of(picture, row):
    """The axial, coronal and sagittal plane of a row, as `[i, j]` of voxels, each 2 x 2 pixels."""
    band = picture[2 * HIGHEST * row : 2 * HIGHEST * (row + 1)]
    found, left = [], 0
    for width, height in zip(SIDES, (218, 182, 182), strict=True):
        panel = band[2 * (HIGHEST - height) :, left : left + 2 * width]
        assert not band[: 2 * (HIGHEST - height), left : left + 2 * width].any()
        found.append(panel[::-1].swapaxes(0, 1))  # to the right, upwards
        left += 2 * width
    assert left == picture.shape[1]
    return found


def is_colour(pixels, colour):
    return (pixels == colour).all(axis=-1)


def outline(mask):
    """Pixels beside a mask of doubled voxels, those that share a side with it."""
    fine = mask.repeat(2, axis=0).repeat(2, axis=1)
    return (ndimage.distance_transform_cdt(~fine, "taxicab") == 1) & ~fine


def test_the_picture_without_lesions_is_one_row(template):
    usual, image = template
    picture = picture_of(image, np.zeros(MNI_SHAPE, np.uint8))
    assert picture.shape == (2 * HIGHEST, 2 * sum(SIDES), 3)
    assert picture.dtype == np.uint8
    assert not is_colour(picture, RED).any()
    middle = np.rint([c.mean() for c in np.nonzero(usual)]).astype(int)
    near = [range(m - 1, m + 2) for m in middle]
    for panel, axis in zip(panels_of(picture, 0), (2, 1, 0), strict=True):
        drawn = is_colour(panel, BLUE)
        assert any(np.array_equal(drawn, outline(usual.take(at, axis))) for at in near[axis])


def test_the_lower_row_shows_the_largest_lesion_where_it_is(template):
    _, image = template
    lesions = np.zeros(MNI_SHAPE, np.uint8)
    lesions[60, 120, 80] = 1
    lesions[110:115, 95:99, 101:107] = 1
    picture = picture_of(image, lesions)
    assert picture.shape == (4 * HIGHEST, 2 * sum(SIDES), 3)
    for panel, axis in zip(panels_of(picture, 1), (2, 1, 0), strict=True):
        at = {0: 112, 1: 97, 2: 104}[axis]  # any plane through the box shows the same outline of it
        edge = outline(lesions.take(at, axis) > 0)
        assert np.array_equal(is_colour(panel, RED), edge)
        assert edge.sum() > 10
        inside = np.argwhere(lesions.take(at, axis))[0] * 2
        assert len(set(panel[tuple(inside)].tolist())) == 1  # gray: the lesion itself stays to be seen


def test_gray_levels_are_the_images(template):
    _, image = template
    image = image.copy()
    image[:, :, 60:120] = np.linspace(0, 2.5, 218, dtype=np.float32)[:, None]
    lesions = np.zeros(MNI_SHAPE, np.uint8)
    lesions[90, 108, 80] = 1
    axial = panels_of(picture_of(image, lesions), 1)[0]
    plain = ~is_colour(axial, BLUE) & ~is_colour(axial, RED)
    expected = np.clip(np.linspace(0, 2.5, 218) / GRAY_TOP, 0, 1) * 255
    shown = np.broadcast_to(expected.repeat(2), axial.shape[:2])
    assert np.abs(axial[plain] - shown[plain][:, None]).max() <= 1


def test_visits_in_the_halfway_space_that_do_not_meet_are_flagged():
    scan = mni_scan("FLAIR")
    z = (scan - scan.mean()) / scan.std()
    for shift, flags in ((0, []), (12, ["correlation of the visits"])):
        images = [z, np.roll(z, shift, axis=1)]
        alike = agreement(images, [image > 0 for image in images])
        assert [flag.rsplit(" ", 1)[0] for same in alike for flag in halfway_flags(same)] == 2 * flags
    assert halfway_flags(None) == []


def test_the_halfway_picture_outlines_the_first_visits_head():
    template = mni_scan("FLAIR")
    head = template > 0
    lesion = np.zeros(template.shape, np.uint8)
    lesion[60:64, 100:104, 90:94] = 1
    picture = halfway_picture(template - 0.3, lesion, head)
    assert picture.shape == picture_of(template, lesion).shape
    assert {(74, 163, 255), (255, 79, 79)} <= set(map(tuple, np.unique(picture.reshape(-1, 3), axis=0)))
