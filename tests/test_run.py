import itertools
import json
import subprocess
import sys
import warnings
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import CROP
from running import Here, bytes_of, put

from synthlong import Recipe, ShardDataset
from synthlong.artifacts import RandomAnisotropicDownsampling, RandomGaussianNoise
from synthlong.artifacts.base import axial_axis
from synthlong.case import read_case
from synthlong.dataset import cases as cases_module
from synthlong.dataset import export as export_module
from synthlong.dataset import run as module
from synthlong.dataset.export import export_pairs, write_pair
from synthlong.dataset.plan import make_plan, read_plan, source_of
from synthlong.dataset.replay import replay
from synthlong.dataset.run import generate
from synthlong.errors import ConfigError, InputError, InputWarning, OutputError
from synthlong.preparation.derivatives import description
from synthlong.synthesis import SynthesisConfig

CONFIG = SynthesisConfig(box=32, new_mean=4.0)
OPTIONS = {"pairs": 7, "seed": 3, "shard_size": 3, "config": CONFIG}

pytestmark = [
    pytest.mark.filterwarnings("ignore::synthlong.errors.InputWarning"),
    pytest.mark.xdist_group("run"),
]


@pytest.fixture(scope="module")
def run(manifest):
    out = manifest.parent / "pairs"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InputWarning)
        outcome = generate(manifest, out, workers=1, **OPTIONS)
    assert (outcome.pairs, outcome.shards, outcome.made, outcome.failures) == (7, 3, 7, {})
    return out


@pytest.fixture
def here(monkeypatch):
    monkeypatch.setattr(module, "LocalPool", Here)


def test_nothing_but_the_contract_is_left(run):
    shards = [f"shards/0000{n}.{kind}" for n in range(3) for kind in ("h5", "json")]
    assert sorted(bytes_of(run)) == sorted(["run.json", "index.json", *shards])


def test_samples_are_pairs_of_case_k_mod_n(run):
    dataset = ShardDataset(run)
    assert len(dataset) == 7
    for k in range(7):
        sample = dataset[k]
        recipe = Recipe.from_json(sample["recipe"])
        assert recipe.case_id == ("cs07", "cs19")[k % 2]
        assert recipe.box.size == 32
        np.testing.assert_array_equal(sample["new_lesions"], sample["evolution"] == 2)
        assert sample["baseline"].max() > 0.5
    assert any(dataset[k]["new_lesions"].any() for k in range(7))


def test_workers_do_not_change_a_byte(run, manifest, tmp_path):
    out = manifest.parent / "again"  # beside the manifest, as the first, so that `source` is the same
    generate(manifest, out, workers=2, **OPTIONS)
    assert bytes_of(out) == bytes_of(run)


def test_resume_makes_what_is_missing_or_damaged(run, manifest):
    out = manifest.parent / "resumed"
    put(out, bytes_of(run))
    (out / "index.json").unlink()
    (out / "shards" / "00000.json").unlink()
    damaged = bytearray((out / "shards" / "00002.h5").read_bytes())
    damaged[-500] ^= 1
    (out / "shards" / "00002.h5").write_bytes(damaged)
    stages = []
    outcome = generate(manifest, out, workers=1, progress=lambda *args: stages.append(args), **OPTIONS)
    assert outcome.made == 4  # shards 0 (3 pairs) and 2 (1 pair)
    assert stages[-1] == ("pairs", 7, 7)
    assert bytes_of(out) == bytes_of(run)
    again = generate(manifest, out, workers=1, **OPTIONS)
    assert (again.made, again.pairs) == (0, 7)


@pytest.mark.usefixtures("here")
def test_only_cases_of_missing_shards_are_prepared_again(run, manifest, monkeypatch):
    out = manifest.parent / "of-one-case"
    put(out, bytes_of(run))
    (out / "index.json").unlink()
    prepared, kept = [], []
    store, write = cases_module.store_case, module.write_index

    def noting(folder, case, *args, **options):
        prepared.append(case.id)
        store(folder, case, *args, **options)

    def noting_too(folder, run_id, sidecars):
        kept.extend(sidecars)
        write(folder, run_id, sidecars)

    monkeypatch.setattr(cases_module, "store_case", noting)
    monkeypatch.setattr(module, "write_index", noting_too)
    assert generate(manifest, out, workers=1, **OPTIONS).made == 0
    assert (prepared, bytes_of(out)) == ([], bytes_of(run))
    for name in ("index.json", "shards/00002.h5"):
        (out / name).unlink()
    assert generate(manifest, out, workers=1, **OPTIONS).made == 1
    assert (prepared, bytes_of(out)) == (["cs07"], bytes_of(run))
    assert all(sample.keys() == {"index", "subject"} for sidecar in kept for sample in sidecar["samples"])


@pytest.mark.parametrize(
    ("change", "named"),
    [({"seed": 4}, "seed: 3 -> 4"), ({"config": SynthesisConfig(box=32)}, "config.new_mean: 4.0 -> 3.0")],
)
def test_another_run_in_the_folder_is_refused(run, manifest, change, named):
    before = bytes_of(run)
    with pytest.raises(ConfigError, match=named):
        generate(manifest, run, workers=1, **(OPTIONS | change))
    assert bytes_of(run) == before


@pytest.mark.usefixtures("here")
def test_changed_input_is_refused(run, manifest, tmp_path):
    copy = tmp_path / "pairs"
    put(copy, bytes_of(run))
    for file in manifest.parent.glob("cs*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "cases.csv").write_bytes(manifest.read_bytes())
    image = nib.load(tmp_path / "cs19_FLAIR.nii.gz")
    nib.save(nib.Nifti1Image(image.get_fdata() * 1.5, image.affine), tmp_path / "cs19_FLAIR.nii.gz")
    with pytest.raises(ConfigError, match=r"cases\.cs19\.flair"):
        generate(tmp_path / "cases.csv", copy, workers=1, **OPTIONS)
    with pytest.raises(InputError, match=r"cs19_FLAIR\.nii\.gz: has changed since the run"):
        replay(copy, 1, source=tmp_path / "cases.csv")
    (copy / "index.json").unlink()  # no shard is missing, so no case would be read
    with pytest.raises(ConfigError, match=r"cases\.cs19\.flair"):
        generate(tmp_path / "cases.csv", copy, workers=1, **OPTIONS)


@pytest.mark.usefixtures("here")
def test_bad_case_is_left_out_or_strict(manifest, tmp_path):
    for file in manifest.parent.glob("cs*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "cases.csv").write_bytes(manifest.read_bytes())
    whole = (tmp_path / "cs07_FLAIR.nii.gz").read_bytes()
    (tmp_path / "cs07_FLAIR.nii.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"1 of 2 cases cannot be used .*cs07_FLAIR"):
        generate(tmp_path / "cases.csv", tmp_path / "strict", workers=1, strict=True, **OPTIONS)
    assert not (tmp_path / "strict").exists()
    outcome = generate(tmp_path / "cases.csv", tmp_path / "out", workers=1, **(OPTIONS | {"pairs": 2}))
    assert list(outcome.failures) == ["cs07"]
    failed = json.loads((tmp_path / "out" / "failures.json").read_text())["failed"]
    assert "cs07_FLAIR.nii.gz" in failed["cs07"]
    assert str(tmp_path) not in failed["cs07"]
    dataset = ShardDataset(tmp_path / "out")
    assert {Recipe.from_json(dataset[k]["recipe"]).case_id for k in range(2)} == {"cs19"}
    (tmp_path / "cs07_FLAIR.nii.gz").write_bytes(whole)  # mended, but the run is what it is
    again = generate(tmp_path / "cases.csv", tmp_path / "out", workers=1, **(OPTIONS | {"pairs": 2}))
    assert (again.made, again.failures) == (0, failed)


def test_foreign_folder_is_left_alone(manifest, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"thesis\.txt"):
        generate(manifest, tmp_path, **OPTIONS)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(OutputError, match="is not a folder"):
        generate(manifest, tmp_path / "thesis.txt", **OPTIONS)


@pytest.mark.parametrize("option", ["pairs", "shard_size", "seed"])
def test_options_out_of_range(manifest, tmp_path, option):
    with pytest.raises(ConfigError, match=f"{option} = -1"):
        generate(manifest, tmp_path / "out", **(OPTIONS | {option: -1}))
    assert not (tmp_path / "out").exists()


def test_nothing_tells_of_the_machine(run, manifest):
    for name, data in bytes_of(run).items():
        assert str(manifest.parent).encode() not in data, name
    assert source_of(run, read_plan(run)).resolve() == manifest


@pytest.mark.parametrize("name", ["linked.csv", "a..b..c..d.csv"])
def test_a_plan_says_where_its_cases_are(tmp_path, name):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "cases.csv").touch()
    (tmp_path / "here").mkdir()
    (tmp_path / "run").mkdir()
    source = tmp_path / "here" / name
    source.symlink_to(tmp_path / "elsewhere" / "cases.csv")
    plan = make_plan(source, tmp_path / "run", cases=[], pairs=1, seed=0, shard_size=1, config=CONFIG, assets={})
    assert source_of(tmp_path / "run", plan).resolve() == source.resolve()
    assert plan["source"] == f"../here/{name}"


def test_replay_gives_the_pair_again(run):
    for k in (0, 3):
        pair, apart = replay(run, k)  # compares every array with the shard, bit for bit
        assert apart == 0
        assert pair.baseline.shape == (32, 32, 32)
    whole, _ = replay(run, 3, whole=True)
    assert sorted(whole.baseline.shape) == sorted(CROP)
    with pytest.raises(ConfigError, match=r"has pairs 0\.\.6, not 7"):
        replay(run, 7)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("painter", ["copypaste", "ellipsoid"])
def test_a_run_of_a_plain_painter(manifest, tmp_path, painter):
    config = SynthesisConfig(box=32, new_mean=4.0, with_new_lesions=1, real_share=0, painter=painter)
    generate(manifest, tmp_path / "run", workers=1, pairs=2, seed=3, config=config)
    recipes = [Recipe.from_json(ShardDataset(tmp_path / "run")[k]["recipe"]) for k in range(2)]
    assert {r.painter for r in recipes} == {painter}
    for k in range(2):
        assert replay(tmp_path / "run", k)[0].new_lesions.any()


def test_replay_notices_a_pair_that_differs(run, monkeypatch):
    from synthlong.dataset import replay as module
    from synthlong.errors import SynthlongError

    honest = module.render

    def off_by(image, mask=0):
        def render(*args, **kwargs):
            pair = honest(*args, **kwargs)
            pair.followup[5, 5, 5] += image
            pair.new_lesions[5, 5, 5] ^= mask
            return pair

        monkeypatch.setattr(module, "render", render)

    off_by(0.02)
    with pytest.raises(SynthlongError, match="pair 0 does not come out as stored"):
        replay(run, 0)
    here = module.environment("cpu")
    other = {**here, "machine": {**here["machine"], "arithmetic": "f00"}}
    monkeypatch.setattr(module, "environment", lambda _: other)
    with pytest.warns(InputWarning, match="images differ by up to 0.02: other processor or libraries than the run's"):
        assert replay(run, 0)[1] == pytest.approx(0.02, abs=0.001)
    for wrong, name in (((0.2,), "followup"), ((0.02, 1), "new_lesions")):
        off_by(*wrong)
        with pytest.raises(SynthlongError, match=rf"pair 0 does not come out as stored \({name}\)"):
            replay(run, 0)
    monkeypatch.setattr(module.synthlong, "__version__", "9.9")
    with pytest.raises(InputError, match=r"made by synthlong .*, this is 9\.9; install that version"):
        replay(run, 0)


@pytest.mark.usefixtures("here")
def test_preferred_orientation_is_part_of_the_run(manifest, tmp_path):
    """Scans whose sform and qform disagree: refused, or read by one of them, in `replay` too."""
    for name in ("cs07_FLAIR", "cs07_mask"):
        image = nib.load(manifest.parent / f"{name}.nii.gz")
        moved = image.affine.copy()
        moved[0, 3] += 3
        image.set_qform(moved, 1)
        nib.save(image, tmp_path / f"{name}.nii.gz")
    (tmp_path / "cases.csv").write_text("subject,flair,mask\ncs07,cs07_FLAIR.nii.gz,cs07_mask.nii.gz\n")
    few = OPTIONS | {"pairs": 1}
    with pytest.raises(InputError, match="sform"):
        generate(tmp_path / "cases.csv", tmp_path / "out", workers=1, **few)
    generate(tmp_path / "cases.csv", tmp_path / "out", workers=1, prefer="qform", **few)
    with pytest.raises(ConfigError, match="prefer: qform -> sform"):
        generate(tmp_path / "cases.csv", tmp_path / "out", workers=1, prefer="sform", **few)
    sform = nib.load(manifest.parent / "cs07_FLAIR.nii.gz").affine
    corner = min(sform[0, 3], (sform @ (CROP[0] - 1, 0, 0, 1))[0])
    assert replay(tmp_path / "out", 0)[0].recipe.origin_mm[0] == pytest.approx(corner + 3)


def test_transforms_know_which_axis_of_a_turned_box_is_axial(run):
    coarser, noise = RandomAnisotropicDownsampling(factor=(4, 4), axes="axial"), RandomGaussianNoise(std=(0, 0))
    plain = ShardDataset(run)
    axes = set()
    for k, sample in enumerate(ShardDataset(run, transform=lambda s: coarser(noise(s)), seed=0)):
        affine = Recipe.from_json(sample["recipe"]).affine
        assert np.array_equal(sample["followup"].affine, affine)
        rough = [[np.abs(np.diff(s["followup"][0], 2, axis=a)).mean() for a in range(3)] for s in (sample, plain[k])]
        axes.add(axial_axis(affine))
        assert np.argmin(np.divide(*rough)) == axial_axis(affine)
    assert len(axes) > 1


def test_export_is_bids_with_true_geometry(run, tmp_path):
    seen = []
    export_pairs(run, tmp_path, numbers=[2], progress=lambda *done: seen.append(done))
    assert seen == [("pairs", 1, 1)]
    files = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.nii.gz")}
    masks = {1: ("lesionsBaseline_mask",), 2: ("newLesions_mask", "evolution_dseg", "lesionsFollowup_mask")}
    anat = {s: f"sub-syn0002/ses-{s}/anat/sub-syn0002_ses-{s}_" for s in (1, 2)}
    truth = {f"derivatives/synthlong/{anat[s]}space-MNI152_desc-{m}.nii.gz" for s in masks for m in masks[s]}
    assert files == truth | {f"{place}FLAIR.nii.gz" for place in anat.values()}
    sample = ShardDataset(run)[2]
    image = nib.load(tmp_path / f"{anat[2]}FLAIR.nii.gz")
    np.testing.assert_array_equal(image.get_fdata(dtype=np.float32), sample["followup"][0].numpy())
    assert np.allclose(np.abs(np.linalg.det(image.affine)), 1)
    recipe = tmp_path / "derivatives/synthlong/sub-syn0002/sub-syn0002_recipe.json"
    assert recipe.read_text().strip() == sample["recipe"]


def test_export_takes_each_number_once_and_no_more_than_there_are(run, tmp_path):
    assert [folder.name for folder in export_pairs(run, tmp_path, numbers=[1, 0, 1])] == ["sub-syn0001", "sub-syn0000"]
    endless = itertools.count()
    with pytest.raises(ConfigError, match=r"has pairs 0\.\.6, not 7"):
        export_pairs(run, tmp_path, numbers=(n for n in endless if n < 1000 or pytest.fail("all are listed first")))


def test_export_names_the_file_that_did_not_fit(run, tmp_path, monkeypatch):
    def full(path, *_):
        raise OutputError(path, "no space left", "free some space")

    for name in ("write_nifti", "_list_participants"):
        monkeypatch.setattr(export_module, name, full)
    with pytest.raises(OutputError, match=r"ses-1_FLAIR\.nii\.gz: no space left"):
        export_pairs(run, tmp_path, numbers=[0])


def test_no_other_pair_is_written_over(run, tmp_path):
    run_id = read_plan(run)["run_id"]
    pair, whole, other = (replay(run, number, whole=whole)[0] for number, whole in ((2, False), (2, True), (3, False)))
    export_pairs(run, tmp_path, numbers=[2])
    write_pair(tmp_path, 2, pair, run_id=run_id)
    before = bytes_of(tmp_path)
    for made, by in ((whole, run_id), (other, run_id), (pair, "of other weights")):
        with pytest.raises(OutputError, match="another pair of this number is there; choose another folder"):
            write_pair(tmp_path, 2, made, run_id=by)
    assert bytes_of(tmp_path) == before
    (tmp_path / "participants.tsv").write_text("participant_id\tage\nsub-01\t40\n")
    with pytest.raises(OutputError, match=r"participants.tsv: is of another data set"):
        export_pairs(run, tmp_path, numbers=[3])


@pytest.mark.parametrize("own", [(), ("README",), ("README.md", "participants.json")])
def test_the_validator_of_bids_finds_no_error(run, tmp_path, own):
    for name in own:
        (tmp_path / name).write_text("{}")
    export_pairs(run, tmp_path, numbers=[0, 3])
    assert all((tmp_path / name).read_text() == "{}" for name in own)
    for folder in (tmp_path, tmp_path / "derivatives" / "synthlong"):
        command = [Path(sys.executable).with_name("bids-validator-deno"), "--json", folder]
        found = json.loads(subprocess.run(command, capture_output=True, check=False).stdout)["issues"]["issues"]
        assert [issue for issue in found if issue["severity"] == "error"] == []


def test_pairs_that_several_exports_wrote_are_listed_by_patient(run, tmp_path):
    for numbers in ([4, 1], [0], [1]):
        export_pairs(run, tmp_path, numbers=numbers)
    table = (tmp_path / "participants.tsv").read_text().splitlines()
    rows = [("sub-syn0000", "cs07"), ("sub-syn0001", "cs19"), ("sub-syn0004", "cs07")]
    assert table == ["participant_id\tsource_subject\tsource_case", *(f"{p}\t{case}\t{case}" for p, case in rows)]


def test_pybids_finds_visits_and_truth_by_session(run, tmp_path):
    bids = pytest.importorskip("bids")
    export_pairs(run, tmp_path, numbers=[0])
    layout = bids.BIDSLayout(tmp_path, derivatives=True)
    place = {"subject": "syn0000", "datatype": "anat", "extension": ".nii.gz"}
    assert {f.entities["session"] for f in layout.get(suffix="FLAIR", **place)} == {"1", "2"}
    masks = {(f.entities["session"], f.entities["desc"]) for f in layout.get(suffix="mask", **place)}
    assert masks == {("1", "lesionsBaseline"), ("2", "lesionsFollowup"), ("2", "newLesions")}
    (labels,) = layout.get(suffix="dseg", session="2", **place)
    assert labels.get_metadata()["Run"] == read_plan(run)["run_id"]
    assert len(layout.get(suffix="recipe", subject="syn0000")) == 1
    (names,) = layout.get(suffix="dseg", extension=".tsv")
    assert names.get_df()["name"].tolist() == ["stable", "new", "vanished", "enlarged part", "shrunk part"]
    versions = {json.loads(p.read_bytes())["BIDSVersion"] for p in tmp_path.rglob("dataset_description.json")}
    assert versions == {description()["BIDSVersion"]}


def test_exported_visits_are_read_back_in_their_own_gray_scales(run, tmp_path):
    steps = []
    pair, _ = replay(run, 0, whole=True, progress=lambda _, done, total: steps.append((done, total)))
    assert steps == [(n, 4) for n in range(5)]
    write_pair(tmp_path, 0, pair, run_id="")
    negative = 0
    for number in (1, 2):
        path = tmp_path / f"sub-syn0000/ses-{number}/anat/sub-syn0000_ses-{number}_FLAIR.nii.gz"
        written = nib.load(path).get_fdata(dtype=np.float32)
        case = read_case(path)
        turned = nib.as_closest_canonical(nib.load(path)).get_fdata(dtype=np.float32)
        np.testing.assert_array_equal(case.flair, np.maximum(turned, 0))
        negative += np.count_nonzero(written < 0)
    assert negative, "artifacts leave noise below 0"


@pytest.mark.usefixtures("here")
def test_exported_voxels_lie_where_the_scan_has_them(manifest, tmp_path):
    """A voxel far from lesions has the scan's own intensity at the same millimetres, whatever the orientation."""
    clean = OPTIONS | {"pairs": 1, "config": SynthesisConfig(box=32, artifacts="none")}
    generate(manifest, tmp_path / "run", workers=1, **clean)
    export_pairs(tmp_path / "run", tmp_path / "nifti", numbers=[0])
    image = nib.load(tmp_path / "nifti/sub-syn0000/ses-1/anat/sub-syn0000_ses-1_FLAIR.nii.gz")
    scan = nib.load(manifest.parent / "cs07_FLAIR.nii.gz")
    box, raw = image.get_fdata(), scan.get_fdata()
    to_scan = np.linalg.inv(scan.affine) @ image.affine
    where = np.argwhere(box > 0.2)[::97]
    there = np.rint(where @ to_scan[:3, :3].T + to_scan[:3, 3]).astype(int)
    ratio = raw[tuple(there.T)] / box[tuple(where.T)]
    assert np.mean(np.abs(ratio / np.median(ratio) - 1) < 0.01) > 0.9  # the rest are lesions that changed
