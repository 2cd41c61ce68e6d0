import itertools

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from synthlong import atlas, prior
from synthlong.assets import build
from synthlong.atlas import MNI_SHAPE, lesion_prior, mirror, mni_affine, sample_map, tissue_maps
from synthlong.errors import ConfigError, InputError, OutputError
from synthlong.nifti import write_nifti
from synthlong.prior import build_prior

ASSETS = atlas.ASSETS


def box(low, high):
    mask = np.zeros(MNI_SHAPE, bool)
    mask[tuple(itertools.starmap(slice, zip(low, high, strict=True)))] = True
    return mask


def world_box(low, high):
    """The MNI-grid mask of the voxels whose centres lie in a world-space box (mm)."""
    origin = mni_affine()[:3, 3]
    return box((np.array(low) - origin).astype(int), (np.array(high) - origin).astype(int) + 1)


@pytest.fixture(scope="module")
def brain():
    return sum(tissue_maps()) > 0


def test_the_grid_is_the_datas_own_turned_to_ras():
    stored = nib.load(ASSETS / "cases" / "sub-cs07_space-MNI152_FLAIR.nii.gz")
    assert stored.shape == MNI_SHAPE
    assert np.array_equal(nib.as_closest_canonical(stored).affine, mni_affine())


def test_lesion_prior_is_the_contracts(brain):
    frequency, affine = lesion_prior()
    assert frequency.shape == MNI_SHAPE
    assert frequency.dtype == np.float32
    assert np.array_equal(affine, mni_affine())
    assert frequency.min() == 0
    assert 0.1 < frequency.max() < 1
    assert (frequency[brain] > 0).all()
    near = np.zeros_like(brain)
    near[tuple(slice(a.min() - 3, a.max() + 4) if a.min() >= 3 else slice(0, a.max() + 4) for a in brain.nonzero())] = 1
    assert not frequency[~near].any()


def test_lesion_prior_is_periventricular():
    (frequency, _), (csf, gm, wm) = lesion_prior(), tissue_maps()
    means = [float((frequency * t).sum() / t.sum()) for t in (csf, gm, wm)]
    assert means[2] > 2 * means[1]
    i, j, k = np.unravel_index(frequency.argmax(), MNI_SHAPE)
    x, y, z = (mni_affine() @ (i, j, k, 1))[:3]
    assert 10 < abs(x) < 35  # beside the lateral ventricles
    assert -60 < y < 40
    assert 5 < z < 40


def test_arrays_are_cached_and_read_only_and_affines_are_not():
    frequency, affine = lesion_prior()
    affine[:] = 0
    again, fresh = lesion_prior()
    assert again is frequency
    assert np.array_equal(fresh, mni_affine())
    for array in (frequency, *tissue_maps()):
        with pytest.raises(ValueError, match="read-only"):
            array[0, 0, 0] = 1


def test_tissue_maps_are_probabilities(brain):
    maps = tissue_maps()
    for values in maps:
        assert values.shape == MNI_SHAPE
        assert values.dtype == np.float32
        assert values.min() == 0
        assert values.max() == 1
    total = sum(maps)
    assert np.allclose(total[brain], 1, atol=1e-6)
    assert not total[~brain].any()
    assert 1.7e6 < brain.sum() < 2.0e6


@pytest.mark.parametrize(
    ("tissue", "point_mm"),
    [
        ("csf", (-6, 10, 14)),
        ("csf", (8, 6, 16)),
        ("wm", (-26, -28, 28)),
        ("wm", (0, 24, 4)),
        ("gm", (-11, -18, 7)),
    ],
)
def test_known_anatomy(tissue, point_mm):
    """Lateral ventricles, centrum semiovale, genu of the corpus callosum, thalamus."""
    maps = dict(zip(("csf", "gm", "wm"), tissue_maps(), strict=True))
    at = tuple(np.array(point_mm) - mni_affine()[:3, 3].astype(int))
    assert maps[tissue][at] == max(m[at] for m in maps.values())


def test_tissue_maps_are_nilearns_within_a_quantisation_step(brain):
    datasets = pytest.importorskip("nilearn.datasets")
    for image, ours in zip(
        (datasets.load_mni152_gm_template(resolution=1), datasets.load_mni152_wm_template(resolution=1)),
        tissue_maps()[1:],
        strict=True,
    ):
        theirs = np.asanyarray(image.dataobj)[7:189, 8:226, :182]
        assert np.abs(theirs - ours)[brain].max() < 1.01 / 63


def test_mirror_is_exact_about_x_0():
    mask = world_box((20, -10, 5), (31, 0, 9))
    assert np.array_equal(mirror(mask), world_box((-31, -10, 5), (-20, 0, 9)))
    assert np.array_equal(mirror(mirror(mask)), mask)
    edge = box((0, 100, 100), (1, 101, 101))
    assert not mirror(edge).any()
    for values in (lesion_prior()[0], *tissue_maps()):
        assert np.array_equal(values[1:], mirror(values)[1:])


def test_weights_are_by_patient_against_a_plain_computation():
    rng = np.random.default_rng(0)
    low = rng.integers(60, 90, (4, 3))
    masks = [(s, box(a, a + 20)) for s, a in zip("aaab", low, strict=True)]
    published = rng.random(MNI_SHAPE, dtype=np.float32)
    got = build_prior(masks, background=(published, 46), fwhm_mm=0, symmetric=False)
    a = (masks[0][1].astype(float) + masks[1][1] + masks[2][1]) / 3
    assert np.allclose(got, (a + masks[3][1] + 46 * published) / 48, atol=1e-6)
    both = build_prior(iter(masks), background=(published, 46), fwhm_mm=0, symmetric=True)
    i, j, k = 37, 90, 91
    assert np.isclose(both[i, j, k], (got[i, j, k] + got[182 - i, j, k]) / 2, atol=1e-6)


def test_smoothing_is_a_gaussian_of_that_width():
    mask = box((91, 109, 91), (92, 110, 92))
    made = build_prior([("a", mask)], fwhm_mm=8, symmetric=False)
    assert np.isclose(made.sum(), 1, rtol=1e-3)
    assert np.isclose(made[91 + 4, 109, 91] / made[91, 109, 91], 0.5, atol=1e-3)
    assert mask.sum() == 1


@pytest.mark.parametrize(
    ("masks", "options", "problem"),
    [
        ([], {}, "at least one mask"),
        ([("x", np.zeros((4, 5, 6), bool))], {}, r"mask of x has shape \(4, 5, 6\)"),
        ([], {"fwhm_mm": -1.0}, "fwhm_mm is -1"),
        ([], {"fwhm_mm": float("nan")}, "fwhm_mm is nan"),
    ],
)
def test_what_cannot_be_built_is_named(masks, options, problem):
    with pytest.raises(ConfigError, match=problem):
        build_prior(masks, **options)


def test_floor_keeps_the_brain_possible_and_the_mean(brain):
    frequency = build_prior([("a", world_box((20, -30, 20), (30, -20, 30)))], fwhm_mm=4, symmetric=False)
    mixed = prior.with_floor(frequency, floor=0.1)
    assert (mixed[brain] > 0).all()
    assert np.isclose(mixed[brain].mean(dtype=float), frequency[brain].mean(dtype=float), rtol=1e-3)
    at = brain & (frequency > 0)
    assert np.array_equal(prior.with_floor(frequency, floor=0)[at], frequency[at])


def test_nothing_is_possible_more_than_3_mm_beyond_the_brain(brain):
    possible = prior.with_floor(np.full(MNI_SHAPE, 0.1, np.float32)) > 0
    slab = np.s_[:, :, 60:70]  # at the top of the temporal lobes
    near = ndimage.distance_transform_edt(~brain[slab]) <= 3
    assert np.array_equal(possible[slab][..., 3:-3], near[..., 3:-3])


def test_held_out_likelihood_against_a_plain_computation(brain):
    rng = np.random.default_rng(1)
    visits = [("a", 0), ("a", 3), ("b", 5), ("c", -4)]
    masks = [(s, world_box((18 + d, -30 + d, 20), (28 + d, -20 + d, 28 + d))) for s, d in visits]
    published = rng.random(MNI_SHAPE, dtype=np.float32) * 0.1
    got = build.held_out_log_likelihood(masks, background=(published, 2), fwhm_mm=3, symmetric=True, floor=0.2)
    expected = {}
    for held in "abc":
        others = [(s, m) for s, m in masks if s != held]
        f = build_prior(others, background=(published, 2), fwhm_mm=3, symmetric=True)[brain].astype(float)
        density = 0.8 * f / f.sum() + 0.2 / brain.sum()
        own = np.mean([m for s, m in masks if s == held], axis=0)[brain]
        expected[held] = (own * np.log(density)).sum() / own.sum()
    assert got.per_patient.keys() == expected.keys()
    assert np.allclose(list(got.per_patient.values()), list(expected.values()), atol=1e-3)
    values = np.array(list(expected.values()))
    assert np.isclose(got.mean, values.mean(), atol=1e-3)
    assert np.isclose(got.sem, values.std(ddof=1) / np.sqrt(3), atol=1e-3)
    assert got.outside == 0
    uniform = build.held_out_log_likelihood(masks, use_masks=False, floor=1.0)
    assert np.isclose(uniform.mean, -np.log(brain.sum()))
    assert uniform.mean < got.mean


def slow_linear(values, affine, shape, target_affine):
    """Trilinear interpolation, point by point, of a map that is 0 beyond its grid."""
    out = np.zeros(shape)
    for index in np.ndindex(shape):
        x = (np.linalg.inv(affine) @ (target_affine @ (*index, 1)))[:3]
        base = np.floor(x).astype(int)
        for corner in itertools.product((0, 1), repeat=3):
            at = base + corner
            if (at >= 0).all() and (at < values.shape).all():
                out[index] += values[tuple(at)] * np.prod(1 - np.abs(x - at))
    return out


def oblique(seed=2):
    affine = np.array([[-0.9, 0.3, 0.1, 4.2], [0.2, 1.3, -0.2, -3.1], [0.1, 0.2, 1.1, 2.4], [0, 0, 0, 1]])
    return np.random.default_rng(seed).random((7, 6, 5), dtype=np.float32), affine


def test_sample_map_against_a_slow_reference():
    values, affine = oblique()
    target = np.diag([1.2, 0.8, 1.0, 1.0])
    target[:3, 3] = (-4, -4, 1)
    got = sample_map(values, affine, (8, 9, 6), target)
    assert got.dtype == np.float32
    expected = slow_linear(values, affine, (8, 9, 6), target)
    assert (expected > 0).sum() > 50
    assert np.allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("shift", [(0, 0, 0), (2, -3, 1), (-2, 1, -1), (40, 0, 0)])
def test_a_shift_by_whole_voxels_equals_the_general_path(shift):
    values, affine = oblique()
    target = affine.copy()
    target[:3, 3] += affine[:3, :3] @ shift
    general = target.copy()
    general[:3, :3] *= 1 + 1e-5  # off the fast path, by far less than a voxel
    fast = sample_map(values, affine, (6, 8, 5), target)
    assert np.allclose(fast, sample_map(values, affine, (6, 8, 5), general), atol=1e-3)
    inside = tuple(np.add(shift, 2))
    if all(0 <= i < n for i, n in zip(inside, values.shape, strict=True)):
        assert fast[2, 2, 2] == values[inside]


def test_sample_map_on_its_own_grid_is_a_copy():
    values, affine = oblique()
    got = sample_map(values, affine, values.shape, affine)
    assert np.array_equal(got, values)
    assert not np.shares_memory(got, values)


def nifti(path, data, affine):
    nib.save(nib.Nifti1Image(data, affine), path)
    return path


def test_write_prior_takes_any_orientation_and_voxel_size(tmp_path):
    first = world_box((20, -30, 20), (29, -21, 27))
    las = np.diag([-1.0, 1, 1, 1])
    las[:3, 3] = (90, -126, -72)
    one = nifti(tmp_path / "sub-01_ses-1_mask.nii.gz", first[::-1].astype(np.uint8), las)
    coarse = np.zeros((60, 40, 45), np.uint8)  # axes z, x, y; 2 mm; x runs right to left
    affine = np.array([[0, -2.0, 0, 50], [0, 0, 2, -60], [2, 0, 0, -20], [0, 0, 0, 1]])
    coarse[20:24, 10:15, 15:20] = 3  # world centres: z 20..26, x 30..22, y -30..-22
    two = nifti(tmp_path / "other.nii.gz", coarse, affine)
    out = tmp_path / "prior.nii.gz"
    frequency = prior.write_prior([one, two], out, fwhm_mm=0.0, symmetric=False)
    written = nib.load(out)
    assert np.array_equal(written.affine, mni_affine())
    assert written.get_data_dtype() == np.float32
    assert np.array_equal(written.get_fdata(dtype=np.float32), frequency)
    plain = prior.with_floor(build_prior([("1", first)], fwhm_mm=0, symmetric=False))
    mean = frequency.min(where=frequency > 0, initial=1)
    assert plain.max() > 0.9
    both = world_box((22, -30, 20), (29, -22, 26))  # where both masks have a lesion, on whole-voxel centres
    assert np.allclose(frequency[both], (1 - prior.FLOOR) + mean, atol=1e-4)
    only_first = world_box((20, -30, 27), (20, -30, 27))
    assert np.allclose(frequency[only_first], (1 - prior.FLOOR) / 2 + mean, atol=1e-4)
    again, affine = lesion_prior(out)
    assert np.array_equal(again, frequency)
    assert np.array_equal(affine, mni_affine())


def test_visits_of_one_patient_count_once(tmp_path):
    las = np.diag([-1.0, 1, 1, 1])
    las[:3, 3] = (90, -126, -72)
    here, there = world_box((20, -30, 20), (29, -21, 27)), world_box((-29, -30, 20), (-20, -21, 27))
    names = {"sub-7_ses-1.nii.gz": here, "sub-7_ses-2.nii.gz": here, "sub-8.nii.gz": there}
    paths = [nifti(tmp_path / n, m[::-1].astype(np.uint8), las) for n, m in names.items()]
    frequency = prior.write_prior(paths, tmp_path / "p.nii", fwhm_mm=0.0, symmetric=False)
    assert np.isclose(frequency[here].mean(), frequency[there].mean())


def test_a_rewritten_prior_is_read_again(tmp_path):
    path = tmp_path / "p.nii"
    for value in (0.25, 0.5):
        data = np.zeros((20, 20, 20), np.float32)
        data[5:15, 5:15, 5:15] = value
        nifti(path, data[: 19 if value == 0.5 else 20], np.diag([2.0, 2, 2, 1]))
        assert lesion_prior(path)[0].max() == value


def test_patients_without_lesions_count(tmp_path):
    data = np.zeros((20, 20, 20), np.uint8)
    none = nifti(tmp_path / "sub-1_mask.nii", data, np.diag([2.0, 2, 2, 1]))
    data[8:12, 8:12, 8:12] = 1
    some = nifti(tmp_path / "sub-2_mask.nii", data, np.diag([2.0, 2, 2, 1]))
    halved, alone = (
        prior.write_prior(masks, tmp_path / "p.nii", fwhm_mm=0.0, symmetric=False) for masks in ([none, some], [some])
    )
    assert halved.max() / alone.max() == pytest.approx(0.5, abs=0.01)
    with pytest.raises(InputError, match=r"sub-1_mask\.nii: no lesion in any of the masks"):
        prior.write_prior([none], tmp_path / "q.nii")
    assert not (tmp_path / "q.nii").exists()


def test_unusable_files_are_named(tmp_path):
    data = np.zeros((8, 8, 8), np.float32)
    data[4] = 30
    percent = nifti(tmp_path / "percent.nii", data, np.eye(4))
    with pytest.raises(InputError, match=r"percent\.nii: values from 0 to 30; a lesion frequency"):
        lesion_prior(percent)
    far = np.eye(4)
    far[:3, 3] = 1000
    away = nifti(tmp_path / "away.nii", data / 100, far)
    with pytest.raises(InputError, match="no positive value on the MNI152 grid"):
        lesion_prior(away)
    with pytest.raises(InputError, match="outside the MNI brain"):
        prior.write_prior([away], tmp_path / "out.nii")
    with pytest.raises(InputError, match="missing"):
        lesion_prior(tmp_path / "missing.nii")
    assert not (tmp_path / "out.nii").exists()


def test_log_code_keeps_relative_precision():
    values = np.geomspace(1e-5, 1, 5000)
    coded = build.encode_log(values)
    assert coded.min() == 1
    assert coded.max() == 255
    assert np.abs(atlas.decode_log(coded) / values - 1).max() < 0.023
    assert atlas.decode_log(build.encode_log(np.array([0.0, 9e-6]))).tolist() == [0, 0]


@pytest.mark.parametrize(
    ("name", "limit_mb"),
    [
        ("prior.npz", 1),
        ("tissue.npz", 1.5),
        ("cases/sub-cs07_space-MNI152_FLAIR.nii.gz", 3),
        ("cases/sub-cs19_space-MNI152_FLAIR.nii.gz", 3),
    ],
)
def test_assets_are_small(name, limit_mb):
    assert (ASSETS / name).stat().st_size < limit_mb * 1e6


def test_bundled_cases_are_listed_and_carry_no_text():
    lines = (ASSETS / "cases" / "cases.csv").read_text().split()
    assert lines[0] == "subject,flair,mask"
    for line in lines[1:]:
        _, flair, mask = line.split(",")
        for name in (flair, mask):
            path = ASSETS / "cases" / name
            assert path.read_bytes()[3:8] == bytes(5)  # gzip: no file name, time 0
            image = nib.load(path)
            texts = [image.header[k].item() for k in ("descrip", "aux_file", "intent_name", "db_name")]
            assert texts == [b""] * 4
            assert not image.header.extensions
            assert image.affine[:3, 3].tolist() == [90, -126, -72]
        assert set(np.unique(np.asanyarray(image.dataobj))) == {0, 1}
    assert len(lines) == 3


def test_what_is_no_lesion_mask_makes_no_prior(tmp_path):
    scan = np.zeros((91, 109, 91), np.float32)
    scan[20:60, 20:80, 20:60] = np.linspace(1, 2, 40)
    affine = atlas.mni_affine() @ np.diag([2, 2, 2, 1])
    write_nifti(tmp_path / "flair.nii", scan, affine)
    with pytest.raises(InputError, match=r"flair.nii: not a binary mask"):
        prior.write_prior([tmp_path / "flair.nii"], tmp_path / "p.nii")
    write_nifti(tmp_path / "brain.nii", (scan > 0).astype(np.uint8), affine)
    with pytest.raises(InputError, match=r"brain.nii: covers 768 ml, like a brain mask"):
        prior.write_prior([tmp_path / "brain.nii"], tmp_path / "p.nii")
    small = (scan > 1.9).astype(np.uint8)
    write_nifti(tmp_path / "mask.nii", small, affine)
    before = (tmp_path / "mask.nii").read_bytes()
    for out, said in (("mask.nii", "is one of the masks"), ("p.npz", "is written as .nii.gz")):
        with pytest.raises(ConfigError, match=said):
            prior.write_prior([tmp_path / "mask.nii"], tmp_path / out)
    assert (tmp_path / "mask.nii").read_bytes() == before
    assert not (tmp_path / "p.npz").exists()


def test_masks_that_are_not_in_mni_space_make_no_prior(tmp_path, bundled):
    mask = nib.load(bundled("cs07")[1])
    seen = []
    prior.write_prior([bundled("cs07")[1]], tmp_path / "p.nii", progress=lambda *done: seen.append(done))
    assert seen == [("masks", 1, 1)]
    moved = mask.affine.copy()
    moved[1:3, 3] += 50  # as a scan whose origin lies in its middle
    away = nifti(tmp_path / "away.nii", np.asanyarray(mask.dataobj), moved)
    with pytest.raises(InputError, match=r"away.nii: \d\d% of its lesions lie outside the MNI brain; give masks"):
        prior.write_prior([away], tmp_path / "q.nii")
    with pytest.raises(OutputError, match="its folder does not exist"):
        prior.write_prior([tmp_path / "none.nii"], tmp_path / "no" / "q.nii")
