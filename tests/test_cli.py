import json
import re
import shutil
import signal
import subprocess
import sys

import pytest
from running import group_is_gone, started, wait_for
from synthlong_cli.main import main
from synthlong_cli.options import each_with
from test_shards import write_run

from synthlong.atlas import ASSETS
from synthlong.dataset.shards import ShardDataset

CASES = ASSETS / "cases" / "cases.csv"
VERBS = ("demo", "check", "prepare", "generate", "verify", "report", "export", "replay", "augment", "atlas", "fit")
VERBS += ("train", "detect", "evaluate")


def synthlong(*arguments, **options):
    command = [sys.executable, "-m", "synthlong_cli.main", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=280, check=False, **options)


def test_help_needs_no_torch():
    code = "import sys; from synthlong_cli.main import main; main(['--help']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("False")
    assert all(verb in done.stdout for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb, capsys):
    assert main([verb, "--help"]) == 0
    assert "Usage:" in capsys.readouterr().out


@pytest.mark.parametrize("words", [[], ["train"]])
def test_no_word_shows_the_help(words, capsys):
    assert main(words) == 2
    said = capsys.readouterr().err
    assert said.lstrip().startswith("Usage: synthlong")
    assert "error" not in said


def test_a_missing_option_is_named_in_one_line(capsys):
    assert main(["generate", "cases.csv", "-o", "out", "--pairs", "3"]) == 2
    assert capsys.readouterr().err == "error: Missing option '--seed'; see `synthlong generate --help`\n"


def test_sigterm_is_no_failure_whatever_a_library_makes_of_it(monkeypatch, capsys):
    def muddled(*_, **__):
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            raise RuntimeError("release unlocked lock")

    monkeypatch.setattr("synthlong_cli.main.app", muddled)
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert main(["verify", "pairs"]) == 143
    finally:
        signal.signal(signal.SIGTERM, before)
    assert capsys.readouterr().err == "terminated\n"


def test_several_files_may_follow_one_option():
    words = ["detect", "b.nii", "f.nii", "--weights", "a.safetensors", "b.safetensors", "-o", "m.nii"]
    each = ["--weights", "a.safetensors", "--weights", "b.safetensors"]
    assert each_with(words, "--weights", ".safetensors") == ["detect", "b.nii", "f.nii", *each, "-o", "m.nii"]
    usual = ["detect", "b", "f", *each, "-o", "m"]
    assert each_with(usual, "--weights", ".safetensors") == usual
    alone = ["fit", "inpainter", "c", "-o", "w.safetensors"]
    assert each_with(alone, "--weights", ".safetensors") == alone


def test_verbs_with_a_bar_need_no_stderr(tmp_path, monkeypatch, capsys):
    run = write_run(tmp_path / "run")
    monkeypatch.setattr(sys, "stderr", None)
    assert main(["verify", str(run)]) == 0
    assert "run: no problem" in capsys.readouterr().out


def test_a_report_is_not_written_over_a_manifest(tmp_path, capsys):
    (tmp_path / "cases.csv").write_text("subject")
    assert main(["report", str(tmp_path), "-o", str(tmp_path / "cases.csv")]) == 2
    assert "a report is named *.html" in capsys.readouterr().err
    assert (tmp_path / "cases.csv").read_text() == "subject"


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["generate"], 2, "Missing"),
        (["juggle"], 2, "No such command"),
        (["check", "none.csv"], 1, "none.csv: no such file"),
        (["generate", CASES, "-o", "x", "--pairs", "0", "--seed", "1"], 2, "pairs = 0"),
        (["generate", CASES, "-o", "x", "--pairs", "two", "--seed", "1"], 2, "--pairs"),
        (["generate", CASES, "-o", "x", "--pairs", "1", "--seed", "1", "--config", "no.toml"], 2, "no.toml"),
        (["generate", CASES, "-o", "x", "--pairs", "1", "--seed", "1", "--device", "abacus"], 2, "abacus"),
        (["generate", CASES, "-o", "/proc/x", "--pairs", "1", "--seed", "1"], 3, "proc/x"),
        (["export", "nowhere", "-o", "x"], 1, "nowhere"),
        (["export", "nowhere", "-o", "x", "--pairs", "a"], 2, "--pairs a"),
        (["export", "nowhere", "-o", "x", "--pairs", "2-1"], 2, "--pairs 2-1"),
        (["replay", "nowhere", "1", "-o", "x"], 1, "nowhere"),
        (["report", "nowhere", "-o", "x.html"], 1, "nowhere"),
        (["atlas", "nowhere.nii.gz", "-o", "x.nii.gz"], 1, "nowhere.nii.gz"),
        (["fit", "inpainter", CASES, "-o", "w.pt"], 2, "w.pt"),
        (["fit", "inpainter", CASES, "-o", "w.safetensors", "--sides", "big"], 2, "--sides big"),
    ],
)
def test_errors_are_one_line_with_their_exit_code(tmp_path, monkeypatch, capsys, arguments, code, said):
    monkeypatch.chdir(tmp_path)
    assert main([str(word) for word in arguments]) == code
    errors = capsys.readouterr().err
    assert said in errors
    assert "Traceback" not in errors
    assert len(errors.strip().splitlines()) <= 2
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("debug", [True, False])
def test_a_process_exits_with_the_code_and_debug_shows_the_traceback(tmp_path, debug):
    done = synthlong(*["--debug"] * debug, "check", "none.csv", cwd=tmp_path)
    assert done.returncode == 1
    assert ("Traceback" in done.stderr) == debug
    assert len(done.stderr.strip().splitlines()) == 1 or debug


@pytest.mark.filterwarnings("ignore::synthlong.errors.InputWarning")
def test_check_names_the_bad_case_and_goes_on(tmp_path, capsys):
    for file in (ASSETS / "cases").iterdir():
        shutil.copy(file, tmp_path)
    flair = next(tmp_path.glob("sub-cs07*FLAIR*"))
    flair.write_bytes(flair.read_bytes()[:-2000])
    assert main(["check", str(tmp_path / "cases.csv")]) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith(" ")]
    assert lines[0].startswith("FAIL  cs07")
    assert flair.name in lines[0]
    assert lines[1].startswith("ok    cs19: 182 x 218 x 182 mm, 98 lesions")


@pytest.mark.filterwarnings("ignore::synthlong.errors.InputWarning")
def test_demo_is_the_whole_line_on_real_scans(tmp_path):
    """Scans to shards, pictures and NIfTI; then a pair again, bit for bit, and the pair on the whole grid."""
    assert main(["demo", "-o", str(tmp_path / "demo"), "--pairs", "3"]) == 0
    dataset = ShardDataset(tmp_path / "demo" / "pairs")
    assert len(dataset) == 3
    assert dataset[0]["baseline"].shape == (1, 64, 64, 64)
    page = (tmp_path / "demo" / "report.html").read_text()
    assert "data:image/png;base64" in page
    assert not re.search(r"(src|href)=\"(?!data:|#)", page)
    assert len(list((tmp_path / "demo" / "nifti").rglob("*.nii.gz"))) == 12

    assert main(["replay", str(tmp_path / "demo" / "pairs"), "0", "-o", str(tmp_path / "again"), "--whole"]) == 0
    recipe = next((tmp_path / "again").rglob("*recipe.json"))
    assert json.loads(recipe.read_text())["case"] == "cs07"


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_run_leaves_no_worker_and_no_temporary(manifest, tmp_path, sent, code):
    (tmp_path / "c.toml").write_text("box = 32\n")
    arguments = ["generate", manifest, "-o", tmp_path / "out", "--pairs", "500", "--seed", "1", "--shard-size", "4"]
    with started(*arguments, "--config", tmp_path / "c.toml", "--workers", "1") as process:
        wait_for(lambda: list((tmp_path / "out").glob("shards/*.json")), process)
        process.send_signal(sent)
        assert process.wait(timeout=60) == code
        said = process.stderr.read()
        assert group_is_gone(process.pid, within_s=5)
    assert "Traceback" not in said
    assert f"go on with: synthlong generate {manifest} -o {tmp_path / 'out'} --pairs 500" in said
    left = {p.name for p in (tmp_path / "out").iterdir()}
    assert left == {"run.json", "shards", "work"}
    assert not list((tmp_path / "out").rglob("*.tmp-*"))
