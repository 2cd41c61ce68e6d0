import itertools
import shutil
import warnings
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import ndimage, stats

import synthlong.case as module
from synthlong.case import Case, read_case, read_lesions
from synthlong.errors import InputError, InputWarning
from synthlong.hole import FLUID
from synthlong.looks import check_looks
from synthlong.tissue import CSF, WHITE

NAME = "JANE DOE 1970"  # header text that must not reach a message


def cut(case, origin, side):
    """A box of the real scan as raw arrays, in units of its own."""
    box = tuple(slice(o, o + side) for o in origin)
    affine = case.affine.copy()
    affine[:3, 3] += origin
    return SimpleNamespace(
        flair=case.flair[box] * 100,
        mask=case.lesions[box].copy(),
        brain=case.brain[box].copy(),
        tissue=case.tissue[box].copy(),
        affine=affine,
    )


@pytest.fixture(scope="module")
def edge(real_case):
    """44^3 at the temporal pole: brain, background and lesions."""
    return cut(real_case, (66, 68, 24), 44)


@pytest.fixture(scope="module")
def ventricles(real_case):
    """48^3 around the ventricles, no background."""
    return cut(real_case, (66, 84, 66), 48)


@pytest.fixture
def read(tmp_path, write_volume):
    """Write the volumes given (arrays, or pairs with their own affine), and read the case from them."""

    def read(flair, mask, affine, *, prefer=None, subject=None, codes=(4, 4), **others):
        folder = tmp_path / "data"
        folder.mkdir(exist_ok=True)
        paths = {}
        for role, data in {"flair": flair, "mask": mask, **others}.items():
            data, grid = data if isinstance(data, tuple) else (data, affine)
            paths[role] = folder / f"sub-7_{role}.nii"
            write_volume(paths[role], data, grid, sform=codes[0], qform=codes[1], descrip=NAME)
        return read_case(paths.pop("flair"), paths.pop("mask"), prefer=prefer, subject=subject, **paths)

    return read


@contextmanager
def refused(file, *parts):
    """Expect an InputError that names the file, the problem and the way out, and no header text."""
    with pytest.raises(InputError) as caught:
        yield
    message = str(caught.value)
    assert message.startswith(f"data/sub-7_{file}.nii: "), message
    assert caught.value.way_out
    assert message.endswith(f"; {caught.value.way_out}")
    assert NAME not in message
    assert "/tmp" not in message
    for part in parts:
        assert part in message, message


@contextmanager
def warned(*texts):
    """Expect exactly these InputWarnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    messages = [str(w.message) for w in caught]
    assert len(messages) == len(texts), messages
    for text in texts:
        assert any(text in m for m in messages), messages
    for w in caught:
        assert w.category is InputWarning
        assert str(w.message).startswith("data/sub-7_")
        assert NAME not in str(w.message)


def same(one, other):
    return all(
        np.array_equal(getattr(one, name), getattr(other, name))
        for name in ("flair", "lesions", "brain", "tissue", "affine")
    )


# --- the case


def test_a_case_wants_arrays_of_one_shape():
    flair = np.zeros((4, 4, 4), np.float32)
    ones = np.ones((4, 4, 4), np.uint8)
    assert Case("x", flair, ones, ones, ones, np.eye(4)).shape == (4, 4, 4)
    for name in ("lesions", "brain", "tissue", "healthy"):
        arrays = {"lesions": ones, "brain": ones, "tissue": ones, name: ones[:3]}
        with pytest.raises(ValueError, match=rf"{name} has shape \(3, 4, 4\)"):
            Case("x", flair, affine=np.eye(4), **arrays)


def test_the_convention(read, edge):
    case = read(edge.flair, edge.mask, edge.affine)
    assert case.id == "7"
    assert [case.flair.dtype, case.lesions.dtype, case.brain.dtype, case.tissue.dtype] == [
        "f4",
        "u1",
        "u1",
        "u1",
    ]
    assert np.array_equal(case.brain, edge.flair != 0)
    assert not case.flair[case.brain == 0].any()
    assert not case.tissue[case.brain == 0].any()
    assert np.array_equal(case.lesions, edge.mask & case.brain)
    assert np.array_equal(case.affine, edge.affine)
    assert case.healthy is None
    assert set(case.sources) == {"flair", "mask"}
    assert case.scan_mean == pytest.approx(edge.flair.mean(dtype=float), rel=1e-6)
    assert case.scan_sd == pytest.approx(edge.flair.std(dtype=float), rel=1e-6)
    # only the unit has changed
    scale = edge.flair[case.brain > 0] / case.flair[case.brain > 0]
    assert np.nanmax(scale) == pytest.approx(np.nanmin(scale), rel=1e-5)


def test_a_mask_is_not_needed(read, edge, tmp_path):
    with warned("no lesion in the mask"):
        empty = read(edge.flair, np.zeros_like(edge.mask), edge.affine)
    case = read_case(tmp_path / "data" / "sub-7_flair.nii")
    assert case.sources == {"flair": empty.sources["flair"]}
    assert same(case, empty)


def test_the_id_is_the_callers_or_the_file_names(read, edge):
    assert read(edge.flair, edge.mask, edge.affine, subject="mine").id == "mine"


# --- intensities


def slow_mode(case):
    """The mode by scipy's kernel density estimate of a subsample."""
    values = case.flair[(case.brain > 0) & (case.lesions == 0) & (case.tissue != CSF)]
    values = np.random.default_rng(0).choice(values, 20_000, replace=False)
    at = np.linspace(0.7, 1.4, 701)
    return at[stats.gaussian_kde(values)(at).argmax()]


def test_the_mode_of_a_real_brain_is_one(real_case):
    assert slow_mode(real_case) == pytest.approx(1, abs=0.03)


def test_lesions_do_not_count_for_the_mode(read, edge):
    brain = edge.brain > 0
    flair = np.where(brain, np.random.default_rng(0).normal(100, 5, brain.shape), 0).astype(np.float32)
    lesions = ndimage.binary_erosion(brain, iterations=3) & (np.indices(brain.shape)[2] > 20)
    lesions &= np.cumsum(lesions).reshape(brain.shape) <= 0.4 * brain.sum()
    flair[lesions] = 180  # the highest density of all
    case = read(flair, lesions, edge.affine, brain=edge.brain, tissue=np.where(brain, WHITE, 0).astype(np.uint8))
    assert np.median(case.flair[lesions]) == pytest.approx(1.8, rel=0.03)


@pytest.mark.parametrize("unit", [1e-6, 1.0, 3e7])
@pytest.mark.parametrize("peaks", [((100, 5, 30_000),), ((100, 4, 30_000), (130, 8, 20_000))])
def test_the_mode_of_known_densities(peaks, unit):
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(m, sd, n) for m, sd, n in peaks]).astype(np.float32)
    assert module.mode_of(values * np.float32(unit)) == pytest.approx(100 * unit, rel=0.015)


def test_the_mode_of_one_value_and_little_else():
    values = np.full(10_000, 7, np.float32)
    values[:2000] = np.linspace(5, 9, 2000)
    assert module.mode_of(values * np.float32(1e-6)) == pytest.approx(7e-6, rel=0.02)


@given(power=st.integers(-30, 30))
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_unit_changes_nothing(read, edge, power):
    case = read(edge.flair, edge.mask, edge.affine)
    again = read(edge.flair * np.float32(2.0**power), edge.mask, edge.affine)
    assert same(case, again)  # powers of two: without rounding
    assert again.scan_mean == pytest.approx(case.scan_mean * 2.0**power, rel=1e-6)


@pytest.mark.parametrize("factor", [1e-5, 0.3, 1234.5, 1e20])
def test_the_unit_changes_next_to_nothing(read, edge, factor):
    case = read(edge.flair, edge.mask, edge.affine)
    again = read(edge.flair * np.float32(factor), edge.mask, edge.affine)
    np.testing.assert_allclose(again.flair, case.flair, rtol=2e-3)
    assert (again.tissue != case.tissue).mean() < 1e-3


def test_few_negative_voxels_are_clipped_with_a_word(read, edge):
    at = tuple(np.argwhere(edge.brain)[:5].T)
    flair = edge.flair.copy()
    flair[at] = -3
    with warned("5 negative voxels set to 0"):
        case = read(flair, edge.mask, edge.affine)
    assert (case.flair[at] == 0).all()
    assert case.brain[at].all()
    assert case.flair.min() == 0


def test_z_scored_scans_are_shifted_with_a_word(read, edge):
    inside = (edge.flair > 0) & (edge.brain > 0)
    values = edge.flair[inside]
    z = np.where(inside, (edge.flair - values.mean()) / values.std(), 0).astype(np.float32)
    share = (z[inside] < 0).mean()
    assert share > 0.2
    low = np.percentile(z[inside], 0.5)
    with warned(f"{share:.0%} of the brain is negative; shifted by {-low:.4g}"):
        case = read(z, edge.mask, edge.affine)
    assert np.array_equal(case.brain > 0, z != 0)
    assert not case.flair[case.brain == 0].any()
    raw = z[inside] - low
    assert (case.flair[inside][raw < 0] == 0).all()
    assert np.corrcoef(case.flair[inside], np.maximum(raw, 0))[0, 1] > 0.99999
    assert np.percentile(case.flair[inside], 0.5) == pytest.approx(0, abs=1e-3)
    straight = read(edge.flair, edge.mask, edge.affine)
    assert (case.tissue != straight.tissue).mean() < 0.05


def test_one_percent_negative_is_the_limit(read, edge):
    inside = np.argwhere(edge.flair != 0)
    for share, text in ((0.0099, "negative voxels set to 0"), (0.0105, "of the brain is negative; shifted")):
        flair = edge.flair.copy()
        flair[tuple(inside[: int(share * len(inside))].T)] *= -0.01
        with warned(text):
            read(flair, edge.mask, edge.affine)


# --- geometry


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_every_orientation_reads_the_same(read, edge, order):
    box = (slice(None), slice(2, 44), slice(4, 44))  # three different sides
    flair, mask = edge.flair[box], edge.mask[box]
    affine = edge.affine @ nib.affines.from_matvec(np.eye(3), (0, 2, 4))
    case = read(flair, mask, affine)
    for flips in itertools.product((1, -1), repeat=3):
        turn = np.column_stack([order, flips])
        stored = affine @ nib.orientations.inv_ornt_aff(turn, flair.shape)
        turned = (nib.orientations.apply_orientation(a, turn) for a in (flair, mask))
        again = read(*turned, stored)
        assert same(case, again)
        assert again.scan_mean == pytest.approx(case.scan_mean, rel=1e-6)
        assert case.flair.flags.c_contiguous


def stored_at(edge, matrix, *, shape=None):
    """The box sampled on another grid about the same centre: what another scanner would have stored."""
    centre = (np.array(edge.flair.shape) - 1) / 2
    shape = shape or tuple(int(n) for n in np.ceil(np.linalg.inv(matrix) @ edge.flair.shape - 1e-6))
    offset = centre - matrix @ ((np.array(shape) - 1) / 2)
    blur = np.sqrt(np.maximum(np.diag(matrix) ** 2 - 1, 0)) / 2.355
    mode = "nearest" if np.array_equal(matrix, np.diag(np.diag(matrix))) else "constant"
    flair, brain, mask = (
        ndimage.affine_transform(np.float32(a), matrix, offset + 1e-3, shape, order=1, mode=mode)
        for a in (ndimage.gaussian_filter(edge.flair, blur), edge.flair != 0, edge.mask)
    )
    flair = np.where(brain >= 0.5, flair, 0)
    return flair, mask >= 0.5, edge.affine @ nib.affines.from_matvec(matrix, offset)


def compare(case, again):
    """Both cases on the lattice of the second, a few voxels within its border."""
    shift = np.rint(again.affine[:3, 3] - case.affine[:3, 3]).astype(int)
    assert np.array_equal(again.affine[:3, :3], np.eye(3))
    assert np.array_equal(again.affine[:3, 3], np.rint(again.affine[:3, 3]))
    low, high = np.maximum(shift, 0) + 3, np.minimum(shift + again.shape, case.shape) - 3
    one = tuple(itertools.starmap(slice, zip(low, high, strict=True)))
    two = tuple(slice(a - s, b - s) for a, b, s in zip(low, high, shift, strict=True))
    return (
        np.corrcoef(case.flair[one].ravel(), again.flair[two].ravel())[0, 1],
        np.median(np.abs(case.flair[one] - again.flair[two])[(case.brain[one] & again.brain[two]) > 0]),
        again.lesions[two].mean() / case.lesions[one].mean(),
        again.brain[two].mean() / case.brain[one].mean(),
    )


@pytest.fixture
def lumps(edge):
    """The box with lesions of a few hundred voxels, which 2 mm can hold."""
    apart = np.indices(edge.mask.shape)
    mask = np.zeros_like(edge.mask)
    for centre, radius in (((22, 22, 30), 5), ((12, 24, 34), 4), ((30, 14, 28), 4.5)):
        mask |= (np.linalg.norm(apart - np.reshape(centre, (3, 1, 1, 1)), axis=0) <= radius).astype(np.uint8)
    mask &= edge.flair != 0
    return SimpleNamespace(flair=edge.flair, mask=mask, affine=edge.affine)


@pytest.mark.parametrize(
    ("side_mm", "likeness", "difference"),
    [(0.8, 0.99, 0.04), (0.5, 0.98, 0.05), (2.0, 0.94, 0.08), (1.25, 0.97, 0.06)],
)
def test_other_voxel_sizes_read_as_the_same_case(read, lumps, side_mm, likeness, difference):
    case = read(lumps.flair, lumps.mask, lumps.affine)
    again = read(*stored_at(lumps, side_mm * np.eye(3)))
    alike, apart, lesions, brain = compare(case, again)
    assert alike > likeness
    assert apart < difference
    assert lesions == pytest.approx(1, abs=0.1)  # most of it lost in storing
    assert brain == pytest.approx(1, abs=0.03)
    assert np.abs(np.subtract(again.shape, case.shape)).max() <= 2
    assert not again.flair[again.brain == 0].any()
    assert again.flair.min() == 0


def test_an_oblique_scan_lands_on_the_lattice(read, lumps):
    a = np.deg2rad(12)
    turn = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    case = read(lumps.flair, lumps.mask, lumps.affine)
    flair, mask, affine = stored_at(lumps, turn, shape=(58, 58, 44))
    alike, apart, lesions, brain = compare(case, read(flair, mask, affine))
    assert alike > 0.98
    assert apart < 0.04
    assert lesions == pytest.approx(1, abs=0.03)
    assert brain == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize(
    "sides", [(2, 2, 2), (1, 1, 3), (1.25, 1.25, 1.25), (0.8, 0.8, 2), (0.94, 0.94, 2.8), (0.5, 0.5, 0.5)]
)
def test_lesion_volume_is_that_of_the_file(read, lumps, sides):
    flair, mask, affine = stored_at(lumps, np.diag(sides))
    mask[(flair > 0) & (np.cumsum(flair > 0).reshape(flair.shape) == 3000)] = True  # and one single voxel
    case = read(flair, mask, affine)
    assert case.lesions.sum(dtype=int) == pytest.approx(np.count_nonzero(mask) * np.prod(sides), rel=0.05)
    assert ndimage.label(case.lesions, np.ones((3, 3, 3)))[1] == ndimage.label(mask, np.ones((3, 3, 3)))[1]


@pytest.mark.parametrize("side_mm", [0.7, 1.0, 2.0])
def test_every_lesion_keeps_its_place(read, lumps, side_mm):
    case = read(*stored_at(lumps, side_mm * np.eye(3)))

    def centres(mask, affine):
        labels, n = ndimage.label(mask)
        return nib.affines.apply_affine(affine, ndimage.center_of_mass(mask, labels, range(1, n + 1)))

    apart = centres(case.lesions, case.affine) - centres(lumps.mask, lumps.affine)
    assert np.abs(apart).max() < 0.6


def test_labels_and_brain_are_resampled_too(read, lumps, edge):
    flair, mask, affine = stored_at(lumps, 2 * np.eye(3))
    fine = stored_at(SimpleNamespace(flair=lumps.flair, mask=edge.brain, affine=edge.affine), 2 * np.eye(3))
    tissue = np.where(flair > 50, 2, 1).astype(np.uint8)
    case = read(flair, mask, affine, brain=fine[1], tissue=tissue)
    assert set(np.unique(case.tissue)) == {0, 1, 2}
    assert case.brain.mean() == pytest.approx(edge.brain.mean(), rel=0.03)
    assert (case.lesions <= case.brain).all()


@pytest.mark.parametrize(("sides", "warns"), [((0.5, 0.5, 4.0), True), ((1.0, 1.0, 3.0), False)])
@pytest.mark.filterwarnings("ignore:.*looks like no FLAIR")
def test_very_anisotropic_voxels_are_read_with_a_word(read, lumps, sides, warns):
    flair, mask, affine = stored_at(lumps, np.diag(sides))
    with warned(*["very anisotropic voxels, 0.5 x 0.5 x 4 mm"] * warns):
        case = read(flair, mask, affine)
    assert int(case.lesions.sum()) == pytest.approx(int(lumps.mask.sum()), rel=0.15)


def test_sixteen_millimetres_are_enough_and_fifteen_are_not(read, edge):
    box = (slice(10, 26), slice(10, 26), slice(14, 30))
    assert read(edge.flair[box], edge.mask[box] | 0, edge.affine).shape == (16, 16, 16)
    with refused("flair", "only 15 mm wide", "at least 16 mm"):
        read(edge.flair[box][:15], edge.mask[box][:15], edge.affine)


@pytest.mark.parametrize("side_mm", [1.0, 2.0])
def test_a_scan_of_half_a_metre_is_refused(read, edge, side_mm):
    long = np.tile(edge.flair, (12, 1, 1))
    with refused("flair", "the scan spans", "voxel size"):
        read(long, np.zeros(long.shape, np.uint8), np.diag([side_mm, 1, 1, 1.0]))


def test_orientation_codes_unset_is_a_guess_with_a_word(read, edge):
    affine = nib.Nifti1Image(edge.flair, None).header.get_base_affine()
    with warned("neither sform nor qform is set", "looks like no FLAIR"):  # it lies elsewhere now
        case = read(edge.flair, edge.mask, affine, codes=(0, 0))
    assert np.array_equal(case.lesions, edge.mask[::-1] & case.brain)  # the guess has x to the left


def test_prefer_decides_where_sform_and_qform_disagree(tmp_path, edge, read):
    read(edge.flair, edge.mask, edge.affine)
    moved = edge.affine.copy()
    moved[:3, 3] += (5, 0, -7)
    paths = [tmp_path / "data" / f"sub-7_{role}.nii" for role in ("flair", "mask")]
    for path in paths:
        image = nib.load(path, mmap=False)
        image = nib.Nifti1Image(np.asarray(image.dataobj), None, image.header)
        image.set_sform(edge.affine, 4)
        image.set_qform(moved, 1)
        nib.save(image, path)
    with refused("flair", "sform and qform disagree", "--prefer sform or --prefer qform"):
        read_case(*paths)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InputWarning)  # where the lesions are in MNI space is not the point
        assert np.allclose(read_case(*paths, prefer="sform").affine, edge.affine)
        assert np.allclose(read_case(*paths, prefer="qform").affine, moved)


# --- masks that are wrong


@pytest.mark.parametrize("value", [1, 255, 0.5])
def test_a_mask_is_zero_and_one_other_value(read, edge, value):
    case = read(edge.flair, (edge.mask * value).astype(np.float32), edge.affine)
    assert case.lesions.max() == 1
    assert np.array_equal(case.lesions, edge.mask & case.brain)


@pytest.mark.parametrize("values", [(1, 2), (0.2, 1), (-1, 1), (-1, -1)])
def test_masks_that_are_not_binary(read, edge, values):
    at = np.argwhere(edge.mask)
    mask = np.zeros(edge.mask.shape, np.float32)
    mask[tuple(at.T)] = values[0]
    mask[tuple(at[::2].T)] = values[1]
    with refused("mask", "not a binary mask", f"from {min(values):g} to {max(values):g}", "threshold"):
        read(edge.flair, mask, edge.affine)
    with refused("brain", "not a binary mask"):
        read(edge.flair, edge.mask, edge.affine, brain=mask)


def test_a_mask_that_is_the_flair(read, edge, tmp_path):
    read(edge.flair, edge.mask, edge.affine)
    flair, mask = (tmp_path / "data" / f"sub-7_{role}.nii" for role in ("flair", "mask"))
    with refused("flair", "the mask is the FLAIR itself", "'mask'"):
        read_case(flair, flair)
    shutil.copy(flair, mask)
    with refused("mask", "the mask is the FLAIR itself", "'mask'"):
        read_case(flair, mask)
    with refused("mask", "the mask is the FLAIR itself", "'mask'"):  # same numbers, other bytes
        read(edge.flair, edge.flair.astype(np.float64), edge.affine)


def test_a_mask_that_is_the_brain(read, edge):
    with refused("mask", "covers 100% of the scan, like a brain mask", "'mask'"):
        read(edge.flair, edge.flair != 0, edge.affine)
    full = np.where(edge.flair == 0, np.float32(20), edge.flair)  # a scan with more than its brain
    third = np.zeros(edge.mask.shape, np.uint8)
    third[:18] = edge.brain[:18]
    with refused("mask", "the lesion mask is the brain mask", "'mask'"):
        read(full, third, edge.affine, brain=third)


def test_lesions_outside_the_brain(read, edge):
    inside = edge.mask & (edge.flair != 0)
    far = np.argwhere(ndimage.binary_erosion(edge.flair == 0, iterations=2))
    n = int(inside.sum())
    for count in (int(0.05 * n), n):
        mask = inside.copy()
        mask[tuple(far[:count].T)] = 1
        if count == n:
            with refused("mask", f"{n} of {2 * n} lesion voxels lie outside the brain", "belong together"):
                read(edge.flair, mask, edge.affine)
        else:
            with warned(f"{count} of {n + count} lesion voxels outside the brain are left out"):
                case = read(edge.flair, mask, edge.affine)
            assert np.array_equal(case.lesions, inside)


def test_a_mask_by_itself_has_the_lesions_of_the_case(tmp_path, write_volume, edge):
    """On a grid of 0.8 mm that is turned, with lesion voxels outside the brain."""
    affine = edge.affine @ np.diag([-0.8, 0.8, 0.8, 1])
    mask = edge.mask.copy()
    far = np.argwhere(ndimage.binary_erosion(edge.flair == 0, iterations=2))
    mask[tuple(far[:3].T)] = 1
    flair = write_volume(tmp_path / "flair.nii", edge.flair, affine)
    path = write_volume(tmp_path / "mask.nii", mask, affine)
    with pytest.warns(InputWarning, match="3 of .* lesion voxels outside the brain are left out"):
        case = read_case(flair, path)
    with pytest.warns(InputWarning, match="3 of .* lesion voxels outside the brain are left out"):
        lesions = read_lesions(path, flair)
    assert np.array_equal(lesions, case.lesions)
    assert lesions.any()
    with pytest.raises(InputError, match="the mask is the FLAIR itself"):
        read_lesions(flair, flair)


def test_a_few_voxels_of_a_small_mask_may_lie_outside(read, edge):
    far, near = np.argwhere(ndimage.binary_erosion(edge.flair == 0)), np.argwhere(edge.mask & (edge.flair != 0))
    for outside, inside, accepted in ((1, 7, True), (10, 7, True), (11, 7, False), (5, 0, False)):
        mask = np.zeros_like(edge.mask)
        mask[tuple(far[:outside].T)] = mask[tuple(near[:inside].T)] = 1
        if accepted:
            with warned(f"{outside} of {outside + inside} lesion voxels outside the brain are left out"):
                assert read(edge.flair, mask, edge.affine).lesions.sum() == inside
        else:
            with refused("mask", "lie outside the brain"):
                read(edge.flair, mask, edge.affine)


def test_a_given_brain_mask_counts(read, edge):
    brain = ndimage.binary_erosion(edge.brain, iterations=2).astype(np.uint8)
    mask = edge.mask & brain
    case = read(edge.flair, mask, edge.affine, brain=brain)
    assert np.array_equal(case.brain, brain)
    assert not case.flair[brain == 0].any()
    assert set(case.sources) == {"flair", "mask", "brain"}
    outside = (edge.flair > 0) & (brain == 0)
    with refused("mask", "lie outside the brain"):
        read(
            edge.flair,
            np.where(np.cumsum(outside).reshape(brain.shape) < 50, outside, mask),
            edge.affine,
            brain=brain,
        )


def test_an_empty_mask_is_a_case_without_lesions(read, edge):
    with warned("no lesion in the mask"):
        case = read(edge.flair, np.zeros_like(edge.mask), edge.affine)
    assert not case.lesions.any()


# --- grids that differ


@pytest.mark.parametrize("role", ["mask", "brain", "tissue"])
def test_shapes_and_affines_must_agree(read, edge, role):
    volumes = {"mask": edge.mask, "brain": edge.brain, "tissue": edge.tissue}
    given = {"mask": edge.mask, role: volumes[role][:-1]}
    with refused(role, "shape (43, 44, 44), but data/sub-7_flair.nii has (44, 44, 44)", "resample"):
        read(edge.flair, affine=edge.affine, **given)
    for moved, accepted in ((0.15, False), (0.05, True)):
        affine = edge.affine.copy()
        affine[0, 3] += moved
        given[role] = (volumes[role], affine)
        if accepted:
            read(edge.flair, affine=edge.affine, **given)
        else:
            with refused(role, "mm off that of data/sub-7_flair.nii", "resample"):
                read(edge.flair, affine=edge.affine, **given)


def test_the_affine_is_compared_over_the_whole_grid(read, edge):
    """A scale that is off by 2e-3 is 0.086 voxels at the far corner, along each axis."""
    with refused("mask", "0.149 mm off"):
        read(
            edge.flair,
            (edge.mask, edge.affine * (1 + 2e-3 * (np.eye(4) - np.diag([0, 0, 0, 1])))),
            edge.affine,
        )


def test_a_mask_of_the_mirrored_grid_is_refused(read, edge):
    affine = edge.affine @ np.diag([-1, 1, 1, 1.0])
    with refused("mask", "mm off"):
        read(edge.flair, (edge.mask, affine), edge.affine)


# --- other files


def test_tissue_labels_are_taken_as_given(read, edge):
    limits = np.quantile(edge.flair[edge.brain > 0], (0.03, 0.6))
    labels = np.where(edge.brain > 0, 1 + np.digitize(edge.flair, limits), 0).astype(np.uint8)
    case = read(edge.flair, edge.mask, edge.affine, tissue=labels)
    assert (case.flair[case.tissue == 2] < FLUID).any()  # dark, but said to be gray matter
    assert np.array_equal(case.tissue, np.where(case.brain > 0, labels, 0))
    with refused("tissue", "labels other than 0-3", "1 CSF, 2 GM, 3 WM"):
        read(edge.flair, edge.mask, edge.affine, tissue=labels + 1)
    gray_first = np.array([0, 3, 1, 2], np.uint8)[labels]  # as BIDS and SPM have it
    with refused("tissue", "label 1 is not the darkest (medians in FLAIR: 1 ", "1 CSF, 2 GM, 3 WM, or leave it out"):
        read(edge.flair, edge.mask, edge.affine, tissue=gray_first)


@pytest.mark.parametrize("role", ["flair", "brain", "tissue"])
def test_constant_volumes(read, edge, role):
    given = {"flair": edge.flair, "mask": edge.mask, role: np.ones_like(edge.flair)}
    with refused(role, "is constant (all voxels 1)"):
        read(affine=edge.affine, **given)


@pytest.mark.parametrize("role", ["flair", "mask", "brain", "tissue"])
def test_files_that_do_not_exist(edge, read, tmp_path, role):
    read(edge.flair, edge.mask, edge.affine)
    folder = tmp_path / "data"
    paths = {
        "flair": folder / "sub-7_flair.nii",
        "mask": folder / "sub-7_mask.nii",
        role: folder / "sub-7_no.nii",
    }
    with refused("no", "does not exist", "check the path"):
        read_case(paths.pop("flair"), paths.pop("mask"), **paths)


def test_damage_is_refused(edge, read, tmp_path):
    read(edge.flair, edge.mask, edge.affine)
    flair, mask = (tmp_path / "data" / f"sub-7_{role}.nii" for role in ("flair", "mask"))
    mask.write_bytes(mask.read_bytes()[:-1000])
    with refused("mask", "its header claims"):
        read_case(flair, mask)
    with refused("flair", "NaN"):
        read(np.where(edge.mask, np.nan, edge.flair).astype(np.float32), edge.mask, edge.affine)


# --- brains that are none


def test_too_little_brain(read, edge):
    brain = np.zeros_like(edge.brain)
    brain[20:28, 20:28, 20:28] = 1
    with refused("flair", "only 512 mm3 of brain"):
        read(edge.flair, np.zeros_like(edge.mask), edge.affine, brain=brain)


def test_a_brain_mask_over_emptiness(read, edge):
    flair = edge.flair.copy()
    flair[:, :, 20:] = 0
    brain = np.ones_like(edge.brain)
    brain[0] = 0
    with refused("flair", "0 in most of the brain mask", "check the brain mask"):
        read(flair, np.zeros_like(edge.mask), edge.affine, brain=brain)


def test_labels_that_call_emptiness_tissue(read, edge):
    brain, flair = edge.brain.copy(), edge.flair.copy()
    flair[np.cumsum(brain).reshape(brain.shape) < 0.4 * brain.sum()] = 0
    with refused("flair", "much of its brain tissue is 0", "check the brain mask"):
        read(flair, edge.mask * (flair > 0), edge.affine, brain=brain, tissue=2 * brain)


def test_too_little_tissue(read, edge):
    with refused("flair", "too little brain tissue outside lesions and CSF"):
        read(edge.flair, edge.mask, edge.affine, tissue=edge.brain)  # all CSF


# --- scans that look wrong


def test_contrasts_that_are_no_flair_are_read_with_a_word(read, ventricles):
    v = ventricles
    inverted = np.where(v.brain > 0, 160 - np.minimum(v.flair, 150), 0)
    t1_like = np.where(v.brain > 0, v.flair * np.array([0, 0.9, 0.65, 1.0], np.float32)[v.tissue], 0)
    for flair in (inverted, t1_like):
        with warned("looks like no FLAIR (CSF"):
            read(flair.astype(np.float32), v.mask, v.affine)
    read(v.flair, v.mask, v.affine)  # itself without a word


def test_a_hot_voxel_is_refused_before_it_ends_a_run(read, edge):
    hot = edge.flair.copy()
    hot[tuple(np.argwhere(edge.mask)[0])] = 1e8
    with refused("flair", "brightest voxel is 9.38e+05 times the mode", "clip it at 300 times the mode"):
        read(hot, edge.mask, edge.affine)


def test_white_matter_of_zero_is_no_division(read, ventricles):
    v = ventricles
    brain = np.pad(np.ones((46, 46, 46), np.uint8), 1)
    flair = np.where(ndimage.binary_dilation(v.tissue == WHITE), 0, v.flair)
    flair = np.where(v.tissue == CSF, 300, flair)
    assert np.median(flair) == 0
    with refused("flair", "it is 0 in most of the brain mask"):
        read(flair, np.zeros_like(v.mask), v.affine, brain=brain)
    maps = [np.float32(v.tissue == label) for label in (1, 2, 3)]
    with warned("looks like no FLAIR (CSF 300, "):
        check_looks(Path("data/sub-7_flair.nii"), flair, brain > 0, tuple(maps), v.affine)


@pytest.fixture(scope="module")
def whole(real_case):
    """The whole brain with a margin of 14 mm, at 1 mm."""
    found = np.argwhere(real_case.brain)
    low, high = found.min(axis=0) - 14, found.max(axis=0) + 15
    box = tuple(itertools.starmap(slice, zip(low, high, strict=True)))
    affine = real_case.affine.copy()
    affine[:3, 3] += low
    distance = ndimage.distance_transform_edt(real_case.brain[box] == 0)
    return SimpleNamespace(
        flair=real_case.flair[box] * 100, mask=real_case.lesions[box].copy(), affine=affine, distance=distance
    )


@pytest.mark.filterwarnings("ignore:.*looks like no FLAIR")
@pytest.mark.parametrize(("between_mm", "brightness"), [((0, 5), 170), ((4, 12), 170), ((0, 8), 40)])
def test_a_skull_is_read_with_a_word(read, whole, between_mm, brightness):
    shell = (whole.distance > between_mm[0]) & (whole.distance <= between_mm[1])
    with pytest.warns(InputWarning, match="data/sub-7_flair.nii: a shell .* not skull-stripped"):
        read(np.where(shell, np.float32(brightness), whole.flair), whole.mask, whole.affine)


def test_a_head_larger_than_any_brain_is_read_with_a_word(read, whole):
    around = np.where(whole.flair, whole.flair, 20 + np.indices(whole.flair.shape).sum(axis=0) % 7).astype(np.float32)
    with warned("outside the MNI brain: skull, or not in MNI space?"):
        read(around, whole.mask, whole.affine)


def test_a_stripped_brain_is_read_without_a_word(read, whole, real_case):
    case = read(whole.flair, whole.mask, whole.affine)
    assert case.lesions.sum() == real_case.lesions.sum()
    assert (case.tissue > 0).sum() == (whole.flair != 0).sum()


@pytest.mark.parametrize(("scale", "background"), [(1.0, 0.00112), (0.01, -0.416), (1.0, -1.0)])
def test_a_background_that_is_not_0_is_taken_for_it(read, whole, scale, background):
    """After z-scoring over the whole grid, or as whole numbers with an offset."""
    plain = read(whole.flair, whole.mask, whole.affine)
    with warned(f"its background is {background:.4g}, taken for 0"):
        case = read((scale * whole.flair + background).astype(np.float32), whole.mask, whole.affine)
    assert np.array_equal(case.brain, plain.brain)
    assert np.array_equal(case.lesions, plain.lesions)
    np.testing.assert_allclose(case.flair, plain.flair, atol=2e-3)


# --- the bundled scans


def test_cs07_keeps_its_lesions(real_case, bundled):
    mask = nib.as_closest_canonical(nib.load(bundled("cs07")[1]))
    assert np.array_equal(real_case.lesions, np.asarray(mask.dataobj) > 0)
    assert np.array_equal(real_case.affine, mask.affine)
    assert real_case.id == "cs07"
    assert real_case.shape == (182, 218, 182)
    assert real_case.flair.min() == 0
    assert not real_case.flair[real_case.brain == 0].any()


def test_cs19_loses_three_lesion_voxels_outside_its_brain(bundled):
    with (
        pytest.warns(InputWarning, match="3 of 49769 lesion voxels outside the brain are left out"),
        pytest.warns(InputWarning, match="of the brain is negative; shifted by"),
    ):
        case = read_case(*bundled("cs19"))
    assert np.count_nonzero(nib.load(bundled("cs19")[1]).dataobj) == 49769
    assert case.lesions.sum() == 49766
    assert (case.tissue[case.lesions > 0] == WHITE).all()
    assert slow_mode(case) == pytest.approx(1, abs=0.03)


@pytest.mark.filterwarnings("ignore:.*looks like no FLAIR")
@pytest.mark.parametrize("moved_mm", [(40, 40, 0), (0, 0, -20), (100, 0, 0)])
def test_a_brain_far_from_the_middle_of_mni_space_is_named(read, whole, moved_mm):
    affine = whole.affine.copy()
    affine[:3, 3] += moved_mm
    if max(moved_mm) > 20:
        with pytest.raises(InputError, match="mm off that of the MNI brain; register it to MNI152") as caught:
            read(whole.flair, whole.mask, affine)
        text = str(caught.value)
    else:
        with pytest.warns(InputWarning) as said:
            read(whole.flair, whole.mask, affine)
        text = next(str(w.message) for w in said if "mm off that of the MNI brain" in str(w.message))
    assert int(text.split("lies ")[1].split(" mm")[0]) == pytest.approx(np.linalg.norm(moved_mm), abs=4)
