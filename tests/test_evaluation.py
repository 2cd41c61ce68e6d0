import csv
import math
import shutil
from dataclasses import astuple

import numpy as np
import pytest
from scipy.stats import wilcoxon
from synthlong_cli.main import main

from synthlong.detection.evaluation import (
    WITH_NEW,
    WITHOUT_NEW,
    average,
    compare,
    evaluate,
    measured,
    write_scores,
)
from synthlong.detection.scores import KEYS, LesionScores, lesion_scores
from synthlong.errors import InputError, InputWarning, OutputError

AFFINE = np.diag([0.9, 0.9, 3, 1])
SPACING = (0.9, 0.9, 3)


def ball(centre, radius=3.0):
    return np.linalg.norm(np.indices((24, 20, 10)) - np.reshape(centre, (3, 1, 1, 1)), axis=0) <= radius


NOTHING = np.zeros((24, 20, 10), bool)
PATIENTS = {  # truth, prediction, another method's
    "p1": (ball((6, 6, 5)), ball((7, 6, 5)), ball((6, 6, 5))),
    "p2": (ball((6, 6, 5)) | ball((17, 12, 5)), ball((6, 6, 5)), ball((6, 6, 5), 2)),
    "p3": (ball((12, 9, 5)), NOTHING, ball((12, 9, 5), 2)),
    "p4": (NOTHING, ball((12, 9, 5), 2), NOTHING),
    "p5": (NOTHING, NOTHING, NOTHING),
}


@pytest.fixture
def cohort(tmp_path, write_volume):
    """The folders truth, prediction and other."""
    folders = [tmp_path / name for name in ("truth", "prediction", "other")]
    for k, folder in enumerate(folders):
        folder.mkdir()
        for patient, masks in PATIENTS.items():
            write_volume(folder / f"{patient}.nii.gz", masks[k], AFFINE)
    return folders


def scores_of(**values):
    """Scores of patients with new lesions: Dice and F1."""
    return {patient: LesionScores(dice=dice, lesion_f1=f1) for patient, (dice, f1) in values.items()}


def test_folders_are_scored_patient_by_patient(cohort):
    truth, prediction, _ = cohort
    (truth / "notes.txt").write_text("no mask")
    (prediction / "._p1.nii.gz").write_text("left by another system")
    seen = []
    scores = evaluate(truth, prediction, progress=lambda *at: seen.append(at))
    wanted = {p: lesion_scores(t, q, SPACING) for p, (t, q, _) in PATIENTS.items()}
    np.testing.assert_equal({p: astuple(s) for p, s in scores.items()}, {p: astuple(s) for p, s in wanted.items()})
    assert seen == [("patients", done, 5) for done in range(1, 6)]


def test_files_need_not_have_the_same_name(cohort, write_volume, tmp_path):
    path = write_volume(tmp_path / "mine.nii", PATIENTS["p1"][1].astype(np.float32) * 255, AFFINE)
    assert evaluate(cohort[0] / "p1.nii.gz", path) == {"p1": lesion_scores(*PATIENTS["p1"][:2], SPACING)}


def test_spacing_is_the_headers_digit_by_digit(tmp_path, write_volume):
    """In the turned affine the 1.2 mm are a little shorter, and lesions of two voxels 3 mm3 instead of just above."""
    c, s = math.cos(math.radians(5)), math.sin(math.radians(5))
    turned = np.array([[c, -s, 0, 0], [s, c, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]) @ np.diag([1.2, 1.25, 1, 1])
    prediction = NOTHING.copy()
    prediction[5, 5, 5:7] = True
    files = [write_volume(tmp_path / f"{n}.nii", mask, turned) for n, mask in enumerate((NOTHING, prediction))]
    assert evaluate(*files)["0"].tested_lesions == 1


def test_spacing_is_the_affines_where_the_header_contradicts_it(tmp_path, write_volume):
    files = [write_volume(tmp_path / f"{k}.nii", PATIENTS["p1"][k], AFFINE, qform=0) for k in range(2)]
    for file in files:
        data = bytearray(file.read_bytes())
        data[80:92] = np.ones(3, "<f4").tobytes()  # pixdim
        file.write_bytes(data)
    assert evaluate(*files)["0"] == lesion_scores(*PATIENTS["p1"][:2], SPACING)


def test_unmatched_files_are_all_listed(cohort):
    truth, prediction, _ = cohort
    (truth / "p2.nii.gz").unlink()
    (prediction / "p3.nii.gz").unlink()
    (prediction / "p4.nii.gz").rename(prediction / "p4.nii")
    with pytest.raises(InputError) as error:
        evaluate(truth, prediction)
    names = "prediction/p2.nii.gz, prediction/p4.nii, truth/p3.nii.gz, truth/p4.nii.gz"
    assert str(error.value).split("/", 1)[1] == (
        f"prediction: no mask of the same name for {names}; name a patient's two masks alike"
    )


def test_capitals_are_an_ending_too(cohort):
    for folder in cohort[:2]:
        (folder / "p1.nii.gz").rename(folder / "P1.NII.GZ")
    assert set(evaluate(*cohort[:2])) == {"P1", *PATIENTS} - {"p1"}


def test_one_patient_in_two_formats_is_refused(cohort):
    for folder in cohort[:2]:
        shutil.copy(folder / "p1.nii.gz", folder / "p1.nii")
    with pytest.raises(InputError, match="a patient twice"):
        evaluate(*cohort[:2])


def test_a_folder_and_a_file_do_not_go_together(cohort):
    truth, prediction, _ = cohort
    with pytest.raises(InputError, match=r"truth/p1.nii.gz: is not a folder as .*/prediction is"):
        evaluate(truth / "p1.nii.gz", prediction)
    with pytest.raises(InputError, match=r"nowhere: is not a folder as .*/truth is"):
        evaluate(truth, truth / "nowhere")


def test_empty_folders_are_refused(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    with pytest.raises(InputError, match=r"a: holds no .nii or .nii.gz file"):
        evaluate(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize(
    ("data", "affine", "said"),
    [
        (np.zeros((24, 20, 11)), AFFINE, r"shape \(24, 20, 11\), but truth/p1.nii.gz has \(24, 20, 10\); resample"),
        (PATIENTS["p1"][1], np.diag([-0.9, 0.9, 3, 1]), "mm off that of truth/p1.nii.gz; resample"),
        (np.linspace(0, 1, 4800, dtype=np.float32).reshape(24, 20, 10), AFFINE, "not a binary mask .* threshold it"),
        (-PATIENTS["p1"][1].astype(np.int16), AFFINE, "not a binary mask"),
    ],
)
def test_masks_on_another_grid_or_not_binary_are_refused(cohort, write_volume, data, affine, said):
    write_volume(cohort[1] / "p1.nii.gz", data, affine)
    with pytest.raises(InputError, match=r"prediction/p1.nii.gz: .*" + said):
        evaluate(*cohort[:2])


def test_a_mask_without_background_counts_as_empty_with_a_word(cohort, write_volume):
    write_volume(cohort[1] / "p4.nii.gz", ~NOTHING, AFFINE)
    with pytest.warns(InputWarning, match=r"prediction/p4.nii.gz: no voxel is 0"):
        scores = evaluate(*cohort[:2])
    assert scores["p4"] == LesionScores(tested_lesions=0, tested_volume_mm3=0)


def test_means_never_mix_patients_with_and_without_new_lesions(cohort):
    scores = evaluate(*cohort[:2])
    for name in WITH_NEW:
        assert set(measured(scores, name)) == {"p1", "p2", "p3"}
    volume_mm3 = PATIENTS["p4"][1].sum() * 0.9 * 0.9 * 3
    assert measured(scores, WITHOUT_NEW[0]) == {"p4": 1, "p5": 0}
    assert average(scores, WITHOUT_NEW[1]).mean == pytest.approx(volume_mm3 / 2)
    assert average(scores, "PPV").undefined == 1  # nothing is predicted in p3
    assert average(scores, "Dice").undefined == 0


def test_mean_and_sem_have_known_values():
    scores = scores_of(a=(0.2, 0.4), b=(0.4, 0.4), c=(0.6, 1.0))
    dice = average(scores, "Dice")
    assert dice.mean == pytest.approx(0.4)
    assert dice.sem == pytest.approx(0.2 / math.sqrt(3))
    assert average(scores, "Avg. Score").mean == pytest.approx((0.3 + 0.4 + 0.8) / 3)


def test_few_or_undefined_patients_give_nan_and_are_counted():
    nan = math.nan
    one = {"a": LesionScores(lesion_sensitivity=0.5), "b": LesionScores(lesion_sensitivity=nan), "c": LesionScores()}
    np.testing.assert_equal(astuple(average(one, "SensL")), (0.5, nan, 1, 1))
    np.testing.assert_equal(astuple(average({}, "SensL")), (nan, nan, 0, 0))
    found = compare(one, one, "SensL")
    assert (found.difference, found.p, found.patients, found.differing) == (0, 1, 1, 0)


def test_equal_methods_do_not_differ():
    scores = scores_of(a=(0.2, 0.4), b=(0.4, 0.4))
    assert compare(scores, scores, "Dice").p == 1
    assert math.isnan(compare({}, scores, "Dice").difference)


@pytest.mark.parametrize("n", range(1, 9))
def test_p_of_few_patients_cannot_be_below_its_least(n):
    better = scores_of(**{f"p{k}": (0.5 + 0.01 * (k + 1), 1) for k in range(n)}, same=(0.5, 1), alone=(0.9, 1))
    worse = scores_of(**{f"p{k}": (0.5, 1) for k in range(n)}, same=(0.5, 1))
    found = compare(better, worse, "Dice")
    assert (found.patients, found.differing) == (n + 1, n)
    assert found.p == pytest.approx(2 / 2**n)
    assert found.least_p == pytest.approx(2 / 2**n)
    assert compare(worse, better, "Dice").p == pytest.approx(found.p)
    assert found.difference == pytest.approx(0.01 * n * (n + 1) / 2 / (n + 1))


def test_rounding_errors_do_not_break_ties():
    one = scores_of(a=(0.3, 1), b=(0.2, 1), c=(0.9, 1), d=(0.1, 1))
    other = scores_of(a=(0.2, 1), b=(0.1, 1), c=(0.8, 1), d=(0.2, 1))
    assert 0.3 - 0.2 != 0.2 - 0.1
    assert compare(one, other, "Dice").p == pytest.approx(wilcoxon([1, 1, 1, -1]).pvalue)


def test_table_is_empty_where_not_computed_and_nan_where_undefined(tmp_path, cohort):
    scores = evaluate(*cohort[:2])
    write_scores(tmp_path / "scores.csv", {"prediction": scores})
    with open(tmp_path / "scores.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["patient", *KEYS]
    assert [row["patient"] for row in rows] == list(PATIENTS)
    for row in rows:
        for key, value in scores[row["patient"]].as_dict().items():
            assert row[key] == ("" if value is None else str(value))  # every digit
    assert rows[2]["PPV"] == "nan"
    assert rows[3]["Dice"] == ""


def test_table_that_cannot_be_written_leaves_nothing(tmp_path):
    (tmp_path / "scores.csv").mkdir()
    with pytest.raises(OutputError):
        write_scores(tmp_path / "scores.csv", {"prediction": {}})
    assert [path.name for path in tmp_path.iterdir()] == ["scores.csv"]


def test_verb_prints_both_groups_apart(cohort, tmp_path, capsys):
    truth, prediction, _ = cohort
    out = tmp_path / "scores.csv"
    assert main(["evaluate", "--truth", str(truth), "--prediction", str(prediction), "-o", str(out)]) == 0
    said, errors = capsys.readouterr()
    having, lacking = said.split("patients without new lesions: 2\n")
    scores = evaluate(truth, prediction)
    for names, part in ((WITH_NEW, having), (WITHOUT_NEW, lacking)):
        for name in names:
            found = average(scores, name)
            numbers = [f"{found.mean:.4f}", f"{found.sem:.4f}", str(found.patients), str(found.undefined)]
            assert any(line.split() == [*name.split(), *numbers] for line in part.splitlines()), name
    assert "patients with new lesions: 3" in having
    assert f"p4: 1 lesions, {scores['p4'].tested_volume_mm3:.1f} mm3" in lacking
    assert "Wilcoxon" not in said
    assert errors == ""
    assert out.read_text().startswith("patient,Jaccard,")


def test_verb_compares_two_methods(cohort, tmp_path, capsys):
    truth, prediction, other = map(str, cohort)
    out = tmp_path / "scores.csv"
    assert main(["evaluate", "--truth", truth, "--prediction", prediction, "--against", other, "-o", str(out)]) == 0
    table = capsys.readouterr().out.split("Wilcoxon")[1]
    found = compare(evaluate(truth, prediction), evaluate(truth, other), "Dice")
    assert found.differing == 3
    line = next(line.split() for line in table.splitlines() if line.split()[:1] == ["Dice"])
    assert line == ["Dice", f"{found.difference:.4f}", f"{found.p:.2g}", "3", "3", "0.25"]
    with open(out, newline="") as file:
        rows = [(row["patient"], row["method"]) for row in csv.DictReader(file)]
    assert rows == [(patient, method) for method in ("prediction", "against") for patient in PATIENTS]


@pytest.mark.parametrize(
    ("truth", "prediction", "out", "code", "said"),
    [
        ("truth", "nowhere", "s.csv", 1, "nowhere: is not a folder"),
        ("truth/p1.nii.gz", "truth/p9.nii.gz", "s.csv", 1, "truth/p9.nii.gz: does not exist; check the path"),
        ("truth", "prediction", "no/s.csv", 3, "no/s.csv: its folder does not exist"),
        ("truth", "prediction", "truth", 2, "-o truth: scores are named *.csv"),
        ("truth", "prediction", "prediction/p1.nii.gz", 2, "-o prediction/p1.nii.gz: scores are named *.csv"),
    ],
)
def test_errors_of_the_verb_are_one_line(cohort, tmp_path, monkeypatch, capsys, truth, prediction, out, code, said):
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", "--truth", truth, "--prediction", prediction, "-o", out]) == code
    error = capsys.readouterr().err
    assert said in error
    assert len(error.splitlines()) == 1
    assert not list(tmp_path.glob("*.csv*"))
