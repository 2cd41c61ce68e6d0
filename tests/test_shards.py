"""Shards: the schema to the letter, equal bytes from equal input, and a dataset that says what it misses."""

from __future__ import annotations

import copy
import errno
import hashlib
import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import crc32c
import h5py
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from synthlong.artifacts import RandomAcquisition, RandomGaussianNoise
from synthlong.dataset import reader as reader_module
from synthlong.dataset import shards as shards_module
from synthlong.dataset.index import Index, write_index
from synthlong.dataset.plan import make_plan, shard_config
from synthlong.dataset.reader import IMAGES, MASKS
from synthlong.dataset.shards import ShardDataset
from synthlong.dataset.writer import Sample, encode_shard, write_shard
from synthlong.errors import ConfigError, InputError, InputWarning, OutputError, ShardCorruptError, SynthlongError
from synthlong.plain import canonical_json
from synthlong.publishing import publish
from synthlong.synthesis import SynthesisConfig

SIDE = 16
TABLE = {
    "baseline": "<f2",
    "followup": "<f2",
    "new_lesions": "u1",
    "evolution": "u1",
    "lesions_baseline": "u1",
    "lesions_followup": "u1",
}
JSONS = {"config_json": '{"seed":7}', "versions_json": '{"synthlong":"0.1.0"}'}

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


def make_sample(k: int, *, side: int = SIDE, subjects: int = 4) -> Sample:
    """One pair: a smooth baseline that compresses, a noisy follow-up that does not."""
    rng = np.random.default_rng(k)
    shape = (side, side, side)
    masks = {name: (rng.random(shape) < 0.05).astype(np.uint8) for name in TABLE if "lesions" in name}
    return Sample(
        baseline=np.linspace(0, 1 + k, side**3, dtype=np.float32).round(1).reshape(shape),
        followup=rng.normal(1, 0.1, shape).astype(np.float32),
        evolution=rng.integers(0, 6, shape).astype(np.uint8),
        recipe=json.dumps({"pair": k, "note": "é" * k}, ensure_ascii=False),
        subject=f"sub-{k % subjects}",
        **masks,
    )


def write_run(
    out: Path, *, shards: int = 3, size: int = 4, side: int = SIDE, compression: str = "blosc-lz4", seed: int = 0
) -> Path:
    """A complete run as `generate` leaves it; another `seed` gives another run of the same shape."""
    cases = [{"subject": f"case-{k}", "patient": f"sub-{k}", "sources": {}} for k in range(4)]
    plan = make_plan(
        out / "cases.csv",
        out,
        cases=cases,
        pairs=shards * size,
        seed=seed,
        shard_size=size,
        config=SynthesisConfig(),
        assets={},
    )
    sidecars = [
        write_shard(
            out,
            number,
            [make_sample(number * size + k, side=side) for k in range(size)],
            first_index=number * size,
            compression=compression,
            config_json=canonical_json(shard_config(plan)),
            versions_json=canonical_json(plan["versions"]),
        )
        for number in range(shards)
    ]
    publish(out / "run.json", canonical_json(plan).encode())
    write_index(out, plan["run_id"], sidecars)
    return out


def flip_bit(path: Path, offset: int, bit: int) -> None:
    """Change one bit of a file, in place."""
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1 << bit]))


def unfinish(out: Path, *finished: int) -> Path:
    """Make a run one that is still being made: no index, and only the finished shards."""
    (out / "index.json").unlink()
    for path in (out / "shards").iterdir():
        if int(path.name[:5]) not in finished:
            path.unlink()
    return out


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("run"))


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(a[key], b[key]) if torch.is_tensor(a[key]) else a[key] == b[key] for key in a
    )


# The bytes


@pytest.mark.parametrize("compression", ["blosc-lz4", "none"])
def test_schema_is_exact(tmp_path: Path, compression: str) -> None:
    samples = [make_sample(k) for k in range(3)]
    data, _ = encode_shard(samples, compression=compression, **JSONS)
    (tmp_path / "0.h5").write_bytes(data)
    with h5py.File(tmp_path / "0.h5") as file:
        assert set(file) == {*TABLE, "recipe_json", "recipe_end"}
        for name, dtype in TABLE.items():
            assert file[name].dtype == np.dtype(dtype)
            assert file[name].shape == file[name].maxshape == (3, SIDE, SIDE, SIDE)
            assert file[name].chunks == (1, SIDE, SIDE, SIDE)
        length = sum(len(sample.recipe.encode()) for sample in samples)
        assert (file["recipe_json"].dtype, file["recipe_json"].shape) == (np.uint8, (length,))
        assert (file["recipe_end"].dtype, file["recipe_end"].shape) == (np.dtype("<i8"), (3,))
        for name in file:
            plist = file[name].id.get_create_plist()
            filters = [plist.get_filter(k) for k in range(plist.get_nfilters())]
            assert filters[-1][0] == h5py.h5z.FILTER_FLETCHER32
            assert len(filters) == (2 if compression == "blosc-lz4" else 1)
            if compression == "blosc-lz4":
                assert (filters[0][0], filters[0][2][5:7]) == (32001, (1, 1))  # blosc: byte shuffle, lz4
            assert not plist.get_obj_track_times()
        assert dict(file.attrs) == {
            "schema": "synthlong/1",
            "config": JSONS["config_json"],
            "versions": JSONS["versions_json"],
            "spacing_mm": 1.0,
        }
        assert file.attrs["spacing_mm"].dtype == np.float64
        end = file["recipe_end"][:]
        text = file["recipe_json"][:].tobytes()
        assert text[end[0] : end[1]].decode() == samples[1].recipe


def test_equal_input_gives_equal_bytes_also_in_another_process() -> None:
    """The other process starts over a second later, and with blosc's switches set."""
    data, sidecar = encode_shard([make_sample(k, side=64) for k in range(2)], **JSONS)
    code = (
        "import time; time.sleep(1.1); from test_shards import *; import synthlong.dataset.writer as w;"
        "data, sidecar = w.encode_shard([make_sample(k, side=64) for k in range(2)], **JSONS);"
        "assert os.environ['BLOSC_NTHREADS'] == '4'; print(canonical_json(sidecar), end='')"
    )
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])]),
        "BLOSC_NTHREADS": "4",
        "BLOSC_CLEVEL": "9",
    }
    other = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True)
    assert other.stdout.decode() == canonical_json(sidecar)
    assert encode_shard([make_sample(k, side=64) for k in range(2)], **JSONS)[0] == data


def test_sidecar_describes_the_bytes(tmp_path: Path) -> None:
    samples = [make_sample(k) for k in range(3)]
    returned = write_shard(tmp_path, 7, samples, first_index=20, **JSONS)
    shard, text = tmp_path / "shards/00007.h5", (tmp_path / "shards/00007.json").read_text()
    assert json.loads(text) == returned
    assert text == canonical_json(returned)
    assert returned.keys() == {"bytes", "sha256", "n", "samples"}
    assert returned["bytes"] == shard.stat().st_size
    assert returned["sha256"] == hashlib.sha256(shard.read_bytes()).hexdigest()
    assert [s["index"] for s in returned["samples"]] == [20, 21, 22]
    with h5py.File(shard) as file:
        for k, (sample, record) in enumerate(zip(samples, returned["samples"], strict=True)):
            decoded = b"".join(file[name][k].astype(dtype).tobytes("C") for name, dtype in TABLE.items())
            assert record["sha256"] == hashlib.sha256(decoded + sample.recipe.encode()).hexdigest()
            assert record["subject"] == sample.subject
            assert record["crc32c"] == {
                name: crc32c.crc32c(file[name].id.read_direct_chunk((k, 0, 0, 0))[1]) for name in TABLE
            }


def test_images_are_rounded_to_nearest_and_refused_where_float16_ends() -> None:
    sample = make_sample(1)
    assert sample.followup.dtype == np.float32
    for value in (np.nan, np.inf, 65520.0):
        image = sample.followup.copy()
        image[3, 4, 5] = value
        with pytest.raises(SynthlongError, match=r"pair 5 \(sub-1\): followup"):
            encode_shard([Sample(**{**vars(sample), "followup": image})], first_index=5, **JSONS)
    image = sample.followup.copy()
    image[3, 4, 5] = 65519.0  # rounds down to the largest float16
    encode_shard([Sample(**{**vars(sample), "followup": image})], **JSONS)


@pytest.mark.parametrize(
    "change",
    [
        {"evolution": np.full((SIDE,) * 3, 6, np.uint8)},
        {"new_lesions": np.full((SIDE,) * 3, 2, np.uint8)},
        {"new_lesions": np.zeros((SIDE,) * 3, np.int64)},
        {"followup": np.zeros((SIDE, SIDE, SIDE + 1), np.float32)},
        {"baseline": np.zeros((SIDE,) * 3, np.int16)},
        {"recipe": ""},
    ],
)
def test_arrays_outside_the_contract_are_refused(change: dict) -> None:
    with pytest.raises(ValueError, match="pair 0"):
        encode_shard([Sample(**{**vars(make_sample(0)), **change})], **JSONS)


# Publishing


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS, errno.EIO])
def test_a_failing_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    target = tmp_path / "index.json"
    publish(target, b"before")

    def fail(_: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OutputError, match=r"index\.json: .*written|no space left .* 2\.0 MB, .* free") as caught:
        publish(target, bytes(2_000_000))
    assert caught.value.exit_code == 3
    assert [path.name for path in tmp_path.iterdir()] == ["index.json"]
    assert target.read_bytes() == b"before"


def test_publish_survives_short_writes_and_names_a_missing_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:1000]))
    publish(tmp_path / "a", bytes(range(256)) * 20)
    assert (tmp_path / "a").read_bytes() == bytes(range(256)) * 20
    with pytest.raises(OutputError, match="nowhere/a"):
        publish(tmp_path / "nowhere" / "a", b"")


# Reading


@pytest.mark.parametrize("compression", ["blosc-lz4", "none"])
def test_round_trip(tmp_path: Path, compression: str) -> None:
    dataset = ShardDataset(write_run(tmp_path, shards=2, size=3, compression=compression))
    assert len(dataset) == 6
    for k in range(6):
        sample, stored = make_sample(k), dataset[k]
        assert list(stored) == [*TABLE, "recipe"]
        for name, dtype in TABLE.items():
            expected = getattr(sample, name).astype(dtype)
            assert stored[name].shape == (1, SIDE, SIDE, SIDE)
            assert stored[name].dtype == (torch.float32 if dtype == "<f2" else torch.uint8)
            np.testing.assert_array_equal(stored[name][0].numpy(), expected)
        assert stored["recipe"] == sample.recipe
    assert equal(dataset[-1], dataset[5])
    assert equal(dataset[np.int64(-6)], dataset[0])
    for beyond in (6, -7):
        with pytest.raises(IndexError):
            dataset[beyond]


def test_a_run_named_from_another_folder_is_still_read(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run.parent)
    dataset = ShardDataset(run.name)
    monkeypatch.chdir(tmp_path)
    assert equal(dataset[0], ShardDataset(run)[0])


def test_keys_restrict_what_is_read(run: Path) -> None:
    assert list(ShardDataset(run, keys=("evolution", "recipe"))[2]) == ["evolution", "recipe"]
    with pytest.raises(ConfigError, match="flair"):
        ShardDataset(run, keys=("flair",))


@pytest.mark.parametrize("cut", [0, 0.001, 0.3, 0.9, 0.999, -1, "junk"])
def test_a_shard_of_another_size_is_found_at_open(tmp_path: Path, cut: float | str) -> None:
    shard = write_run(tmp_path) / "shards/00001.h5"
    data = shard.read_bytes()
    if cut == "junk":
        shard.write_bytes(data + bytes(400))
    else:
        shard.write_bytes(data[: -1 if cut == -1 else int(cut * len(data))])
    with pytest.raises(ShardCorruptError, match=r"shards/00001\.h5: has \d+ bytes, the index says"):
        ShardDataset(tmp_path)


def test_a_file_cut_under_a_reader_is_an_error(tmp_path: Path) -> None:
    dataset = ShardDataset(write_run(tmp_path), check="off")
    dataset[4]
    os.truncate(tmp_path / "shards/00001.h5", 5000)
    with pytest.raises(ShardCorruptError, match=r"shards/00001\.h5: sample 3: ends before byte"):
        dataset[7]


def test_missing_shards_are_named_and_can_be_done_without(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    out = write_run(tmp_path / "out")
    dataset = ShardDataset(out)
    (out / "shards/00000.h5").unlink()
    (out / "shards/00002.h5").unlink()
    with pytest.raises(InputError, match=r"2 of 3 shards missing: 00000\.h5, 00002\.h5.*allow_missing"):
        ShardDataset(out)
    with pytest.raises(InputError, match="No such file"):
        dataset[0]
    with caplog.at_level(logging.WARNING, "synthlong"):
        rest = ShardDataset(out, allow_missing=True)
    assert "2 of 3 shards missing: 00000.h5, 00002.h5; 4 of 12 samples are left" in caplog.text
    assert [json.loads(rest[k]["recipe"])["pair"] for k in range(len(rest))] == [4, 5, 6, 7]
    folds = [ShardDataset(out, allow_missing=True, split="validation", folds=4, fold=k) for k in range(4)]
    assert [f.subjects for f in folds] == [
        ShardDataset(write_run(tmp_path / "whole"), split="validation", folds=4, fold=k).subjects for k in range(4)
    ]


def test_a_run_without_an_index_is_not_finished(tmp_path: Path) -> None:
    out = unfinish(write_run(tmp_path / "out"), 0, 2)
    with pytest.raises(InputError, match=r"out: not finished: 2/3 shards, no index.*generate.*partial=True"):
        ShardDataset(out)
    with pytest.raises(InputError, match="no such folder"):
        ShardDataset(tmp_path / "other")


def test_a_folder_around_a_run_is_not_taken_for_an_unfinished_one(tmp_path: Path) -> None:
    write_run(tmp_path / "demo" / "pairs")
    with pytest.raises(InputError, match="demo: holds no run of pairs; give the folder that `generate` wrote"):
        ShardDataset(tmp_path / "demo")


@pytest.mark.filterwarnings("ignore:.* its recipes are of another version")
def test_a_growing_run_is_read_as_it_was_at_open(tmp_path: Path) -> None:
    """A shard counts once its sidecar is there; temporaries never do."""
    whole, out = write_run(tmp_path / "whole"), unfinish(write_run(tmp_path / "out"), 0, 2)
    for name in ("00001.h5", "00001.h5.tmp-7-ab", "00003.json.tmp-7-ab"):
        shutil.copy(whole / "shards/00001.h5", out / "shards" / name)
    dataset = ShardDataset(out, partial=True)
    for name in ("shards/00001.json", "index.json"):
        shutil.copy(whole / name, out / name)
    assert [json.loads(dataset[k]["recipe"])["pair"] for k in range(len(dataset))] == [0, 1, 2, 3, 8, 9, 10, 11]
    assert len(ShardDataset(out, partial=True)) == 12
    part = ShardDataset(unfinish(out, 1), partial=True, split="validation", folds=2, transform=draw, seed=5)
    same = ShardDataset(whole, split="validation", folds=2, transform=draw, seed=5)
    assert part.subjects == same.subjects
    assert {tuple(x.tolist()) for x in part} <= {tuple(x.tolist()) for x in same}


def test_a_growing_run_refuses_shards_of_another(tmp_path: Path) -> None:
    other = write_run(tmp_path / "other", seed=1)
    out = unfinish(write_run(tmp_path / "out"), 0)
    for suffix in ("h5", "json"):
        shutil.copy(other / f"shards/00001.{suffix}", out / f"shards/00001.{suffix}")
    dataset = ShardDataset(out, partial=True)
    dataset[0]
    with pytest.raises(ShardCorruptError, match=r"00001\.h5: belongs to another run"):
        dataset[4]
    shutil.copy(out / "shards/00000.json", out / "shards/00001.json")
    with pytest.raises(InputError, match=r"00001\.json: is not of this run"):
        ShardDataset(out, partial=True)


def test_the_index_vouches_for_itself(tmp_path: Path) -> None:
    out = write_run(tmp_path)
    text = (out / "index.json").read_text()
    index = json.loads(text)
    assert index.keys() == {"schema", "run_id", "n", "shards", "subjects", "sha256"}
    assert index["n"] == 12
    assert [shard["file"] for shard in index["shards"]] == [f"shards/0000{k}.h5" for k in range(3)]
    rest = {key: value for key, value in index.items() if key != "sha256"}
    assert index["sha256"] == hashlib.sha256(canonical_json(rest).encode()).hexdigest()
    for damaged in (text.replace("sub-1", "sub-2"), text[:-9], "", "[]", '{"n":NaN}', json.dumps(index)):
        (out / "index.json").write_text(damaged)
        with pytest.raises(InputError, match=r"index\.json: .*--rebuild-index"):
            Index.read(out)
    foreign = text.replace("synthlong/1", "synthlong-1")
    (out / "index.json").write_text(foreign)
    with pytest.raises(InputError, match=r"is not an index of shards; .*--rebuild-index"):
        Index.read(out)
    for change in ({}, {"a": 1}):  # a newer one may have other keys, or another hash
        newer = rest | {"schema": "synthlong/2"} | change
        newer["sha256"] = hashlib.sha256(canonical_json(newer).encode()).hexdigest()
        (out / "index.json").write_text(canonical_json(newer))
        with pytest.raises(InputError, match=r"synthlong/2, newer.*install a synthlong that reads synthlong/2"):
            Index.read(out)


def test_every_flip_in_the_index_is_seen(tmp_path: Path) -> None:
    path = write_run(tmp_path, shards=1, size=2) / "index.json"
    text, rng = path.read_bytes(), np.random.default_rng(0)
    for offset in range(len(text)):
        path.write_bytes(text[:offset] + bytes([text[offset] ^ 1 << int(rng.integers(8))]) + text[offset + 1 :])
        with pytest.raises(InputError, match=r"index\.json"):
            ShardDataset(tmp_path)


def test_swapped_shards_are_not_taken_for_each_other(tmp_path: Path) -> None:
    out = write_run(tmp_path, compression="none")  # shards of the same size
    for suffix in ("h5", "json"):
        a, b, c = (out / f"shards/{name}.{suffix}" for name in ("00000", "00001", "c"))
        a.rename(c), b.rename(a), c.rename(b)
    for check in ("always", "first"):
        with pytest.raises(ShardCorruptError, match=r"0000[01]\.h5: "):
            ShardDataset(out, check=check)[0]


# A shard that changes


def test_a_replaced_shard_is_never_mixed_with_the_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards_module, "_MAX_OPEN", 1)
    out, other = write_run(tmp_path / "out", compression="none"), write_run(tmp_path / "b", compression="none", seed=1)
    same_size = bytearray((other / "shards/00000.h5").read_bytes())
    assert len(same_size) == (out / "shards/00000.h5").stat().st_size
    dataset = ShardDataset(out)
    before = dataset[1]
    publish(out / "shards/00000.h5", same_size)
    assert equal(dataset[1], before), "what is open keeps the old file"
    dataset[4]
    with pytest.raises(ShardCorruptError, match=r"00000\.h5: its SHA-256"):
        dataset[1]


def test_a_shard_is_hashed_once_while_it_stays_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards_module, "_MAX_OPEN", 1)
    hashed = []
    sha256 = reader_module._sha256
    monkeypatch.setattr(reader_module, "_sha256", lambda file: hashed.append(file) or sha256(file))
    dataset = ShardDataset(write_run(tmp_path))
    for k in (0, 4, 8, 0, 4, 8):
        dataset[k]
    assert len(hashed) == 3
    os.utime(tmp_path / "shards/00000.h5")
    dataset[0]
    assert len(hashed) == 4
    dataset = ShardDataset(tmp_path, check="off")
    dataset[0]
    assert len(hashed) == 4


@pytest.mark.parametrize(("check", "seen"), [("always", True), ("first", False), ("off", False)])
def test_what_is_checked(tmp_path: Path, check: str, seen: bool) -> None:
    """One voxel changes behind the back of an open dataset, times put back."""
    dataset = ShardDataset(write_run(tmp_path, shards=1, compression="none"), check=check)
    before = dataset[1]["followup"]
    with h5py.File(tmp_path / "shards/00000.h5", locking=False) as file:
        offset = file["followup"].id.get_chunk_info(1).byte_offset
    flip_bit(tmp_path / "shards/00000.h5", offset + 100, 0)
    if seen:
        with pytest.raises(ShardCorruptError, match=r"00000\.h5: sample 1: .*crc32c [0-9a-f]{8}, not [0-9a-f]{8}"):
            dataset[1]
        dataset[0]
    else:
        assert (dataset[1]["followup"] != before).sum() == 1
    fresh = ShardDataset(tmp_path, check=check)
    if check == "off":
        fresh[1]
    else:
        with pytest.raises(ShardCorruptError, match=r"00000\.h5: its SHA-256"):
            fresh[0]


def test_reading_writes_nothing(tmp_path: Path) -> None:
    out = write_run(tmp_path)
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ctime_ns) for path in tmp_path.rglob("*")}
    for path, folder in ((out, 0o555), (out / "shards", 0o555)):
        path.chmod(folder)
    try:
        assert len(list(ShardDataset(out))) == 12
    finally:
        for path in (out, out / "shards"):
            path.chmod(0o755)
    after = {path: (path.stat().st_mtime_ns, path.stat().st_ctime_ns) for path in tmp_path.rglob("*")}
    assert {p: t[0] for p, t in before.items()} == {p: t[0] for p, t in after.items()}


# Workers


@pytest.mark.parametrize("start", ["fork", "spawn", "forkserver"])
def test_workers_read_the_same(run: Path, start: str) -> None:
    dataset = ShardDataset(run)
    plain = [dataset[k] for k in range(len(dataset))]  # opens shards in the parent, before the fork
    options = {"batch_size": None, "num_workers": 2, "multiprocessing_context": start, "persistent_workers": True}
    loader = DataLoader(dataset, **options)
    for _ in range(2):
        assert all(equal(a, b) for a, b in zip(loader, plain, strict=True))


@pytest.mark.parametrize("workers", [0, 1])
def test_corruption_keeps_its_name_through_a_loader(tmp_path: Path, workers: int) -> None:
    dataset = ShardDataset(write_run(tmp_path, shards=1))
    with h5py.File(tmp_path / "shards/00000.h5", locking=False) as file:
        offset = file["evolution"].id.get_chunk_info(2).byte_offset
    dataset[0]
    flip_bit(tmp_path / "shards/00000.h5", offset + 20, 3)
    options = {"multiprocessing_context": "fork"} if workers else {}
    loader = DataLoader(dataset, batch_size=None, sampler=[2], num_workers=workers, **options)
    with pytest.raises(ShardCorruptError, match=r"shards/00000\.h5: sample 2: .*crc32c") as caught:
        next(iter(loader))
    assert (caught.value.path.name, caught.value.sample) == ("00000.h5", 2)


def test_default_collation_works(run: Path) -> None:
    batch = next(iter(DataLoader(ShardDataset(run), batch_size=3)))
    assert batch["baseline"].shape == (3, 1, SIDE, SIDE, SIDE)
    assert len(batch["recipe"]) == 3


def test_pickles_small_and_without_handles(run: Path, tmp_path: Path) -> None:
    dataset = ShardDataset(run)
    first = dataset[0]
    state = pickle.dumps(dataset)
    assert len(state) < 10_000
    assert equal(pickle.loads(state)[0], first)


def test_ten_thousand_shards_open_fast_and_pickle_small(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    sidecars = []
    for number in range(10_000):
        (tmp_path / f"shards/{number:05d}.h5").touch()
        samples = [{"index": number * 64 + k, "subject": f"sub-{k:04d}"} for k in range(64)]
        sidecars.append({"bytes": 0, "sha256": f"{number:064x}", "n": 64, "samples": samples})
    write_index(tmp_path, "run", sidecars)
    started = time.process_time()
    dataset = ShardDataset(tmp_path, split="train", folds=64)
    assert time.process_time() - started < 3, "a second is the goal, on a machine of its own"
    assert len(dataset) == 630_000
    assert len(pickle.dumps(dataset)) < 1_000_000 * 10_000 // 15_625, "a million pairs: less than a megabyte"
    assert len(pickle.loads(pickle.dumps(dataset))) == 630_000


def test_few_descriptors_are_enough_for_many_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)
    write_run(tmp_path, shards=500, size=1, side=2)
    code = (
        "import resource, sys; from synthlong import ShardDataset; dataset = ShardDataset(sys.argv[1]);"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64));"
        "assert [dataset[k]['baseline'].max() == 1 + k for k in (*range(500), *range(0, 500, 7))].count(False) == 0"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=120)


def test_open_files_are_bounded(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards_module, "_MAX_OPEN", 2)
    dataset = ShardDataset(run)
    before = len(os.listdir("/proc/self/fd"))
    for k in (0, 5, 9, 1, 6, 10, 0):
        assert json.loads(dataset[k]["recipe"])["pair"] == k
        assert len(os.listdir("/proc/self/fd")) <= before + 2


# Splits and draws


def test_splits_keep_subjects_apart_and_cover_all(run: Path) -> None:
    held_out = []
    for fold in range(3):
        train = ShardDataset(run, split="train", fold=fold, folds=3)
        validation = ShardDataset(run, split="validation", fold=fold, folds=3)
        assert not set(train.subjects) & set(validation.subjects)
        assert len(train) + len(validation) == 12
        for dataset in (train, validation):
            pairs = [json.loads(dataset[k]["recipe"])["pair"] for k in range(len(dataset))]
            assert {f"sub-{pair % 4}" for pair in pairs} == set(dataset.subjects)
        held_out += validation.subjects
    assert sorted(held_out) == ["sub-0", "sub-1", "sub-2", "sub-3"]


def test_folds_are_those_of_every_machine(run: Path) -> None:
    order = sorted((f"sub-{k}" for k in range(4)), key=lambda s: hashlib.sha256(s.encode()).hexdigest())
    assert set(ShardDataset(run, split="validation", fold=1, folds=2).subjects) == {order[1], order[3]}


def test_runs_dealt_among_the_same_subjects_agree_on_folds(run: Path, tmp_path: Path) -> None:
    other = write_run(tmp_path, shards=1, size=2)  # of sub-0 and sub-1 alone
    options = {"folds": 2, "subjects": ShardDataset(run).subjects}
    for fold in range(2):
        train = ShardDataset(run, split="train", fold=fold, **options)
        validation = ShardDataset(other, split="validation", fold=fold, **options)
        assert not set(train.subjects) & set(validation.subjects)
        assert set(validation.subjects) <= {"sub-0", "sub-1"}
        assert [f"sub-{json.loads(sample['recipe'])['pair']}" for sample in validation] == validation.subjects
    with pytest.raises(ConfigError, match=r"subjects: 'sub-2' of .* is not among them"):
        ShardDataset(run, subjects=ShardDataset(other).subjects)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "train"}, "folds = 5: there are 4 patients; use 2 to 4"),
        ({"split": "train", "folds": 1}, "folds"),
        ({"split": "train", "folds": 3, "fold": 3}, "fold must be"),
        ({"split": "test", "folds": 3}, "'test'"),
        ({"seed": -1}, "seed"),
    ],
)
def test_options_outside_their_range_are_named(run: Path, options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ShardDataset(run, **options)


def draw(sample: dict) -> torch.Tensor:
    """A transform that draws from torch's global generator."""
    return torch.cat([torch.rand(3), torch.tensor([float(json.loads(sample["recipe"])["pair"])])])


def test_draws_depend_on_seed_epoch_and_index_only(run: Path) -> None:
    dataset = ShardDataset(run, keys=["recipe"], transform=draw, seed=5)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    forward = [dataset[k] for k in range(12)]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    backward = [dataset[k] for k in reversed(range(12))][::-1]
    assert all(map(torch.equal, forward, backward))

    loader = DataLoader(
        dataset, batch_size=None, num_workers=2, persistent_workers=True, multiprocessing_context="fork"
    )
    assert all(map(torch.equal, loader, forward))
    dataset.set_epoch(1)
    second = [dataset[k] for k in range(12)]
    assert all(map(torch.equal, loader, second)), "persistent workers must see the new epoch"
    other = ShardDataset(run, keys=["recipe"], transform=draw, seed=6)
    draws = {tuple(x[:3].tolist()) for x in [*forward, *second, *(other[k] for k in range(12))]}
    assert len(draws) == 36

    part = ShardDataset(run, keys=["recipe"], transform=draw, seed=5, split="validation", folds=2)
    for k in range(len(part)):
        assert torch.equal(part[k], forward[int(part[k][3])])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda dataset: pickle.loads(pickle.dumps(dataset))])
def test_workers_of_a_copy_see_its_epochs(run: Path, copied: Callable[[ShardDataset], ShardDataset]) -> None:
    dataset = copied(ShardDataset(run, keys=["recipe"], seed=5))
    dataset.transform = draw
    options = {"num_workers": 1, "persistent_workers": True, "multiprocessing_context": "fork"}
    loader = DataLoader(dataset, batch_size=None, sampler=[0, 1], **options)
    first = list(loader)
    dataset.set_epoch(1)
    assert [torch.equal(a, b) for a, b in zip(loader, first, strict=True)] == [False, False]


def test_without_a_seed_the_callers_generator_is_used(run: Path) -> None:
    dataset = ShardDataset(run, keys=["recipe"], transform=draw)
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    assert torch.equal(dataset[0][:3], expected)


@pytest.mark.filterwarnings("ignore:.* its recipes are of another version")
def test_artifacts_on_one_visit_on_both_and_alike(run: Path) -> None:
    """The transforms know a sample: its float images are changed, its masks and recipe are not."""
    plain = ShardDataset(run)[0]

    def changed(transform: object) -> dict[str, torch.Tensor]:
        sample = ShardDataset(run, transform=transform, seed=1)[0]
        assert all(torch.equal(sample[key], plain[key]) for key in MASKS)
        assert sample["recipe"] == plain["recipe"]
        return {key: sample[key] - plain[key] for key in IMAGES}

    with pytest.warns(InputWarning, match="its recipes are of another version; transforms take images for RAS, 1 mm"):
        both = changed(RandomGaussianNoise(std=(1, 1)))
    assert not torch.equal(both["baseline"], both["followup"])
    assert min(d.abs().max() for d in both.values()) > 0
    alike = changed(RandomGaussianNoise(std=(1, 1), shared=True))
    assert torch.allclose(alike["baseline"], alike["followup"], atol=1e-5)
    one = changed(RandomGaussianNoise(std=(1, 1), include=["followup"]))
    assert not one["baseline"].any()
    assert one["followup"].any()

    mixture = RandomAcquisition("kamraoui", correlation=0.5)
    dataset = ShardDataset(run, transform=mixture, seed=1)
    here = [dataset[k]["followup"] for k in range(4)]
    loader = DataLoader(dataset, batch_size=None, num_workers=2, multiprocessing_context="spawn")
    there = [sample["followup"] for sample in loader][:4]
    assert all(map(torch.equal, here, there)), "results do not depend on workers"
