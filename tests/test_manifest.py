import json
import warnings

import numpy as np
import pytest

from synthlong.atlas import ASSETS
from synthlong.errors import InputError, InputWarning
from synthlong.manifest import find_cases, manifest_rows, read_cases, warn_of_twins

SPACE = "space-MNI152"


@pytest.fixture
def folder(tmp_path):
    """A folder `data` with the empty files a.nii and m.nii: listing cases opens none of them."""
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("a.nii", "m.nii"):
        (folder / name).touch()
    return folder


def manifest(folder, text, encoding="utf-8"):
    path = folder / "cases.csv"
    path.write_bytes(text.encode(encoding))
    return path


def refusal(source, *parts):
    """Return the error, having checked that it names the source and what it must."""
    with pytest.raises(InputError) as caught:
        find_cases(source)
    message = str(caught.value)
    assert "data" in message.split(": ")[0], message
    assert caught.value.way_out in message
    for part in parts:
        assert part in message
    return caught.value


# --- manifests that are fine


def test_rows_become_cases_sorted_by_id_with_paths_beside_the_manifest(folder):
    source = manifest(folder, "subject,flair,mask,t1,brain\nsub-b,a.nii,m.nii,,\nA1,a.nii,m.nii,no.nii,a.nii\n")
    first, second = find_cases(source)
    assert (first.subject, second.subject) == ("A1", "b")
    assert (first.flair, first.mask, first.brain) == (folder / "a.nii", folder / "m.nii", folder / "a.nii")
    assert second.brain is second.tissue is None


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("subject,flair,mask\nx,a.nii,m.nii\n", "utf-8-sig"),
        ("subject,flair,mask\r\nx,a.nii,m.nii\r\n", "utf-8-sig"),
        ("subject,flair,mask\nx,a.nii,m.nii", "utf-8"),
        (" subject , flair , mask \n x , a.nii , m.nii \n", "utf-8"),
        ('"subject","flair","mask"\n"x","a.nii","m.nii"\n', "utf-8"),
        ("mask,flair,subject\nm.nii,a.nii,x\n", "utf-8"),
        ("subject,flair,mask,brain,tissue\nx,a.nii,m.nii\n", "utf-8"),  # a short row
        ("subject,flair,mask\nx,a.nii,m.nii,,\n\n,,\n", "utf-8"),  # what spreadsheets leave behind
        ("subject,flair,mask,,\nx,a.nii,m.nii,,\n", "utf-8"),
        ("subject,flair,mask,new_lesions,new_lesions_xfm\nx,a.nii,m.nii,,\n", "utf-8"),
        ("subject;flair;mask\nx;a.nii;m.nii\n", "utf-8-sig"),
        ("subject\tflair\tmask\nx\ta.nii\tm.nii\n", "utf-8"),
        ("Subject,FLAIR,Mask\nx,a.nii,m.nii\n", "utf-8"),
        ("\n\r\nsubject,flair,mask\nx,a.nii,m.nii\n", "utf-8"),
    ],
)
def test_what_spreadsheets_and_editors_do_is_understood(folder, text, encoding):
    (case,) = find_cases(manifest(folder, text, encoding))
    assert case.subject == "x"
    assert (case.flair, case.mask) == (folder / "a.nii", folder / "m.nii")
    assert case.brain is case.tissue is None


def test_extra_columns_are_named_and_ignored(folder):
    source = manifest(folder, "subject,age,flair,mask\nx,40,a.nii,m.nii\n")
    with pytest.warns(InputWarning, match=r"data/cases\.csv: columns not used: age$"):
        (case,) = find_cases(source)
    assert case.flair == folder / "a.nii"


def test_sessions_tell_visits_of_a_patient_apart(folder):
    source = manifest(folder, "subject,session,flair,mask\nx,1,a.nii,m.nii\nx,ses-2,a.nii,m.nii\ny,,a.nii,m.nii\n")
    cases = find_cases(source)
    assert [c.subject for c in cases] == ["x_ses-1", "x_ses-2", "y"]
    assert [c.patient for c in cases] == ["x", "x", "y"]


def test_absolute_paths_stay(folder, tmp_path):
    (tmp_path / "elsewhere.nii").touch()
    source = manifest(folder, f"subject,flair,mask\nx,{tmp_path}/elsewhere.nii,m.nii\n")
    assert find_cases(source)[0].flair == tmp_path / "elsewhere.nii"


# --- manifests that are not


@pytest.mark.parametrize(
    ("header", "missing"),
    [
        ("subject,flair", "column missing: mask"),
        ("id,flair,mask", "column missing: subject"),
        ("subject|flair|mask", "columns missing: subject, flair, mask"),
        ("", "columns missing: subject, flair, mask"),
        ("subject,flair,mask,mask", "columns named twice: mask"),
    ],
)
def test_columns(folder, header, missing):
    refusal(manifest(folder, f"{header}\nx,a.nii,m.nii,m.nii\n" if header else ""), "cases.csv", missing)


@pytest.mark.parametrize("text", ["subject,flair,mask\n", "subject,flair,mask\n\n,,\n"])
def test_a_manifest_without_cases(folder, text):
    refusal(manifest(folder, text), "lists no case", "add a row")


@pytest.mark.parametrize(
    "subject",
    [
        "",
        "../x",
        "a/b",
        "a\\b",
        ".",
        "..",
        "sub-..",
        "sub-",
        "sub-/",
        ".hidden",
        "-rf",
        "a b",
        "x" * 300,
        "Jürgen",
        "患者",
        "a\u202eb",
        "a\x00b",
        '"a\nb"',
        "a:b",
        "a*",
    ],
)
def test_unsafe_ids(folder, subject):
    error = refusal(manifest(folder, f"subject,flair,mask\n{subject},a.nii,m.nii\n"), "unsafe subject id", "line")
    assert str(error).isascii()
    assert len(str(error)) < 300


def test_unsafe_session(folder):
    source = manifest(folder, "subject,session,flair,mask\nx,../1,a.nii,m.nii\n")
    refusal(source, "line 2: unsafe session id '../1'")


@pytest.mark.parametrize(
    "ids", [("x", "x"), ("Xy", "xY"), ("sub-01", "Sub-01"), ("01", "sub-01"), ("1", "1"), ("x_ses-1", "x,1")]
)
def test_an_id_twice(folder, ids):
    rows = [f"{i}," if "," not in i else i for i in ids]
    source = manifest(folder, "subject,session,flair,mask\n" + "".join(f"{r},a.nii,m.nii\n" for r in rows))
    refusal(source, "cases.csv", "appears twice", "its own id")


def test_a_path_that_does_not_exist_is_named_with_its_line(folder):
    source = manifest(folder, "subject,flair,mask\nx,a.nii,m.nii\ny,a.nii,gone.nii\n")
    with pytest.raises(InputError, match=r"'data/cases.csv' line 3 names it.* correct the path") as error:
        list(manifest_rows(source, needed=("flair", "mask"), optional=()))
    assert error.value.path == folder / "gone.nii"


def test_a_missing_file_is_a_matter_of_its_case(folder):
    source = manifest(folder, "subject,flair,mask\nx,a.nii,m.nii\ny,a.nii,gone.nii\n")
    with pytest.warns(
        InputWarning, match=r"cases.csv: names data/gone.nii, which does not exist; paths are relative to"
    ):
        cases = find_cases(source)
    assert [files.subject for files in cases] == ["x", "y"]
    with pytest.raises(InputError, match=r"gone.nii: cannot be read"):
        cases[1].hashes()


def test_lines_are_counted_as_an_editor_does(folder):
    source = manifest(folder, "\n\nsubject,flair,mask\nx,a.nii,m.nii\ny,a.nii,gone.nii\n")
    with pytest.raises(InputError, match="line 5 names it"):
        list(manifest_rows(source, needed=("flair", "mask"), optional=()))


@pytest.mark.parametrize("row", ["x,a.nii", "x,a.nii,", "x"])
def test_short_rows(folder, row):
    refusal(manifest(folder, f"subject,flair,mask\n{row}\n"), "line 2: '", "is empty", "fill it in")


@pytest.mark.parametrize(
    "content", [b"\x1f\x8b\x08\x00\xff\xfe", "subject,flair,mask\n".encode("utf-16"), b"x" * 200_000 + b"\n"]
)
def test_what_is_no_csv(folder, content):
    path = folder / "cases.csv"
    path.write_bytes(content)
    refusal(path, "cases.csv")


def test_a_source_that_does_not_exist(folder):
    refusal(folder / "nothing.csv", "nothing.csv", "no such file or folder")


# --- folders


KINDS = ("FLAIR", "desc-lesions_mask")


def fill(folder, *names):
    for name in names:
        (folder / name.replace("SPACE", SPACE)).touch()
    return folder


def test_a_folder_is_read_by_its_names(folder):
    fill(
        folder,
        "sub-b_ses-1_SPACE_FLAIR.nii.gz",
        "sub-b_ses-1_SPACE_desc-lesions_mask.nii.gz",
        "sub-a_SPACE_FLAIR.nii",
        "sub-a_SPACE_desc-lesions_mask.nii",
        "sub-a_SPACE_T1w.nii.gz",
        "sub-a_SPACE_desc-brain_mask.nii.gz",
        "sub-a_SPACE_dseg.nii.gz",
        "sub-a_SPACE_desc-healthy_FLAIR.nii.gz",
        "._sub-a_SPACE_FLAIR.nii",  # macOS
        "notes.txt",
    )
    a, b = find_cases(folder)
    assert (a.subject, b.subject, b.patient) == ("a", "b_ses-1", "b")
    assert a.flair.name == f"sub-a_{SPACE}_FLAIR.nii"
    assert [p and p.name.split("152_")[1] for p in (a.brain, a.tissue)] == [
        "desc-brain_mask.nii.gz",
        "dseg.nii.gz",
    ]
    assert b.brain is b.tissue is None


def test_a_folder_is_read_as_deep_as_it_goes_and_in_other_tools_names(folder):
    anat, unfinished = folder / "sub-a" / "ses-2" / "anat", folder / ".unfinished-c-1"
    anat.mkdir(parents=True)
    unfinished.mkdir()
    for kind in ("FLAIR", "label-lesion_mask", "desc-brain_mask"):
        (anat / f"sub-a_ses-2_space-MNI152NLin2009cAsym_res-1_{kind}.nii.gz").touch()
        (unfinished / f"sub-c_{SPACE}_{kind}.nii.gz").touch()
    (case,) = find_cases(folder)
    assert (case.subject, case.patient) == ("a_ses-2", "a")
    assert (case.flair.parent, case.mask.parent, case.brain.parent) == (anat, anat, anat)


def test_two_files_of_a_kind_are_skipped_with_a_word(folder):
    fill(folder, *(f"sub-{s}_SPACE_{e}.nii" for s in "ab" for e in ("FLAIR", "desc-lesions_mask")))
    fill(folder, "sub-b_SPACE_label-lesion_mask.nii.gz")
    with pytest.warns(InputWarning, match="sub-b is skipped, it has several of a kind .*; pass a manifest"):
        (case,) = find_cases(folder)
    assert case.subject == "a"


def test_one_scan_under_two_ids_is_named():
    with pytest.warns(InputWarning, match="^a, c: one scan under 2 ids$"):
        warn_of_twins([("a", "0f"), ("b", "1f"), ("c", "0f")])
    with pytest.warns(InputWarning, match="^a, b, c: one scan under 3 ids$") as said:
        warn_of_twins([("a", "0f"), ("b", "0f"), ("c", "0f")])
    assert len(said) == 1
    warn_of_twins([("a", "0f"), ("b", "1f"), ("a", "0f")])


def test_runs_and_acquisitions_are_of_one_patient(folder):
    fill(folder, *(f"sub-p_{run}_SPACE_{e}.nii" for run in ("run-1", "acq-3D_run-2") for e in KINDS))
    assert {case.patient for case in find_cases(folder)} == {"p"}


@pytest.mark.parametrize(("lone", "lacking"), [("desc-lesions_mask", "its FLAIR"), ("FLAIR", "its lesion mask")])
def test_half_a_case_is_skipped_with_a_word(folder, lone, lacking):
    fill(
        folder,
        "sub-a_SPACE_FLAIR.nii.gz",
        "sub-a_SPACE_desc-lesions_mask.nii.gz",
        f"sub-b_SPACE_{lone}.nii.gz",
    )
    with pytest.warns(InputWarning, match=f"data: sub-b is skipped, {lacking} is missing"):
        (case,) = find_cases(folder)
    assert case.subject == "a"


def test_a_name_without_sub_is_skipped_with_a_word(folder):
    fill(folder, "a_SPACE_FLAIR.nii.gz", "sub-a_SPACE_FLAIR.nii.gz", "sub-a_SPACE_desc-lesions_mask.nii.gz")
    with pytest.warns(InputWarning, match="data: a is skipped, its name does not start with 'sub-'"):
        assert len(find_cases(folder)) == 1


def test_a_folder_without_cases(folder):
    refusal(folder, "no sub-*_space-MNI152_FLAIR.nii.gz", "pass a manifest")
    fill(folder, "sub-b_SPACE_desc-lesions_mask.nii.gz")
    with pytest.warns(InputWarning, match="sub-b is skipped"):
        refusal(folder, "no sub-*_space-MNI152_FLAIR.nii.gz")


def test_ids_in_a_folder_that_differ_by_case_or_are_unsafe(folder):
    fill(folder, *(f"sub-{s}_SPACE_{e}.nii.gz" for s in "aA" for e in ("FLAIR", "desc-lesions_mask")))
    if len(list(folder.glob("sub-*"))) == 4:  # not where the file system itself ignores case
        refusal(folder, "appears twice")
    for path in folder.glob("sub-*"):
        path.unlink()
    fill(folder, "sub-ü_SPACE_FLAIR.nii.gz", "sub-ü_SPACE_desc-lesions_mask.nii.gz")
    refusal(folder, "unsafe subject id 'sub-\\xfc'")


# --- reading


@pytest.mark.filterwarnings("ignore:.*looks like no FLAIR")
def test_cases_are_read_one_by_one(folder, small_case, write_volume):
    write_volume(folder / "a.nii", small_case.flair, small_case.affine)
    write_volume(folder / "m.nii", small_case.lesions, small_case.affine)
    source = manifest(folder, "subject,flair,mask,t1,brain\nq,a.nii,m.nii,a.nii,\np,a.nii,m.nii,,\n")
    cases = read_cases(source)
    first = next(cases)
    assert first.id == "p"
    assert set(first.sources) == {"flair", "mask"}
    second = next(cases)
    assert second.id == "q"
    assert set(second.sources) == {"flair", "mask"}
    assert np.array_equal(first.flair, second.flair)
    assert next(cases, None) is None


@pytest.mark.filterwarnings("ignore:.*looks like no FLAIR")
def test_a_stated_gray_scale_is_one_of_the_sources(folder, small_case, write_volume):
    """It decides what the case is, so a run that began with another must notice."""
    write_volume(folder / "a.nii", small_case.flair, small_case.affine)
    write_volume(folder / "m.nii", small_case.lesions, small_case.affine)
    (files,) = find_cases(manifest(folder, "subject,flair,mask\np,a.nii,m.nii\n"))
    assert files.hashes() == files.read().sources
    assert files.hashes().keys() == {"flair", "mask"}
    found = []
    for mode in (1.0, 1.25):
        (folder / "a.json").write_text(json.dumps({"BrainMode": mode}))
        found.append(files.hashes())
        assert found[-1] == files.read().sources
    assert found[0] != found[1]


def test_the_bundled_manifest_lists_both_cases():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [c.subject for c in find_cases(ASSETS / "cases" / "cases.csv")] == ["cs07", "cs19"]
        assert [c.subject for c in find_cases(ASSETS / "cases")] == ["cs07", "cs19"]
