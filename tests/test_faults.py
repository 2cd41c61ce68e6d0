"""What runs survive: each fault is injected into a real run, and the resumed one has the bytes of one left alone."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
from running import Here, bytes_of, group_is_gone, kill_group, made, put, started, wait_for, workers_of

from synthlong import SynthesisConfig
from synthlong.dataset import plan, run
from synthlong.dataset.run import generate
from synthlong.errors import ConfigError, OutputError
from synthlong.lock import writer_lock

CONFIG = SynthesisConfig(box=32, new_mean=4.0)
OPTIONS = {"pairs": 12, "seed": 5, "shard_size": 1, "config": CONFIG, "workers": 1}
TOML = "box = 32\nnew_mean = 4.0\n"

pytestmark = [
    pytest.mark.filterwarnings("ignore::synthlong.errors.InputWarning"),
    pytest.mark.xdist_group("faults"),
]


@pytest.fixture(scope="module")
def whole(manifest):
    return made(manifest, "whole", **OPTIONS)


@pytest.fixture
def out(manifest, request):
    """Where a test's run goes."""
    folder = manifest.parent / f"out-{abs(hash(request.node.nodeid))}"
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def here(monkeypatch):
    monkeypatch.setattr(run, "LocalPool", Here)


def arguments(manifest, out, workers=1):
    config = manifest.parent / "config.toml"
    config.write_text(TOML)
    numbers = ["--pairs", "12", "--seed", "5", "--shard-size", "1", "--workers", workers]
    return ["generate", manifest, "-o", out, "--config", config, *numbers]


def shards_of(out):
    return sorted((out / "shards").glob("*.json"))


# Killed, stopped


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_leaves_a_folder_that_goes_on(manifest, whole, out, times):
    """Once or twice, to the whole group as a terminal sends it."""
    with started(*arguments(manifest, out)) as process:
        wait_for(lambda: shards_of(out), process)
        for _ in range(times):
            os.killpg(process.pid, signal.SIGINT)
            time.sleep(0.1)  # or the second would be the first
        assert process.wait(timeout=20) in (130, -signal.SIGINT)  # the shell's 130 both
        assert "Traceback" not in process.stderr.read()
        assert group_is_gone(process.pid, within_s=5)
    assert not list(out.rglob("*.tmp-*"))
    assert 0 < len(shards_of(out)) < 12
    outcome = generate(manifest, out, **OPTIONS)
    assert 0 < outcome.made < 12
    assert bytes_of(out) == whole


def test_killed_run_goes_on(manifest, whole, out):
    """SIGKILL to all of it, in the middle; the next call finds no lock, and what was published is whole.

    File times and time zones decide nothing: half was made long ago in another zone, half by files from the future.
    """
    zone = os.environ | {"TZ": "Pacific/Kiritimati", "SOURCE_DATE_EPOCH": "1"}
    with started(*arguments(manifest, out), env=zone) as process:
        wait_for(lambda: len(shards_of(out)) >= 3, process)
        kill_group(process.pid)
        process.wait()
    (out / "shards" / "00003.h5.tmp-1-cafe").write_bytes(b"what a killed writer leaves")
    published = bytes_of(out / "shards")
    for name, data in published.items():
        assert ".tmp-" in name or data == whole[f"shards/{name}"]
    for k, file in enumerate(out.rglob("*")):
        os.utime(file, (0, 0) if k % 2 else (4e9, 4e9))
    assert generate(manifest, out, **OPTIONS).made <= 9
    assert bytes_of(out) == whole


def test_orphaned_worker_ends(manifest, out):
    """Only the parent is killed: its worker finishes the pair, sees that it is alone, and ends."""
    with started(*arguments(manifest, out)) as process:
        wait_for(lambda: len(shards_of(out)) >= 1, process)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert group_is_gone(process.pid, within_s=30)


def test_killed_workers_are_replaced_and_a_second_writer_is_refused(manifest, whole, out):
    """One dies before its first task, one in the middle; the run ends whole."""
    with started(*arguments(manifest, out, workers=2)) as process:
        wait_for(lambda: workers_of(process), process)
        os.kill(workers_of(process)[0], signal.SIGKILL)
        wait_for(lambda: len(shards_of(out)) >= 1, process)
        with pytest.raises(OutputError, match=f"locked by process {process.pid} on "):
            generate(manifest, out, **OPTIONS)
        os.kill(workers_of(process)[0], signal.SIGKILL)
        process.wait(timeout=240)
        assert process.returncode == 0, process.stderr.read()
    assert bytes_of(out) == whole


def test_shard_that_kills_its_worker_is_reported_and_the_rest_is_made(manifest, whole, out, tmp_path):
    """A limit on memory that only the large shard exceeds would depend on the machine; so one worker kills itself."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        "def look(frame, event, argument):\n"
        "    if event == 'call' and frame.f_code.co_name == 'make_shard' and frame.f_locals['task'].number == 1:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "sys.setprofile(look)\n"
    )
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    with started(*arguments(manifest, out), env=os.environ | {"PYTHONPATH": path}) as process:
        said, errors = process.communicate(timeout=240)
        assert process.returncode == 1, errors
    assert f"{out.name}/shards/00001.h5: its worker died each time" in errors
    assert "not finished, 1 of 12 shards are missing" in said
    assert not (out / "index.json").exists()
    assert [p.stem for p in shards_of(out)] == [f"{n:05d}" for n in range(12) if n != 1]
    assert generate(manifest, out, **OPTIONS).made == 1
    assert bytes_of(out) == whole


# The disk


def test_disk_that_is_full_before_the_start(manifest, out, monkeypatch):
    usage = shutil.disk_usage(manifest.parent)
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda _: usage._replace(free=5_000_000))
    with pytest.raises(OutputError, match=r"the run needs about \d+ MB, 5 MB are free"):
        generate(manifest, out, **OPTIONS)
    assert not out.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_disk_that_fills_up(manifest, whole, out, monkeypatch):
    """A tmpfs: full while cases are prepared, full while shards are written, then large enough."""
    out.mkdir()

    def mount(size):
        return subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", out], capture_output=True, check=False)

    monkeypatch.setattr(run, "check_space", lambda *_, **__: None)  # or it would refuse at once
    if mount("size=1m").returncode:
        pytest.skip("mounting is not allowed here")
    try:
        with pytest.raises(OutputError, match=r"no space left|No space left.*free some space"):
            generate(manifest, out, **OPTIONS)
        assert not list(out.rglob("*.unfinished"))
        subprocess.run(["mount", "-o", "remount,size=40m", out], check=True)
        filler = out / "work" / "filler"
        filler.parent.mkdir(exist_ok=True)
        stop_at = len(whole["shards/00000.h5"]) * 3

        def fill(stage, done, _total):
            if stage == "pairs" and not filler.exists():
                left = os.statvfs(out)
                filler.write_bytes(bytes(left.f_bavail * left.f_bsize - stop_at))

        with pytest.raises(OutputError, match=r"no space left \(No space left on device\): needs \d") as failure:
            generate(manifest, out, progress=fill, **OPTIONS)
        assert failure.value.exit_code == 3
        assert not list(out.rglob("*.tmp-*"))
        for file in shards_of(out):
            assert file.read_bytes() == whole[f"shards/{file.name}"]
        filler.unlink()
        generate(manifest, out, **OPTIONS)
        assert bytes_of(out) == whole
    finally:
        subprocess.run(["umount", out], check=True)


def test_file_size_limit(manifest, out):
    """`ulimit -f`: the kernel refuses the write (EFBIG); nothing half-written is left, exit code 3."""
    limited = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))}
    command = [sys.executable, "-m", "synthlong_cli.main", *map(str, arguments(manifest, out))]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240, **limited)
    assert done.returncode == 3
    assert "a limit on file sizes" in done.stderr
    assert len(done.stderr.splitlines()) <= 4
    assert not list(out.rglob("*.unfinished"))
    assert not list(out.rglob("*.tmp-*"))


@pytest.mark.parametrize("place", ["/proc/synthlong", "{file}/below"])
def test_places_that_cannot_be_written(manifest, tmp_path, place):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be made") as failure:
        generate(manifest, place.format(file=tmp_path / "file"), **OPTIONS)
    assert failure.value.exit_code == 3


# Others


def test_lock_ends_with_the_run(manifest, whole, out):
    out.mkdir()
    with writer_lock(out), pytest.raises(OutputError, match="locked by"):
        generate(manifest, out, **OPTIONS)
    assert not list(out.iterdir())


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"machine": {"cpu": "another", "device": "cpu"}}, r"machine\.cpu: .* -> another"),
        ({"machine": {"cpu": "AVX512", "device": "cpu", "arithmetic": "f00"}}, r"machine\.arithmetic: .* -> f00"),
        ({"versions": {"synthlong": "9.9", "torch": "1"}}, r"versions\.synthlong: .* -> 9\.9"),
    ],
)
def test_resume_on_another_machine_or_version_is_refused(manifest, whole, out, monkeypatch, change, named):
    put(out, whole)
    here = plan.environment("cpu")
    monkeypatch.setattr(plan, "environment", lambda _: here | change)
    with pytest.raises(ConfigError, match=rf"{named}.*; go on with the versions and the processor that it was begun"):
        generate(manifest, out, **OPTIONS)
    with pytest.raises(ConfigError, match=r"seed: 5 -> 6.*\); use another folder"):
        generate(manifest, out, **OPTIONS | {"seed": OPTIONS["seed"] + 1})
    assert bytes_of(out) == whole


@pytest.mark.usefixtures("here")
def test_complete_run_mends_itself(manifest, whole, out):
    """A shard lost after completion, or an index damaged: the same command makes what is missing, and only that."""
    put(out, whole)
    (out / "shards" / "00004.h5").unlink()
    (out / "index.json").write_bytes(whole["index.json"][:-40])
    assert generate(manifest, out, **OPTIONS).made == 1
    assert bytes_of(out) == whole


def test_nothing_tells_of_user_host_or_home(whole, manifest):
    secrets = {os.uname().nodename, os.path.expanduser("~"), str(manifest.parent.parent)}
    for name, data in whole.items():
        for secret in secrets:
            assert len(secret) < 4 or secret.encode() not in data, (name, secret)


# What is not of this run


@pytest.fixture(scope="module")
def other(manifest):
    """A run of the same shape with another seed."""
    return made(manifest, "other", **(OPTIONS | {"seed": 6, "pairs": 4}))


def foreign_shard(whole, other):
    return {name: other[name] for name in ("shards/00001.h5", "shards/00001.json")}


def swapped_shards(whole, other):
    """Two of one patient."""
    kinds = ("h5", "json")
    return {f"shards/0000{n}.{k}": whole[f"shards/0000{2 - n}.{k}"] for n in (0, 2) for k in kinds}


def other_patient(whole, other):
    sidecar = whole["shards/00001.json"]
    return {"shards/00001.json": sidecar.replace(b'"subject":"cs19"', b'"subject":"cs07"')}


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("fault", [foreign_shard, swapped_shards, other_patient])
def test_resume_takes_no_shard_that_is_not_its_own(manifest, whole, other, out, fault):
    put(out, whole | fault(whole, other))
    (out / "index.json").unlink()
    assert generate(manifest, out, **OPTIONS).made == (2 if fault is swapped_shards else 1)
    assert bytes_of(out) == whole


@pytest.mark.usefixtures("here")
def test_index_of_another_run_does_not_make_this_one_complete(manifest, other, out):
    put(out, other)
    plan = json.loads(other["run.json"])
    put(out, {"index.json": other["index.json"].replace(plan["run_id"].encode(), b"0" * 16)})
    assert generate(manifest, out, **(OPTIONS | {"seed": 6, "pairs": 4})).made == 0  # the shards are its own
    assert bytes_of(out) == other


@pytest.mark.usefixtures("here")
def test_what_a_writer_killed_at_birth_leaves_is_no_foreign_file(manifest, other, out):
    put(out, {"run.json.tmp-7-cafe": b"{", ".probe-cafe": b"token", "work/case-x-7-cafe.unfinished/a.npy": b""})
    generate(manifest, out, **(OPTIONS | {"seed": 6, "pairs": 4}))
    assert bytes_of(out) == other


def test_another_run_is_refused_before_its_cases_are_prepared(manifest, whole, out, monkeypatch):
    put(out, whole)
    (out / "index.json").unlink()
    monkeypatch.setattr(run, "prepare_cases", None)
    with pytest.raises(ConfigError, match=r"config\.new_mean: 4\.0 -> 3\.0"):
        generate(manifest, out, **(OPTIONS | {"config": SynthesisConfig(box=32)}))


def test_case_added_to_a_complete_run_is_refused(manifest, whole, out, tmp_path):
    put(out, whole)
    for file in manifest.parent.glob("cs*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    row = "third,cs07_FLAIR.nii.gz,cs07_mask.nii.gz\n"
    (tmp_path / "cases.csv").write_text(manifest.read_text() + row)
    with pytest.raises(ConfigError, match=r"cases\.third\.flair: none -> "):
        generate(tmp_path / "cases.csv", out, **OPTIONS)


@pytest.mark.usefixtures("here")
def test_scan_that_cannot_be_read_is_left_out(manifest, out, tmp_path):
    for file in manifest.parent.glob("cs*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "cases.csv").write_bytes(manifest.read_bytes())
    (tmp_path / "cs07_mask.nii.gz").unlink()
    (tmp_path / "cs07_mask.nii.gz").symlink_to("annex/of/another/machine")
    outcome = generate(tmp_path / "cases.csv", out, **(OPTIONS | {"pairs": 2}))
    assert "cs07_mask.nii.gz: cannot be read (No such file" in outcome.failures["cs07"]
