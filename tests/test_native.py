import json
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from nibabel.affines import apply_affine
from scipy import ndimage
from scipy.spatial.transform import Rotation

from synthlong.errors import InputError, InputWarning
from synthlong.manifest import CaseFiles, find_cases
from synthlong.preparation import to_native
from synthlong.preparation.derivatives import file_name, read_native, read_record, way_name
from synthlong.resampling import Grid, Native

FULL = np.ones((3, 3, 3))
SHAPE = (64, 60, 14)

# an oblique scan, slices of 3.5 mm; and how the patient lay in the scanner
SCAN = np.eye(4)
SCAN[:3, :3] = Rotation.from_euler("xyz", (9, -6, 4), degrees=True).as_matrix() * (-0.8, 0.8, 3.5)
SCAN[:3, 3] = (11, -38, 3)
WAY = np.eye(4)
WAY[:3, :3] = Rotation.from_euler("xyz", (-5, 8, 12), degrees=True).as_matrix()
WAY[:3, 3] = (4, -3, 6)


@pytest.fixture
def prepared(small_case):
    """The small case, as if prepared from a scan that covers it."""
    middle = apply_affine(WAY, apply_affine(small_case.affine, [20, 20, 20]))
    affine = SCAN.copy()
    affine[:3, 3] = middle - SCAN[:3, :3] @ ((np.array(SHAPE) - 1) / 2)
    return replace(small_case, native=Native(Grid(SHAPE, affine), WAY))


@pytest.fixture
def files(prepared, tmp_path, write_volume):
    """The same on disk, the transform written by ITK."""
    folder = tmp_path / "data"
    folder.mkdir()
    paths = {}
    for role, what in (("flair", "FLAIR.nii.gz"), ("mask", "desc-lesions_mask.nii.gz")):
        paths[role] = folder / file_name("7_ses-1", what)
        write_volume(paths[role], prepared.flair if role == "flair" else prepared.lesions, prepared.affine)
    lps = np.diag([-1, -1, 1, 1])
    transform = sitk.AffineTransform(3)
    transform.SetMatrix((lps @ WAY @ lps)[:3, :3].ravel().tolist())
    transform.SetTranslation((lps @ WAY @ lps)[:3, 3].tolist())
    sitk.WriteTransform(transform, str(folder / way_name("7_ses-1")))
    record = {
        "native": {
            "shape": list(SHAPE),
            "affine": prepared.native.grid.affine.tolist(),
            "transform": way_name("7_ses-1"),
        },
        "flags": [],
        "synthlong": "0.1.0",
    }
    (folder / file_name("7_ses-1", "FLAIR.json")).write_text(json.dumps(record))
    return CaseFiles("7_ses-1", **paths)


def places_mm(mask, affine):
    """Centres of its lesions."""
    labels, count = ndimage.label(mask, FULL)
    return np.array([apply_affine(affine, np.argwhere(labels == n)).mean(axis=0) for n in range(1, count + 1)])


def test_lesions_lie_where_the_scan_shows_them(prepared):
    there = to_native(prepared.lesions, prepared)
    assert there.shape == SHAPE
    assert there.dtype == np.uint8
    expected = apply_affine(WAY, places_mm(prepared.lesions, prepared.affine))
    found = places_mm(there, prepared.native.grid.affine)
    assert len(found) == len(expected) == 3
    for place in expected:
        assert np.linalg.norm(found - place, axis=1).min() < 1.75  # half a slice
    volume = there.sum() * 0.8 * 0.8 * 3.5
    assert volume == pytest.approx(prepared.lesions.sum(), rel=0.05)


def test_there_and_back_again(prepared):
    """Back through the scan's grid as if that were a case whose own scan is the prepared one."""
    there = to_native(prepared.lesions, prepared)
    grid = prepared.native.grid
    turned = Native(Grid(prepared.shape, prepared.affine), np.linalg.inv(WAY))
    empty = np.zeros(SHAPE, np.uint8)
    scan = replace(
        prepared,
        flair=np.zeros(SHAPE, np.float32),
        lesions=empty,
        brain=empty,
        tissue=empty,
        healthy=None,
        affine=grid.affine,
        native=turned,
    )
    back = to_native(there, scan)
    assert ndimage.label(back, FULL)[1] == 3
    assert back.sum() == pytest.approx(prepared.lesions.sum(), rel=0.05)
    dice = 2 * (back * prepared.lesions).sum() / (back.sum() + prepared.lesions.sum())
    assert dice > 0.6  # the lesions are 3 to 5 mm wide, the slices 3.5


def test_a_case_its_files_and_their_path_are_the_same(prepared, files):
    expected = to_native(prepared.lesions, prepared)
    for mask in (prepared.lesions, prepared.lesions > 0, prepared.lesions * 3.0, files.mask, str(files.mask)):
        for case in (prepared, files, files.flair, str(files.flair)):
            assert np.array_equal(to_native(mask, case), expected)


@pytest.mark.filterwarnings("ignore::synthlong.errors.InputWarning")
def test_a_case_read_from_its_folder_knows_its_scan(prepared, files):
    (found,) = find_cases(files.flair.parent)
    assert found == files
    case = found.read()
    assert case.id == "7_ses-1"
    assert case.native.grid.shape == SHAPE
    assert np.array_equal(case.native.grid.affine, prepared.native.grid.affine)
    assert case.native.way == pytest.approx(WAY, abs=1e-12)
    assert np.array_equal(to_native(prepared.lesions, case), to_native(prepared.lesions, prepared))
    assert case.healthy_file is None


def test_a_mask_file_with_other_axes_lies_where_its_own_header_says(prepared, files, write_volume):
    affine = prepared.affine @ np.diag([-1, 1, 1, 1])
    affine[:3, 3] = apply_affine(prepared.affine, [39, 0, 0])
    flipped = write_volume(files.mask.parent / "flipped.nii", prepared.lesions[::-1], affine)
    assert np.array_equal(to_native(flipped, prepared), to_native(prepared.lesions, prepared))


def test_an_empty_prediction_is_an_empty_mask(prepared, files, write_volume):
    none = np.zeros(prepared.shape, np.uint8)
    assert not to_native(none, prepared).any()
    path = write_volume(files.mask.parent / "none.nii.gz", none, prepared.affine)
    assert to_native(path, files).shape == SHAPE
    assert not to_native(path, files).any()


def test_the_result_is_read_by_others(prepared, tmp_path):
    """With `native.grid.affine` as its affine, world coordinates lead from the scan to the prepared lesion."""
    path = tmp_path / "there.nii.gz"
    nib.save(nib.Nifti1Image(to_native(prepared.lesions, prepared), prepared.native.grid.affine), path)
    image = sitk.ReadImage(str(path))
    voxels = np.argwhere(sitk.GetArrayFromImage(image))[:, ::-1]
    world = np.array([image.TransformIndexToPhysicalPoint(v.tolist()) for v in voxels]) * (-1, -1, 1)
    back = apply_affine(np.linalg.inv(prepared.affine) @ np.linalg.inv(WAY), world)
    distance = ndimage.distance_transform_edt(prepared.lesions == 0)
    assert distance[tuple(np.rint(back).astype(int).T)].max() <= 2.3
    assert (distance[tuple(np.rint(back).astype(int).T)] <= 1).mean() > 0.8


# --- refusing


def refused(*parts):
    return pytest.raises(InputError, match=".*".join(parts))


def test_masks_on_another_grid_are_refused(prepared, files, write_volume):
    other = np.zeros((40, 40, 39), np.uint8)
    path = write_volume(files.mask.parent / "other.nii", other, prepared.affine)
    for mask in (other, path):
        for case in (prepared, files, files.flair):
            with refused(r"\(40, 40, 39\)", r"\(40, 40, 40\)", "give a mask on the prepared scan's grid"):
                to_native(mask, case)


def test_cases_that_were_not_prepared_are_refused(small_case, files):
    with refused("small: no record of the scan", "synthlong prepare"):
        to_native(small_case.lesions, small_case)
    files.flair.with_name(file_name("7_ses-1", "FLAIR.json")).unlink()
    for case in (files, files.flair):
        with refused("FLAIR.nii.gz: no record of the scan"):
            to_native(small_case.lesions, case)


@pytest.mark.parametrize("text", ['{"SkullStripped": true}', "[]", "{}", '"synthlong"', "3", "null"])
def test_a_sidecar_of_others_is_no_record(files, text):
    files.flair.with_name(file_name("7_ses-1", "FLAIR.json")).write_text(text)
    assert read_record(files.flair) is None
    assert read_native(files.flair) is None
    assert len(find_cases(files.flair.parent)) == 1


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda p: p.write_bytes(p.read_bytes()[:-9]), "FLAIR.json: is not a readable record"),
        (lambda p: p.write_bytes(b"\xff\xfe"), "FLAIR.json: is not a readable record"),
        (lambda p: p.write_text('{"synthlong": "1"}'), "its record lacks the scan's grid"),
        (lambda p: p.write_text('{"synthlong": "1", "native": [1]}'), "its record lacks the scan's grid"),
        (lambda p: p.write_text(p.read_text().replace("[64, 60, 14]", "[64, 60]")), "lacks the scan's grid"),
        (lambda p: p.write_text(p.read_text().replace("64", '"a"')), "lacks the scan's grid"),
        (lambda p: p.with_name(way_name("7_ses-1")).unlink(), r"mode-image_xfm.txt: cannot be read"),
        (lambda p: p.with_name(way_name("7_ses-1")).write_text("x"), r"mode-image_xfm.txt: is not an ITK transform"),
    ],
)
def test_damaged_records_are_refused(prepared, files, edit, said):
    edit(files.flair.with_name(file_name("7_ses-1", "FLAIR.json")))
    for case in (files, files.flair):
        with refused(said):
            to_native(prepared.lesions, case)


def test_the_transform_is_looked_for_beside_the_scan_only(prepared, files):
    path = files.flair.with_name(file_name("7_ses-1", "FLAIR.json"))
    record = json.loads(path.read_text())
    record["native"]["transform"] = f"../../etc/{way_name('7_ses-1')}"
    path.write_text(json.dumps(record))
    assert read_native(files.flair).way == pytest.approx(WAY, abs=1e-12)


def test_a_flagged_case_is_listed_with_a_word(files):
    path = files.flair.with_name(file_name("7_ses-1", "FLAIR.json"))
    flags = ["brain of 300 ml", "signal-to-noise ratio 2.0"]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"flags": flags}))
    said = r"_FLAIR.nii.gz: flagged by `prepare` \(brain of 300 ml; signal-to-noise ratio 2.0\); look at its picture"
    with pytest.warns(InputWarning, match=said):
        assert find_cases(Path(files.flair.parent)) == [files]
