import json
import random

import pytest

from synthlong.errors import ConfigError, InputError, InputWarning, short
from synthlong.preparation import Scan, find_scans
from synthlong.preparation.scans import visits_of

DESCRIPTION = {"Name": "x", "BIDSVersion": "1.8.0", "GeneratedBy": [{"Name": "x"}]}


@pytest.fixture
def fill(tmp_path):
    """`fill(*names)` makes empty files in the folder `data`, descriptions where they are named; listing opens none."""

    def fill(*names):
        for name in names:
            path = tmp_path / "data" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            kind = {"DatasetType": "derivative" if "derivatives/" in name else "raw"}
            path.write_text(json.dumps(DESCRIPTION | kind) if path.name == "dataset_description.json" else "")
        return tmp_path / "data"

    return fill


@pytest.fixture
def manifest(fill):
    """`manifest(text)` writes it beside the empty files f.nii, m.nii, t.nii and x.txt."""

    def manifest(text):
        folder = fill("f.nii", "m.nii", "t.nii", "x.txt")
        (folder / "scans.csv").write_text(text)
        return folder / "scans.csv"

    return manifest


def refused(source, *parts, error=InputError, **options):
    with pytest.raises(error) as caught:
        find_scans(source, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert "/tmp" not in message
    if error is InputError:
        assert caught.value.way_out in message
        assert caught.value.way_out
    for part in parts:
        assert part in message, message


def test_what_was_prepared_into_the_folder_is_no_raw_scan(fill):
    raw = ("sub-a/anat/sub-a_FLAIR.nii.gz", "sub-a/anat/sub-a_T1w.nii.gz")
    made = [f"cases/sub-a_space-MNI152_{what}.nii.gz" for what in ("FLAIR", "T1w", "desc-healthy_FLAIR")]
    folder = fill("dataset_description.json", *raw, *made, "cases/sub-b_space-halfway_FLAIR.nii.gz")
    (scan,) = find_scans(folder)
    assert [scan.flair, scan.t1] == [folder / name for name in raw]


# --- manifests


def test_each_column_is_a_file_of_the_scan(manifest):
    source = manifest(
        "subject,session,flair,mask,t1,brain,tissue,new_lesions,new_lesions_xfm\n"
        "sub-a,ses-2,f.nii,m.nii,t.nii,m.nii,m.nii,m.nii,x.txt\n"
    )
    (scan,) = find_scans(source)
    folder = source.parent
    names = {"flair": "f.nii", "mask": "m.nii", "t1": "t.nii", "brain": "m.nii", "tissue": "m.nii"}
    names |= {"new_lesions": "m.nii", "new_lesions_xfm": "x.txt"}
    assert scan == Scan("a", session="2", **{role: folder / name for role, name in names.items()})
    assert scan.id == "a_ses-2"
    assert scan.files == {role: folder / name for role, name in names.items()}


@pytest.mark.parametrize("text", ["subject,flair\nb,f.nii\n", "subject,flair,mask,t1,session\nb,f.nii,,,\n"])
def test_only_subject_and_flair_are_needed(manifest, text):
    source = manifest(text)
    (scan,) = find_scans(source)
    assert scan == Scan("b", source.parent / "f.nii")
    assert (scan.id, scan.mask, scan.session) == ("b", None, "")
    assert scan.files == {"flair": source.parent / "f.nii"}


def test_scans_come_by_subject_and_sessions_in_their_order(manifest):
    order = ["1", "2", "10", "m0", "m6", "m12", "post", "pre"]
    rows = [f"{s},{v},f.nii" for s in ("b", "a") for v in order]
    random.Random(1).shuffle(rows)
    scans = find_scans(manifest("subject,session,flair\n" + "\n".join(rows) + "\n"))
    assert [(s.subject, s.session) for s in scans] == [(s, v) for s in ("a", "b") for v in order]
    visits = visits_of(scans[::-1])
    assert [(subject, [s.session for s in group]) for subject, group in visits] == [("a", order), ("b", order)]
    assert [len(group) for _, group in visits_of(scans[:1])] == [1]
    assert visits_of([]) == []


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("subject,mask\na,m.nii\n", ["column missing: flair", "subject,flair[,session,mask,t1,"]),
        ("flair\nf.nii\n", ["column missing: subject"]),
        ("subject,flair\n", ["lists no scan", "add a row"]),
        ("subject,flair\na,\n", ["line 2: 'flair' is empty"]),
        ("subject,flair,mask\na,f.nii,m.nii\nb,f.nii,no.nii\n", ["data/no.nii", "line 3", "correct the path"]),
        ("subject,flair,new_lesions_xfm\na,f.nii,no.txt\n", ["data/no.txt", "line 2"]),
        ("subject,flair\n../a,f.nii\n", ["unsafe subject id '../a'"]),
        ("subject,session,flair\na,1/2,f.nii\n", ["unsafe session id '1/2'"]),
        ("subject,flair\na,f.nii\nsub-a,f.nii\n", ["'a' appears twice", "or a session"]),
        ("subject,session,flair\na,1,f.nii\nA,ses-1,f.nii\n", ["'A_ses-1' appears twice"]),
        ("subject,session,flair\na,1,f.nii\na,,f.nii\n", ["subject 'a' has several scans", "name their sessions"]),
        ("subject,session,flair\nP1,1,f.nii\np1,2,f.nii\n", ["'p1' appears twice (upper and lower case"]),
        (
            "subject,session,flair,new_lesions\na,pre,f.nii,\na,post,f.nii,m.nii\n",
            ["new_lesions of subject 'a' at session 'post', the first of post, pre; name sessions so that they sort"],
        ),
        ("subject,flair,new_lesions_xfm\na,f.nii,x.txt\n", ["a has a new_lesions_xfm, but no new_lesions"]),
        ("subject,flair,t1,t1\na,f.nii,t.nii,t.nii\n", ["columns named twice: t1"]),
    ],
)
def test_manifests_that_will_not_do(manifest, text, parts):
    refused(manifest(text), *parts)


def test_sources_that_are_none(tmp_path):
    refused(tmp_path / "data" / "none.csv", "data/none.csv: no such file or folder", "a BIDS folder")


def test_columns_of_no_use_are_named(manifest):
    with pytest.warns(InputWarning, match=r"data/scans\.csv: columns not used: age, sex"):
        assert len(find_scans(manifest("subject,age,flair,sex\na,40,f.nii,f\n"))) == 1


# --- a choice of them


def test_participants(manifest):
    source = manifest("subject,session,flair\na,1,f.nii\na,2,f.nii\nb,1,f.nii\nc,1,f.nii\n")
    assert [s.id for s in find_scans(source, participants=["sub-a", "c"])] == ["a_ses-1", "a_ses-2", "c_ses-1"]
    refused(source, "--participant-label d e: not in data/scans.csv", error=ConfigError, participants=["e", "a", "d"])


def test_brain_masks_by_a_pattern(manifest, fill):
    source = manifest("subject,session,flair,brain\na,1,f.nii,m.nii\na,2,f.nii,\nb,,f.nii,\n")
    folder = fill("bet/a-1.nii", "bet/a-2.nii", "bet/b-.nii")
    scans = find_scans(source, brain_mask=f"{folder}/bet/{{subject}}-{{session}}.nii")
    assert [s.brain for s in scans] == [folder / "bet" / name for name in ("a-1.nii", "a-2.nii", "b-.nii")]
    (folder / "bet" / "a-2.nii").unlink()
    pattern = f"{folder}/bet/{{subject}}-{{session}}.nii"
    refused(source, "bet/a-2.nii: no such brain mask", "correct --brain-mask", brain_mask=pattern)
    only = find_scans(source, participants=["b"], brain_mask=pattern)  # others' are not asked for
    assert [s.id for s in only] == ["b"]


@pytest.mark.parametrize("pattern", ["{name}.nii", "{}.nii", "{subject.nii", "{subject.name}.nii", "{subject[x]}.nii"])
def test_patterns_that_ask_for_something_else(manifest, pattern):
    source = manifest("subject,flair\na,f.nii\n")
    refused(source, f"--brain-mask {pattern}: only {{subject}} and", error=ConfigError, brain_mask=pattern)


# --- BIDS folders


def relative(scan, folder):
    return {role: path.relative_to(folder).as_posix() for role, path in scan.files.items()}


def test_a_bids_folder(fill):
    folder = fill(
        "dataset_description.json",
        "sub-02/anat/sub-02_FLAIR.nii.gz",
        "sub-02/anat/sub-02_T2w.nii.gz",
        "sub-01/ses-10/anat/sub-01_ses-10_FLAIR.nii",
        "sub-01/ses-2/anat/sub-01_ses-2_FLAIR.nii.gz",
        "sub-01/ses-2/anat/sub-01_ses-2_T1w.nii.gz",
        "sub-03/anat/sub-03_T1w.nii.gz",
        "derivatives/manual/dataset_description.json",
        "derivatives/manual/sub-01/ses-2/anat/sub-01_ses-2_label-lesion_mask.nii.gz",
        "derivatives/manual/sub-01/ses-2/anat/sub-01_ses-2_desc-brain_mask.nii.gz",
        "derivatives/manual/sub-02/anat/sub-02_desc-lesions_mask.nii.gz",
        "derivatives/manual/sub-02/anat/sub-02_FLAIR.nii.gz",
    )
    two, ten, other = find_scans(folder)
    assert [two.id, ten.id, other.id] == ["01_ses-2", "01_ses-10", "02"]
    assert relative(two, folder) == {
        "flair": "sub-01/ses-2/anat/sub-01_ses-2_FLAIR.nii.gz",
        "mask": "derivatives/manual/sub-01/ses-2/anat/sub-01_ses-2_label-lesion_mask.nii.gz",
        "t1": "sub-01/ses-2/anat/sub-01_ses-2_T1w.nii.gz",
    }
    assert relative(ten, folder) == {"flair": "sub-01/ses-10/anat/sub-01_ses-10_FLAIR.nii"}
    assert relative(other, folder) == {
        "flair": "sub-02/anat/sub-02_FLAIR.nii.gz",
        "mask": "derivatives/manual/sub-02/anat/sub-02_desc-lesions_mask.nii.gz",
    }
    assert [s.id for s in find_scans(folder, participants=["02"])] == ["02"]


def test_what_was_prepared_before_is_not_taken_for_a_scan_or_its_mask(fill):
    prepared = "derivatives/synthlong/sub-01_space-"
    folder = fill(
        "dataset_description.json",
        "sub-01/anat/sub-01_FLAIR.nii.gz",
        "derivatives/manual/dataset_description.json",
        "derivatives/manual/sub-01/anat/sub-01_space-orig_desc-lesions_mask.nii.gz",
        "derivatives/synthlong/dataset_description.json",
        *(f"{prepared}MNI152_{n}.nii.gz" for n in ("FLAIR", "T1w", "desc-lesions_mask", "desc-newlesions_mask")),
        *(f"{prepared}halfway_{n}.nii.gz" for n in ("FLAIR", "desc-lesions_mask", "desc-newlesions_mask")),
    )
    (scan,) = find_scans(folder)
    assert relative(scan, folder) == {
        "flair": "sub-01/anat/sub-01_FLAIR.nii.gz",
        "mask": "derivatives/manual/sub-01/anat/sub-01_space-orig_desc-lesions_mask.nii.gz",
    }


def test_derivatives_without_a_description_are_named(fill):
    """pybids passes them over; without a word the scan would be prepared without its lesions."""
    folder = fill(
        "dataset_description.json",
        "sub-01/anat/sub-01_FLAIR.nii.gz",
        "derivatives/manual/sub-01/anat/sub-01_desc-lesions_mask.nii.gz",
        "derivatives/other/sub-01/anat/sub-01_desc-brain_mask.nii.gz",
    )
    with pytest.warns(InputWarning) as caught:
        (scan,) = find_scans(folder)
    assert [str(w.message) for w in caught] == [
        "derivatives/manual: its lesion masks are not used, it lacks a dataset_description.json"
    ]
    assert scan.mask is None


def test_several_files_for_one_place(fill):
    folder = fill("dataset_description.json", *(f"sub-01/anat/sub-01_acq-{a}_T1w.nii.gz" for a in "ba"))
    fill("sub-01/anat/sub-01_FLAIR.nii.gz")
    with pytest.warns(InputWarning, match="sub-01: of 2 T1w scans sub-01_acq-a_T1w.nii.gz is used"):
        (scan,) = find_scans(folder)
    assert scan.t1.name == "sub-01_acq-a_T1w.nii.gz"
    fill("sub-01/anat/sub-01_run-2_FLAIR.nii.gz")
    fill("sub-02/anat/sub-02_FLAIR.nii.gz")
    with pytest.warns(InputWarning, match="of 2 T1w scans"):
        several, other = find_scans(folder)
    names = "sub-01_FLAIR.nii.gz, sub-01_run-2_FLAIR.nii.gz"
    assert (
        several.problem == f"{short(folder)}: sub-01 has several FLAIRs ({names}); pass a manifest (CSV) that names one"
    )
    assert other.problem is None


def test_several_masks_of_one_scan(fill):
    folder = fill("dataset_description.json", "sub-01/anat/sub-01_FLAIR.nii.gz")
    for rater in ("one", "two"):
        fill(f"derivatives/{rater}/dataset_description.json", f"derivatives/{rater}/sub-01_label-lesion_mask.nii.gz")
    (scan,) = find_scans(folder)
    assert "data: sub-01 has several lesion masks (sub-01_label-lesion_mask" in scan.problem


@pytest.mark.parametrize(
    "name", ["label-WMH_mask", "label-Lesion_mask", "label-lesion_roi", "lesionmask", "desc-Lesions_run-1_mask"]
)
def test_lesion_masks_by_other_names(fill, name):
    folder = fill(
        "dataset_description.json", "sub-01/anat/sub-01_FLAIR.nii.gz", "derivatives/x/dataset_description.json"
    )
    fill(f"derivatives/x/sub-01/anat/sub-01_{name}.nii.gz")
    (scan,) = find_scans(folder)
    assert scan.mask.name == f"sub-01_{name}.nii.gz"


def test_masks_that_no_scan_uses_are_named(fill):
    folder = fill("dataset_description.json", "derivatives/x/dataset_description.json")
    for n in "12":
        fill(f"sub-0{n}/ses-1/anat/sub-0{n}_ses-1_FLAIR.nii.gz", f"derivatives/x/sub-0{n}_label-lesion_mask.nii.gz")
    fill("derivatives/x/sub-01_ses-1_space-T1w_lesions.nii.gz")
    names = "sub-01_label-lesion_mask.nii.gz, sub-01_ses-1_space-T1w_lesions.nii.gz"
    with pytest.warns(
        InputWarning, match=f"data: no scan uses {names}, sub-02_label-lesion_mask.nii.gz; name masks in a"
    ):
        scans = find_scans(folder)
    assert [scan.mask for scan in scans] == [None, None]
    with pytest.warns(InputWarning, match=f"no scan uses {names}; name masks"):
        find_scans(folder, participants=["01"])


def test_metadata_that_nothing_asks_for_may_be_broken(fill):
    folder = fill("dataset_description.json", "sub-01/anat/sub-01_FLAIR.nii.gz", "sub-01/anat/sub-01_FLAIR.json")
    assert [s.id for s in find_scans(folder)] == ["01"]
    fill("derivatives/x/dataset_description.json")
    (folder / "derivatives" / "x" / "dataset_description.json").write_text("{")
    refused(folder, "data: pybids cannot read it (", "correct its JSON files")


def test_folders_that_will_not_do(fill):
    folder = fill("dataset_description.json", "sub-01/anat/sub-01_T1w.nii.gz", "other/x_FLAIR.nii.gz")
    refused(folder, "data: no *_FLAIR.nii.gz in it", "pass a BIDS folder, or a manifest")
    fill("sub-01/anat/sub-01_FLAIR.nii.gz")
    assert [s.id for s in find_scans(folder)] == ["01"]
    fill("sub-01/ses-1/anat/sub-01_ses-1_FLAIR.nii.gz")
    refused(folder, "subject '01' has several scans")
