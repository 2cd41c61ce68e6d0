"""`verify` finds what is wrong, all of it, and touches nothing; `rebuild_index` writes what `generate` wrote."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py
import pytest
import typer
from synthlong_cli.verify import verify as verb
from test_reader import flips
from test_shards import flip_bit, unfinish, write_run
from typer.testing import CliRunner, Result

from synthlong.dataset.index import write_index
from synthlong.dataset.shards import ShardDataset
from synthlong.dataset.verify import rebuild_index, verify
from synthlong.errors import InputError
from synthlong.plain import canonical_json

Fault = Callable[[Path], None]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("verify") / "out")


@pytest.fixture
def out(whole: Path, tmp_path: Path) -> Path:
    """A run of one's own."""
    return Path(shutil.copytree(whole, tmp_path / "out"))


def snapshot(out: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


@pytest.mark.parametrize("quick", [True, False])
def test_a_sound_run_has_no_problem(out: Path, quick: bool) -> None:
    before, seen = snapshot(out), []
    report = verify(out, quick=quick, progress=lambda *step: seen.append(step))
    size = sum(path.stat().st_size for path in out.glob("shards/*.h5"))
    assert (report.shards, report.samples, report.bytes, report.problems) == (3, 12, size, [])
    assert seen == [("shards", 1, 3), ("shards", 2, 3), ("shards", 3, 3)]
    assert snapshot(out) == before


# Faults that names and sizes tell


def cut(share: float) -> Fault:
    def fault(out: Path) -> None:
        path = out / "shards/00001.h5"
        os.truncate(path, int(share * path.stat().st_size))

    return fault


def cut_last_byte(out: Path) -> None:
    os.truncate(out / "shards/00001.h5", (out / "shards/00001.h5").stat().st_size - 1)


def junk(out: Path) -> None:
    with (out / "shards/00001.h5").open("ab") as file:
        file.write(bytes(400))


def missing(out: Path) -> None:
    (out / "shards/00001.h5").unlink()


def half_copied(out: Path) -> None:
    """As rsync leaves it: by name, a temporary of its own, no index yet."""
    for name in ("shards/00001.h5", "shards/00001.json", "shards/00002.h5", "shards/00002.json"):
        (out / name).unlink()
    (out / "shards/.00001.h5.aB3xYz").write_bytes(b"half")


def extra(out: Path) -> None:
    for suffix in ("h5", "json"):
        shutil.copy(out / f"shards/00001.{suffix}", out / f"shards/00003.{suffix}")


def no_sidecar(out: Path) -> None:
    (out / "shards/00002.json").unlink()


def unfinished(out: Path) -> None:
    unfinish(out, 0, 2)


def no_plan(out: Path) -> None:
    (out / "run.json").unlink()


def only_shards(out: Path) -> None:
    (out / "run.json").unlink()
    (out / "index.json").unlink()


def index_of_another_run(out: Path) -> None:
    shutil.copy(write_run(out.parent / "other", seed=1) / "index.json", out / "index.json")


def index_of_fewer_shards(out: Path) -> None:
    sidecars = [json.loads((out / f"shards/0000{k}.json").read_text()) for k in range(2)]
    write_index(out, json.loads((out / "run.json").read_text())["run_id"], sidecars)


def damaged_index_and_a_shard_gone(out: Path) -> None:
    (out / "index.json").write_text("{}")
    for suffix in ("h5", "json"):
        (out / f"shards/00001.{suffix}").unlink()


def junk_and_no_index(out: Path) -> None:
    junk(out)
    (out / "index.json").unlink()


SIZE = r"has \d+ bytes, recorded are \d+"
QUICK = [
    *((cut(share), [("shards/00001.h5", SIZE)]) for share in (0, 0.001, 0.3, 0.9, 0.999)),
    (cut_last_byte, [("shards/00001.h5", SIZE)]),
    (junk, [("shards/00001.h5", SIZE)]),
    (missing, [("shards/00001.h5", "is missing")]),
    (half_copied, [(f"shards/0000{k}.{suffix}", "is missing") for k in (1, 2) for suffix in ("h5", "json")]),
    (extra, [(f"shards/00003.{suffix}", "is not of this run") for suffix in ("h5", "json")]),
    (no_sidecar, [("shards/00002.json", "is missing")]),
    (unfinished, [("index.json", "not finished: 2/3 shards, no index.json")]),
    (no_plan, [("run.json", "no run.json in it")]),
    (only_shards, [("run.json", "no run.json in it"), ("index.json", "not finished: 3 shards, no index.json")]),
    (index_of_another_run, [("index.json", "is not of the run in run.json")]),
    (index_of_fewer_shards, [("index.json", "is not of the run in run.json")]),
    (
        damaged_index_and_a_shard_gone,
        [
            ("index.json", "is not an index .*"),
            *((f"shards/00001.{suffix}", "is missing") for suffix in ("h5", "json")),
        ],
    ),
    (junk_and_no_index, [("index.json", "not finished: 3/3 shards, no index.json"), ("shards/00001.h5", SIZE)]),
]


def check_found(out: Path, expected: list[tuple[str, str]], *, quick: bool) -> None:
    before, problems = snapshot(out), verify(out, quick=quick).problems
    assert [problem.file for problem in problems] == [file for file, _ in expected]
    for problem, (_, text) in zip(problems, expected, strict=True):
        assert re.fullmatch(text, problem.problem)
        assert problem.way_out
    assert snapshot(out) == before


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize(("fault", "expected"), QUICK)
def test_names_and_sizes(out: Path, fault: Fault, expected: list[tuple[str, str]], quick: bool) -> None:
    fault(out)
    check_found(out, expected, quick=quick)


# Faults that only the bytes tell


def swapped(out: Path) -> None:
    for suffix in ("h5", "json"):
        a, b, c = (out / f"shards/{name}.{suffix}" for name in ("00000", "00001", "c"))
        a.rename(c)
        b.rename(a)
        c.rename(b)


def foreign(out: Path) -> None:
    """A whole shard of another run with its sidecar, and with an index that takes it for ours."""
    other = write_run(out.parent / "other", seed=1)
    for suffix in ("h5", "json"):
        shutil.copy(other / f"shards/00001.{suffix}", out / f"shards/00001.{suffix}")
    (out / "index.json").unlink()


def sidecar(change: Callable[[dict], None]) -> Fault:
    def fault(out: Path) -> None:
        path = out / "shards/00001.json"
        record = json.loads(path.read_text())
        change(record)
        path.write_text(canonical_json(record))

    return fault


def sample_hash(record: dict) -> None:
    record["samples"][2]["sha256"] = "0" * 64


def sample_sum(record: dict) -> None:
    record["samples"][2]["crc32c"]["evolution"] ^= 1


def subject(record: dict) -> None:
    record["samples"][2]["subject"] = "sub-9"


def number(record: dict) -> None:
    record["samples"][2]["index"] = 99


def more(record: dict) -> None:
    record["samples"].append(record["samples"][0])
    record["n"] += 1


def keys(record: dict) -> None:
    del record["sha256"]


def size(record: dict) -> None:
    record["bytes"] += 1


def enormous(record: dict) -> None:
    record["bytes"] = 2**63


def fewer_sums(record: dict) -> None:
    del record["samples"][2]["crc32c"]["evolution"]


def subject_and_no_plan(out: Path) -> None:
    sidecar(subject)(out)
    no_plan(out)


def one_voxel(out: Path) -> None:
    with h5py.File(out / "shards/00001.h5", locking=False) as file:
        offset = file["baseline"].id.get_chunk_info(3).byte_offset
    flip_bit(out / "shards/00001.h5", offset + 20, 1)


def attribute(out: Path) -> None:
    data = (out / "shards/00001.h5").read_bytes()
    flip_bit(out / "shards/00001.h5", data.index(b'"seed":') + 7, 0)


SUM = "its SHA-256 is not the one that was recorded"
FULL = [
    (swapped, [(f"shards/0000{k}.{name}", text) for k in (0, 1) for name, text in (("json", ".*"), ("h5", SIZE))]),
    (foreign, [("index.json", "not finished.*"), ("shards/00001.h5", "is of run .*, not .*")]),
    (sidecar(sample_hash), [("shards/00001.json", "sample 2: is not what the shard holds")]),
    (sidecar(sample_sum), [("shards/00001.json", "sample 2: is not what the shard holds")]),
    (sidecar(subject), [("shards/00001.json", "is of another shard or run")]),
    (sidecar(number), [("shards/00001.json", "is of another shard or run")]),
    (sidecar(more), [("shards/00001.json", "is of another shard or run")]),
    *(
        (sidecar(change), [("shards/00001.json", "is not the record of a shard")])
        for change in (keys, enormous, fewer_sums)
    ),
    (sidecar(size), [("shards/00001.json", "does not agree with index.json")]),
    (subject_and_no_plan, [("run.json", ".*"), ("shards/00001.json", "does not agree with index.json")]),
    (one_voxel, [("shards/00001.h5", rf"{SUM} \(samples 3\)")]),
    (attribute, [("shards/00001.h5", rf"{SUM} \(no sample's voxels\)")]),
]


@pytest.mark.parametrize(("fault", "expected"), FULL)
def test_bytes(out: Path, fault: Fault, expected: list[tuple[str, str]]) -> None:
    fault(out)
    check_found(out, expected, quick=False)


def check_flips(out: Path, number: int, *, seed: int = 0) -> None:
    """Flip bits of a shard one after the other: `verify` sees each."""
    path = out / "shards/00001.h5"
    for offset, bit in flips(path, number, seed=seed):
        flip_bit(path, offset, bit)
        assert [(p.file, p.problem[: len(SUM)]) for p in verify(out).problems] == [("shards/00001.h5", SUM)], offset
        flip_bit(path, offset, bit)
    assert not verify(out).problems


def test_every_flip_is_found(out: Path) -> None:
    check_flips(out, 12)


def test_a_file_renamed_meanwhile_hides_no_other(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scandir = os.scandir

    @contextmanager
    def raced(folder: Path) -> Iterator[Iterator[os.DirEntry[str]]]:
        """Lists a temporary first, which is gone when it is asked for its size."""
        temporary = Path(folder) / "00003.h5.tmp-7-ab"
        temporary.touch()
        with scandir(folder) as entries:
            listed = sorted(entries, key=lambda entry: ".tmp-" not in entry.name)
        temporary.unlink()
        yield iter(listed)

    monkeypatch.setattr(os, "scandir", raced)
    assert verify(out, quick=True).problems == []


def test_all_problems_are_listed(out: Path) -> None:
    missing(out)
    flip_bit(out / "shards/00000.h5", 5000, 0)
    (out / "shards/00002.json").write_text("{}")
    (out / "shards/00002.h5.tmp-1-ab").touch()
    report = verify(out)
    assert [problem.file for problem in report.problems] == [
        "shards/00000.h5",
        "shards/00001.h5",
        "shards/00002.json",
    ]
    assert (report.shards, report.leftovers) == (0, ["shards/00002.h5.tmp-1-ab"])


HOSTILE = ("", "[]", "7", '{"samples": 1}', "[" * 100_000, '{"n": 1e999}', "\x00", '"\\ud800"')


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_records_are_problems_not_crashes(out: Path, text: str) -> None:
    (out / "shards/00001.json").write_text(text)
    assert [problem.file for problem in verify(out).problems] == ["shards/00001.json"]
    (out / "index.json").unlink()
    with pytest.raises(InputError, match=r"00001\.json"):
        ShardDataset(out, partial=True)


# The index again


def test_the_index_is_rebuilt_to_the_byte(out: Path) -> None:
    text = (out / "index.json").read_bytes()
    for damaged in (text.replace(b"sub-1", b"sub-2"), b"", None):
        if damaged is None:
            (out / "index.json").unlink()
        else:
            (out / "index.json").write_bytes(damaged)
        assert verify(out).problems
        assert not rebuild_index(out).problems
        assert (out / "index.json").read_bytes() == text


@pytest.mark.parametrize("fault", [missing, junk, one_voxel, no_sidecar, foreign, swapped, unfinished])
def test_the_index_is_rebuilt_from_sound_shards_only(out: Path, fault: Fault) -> None:
    fault(out)
    (out / "index.json").unlink(missing_ok=True)
    report = rebuild_index(out)
    assert report.problems
    assert all(problem.file.startswith("shards/0000") for problem in report.problems)
    assert not (out / "index.json").exists()


# Speed


def test_a_quick_look_at_a_thousand_shards_takes_no_second(out: Path) -> None:
    """Over hard links: names and sizes are all that is looked at."""
    sidecar = json.loads((out / "shards/00000.json").read_text())
    shutil.rmtree(out / "shards")
    (out / "shards").mkdir()
    (out / "run.json").unlink()
    sidecars = []
    for k in range(1000):
        for suffix in ("h5", "json"):
            (out / f"shards/{k:05d}.{suffix}").touch()
        samples = [{**sample, "index": 4 * k + i} for i, sample in enumerate(sidecar["samples"])]
        sidecars.append({**sidecar, "bytes": 0, "samples": samples})
    write_index(out, "run", sidecars)
    started = time.process_time()
    report = verify(out, quick=True)
    assert time.process_time() - started < 1
    assert [problem.file for problem in report.problems] == ["run.json"]
    assert report.shards == 1000


# The command


@pytest.fixture
def run_verb() -> Callable[..., Result]:
    app = typer.Typer()
    app.command()(verb)
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_command_says_and_exits(
    out: Path, run_verb: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(out)
    for named in (out, "."):
        done = run_verb(named)
        assert (done.exit_code, done.stderr) == (0, "")
        assert re.fullmatch(r"out: no problem; 3 shards, 12 samples, \d+ MB sound \(.* s\)\n", done.stdout)
    flip_bit(out / "shards/00001.h5", 5000, 0)
    junk_file = out / "shards/00002.h5.tmp-1-ab"
    junk_file.touch()
    assert run_verb(out, "--quick").exit_code == 0
    done = run_verb(out)
    assert done.exit_code == 1
    assert re.fullmatch(r"out/shards/00001\.h5: its SHA-256 .*; copy .*\n", done.stderr)
    assert re.search(r"out: 1 problem; 2 shards, 8 samples, .*, 1 leftover temporary file \(harmless\)\n", done.stdout)
    (out / "index.json").unlink()
    assert run_verb(out, "--rebuild-index").exit_code == 1
    flip_bit(out / "shards/00001.h5", 5000, 0)
    assert "index.json rebuilt" in run_verb(out, "--rebuild-index").stdout
    assert run_verb(out).exit_code == 0
