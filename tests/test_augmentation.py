"""`synthlong augment`: one artifact on one file."""

import json

import nibabel as nib
import numpy as np
import pytest
import torch
from synthlong_cli.main import main

from synthlong import artifacts
from synthlong.augmentation import ARTIFACTS, augment, contact_sheet, setting_of
from synthlong.errors import ConfigError, InputError


@pytest.fixture
def scan(tmp_path):
    """A blob of brightness 300 with an odd header: anisotropic, oblique, both forms set with their own codes."""
    grid = np.indices((24, 20, 12)).reshape(3, -1).T - (12, 10, 6)
    inside = np.linalg.norm(grid / (10, 8, 5), axis=1).reshape(24, 20, 12) < 1
    data = np.where(inside, np.random.default_rng(0).normal(300, 20, inside.shape), 0).astype(np.float32)
    affine = np.array([[-0.9, 0.1, 0, 7.3], [0.1, 0.9, 0, -3.1], [0, 0, 3.0, 11.7], [0, 0, 0, 1]])
    affine[:3, :2] /= np.linalg.norm(affine[:3, :2], axis=0)
    image = nib.Nifti1Image(data, affine)
    image.set_sform(affine, 2)
    image.set_qform(affine, 1)
    image.header.set_xyzt_units("mm", "sec")
    path = tmp_path / "scan.nii.gz"
    nib.save(image, path)
    return path


@pytest.mark.parametrize("artifact", ARTIFACTS)
def test_geometry_is_kept_digit_by_digit(scan, tmp_path, artifact):
    out = tmp_path / "out.nii"
    settings = {"preset": "kamraoui"} if artifact == "acquisition" else {}
    params = augment(scan, out, artifact, seed=2, settings=settings)
    before, after = nib.load(scan), nib.load(out)
    for name in ("sform_code", "qform_code", "srow_x", "quatern_b", "qoffset_z", "pixdim", "xyzt_units", "dim"):
        assert np.array_equal(before.header[name], after.header[name]), name
    assert np.array_equal(before.affine, after.affine)
    assert after.get_data_dtype() == np.float32
    assert not np.array_equal(after.get_fdata(), before.get_fdata())
    assert 0.5 < after.get_fdata().max() / before.get_fdata().max() < 5, "in the scan's own units"
    assert json.loads(json.dumps(params)) == params


def test_it_is_the_function_at_mode_1(scan, tmp_path):
    out = tmp_path / "out.nii.gz"
    params = augment(scan, out, "noise", seed=5, settings={"std": (0.1, 0.1)})
    before = nib.load(scan).get_fdata()
    inside = before != 0
    difference = (nib.load(out).get_fdata() - before)[inside]
    want = artifacts.gaussian_noise(torch.zeros(24, 20, 12), **params).numpy()[inside]
    assert np.corrcoef(difference, want)[0, 1] > 0.9999
    assert abs(difference.std() / 30 - 1) < 0.1, "a tenth of the mode of 300"


def test_the_seed_decides(scan, tmp_path):
    outs = [tmp_path / f"{n}.nii.gz" for n in range(3)]
    for out, seed in zip(outs, (1, 1, 2), strict=True):
        augment(scan, out, "motion", seed=seed)
    assert outs[0].read_bytes() == outs[1].read_bytes()
    assert outs[0].read_bytes() != outs[2].read_bytes()


def test_settings():
    assert setting_of("degrees=5") == ("degrees", 5)
    assert setting_of("std=0.5,1.75") == ("std", (0.5, 1.75))
    assert setting_of("axis=axial") == ("axis", "axial")
    assert setting_of("translation-mm=2,2") == ("translation_mm", (2, 2))
    assert setting_of("prefilter=true") == ("prefilter", True)
    for bad in ("degrees", "=5", "degrees="):
        with pytest.raises(ConfigError, match="key=value"):
            setting_of(bad)


def test_five_means_minus_five_to_five(scan, tmp_path):
    drawn = []
    for seed in range(20):
        out = tmp_path / "out.nii"
        drawn += np.ravel(augment(scan, out, "motion", seed=seed, settings={"degrees": 5})["degrees"]).tolist()
    assert -5 <= min(drawn) < -3
    assert 3 < max(drawn) <= 5
    fixed = augment(scan, tmp_path / "out.nii", "motion", settings={"degrees": (5, 5)})
    assert np.all(np.array(fixed["degrees"]) == 5)


def test_command_line(scan, tmp_path, capsys):
    out = tmp_path / "out.nii.gz"
    assert main(["augment", str(scan), "-o", str(out), "--artifact", "blur", "--seed", "3", "--set", "std=1,1"]) == 0
    assert capsys.readouterr().out == 'out.nii.gz: blur {"std": 1.0}\n'
    for arguments, problem in [
        (["--artifact", "glow"], "must be one of blur, unsharp"),
        (["--artifact", "blur", "--set", "size=3"], "--set size: blur has std"),
        (["--artifact", "blur", "--set", "std=-1"], "--set std = -1: must be a number in [0, 100]"),
        (["--artifact", "blur", "--set", "std"], "give key=value"),
        (["--artifact", "all", "--set", "std=1"], "name one artifact"),
        (["--artifact", "all"], "ends in .html or .png"),
    ]:
        assert main(["augment", str(scan), "-o", str(out), *arguments]) == 2
        assert problem in capsys.readouterr().err
    assert main(["augment", str(scan), "-o", str(tmp_path / "out.png"), "--artifact", "blur"]) == 2
    assert main(["augment", str(tmp_path / "none.nii"), "-o", str(out), "--artifact", "blur"]) == 1


@pytest.mark.parametrize("name", ["sheet.html", "sheet.png"])
def test_sheet(bundled, tmp_path, name):
    captions = contact_sheet(bundled("cs07")[0], tmp_path / name, seed=1)
    assert len(captions) == 11
    page = (tmp_path / name).read_bytes()
    if name.endswith("html"):
        assert page.count(b"<figure>") == 11
        assert b"motion: degrees" in page
    else:
        assert page.startswith(b"\x89PNG")
    again = tmp_path / f"again-{name}"
    contact_sheet(bundled("cs07")[0], again, seed=1)
    assert again.read_bytes().replace(b"again-", b"") == page


def test_noise_is_as_strong_however_much_background_a_head_has(tmp_path, write_volume):
    rng = np.random.default_rng(0)
    far = np.linalg.norm(np.indices((64, 64, 64)) - 31.5, axis=0)
    head = np.where(far < 26, rng.normal(300, 15, far.shape), np.hypot(*rng.normal(0, 10, (2, *far.shape))))
    for pad in (0, 8):
        scan = write_volume(tmp_path / f"{pad}.nii.gz", np.pad(head, pad).astype(np.float32), np.eye(4))
        augment(scan, tmp_path / "out.nii.gz", "noise", settings={"std": (0.1, 0.1)})
        inside = np.pad(np.ones_like(head), pad) > 0
        added = (nib.load(tmp_path / "out.nii.gz").get_fdata() - np.pad(head, pad))[inside]
        assert added.std() == pytest.approx(30, rel=0.03)


def test_prefer_decides_between_two_orientations(scan, tmp_path, capsys):
    image = nib.load(scan)
    moved = image.affine.copy()
    moved[0, 3] += 2
    image.set_sform(moved, 2)
    nib.save(image, tmp_path / "two.nii.gz")
    words = ["augment", str(tmp_path / "two.nii.gz"), "-o", str(tmp_path / "out.nii.gz"), "--artifact", "noise"]
    assert main(words) == 1
    assert "pass --prefer sform or --prefer qform" in capsys.readouterr().err
    assert main([*words, "--prefer", "qform"]) == 0


def test_the_scan_itself_is_not_written_over(scan):
    before = scan.read_bytes()
    with pytest.raises(ConfigError, match=r"scan.nii.gz: is the scan itself"):
        augment(scan, scan, "noise")
    assert scan.read_bytes() == before


@pytest.mark.parametrize("background", [0, -2.5])
def test_z_scored_scans_are_refused(tmp_path, write_volume, bundled, background):
    image = nib.load(bundled("cs07")[0])
    data = image.get_fdata(dtype=np.float32)
    brain = data != 0
    z_scored = np.where(brain, (data - data[brain].mean()) / data[brain].std(), background).astype(np.float32)
    path = write_volume(tmp_path / "z.nii.gz", z_scored, image.affine)
    with pytest.raises(InputError, match=r"z.nii.gz: [34]\d% of its voxels are negative.*before z-scoring"):
        augment(path, tmp_path / "out.nii.gz", "noise")
    assert not (tmp_path / "out.nii.gz").exists()


def test_around_a_stripped_brain_it_stays_dark(tmp_path, bundled):
    flair, _ = bundled("cs07")
    augment(flair, tmp_path / "noisy.nii.gz", "noise", seed=1)
    before, after = (nib.load(path).get_fdata(dtype=np.float32) for path in (flair, tmp_path / "noisy.nii.gz"))
    assert not after[before == 0].any()
    assert (after != before)[before != 0].mean() > 0.99


def test_around_the_brain_in_a_box_it_stays_dark(tmp_path, write_volume, bundled):
    image = nib.load(bundled("cs07")[0])
    box = image.get_fdata(dtype=np.float32)[20:84, 90:154, 80:144]
    scan = write_volume(tmp_path / "box.nii.gz", box, image.affine)
    augment(scan, tmp_path / "noisy.nii.gz", "noise", seed=1)
    noisy = nib.load(tmp_path / "noisy.nii.gz").get_fdata(dtype=np.float32)
    assert 0.05 < (box == 0).mean() < 0.5
    assert not noisy[box == 0].any()


def test_zeros_scattered_in_air_are_air(tmp_path, write_volume):
    rng = np.random.default_rng(0)
    far = np.linalg.norm(np.indices((32, 32, 32)) - 15.5, axis=0)
    head = np.where(far < 13, rng.normal(300, 15, far.shape), rng.poisson(1, far.shape)).astype(np.float32)
    scan = write_volume(tmp_path / "head.nii.gz", head, np.eye(4))
    augment(scan, tmp_path / "noisy.nii.gz", "noise")
    assert nib.load(tmp_path / "noisy.nii.gz").get_fdata()[head == 0].all()
