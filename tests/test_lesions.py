from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from synthlong.bank import LesionBank, Shape, build_bank, read_bank, shape_of, write_bank
from synthlong.errors import ConfigError, InputError
from synthlong.lesions import core, find_lesions, grown
from synthlong.manifest import read_cases
from synthlong.profile import typical
from synthlong.recipe import draw_recipe, rng_of
from synthlong.synthesis import SynthesisConfig

TOUCHING = np.ones((3, 3, 3))


def ball(shape, centre, radius):
    return np.linalg.norm(np.indices(shape) - np.reshape(centre, (3, 1, 1, 1)), axis=0) <= radius


def dumbbell(neck=1):
    shape = (44, 22, 22)
    bar = np.zeros(shape, bool)
    bar[10:34, 11 - neck : 11 + neck, 11 - neck : 11 + neck] = True
    return ball(shape, (10, 11, 11), 8) | ball(shape, (33, 11, 11), 8) | bar


def check_partition(mask, lesions):
    assert np.array_equal(lesions.labels > 0, mask != 0)
    assert np.array_equal(np.unique(lesions.labels[mask != 0]), np.arange(1, len(lesions) + 1))
    assert lesions.volumes_mm3.sum() == mask.sum()
    for number, box in enumerate(lesions.boxes, start=1):
        own = lesions.labels == number
        assert own.sum() == own[box].sum() == lesions.volumes_mm3[number - 1]
        assert ndimage.label(own[box], TOUCHING)[1] == 1


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.02, 0.3))
def test_numbering_partitions_the_mask(seed, share):
    mask = np.random.default_rng(seed).random((12, 13, 14)) < share
    lesions = find_lesions(mask, max_event_mm3=1e5)
    check_partition(mask, lesions)
    assert len(lesions) == ndimage.label(mask, TOUCHING)[1]


def test_lesions_touch_at_corners():
    mask = np.zeros((5, 5, 5), np.uint8)
    mask[1, 1, 1] = mask[2, 2, 2] = mask[4, 4, 4] = 255
    assert find_lesions(mask, max_event_mm3=3000).volumes_mm3.tolist() == [2, 1]


def test_only_the_middle_sized_are_mutable():
    mask = np.zeros((30, 12, 12), bool)
    mask[0:3, 0, 0] = True  # 3 mm3
    mask[0:4, 4, 4] = True  # 4
    mask[10:20, 2:12, 2:12] = True  # 1000
    lesions = find_lesions(mask, max_event_mm3=900)
    assert dict(zip(lesions.volumes_mm3, lesions.mutable, strict=True)) == {3: False, 4: True, 1000: False}
    assert find_lesions(mask, max_event_mm3=1000).mutable.tolist() == [False, True, True]


def test_none_in_an_empty_mask():
    assert len(find_lesions(np.zeros((4, 4, 4)), max_event_mm3=3000)) == 0


def test_a_dumbbell_splits_at_its_neck():
    mask = dumbbell()
    lesions = find_lesions(mask, max_event_mm3=3000)
    check_partition(mask, lesions)
    assert len(lesions) == 2
    assert lesions.mutable.all()
    cut = [np.argwhere(lesions.labels == n)[:, 0] for n in (1, 2)]
    assert cut[0].max() <= 24
    assert cut[1].min() >= 19
    for limit in (5000, int(mask.sum())):
        assert len(find_lesions(mask, max_event_mm3=limit)) == 1  # small enough as a whole


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6))
def test_confluent_lesions_split_into_connected_parts(seed):
    rng = np.random.default_rng(seed)
    mask = np.zeros((40, 36, 30), bool)
    for _ in range(7):
        mask |= ball(mask.shape, rng.integers(6, 26, 3), rng.uniform(2, 7))
    check_partition(mask, find_lesions(mask, max_event_mm3=200))


def slow_core(mask, fraction):
    keep = max(min(round(fraction * int(mask.sum())), int(mask.sum()) - 1), 1)
    padded = np.pad(mask, 1)
    border = np.argwhere(~padded) - 1
    voxels = [tuple(v) for v in np.argwhere(mask)]
    depth = {v: np.sqrt(((border - v) ** 2).sum(axis=1).min()) for v in voxels}
    deepest = max(voxels, key=lambda v: depth[v])
    order = sorted(voxels, key=lambda v: 0.5 * np.linalg.norm(np.subtract(v, deepest)) - depth[v])
    inner = np.zeros_like(mask)
    for v in order[:keep]:
        inner[v] = True
    parts, _ = ndimage.label(inner, TOUCHING)
    return parts == parts[deepest]


def random_lesion(seed):
    rng = np.random.default_rng(seed)
    mask = np.zeros((12, 11, 10), bool)
    at = np.array([6, 5, 5])
    for _ in range(4):
        mask |= ball(mask.shape, at, rng.uniform(0.5, 2.5))
        at = np.clip(at + rng.integers(-2, 3, 3), 1, 8)
    parts, _ = ndimage.label(mask, TOUCHING)
    return parts == parts[6, 5, 5]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.01, 0.99))
def test_core_is_the_slow_one(seed, fraction):
    mask = random_lesion(seed)
    before = mask.copy()
    assert np.array_equal(core(mask, fraction), slow_core(mask, fraction))
    assert np.array_equal(mask, before)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 1), st.floats(0, 1))
def test_cores_are_nested_and_connected(seed, a, b):
    mask = random_lesion(seed)
    small, large = (core(mask, f) for f in sorted((a, b)))
    assert not (small & ~large).any()
    assert not (large & ~mask).any()
    for part, share in zip((small, large), sorted((a, b)), strict=True):
        assert ndimage.label(part, TOUCHING)[1] == (share > 0)  # a lesion present has a voxel
        assert part.sum() <= max(round(share * mask.sum()), 1)


def test_core_of_nothing_and_of_all():
    mask = random_lesion(1)
    assert not core(mask, 0).any()
    assert np.array_equal(core(mask, 1), mask)
    assert core(mask, 1) is not mask
    assert 0 < core(mask, 0.9999).sum() < mask.sum()
    for fraction in (0, 0.5, 1):
        assert not core(np.zeros_like(mask), fraction).any()
    for wrong in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="fraction"):
            core(mask, wrong)


def test_a_core_does_not_jump_over_a_neck():
    """The far end is deep, too, but what leads there is not."""
    mask = dumbbell()
    for fraction in (0.4, 0.5, 0.6, 0.7):
        assert ndimage.label(core(mask, fraction), TOUCHING)[1] == 1


def box_of(shape, voxels):
    box = np.zeros(shape, bool)
    box.ravel()[:voxels] = True
    return box


@pytest.mark.parametrize(
    ("shape", "voxels", "kept"),
    [
        ((3, 1, 1), 3, False),  # too small
        ((4, 1, 1), 4, True),
        ((15, 20, 10), 3000, True),
        ((15, 20, 11), 3001, False),  # too large
        ((2, 40, 2), 160, True),
        ((2, 41, 2), 164, False),  # too wide
        ((10, 10, 2), 30, True),
        ((10, 10, 2), 29, False),  # a sheet
    ],
)
def test_what_is_no_lesions_shape_is_left_out(shape, voxels, kept):
    found = shape_of(box_of(shape, voxels), np.zeros(3, int), np.eye(4))
    assert (found is not None) == kept


def test_grown_is_euclidean():
    mask = random_lesion(4)
    wide = np.pad(mask, 6)
    assert np.array_equal(grown(wide, 4), ndimage.distance_transform_edt(~wide) <= 4)
    assert not grown(np.zeros((3, 3, 3)), 4).any()


def test_a_bank_keeps_its_shapes():
    shapes = [Shape(random_lesion(n)[2:9], (float(n), -1.5, 3.25)) for n in range(5)]
    bank = LesionBank.from_shapes(shapes)
    assert len(bank) == 5
    for n, shape in enumerate(shapes):
        assert np.array_equal(bank[n].voxels, shape.voxels)
        assert bank[n].centre_mm == shape.centre_mm
        assert bank.volumes_mm3[n] == shape.voxels.sum()
    assert np.array_equal(bank[2].mirrored().mirrored().voxels, shapes[2].voxels)
    assert bank[2].mirrored().centre_mm[0] == -2.0
    for index in (-1, 5):
        with pytest.raises(IndexError):
            bank[index]
    assert len(LesionBank.from_shapes([])) == 0


def test_the_shipped_bank_is_sound():
    bank = read_bank()
    assert len(bank) > 1000
    for n in range(0, len(bank), 97):
        voxels = bank[n].voxels
        assert voxels.sum() == bank.volumes_mm3[n] > 3
        assert all(voxels.any(axis=tuple({0, 1, 2} - {a}))[[0, -1]].all() for a in range(3))
        assert ndimage.label(voxels, TOUCHING)[1] == 1


@pytest.mark.filterwarnings("ignore::synthlong.errors.InputWarning")
def test_a_bank_of_one_s_own_cases(manifest, tmp_path):
    cases = list(read_cases(manifest))
    bank = build_bank([*cases, cases[0]])  # twice is once
    write_bank(bank, tmp_path / "bank.npz")
    read = read_bank(tmp_path / "bank.npz")
    volumes, at = [], []
    for case in cases:
        labels, _ = ndimage.label(case.lesions, TOUCHING)
        for number, box in enumerate(ndimage.find_objects(labels), start=1):
            own = labels == number
            if 3 < own.sum() <= 3000 and own[box].mean() >= 0.15:
                volumes.append(own.sum())
                at.append(case.affine[:3] @ [*np.argwhere(own).mean(axis=0), 1])
    assert 5 < len(read) == len(volumes)
    assert read.volumes_mm3.tolist() == volumes
    np.testing.assert_allclose(read.centres_mm, at, atol=1e-3)
    lesions = [find_lesions(case.lesions, max_event_mm3=3000) for case in [*cases, cases[0]]]
    assert len(read.profiles) == sum(typical(each).sum() for each in lesions) < sum(map(len, lesions))
    assert np.array_equal(read.profiles, bank.profiles)
    drawn = draw_recipe(
        cases[0], SynthesisConfig(lesion_bank=str(tmp_path / "bank.npz"), new_mean=4), rng_of(1, "a", 0)
    )
    assert max(e.site.shape for e in drawn.events if e.site) < len(read)
    write_bank(LesionBank.from_shapes([bank[0]], bank.profiles), tmp_path / "bank.npz")
    assert len(read_bank(tmp_path / "bank.npz")) == 1  # not the one that was read before from there


def test_cases_without_lesions_make_no_bank(small_case):
    for cases in ([], [replace(small_case, lesions=np.zeros_like(small_case.lesions))]):
        with pytest.raises(ConfigError, match="a lesion bank needs lesions"):
            build_bank(cases)


def test_damaged_banks_are_refused(tmp_path):
    whole = LesionBank.default_path().read_bytes()
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :]
    for n, data in enumerate((b"", b"not a bank", whole[:2000], flipped)):
        path = tmp_path / f"{n}.npz"
        path.write_bytes(data)
        with pytest.raises(InputError, match="bank"):
            read_bank(path)
    with pytest.raises(InputError, match="bank"):
        read_bank(tmp_path / "missing.npz")
    np.savez(tmp_path / "odd.npz", **dict.fromkeys(("extents", "centres_mm", "volumes_mm3", "bits", "ends"), 1))
    with pytest.raises(InputError, match="bank"):
        read_bank(tmp_path / "odd.npz")
    one = LesionBank.from_shapes([Shape(np.ones((3, 3, 3), bool), (0.0, 0.0, 0.0))])
    for n, bank in enumerate((LesionBank.from_shapes([]), replace(one, bits=np.append(one.bits, np.uint8(0))))):
        write_bank(bank, tmp_path / f"disagrees{n}.npz")
        with pytest.raises(InputError, match="tables disagree"):
            read_bank(tmp_path / f"disagrees{n}.npz")
