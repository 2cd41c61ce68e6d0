"""What lies there of a subject: it stays, is made again, or is refused; the tools are one that copies."""

import csv
import errno
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from running import work_here

from synthlong.errors import InputWarning, OutputError
from synthlong.preparation import PreparationConfig, Scan, prepare, run
from synthlong.preparation.derivatives import file_name
from synthlong.preparation.visit import Record

QUICK = PreparationConfig(recipe="schmidt", spacing_mm=2.0)


@pytest.fixture
def stub(monkeypatch, tmp_path):
    """`stub(*scans)` prepares them with a tool that copies; those in `stub.failing` fail."""

    def copied(scans, folder, config, **_):
        for scan in scans:
            if scan.id in failing:
                raise RuntimeError("out of memory")
            (folder / file_name(scan.id, "FLAIR.nii.gz", space=config.space)).write_bytes(scan.flair.read_bytes())
            if scan.new_lesions:
                (folder / file_name(scan.id, "desc-newlesions_mask.nii.gz", space=config.space)).write_bytes(b"mask")
        return [Record({}, {}, []) for _ in scans]

    work_here(monkeypatch, run)
    monkeypatch.setattr(run, "prepare_subject", copied)
    for name, content in (("f", b"scan"), ("g", b"other scan")):
        (tmp_path / f"{name}.nii").write_bytes(content)

    def stub(*scans, config=QUICK, **options):
        return prepare(scans, tmp_path / "out", config=config, **options)

    failing = stub.failing = set()
    return stub


def lines_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_only_visits_that_were_prepared_together_are_a_pair(stub, tmp_path):
    first, last = Scan("a", tmp_path / "f.nii", "1"), Scan("a", tmp_path / "g.nii", "2", new_lesions=tmp_path / "f.nii")
    stub(first, last)
    assert len(lines_of(tmp_path / "out" / "pairs.csv")) == 1
    with (
        pytest.warns(InputWarning, match="other visits"),
        pytest.warns(InputWarning, match="no visits of their subjects any more, and in no table: a_ses-2; delete"),
    ):
        stub(first)  # by itself, registered anew
    assert [line["session"] for line in lines_of(tmp_path / "out" / "prepared.csv")] == ["1"]
    assert not (tmp_path / "out" / "pairs.csv").exists()
    with pytest.warns(InputWarning, match="other visits"):
        stub(first, last)
    assert len(lines_of(tmp_path / "out" / "pairs.csv")) == 1


def test_a_failure_is_forgotten_once_what_lies_there_is_what_is_asked_for(stub, tmp_path):
    scan = Scan("a", tmp_path / "f.nii")
    stub(scan)
    stub.failing.add("a")
    finer = PreparationConfig(recipe="schmidt", spacing_mm=0.3)
    with pytest.warns(InputWarning, match="spacing_mm"):
        assert "out of memory" in stub(scan, config=finer).failures["a"]
    assert lines_of(tmp_path / "out" / "prepared.csv")[0]["status"] == "failed"
    again = stub(scan)
    assert (again.prepared, again.there, again.flagged, again.failures) == ([], ["a"], {}, {})
    assert lines_of(tmp_path / "out" / "prepared.csv")[0]["status"] == "ok"


def test_the_table_keeps_failures_that_a_call_did_not_come_to(stub, tmp_path):
    one, other = Scan("a", tmp_path / "f.nii"), Scan("b", tmp_path / "g.nii")
    stub.failing.add("b")
    stub(one, other)
    stub(one)
    lines = lines_of(tmp_path / "out" / "prepared.csv")
    assert [(line["subject"], line["status"]) for line in lines] == [("a", "ok"), ("b", "failed")]
    assert "out of memory" in lines[1]["problem"]

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):  # after `a`
        stub(replace(one, session="2"), other, progress=stop)
    assert lines_of(tmp_path / "out" / "prepared.csv")[-1]["status"] == "failed"
    stub.failing.clear()
    with pytest.warns(InputWarning, match="in no table: a_ses-2"):
        stub(one, other)
    assert lines_of(tmp_path / "out" / "prepared.csv")[-1]["status"] == "ok"


def test_what_was_made_apart_comes_together(stub, tmp_path):
    """As on a cluster: a folder for each task, copied into one; the last call finds all there."""
    one = [Scan("a", tmp_path / "f.nii", "1"), Scan("a", tmp_path / "g.nii", "2", new_lesions=tmp_path / "f.nii")]
    other = Scan("b", tmp_path / "h.nii")
    other.flair.write_bytes(b"a third")
    for n, scans in enumerate((one, [other])):
        prepare(scans, tmp_path / f"task{n}", config=QUICK)
        shutil.copytree(tmp_path / f"task{n}", tmp_path / "out", dirs_exist_ok=True)
    outcome = stub(*one, other)
    assert (outcome.prepared, outcome.there) == ([], ["a_ses-1", "a_ses-2", "b"])
    lines = [(line["subject"], line["flair"]) for line in lines_of(tmp_path / "out" / "prepared.csv")]
    assert lines == [("a", "f.nii"), ("a", "g.nii"), ("b", "h.nii")]
    assert len(lines_of(tmp_path / "out" / "pairs.csv")) == 1


def test_a_full_disk_is_named(stub, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "tmp" / "x.mat"))

    monkeypatch.setattr(run, "prepare_subject", full)
    with pytest.raises(OutputError, match=r"tmp/x.mat: cannot be written \(No space left on device\)"):
        stub(Scan("a", tmp_path / "f.nii"))


def test_what_a_person_changed_stays(stub, tmp_path):
    scan, finer = Scan("a", tmp_path / "f.nii"), PreparationConfig(recipe="schmidt", spacing_mm=0.3)
    flair, own = (tmp_path / "out" / f"sub-a_space-halfway_{what}.nii.gz" for what in ("FLAIR", "desc-own_mask"))
    stub(scan)
    own.write_bytes(b"drawn")
    flair.write_bytes(b"corrected")
    with pytest.warns(InputWarning, match=f"out: changed since prepared, and kept: {flair.name}; delete what"):
        outcome = stub(scan)
    assert (outcome.prepared, outcome.there, outcome.failures) == ([], ["a"], {})
    for options in ({}, {"dry_run": True}):
        said = stub(scan, config=finer, **options).failures["a"]
        assert f"out/{flair.name}: is to be made again (spacing_mm: 2.0 -> 0.3), but was changed by hand; move" in said
    assert flair.read_bytes() == b"corrected"
    flair.unlink()
    assert stub(scan).prepared == ["a"]
    assert (flair.read_bytes(), own.read_bytes()) == (b"scan", b"drawn")


def test_no_file_of_somebody_else_is_overwritten(stub, tmp_path):
    new = tmp_path / "out" / "sub-a_ses-2_space-halfway_desc-newlesions_mask.nii.gz"
    one, other = Scan("a", tmp_path / "f.nii", "1"), Scan("a", tmp_path / "g.nii", "2")
    stub(one, other)
    new.write_bytes(b"drawn")
    with pytest.warns(InputWarning, match="another new_lesions"):
        said = stub(one, replace(other, new_lesions=tmp_path / "f.nii")).failures["a"]
    assert said == f"out/{new.name}: no preparation made it, but one is to write there; move it away"
    assert new.read_bytes() == b"drawn"
    assert (tmp_path / "out" / "sub-a_ses-2_space-halfway_FLAIR.nii.gz").exists()


def test_what_a_kill_leaves_half_moved_is_made_again(stub, tmp_path, monkeypatch):
    scan, moved, move = Scan("a", tmp_path / "f.nii"), [], Path.replace
    stub(scan)
    (tmp_path / "f.nii").write_bytes(b"another")

    def killed(path, target):
        if path.parent.name.startswith(".unfinished") and path.suffix == ".gz":
            raise KeyboardInterrupt
        moved.append(path.name)
        return move(path, target)

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt), pytest.warns(InputWarning, match="another flair"):
        stub(scan)
    monkeypatch.setattr(Path, "replace", move)
    assert "sub-a_space-halfway_FLAIR.json" in moved
    assert stub(scan).prepared == ["a"]


def test_a_record_that_says_nothing_is_written_anew(stub, tmp_path):
    scan, path = Scan("a", tmp_path / "f.nii"), tmp_path / "out" / "sub-a_space-halfway_FLAIR.json"
    stub(scan)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"stamp": {"versions": None}}))
    assert stub(scan).prepared == ["a"]
    assert stub(scan).there == ["a"]


def test_results_of_other_versions_stay(stub, tmp_path):
    stub(Scan("a", tmp_path / "f.nii"), Scan("b", tmp_path / "g.nii"))
    for name in "ab":
        path = tmp_path / "out" / f"sub-{name}_space-halfway_FLAIR.json"
        record = json.loads(path.read_text())
        record["stamp"]["versions"]["numpy"] = "1.0"
        path.write_text(json.dumps(record))
    with pytest.warns(InputWarning, match=r"2 scans were made by other versions \(numpy: 1.0 -> .*\) and are kept"):
        assert stub(Scan("a", tmp_path / "f.nii"), Scan("b", tmp_path / "g.nii")).there == ["a", "b"]


def test_one_scan_is_not_two_visits(stub, tmp_path):
    one, other = Scan("a", tmp_path / "f.nii", "1"), Scan("a", tmp_path / "f.nii", "2")
    several = Scan("c", tmp_path / "f.nii", problem="several FLAIRs")
    outcome = stub(one, other, Scan("b", tmp_path / "g.nii"), several)
    assert outcome.prepared == ["b"]
    assert outcome.failures.pop("c") == "several FLAIRs"
    said = f"{tmp_path.name}/f.nii: is the FLAIR of session '1', too; name that of session '2'"
    assert outcome.failures == {"a": said}
    with pytest.warns(InputWarning, match="a_ses-1, c: one scan under 2 ids"):
        stub(one, Scan("c", tmp_path / "f.nii"))


def test_an_id_may_look_like_a_file(stub, tmp_path):
    scan = Scan("scan1.nii.gz", tmp_path / "f.nii")
    assert stub(scan).prepared == ["scan1.nii.gz"]
    assert stub(scan).there == ["scan1.nii.gz"]
