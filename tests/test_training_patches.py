import warnings

import nibabel as nib
import numpy as np
import pytest
from training import SCALING, write_balls, write_scans

from synthlong.atlas import MNI_VOXELS
from synthlong.dataset.shards import ShardDataset
from synthlong.derived import scaling_of
from synthlong.detection.networks import ConcatUNet, SiameseUNet
from synthlong.errors import ConfigError, InputError, InputWarning
from synthlong.protocol import toned
from synthlong.recipe import Recipe
from synthlong.training.ohem import OhemConfig
from synthlong.training.patches import check_folds, read_patches
from synthlong.training.sides import read_sides, source_sha256

SPLIT = {"split": "train", "fold": 0, "folds": 2}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_balls(tmp_path_factory.mktemp("balls"))


def windows(volume, side):
    view = np.lib.stride_tricks.sliding_window_view(volume, (side, side, side))
    return view.reshape(-1, side, side, side)


def test_patches_are_z_scored_cuts_of_the_boxes(run):
    patches = read_patches(run, side=8, **SPLIT)
    baseline, followup, new = patches.draw(np.random.default_rng(0), 6, 3)
    assert baseline.shape == followup.shape == new.shape == (6, 1, 8, 8, 8)
    assert baseline.dtype == followup.dtype == np.float32
    (mean0, sd0), (mean1, sd1) = SCALING
    samples = ShardDataset(run, **SPLIT)
    for n in range(6):
        raw = baseline[n, 0] * sd0 + mean0
        source = next(
            s for s in samples if (abs(windows(s["baseline"][0].numpy(), 8) - raw) < 1e-4).all((1, 2, 3)).any()
        )
        place = (abs(windows(source["baseline"][0].numpy(), 8) - raw) < 1e-4).all((1, 2, 3)).argmax()
        assert np.allclose(windows(source["followup"][0].numpy(), 8)[place], followup[n, 0] * sd1 + mean1, atol=1e-4)
        assert np.array_equal(windows(source["new_lesions"][0].numpy(), 8)[place], new[n, 0])
        assert n < 3 or Recipe.from_json(source["recipe"]).box.placed == "uniform"


def test_only_the_first_kind_of_network_sees_z_scores(run):
    z_scored, plain = (
        read_patches(run, side=8, network=network, **SPLIT).draw(np.random.default_rng(0), 6, 3)
        for network in (ConcatUNet, SiameseUNet)
    )
    for scores, visit, (mean, sd) in zip(z_scored[:2], plain[:2], SCALING, strict=True):
        assert np.allclose(scores * sd + mean, visit, atol=1e-5)
    assert np.array_equal(z_scored[2], plain[2])


def test_positive_patches_hold_a_new_lesion_and_uniform_ones_reach_every_corner(run):
    patches = read_patches(run, side=8, **SPLIT)
    baseline, _, new = patches.draw(np.random.default_rng(1), 200, 100)
    assert new[:100].any(axis=(1, 2, 3, 4)).all()
    assert not new[100:].any(axis=(1, 2, 3, 4)).all()
    mean, sd = SCALING[0]
    cuts = np.concatenate([windows(s["baseline"][0].numpy(), 8) for s in ShardDataset(run, **SPLIT)])
    found = [(abs(cuts - patch) < 1e-4).all((1, 2, 3)).argmax() for patch in baseline[100:, 0] * sd + mean]
    starts = np.stack(np.unravel_index(np.array(found) % 9**3, (9, 9, 9)), axis=1)
    assert (starts.min(axis=0) == 0).all()
    assert (starts.max(axis=0) == 8).all()


def test_draws_are_those_of_the_generator_in_any_thread(run):
    patches = read_patches(run, side=8, **SPLIT)
    one, two, other = (
        p.draw(np.random.default_rng(s), 5, 2) for p, s in ((patches, 0), (patches.reopened(), 0), (patches, 1))
    )
    assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))
    assert not np.array_equal(one[0], other[0])


def test_patients_are_on_one_side(run):
    sides = [set(read_patches(run, side=8, split=s, fold=0, folds=2).subjects) for s in ("train", "validation")]
    assert len(sides[0]) == len(sides[1]) == 2
    assert not sides[0] & sides[1]


def test_what_cannot_be_drawn_is_said(run, tmp_path):
    with pytest.raises(InputError, match="nowhere: no such file or folder"):
        read_patches(tmp_path / "nowhere", side=8, **SPLIT)
    with pytest.raises(ConfigError, match="side = 32: larger than the boxes of 16"):
        read_patches(run, side=32, **SPLIT)
    write_balls(tmp_path, uniform=lambda k: False)
    with pytest.raises(InputError, match="placed uniformly; generate pairs with `around_events`"):
        read_patches(tmp_path, side=8, **SPLIT)


def test_the_recipe_carries_the_z_score_of_the_whole_visit(real_case):
    for tone in ((1.0, 1.0), (1.3, 0.8)):
        mean, sd = scaling_of(real_case, tone)
        visit = toned(real_case.flair, tone)
        assert np.abs((visit - mean) / sd - ConcatUNet.normalised(visit)).max() < 1e-3


@pytest.fixture(scope="module")
def scans(tmp_path_factory, manifest):
    return write_scans(tmp_path_factory.mktemp("scans"), manifest)


def test_whole_scans(scans):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InputWarning)
        patches = read_patches(scans, side=16, split="train", fold=0, folds=3)
        wider = read_patches(scans, side=16, split="train", fold=0, folds=3, margin=6)
    baseline, followup, new = patches.draw(np.random.default_rng(0), 8, 4)
    assert new[:4].any(axis=(1, 2, 3, 4)).all()
    assert baseline.shape == (8, 1, 16, 16, 16)
    uniform = patches.draw(np.random.default_rng(1), 30, 0)[2]
    assert not uniform.any(axis=(1, 2, 3, 4)).all()
    with_surroundings = wider.draw(np.random.default_rng(0), 8, 4)
    for bare, wide in zip((baseline, followup, new), with_surroundings, strict=True):
        assert np.array_equal(bare, wide[..., 6:-6, 6:-6, 6:-6])
    assert with_surroundings[0][..., :6].any()
    change = followup - baseline
    assert change[new > 0].mean() > np.abs(change[new == 0]).mean()
    visit = patches._scans[0].visits[1]
    beyond = MNI_VOXELS - visit.size  # how much of the MNI grid is background that the scan does not have
    assert abs(visit.sum(dtype=float) + beyond * visit.min()) < 1e-3 * MNI_VOXELS
    assert abs(np.square(visit, dtype=float).sum() + beyond * visit.min() ** 2 - MNI_VOXELS) < 1e-3 * MNI_VOXELS


def test_a_patient_may_have_several_pairs(scans, tmp_path):
    """As `prepare` lists three visits: a row for each follow-up."""
    header, row, other = scans.read_text().splitlines()[:3]
    again = scans.with_name("again.csv")
    again.write_text("\n".join([header, row, other, row]) + "\n")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InputWarning)
        once, twice = (read_patches(path, side=16, split=None, fold=0, folds=1) for path in (scans, again))
    assert set(twice.subjects) <= set(once.subjects)
    assert len(twice._scans) == 3
    rng = np.random.default_rng(0)
    assert all(len(d) == 5 for d in twice.draw(rng, 5, 2))
    nothing_new = scans.read_text().splitlines()[3].replace("c,", f"{row[0]},", 1)
    again.write_text("\n".join([header, row, other, nothing_new]) + "\n")
    check_folds(again, [0, 1], of=2)  # one of a patient's pairs is enough


def test_a_patient_cannot_be_on_both_sides_unnoticed(scans):
    header, row = scans.read_text().splitlines()[:2]
    twice = scans.with_name("twice.csv")
    twice.write_text("\n".join([header, row, row, f"A{row[1:]}"]) + "\n")
    with pytest.raises(InputError, match=r"twice.csv: subject 'A' appears twice \(upper and lower case"):
        read_patches(twice, side=16, split=None, fold=0, folds=1)
    twice.write_text("\n".join([header, row, row, f"twin{row[1:]}"]) + "\n")
    with pytest.warns(InputWarning, match="^a, twin: one scan under 2 ids") as said:
        source_sha256(twice, pairs=True)
    assert len(said) == 1


@pytest.mark.filterwarnings("ignore::synthlong.errors.InputWarning")
@pytest.mark.parametrize("folds", [1, 2])
def test_where_nobody_has_anything_new_other_folds_are_no_way_out_of_one(folds, scans):
    header, *_, nothing = scans.read_text().splitlines()
    none = scans.with_name("none.csv")
    none.write_text("\n".join([header, nothing, f"d{nothing[1:]}"]) + "\n")
    way = "add patients with a new lesion" if folds == 1 else "choose another number of folds, or add patients"
    with pytest.raises(InputError, match=f"none.csv: none of the patients learned from has a new lesion; {way}$"):
        read_patches(none, side=16, split="train" if folds > 1 else None, fold=0, folds=folds)


def test_one_patient_is_told_how_to_be_learned_from(scans):
    alone = scans.with_name("alone.csv")
    alone.write_text("\n".join(scans.read_text().splitlines()[:2]) + "\n")
    with pytest.raises(ConfigError, match=r"^folds = 4: there is 1 patient; add patients, or .*--folds 1\)$"):
        read_patches(alone, side=16, split="train", fold=0, folds=4)


@pytest.mark.parametrize("share", [0.5, 1])
def test_new_lesions_where_the_baseline_ends_do_not_vanish_unsaid(share, manifest, tmp_path):
    source = write_scans(tmp_path, manifest)
    scan = nib.load(manifest.parent / "cs07_FLAIR.nii.gz")
    lesions = np.flatnonzero(nib.load(tmp_path / "a_new.nii.gz").get_fdata())
    data = scan.get_fdata()
    data.flat[lesions[: round(share * len(lesions))]] = 0
    nib.save(nib.Nifti1Image(data.astype(np.float32), scan.affine), tmp_path / "cut.nii.gz")
    header, row = source.read_text().splitlines()[:2]
    source.write_text(f"{header}\na,cut.nii.gz,{row.split(',', 2)[2]}\n")
    said = r"a_new.nii.gz: \d+ of \d+ lesion voxels lie outside the baseline's brain"
    expected = pytest.raises(InputError, match=said) if share == 1 else pytest.warns(InputWarning, match=said)
    with expected, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?!.*lie outside)", InputWarning)
        read_patches(source, side=16, split=None, fold=0, folds=1)


@pytest.mark.filterwarnings("ignore::synthlong.errors.InputWarning")
def test_a_preferred_orientation_is_that_of_all_files(manifest, tmp_path):
    source = write_scans(tmp_path, manifest)
    for name in ("a_followup", "a_new"):
        path = tmp_path / f"{name}.nii.gz"
        image = nib.load(path)
        image.set_sform(image.affine, code=1)
        moved = image.affine.copy()
        moved[0, 3] += 5
        image.set_qform(moved, code=1)
        nib.save(nib.Nifti1Image(image.get_fdata(dtype=np.float32), None, image.header), path)
    whole = {"side": 16, "split": None, "fold": 0, "folds": 1}
    with pytest.raises(InputError, match=r"a_followup.nii.gz: its sform and qform disagree .*; pass --prefer"):
        read_patches(source, **whole)
    assert read_patches(source, prefer="sform", **whole).subjects == ["a", "b", "c"]
    assert read_sides(source, OhemConfig(side=16, folds=1, prefer="sform"))[0].subjects == ["a", "b", "c"]
    with pytest.raises(InputError, match="its sform and qform disagree"):
        check_folds(source, [0], of=2)
    check_folds(source, [0], of=2, prefer="sform")
