"""Shards: the schema to the letter, equal bytes from equal input, and no wrong number from a wrong byte."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import crc32c
import h5py
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from synthlong.artifacts import RandomAcquisition, RandomGaussianNoise
from synthlong.dataset import shards as shards_module
from synthlong.dataset.reader import IMAGES, MASKS, ShardReader
from synthlong.dataset.shards import (
    Sample,
    ShardDataset,
    canonical_json,
    encode_shard,
    publish,
    read_index,
    write_index,
    write_shard,
)
from synthlong.errors import ConfigError, InputError, OutputError, ShardCorruptError, SynthlongError

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


def write_run(out: Path, *, shards: int = 3, size: int = 4, compression: str = "blosc-lz4") -> Path:
    sidecars = [
        write_shard(
            out,
            number,
            [make_sample(number * size + k) for k in range(size)],
            first_index=number * size,
            compression=compression,
            **JSONS,
        )
        for number in range(shards)
    ]
    write_index(out, "run", sidecars)
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


def test_keys_restrict_what_is_read(run: Path) -> None:
    assert list(ShardDataset(run, keys=("evolution", "recipe"))[2]) == ["evolution", "recipe"]
    with pytest.raises(ConfigError, match="flair"):
        ShardDataset(run, keys=("flair",))


@pytest.mark.parametrize("compression", ["blosc-lz4", "none"])
def test_a_flipped_bit_never_gives_other_numbers(tmp_path: Path, compression: str) -> None:
    out = write_run(tmp_path, shards=1, size=2, compression=compression)
    shard = out / "shards/00000.h5"
    clean, data = list(ShardDataset(out)), shard.read_bytes()
    with h5py.File(shard) as file:
        info = [file[name].id.get_chunk_info(k) for name in TABLE for k in (0, 1)]
    rng = np.random.default_rng(0)
    in_chunks = [chunk.byte_offset + int(rng.integers(chunk.size)) for chunk in info for _ in range(4)]
    anywhere = [*range(0, 4700, 67), *map(int, rng.integers(len(data), size=30))]
    for offset in in_chunks + anywhere:
        damaged = bytearray(data)
        damaged[offset] ^= 1 << int(rng.integers(8))
        shard.write_bytes(damaged)
        caught = []
        for k in (0, 1):
            try:
                assert equal(ShardDataset(out)[k], clean[k]), offset
            except ShardCorruptError as error:
                caught.append((error.path, error.sample))
        if offset in in_chunks:
            assert caught in ([(shard, 0)], [(shard, 1)]), offset


@pytest.mark.parametrize("cut", [0, 100, -1, "junk"])
def test_a_shard_of_another_size_is_found_at_open(tmp_path: Path, cut: int | str) -> None:
    shard = write_run(tmp_path) / "shards/00001.h5"
    data = shard.read_bytes()
    shard.write_bytes(data + bytes(400) if isinstance(cut, str) else data[:cut])
    with pytest.raises(ShardCorruptError, match=r"shards/00001\.h5: has \d+ bytes, the index says"):
        ShardDataset(tmp_path)


def test_missing_shards_index_and_folder_are_named(tmp_path: Path) -> None:
    out = write_run(tmp_path / "out")
    dataset = ShardDataset(out)
    (out / "shards/00000.h5").unlink()
    (out / "shards/00002.h5").unlink()
    with pytest.raises(InputError, match=r"2 of 3 shards missing: 00000\.h5, 00002\.h5"):
        ShardDataset(out)
    with pytest.raises(InputError, match="No such file"):
        dataset[0]
    (out / "index.json").unlink()
    with pytest.raises(InputError, match=r"not finished: 3 shards done.*resume"):
        ShardDataset(out)
    with pytest.raises(InputError, match="no such folder"):
        ShardDataset(tmp_path / "other")


def test_the_index_vouches_for_itself(tmp_path: Path) -> None:
    out = write_run(tmp_path)
    index, text = read_index(out), (out / "index.json").read_text()
    assert index.keys() == {"schema", "run_id", "n", "shards", "sha256"}
    assert index["n"] == 12
    assert [shard["file"] for shard in index["shards"]] == [f"shards/0000{k}.h5" for k in range(3)]
    rest = {key: value for key, value in index.items() if key != "sha256"}
    assert index["sha256"] == hashlib.sha256(canonical_json(rest).encode()).hexdigest()
    for damaged in (text.replace("sub-1", "sub-2"), text[:-9], "", "[]", '{"n":NaN}'):
        (out / "index.json").write_text(damaged)
        with pytest.raises(InputError, match=r"index\.json: .*--rebuild-index"):
            read_index(out)
    newer = rest | {"schema": "synthlong/2"}
    newer["sha256"] = hashlib.sha256(canonical_json(newer).encode()).hexdigest()
    (out / "index.json").write_text(canonical_json(newer))
    with pytest.raises(InputError, match=r"synthlong/2, newer"):
        read_index(out)


# Shards made to mislead


def external_link(file: h5py.File, other: Path) -> None:
    del file["followup"]
    file["followup"] = h5py.ExternalLink(str(other), "followup")


def soft_link(file: h5py.File, other: Path) -> None:
    del file["followup"]
    file["followup"] = h5py.SoftLink("/baseline")


def external_storage(file: h5py.File, other: Path) -> None:
    del file["evolution"]
    shape = file["baseline"].shape
    file.create_dataset("evolution", shape, np.uint8, external=[(str(other), 0, int(np.prod(shape)))])


def virtual(file: h5py.File, other: Path) -> None:
    layout = h5py.VirtualLayout(file["followup"].shape, np.float16)
    layout[...] = h5py.VirtualSource(str(other), "followup", file["followup"].shape)
    del file["followup"]
    file.create_virtual_dataset("followup", layout)


def bomb(file: h5py.File, other: Path) -> None:
    del file["recipe_json"]
    file.create_dataset("recipe_json", (2**40,), np.uint8, chunks=(2**30,), fletcher32=True)


def unchecked(file: h5py.File, other: Path) -> None:
    values = file["followup"][:]
    del file["followup"]
    file.create_dataset("followup", data=values, chunks=(1, *values.shape[1:]))


def unwritten(file: h5py.File, other: Path) -> None:
    shape = file["followup"].shape
    del file["followup"]
    file.create_dataset("followup", shape, np.float16, chunks=(1, *shape[1:]), fletcher32=True)


def another_dtype(file: h5py.File, other: Path) -> None:
    values = file["followup"][:]
    del file["followup"]
    chunks = (1, *values.shape[1:])
    file.create_dataset("followup", data=values, dtype=np.float32, chunks=chunks, fletcher32=True)


def group(file: h5py.File, other: Path) -> None:
    del file["followup"]
    file.create_group("followup")


def extra(file: h5py.File, other: Path) -> None:
    file["more"] = 1


def fewer(file: h5py.File, other: Path) -> None:
    del file["followup"]


@pytest.mark.parametrize(
    "trick",
    [
        external_link,
        soft_link,
        external_storage,
        virtual,
        bomb,
        unchecked,
        unwritten,
        another_dtype,
        group,
        extra,
        fewer,
    ],
)
def test_a_misleading_shard_is_refused_before_its_data(tmp_path: Path, trick) -> None:
    data, _ = encode_shard([make_sample(k) for k in range(2)], **JSONS)
    shard, other = tmp_path / "00000.h5", tmp_path / "other.h5"
    shard.write_bytes(data)
    other.write_bytes(data)
    with h5py.File(shard, "r+", libver="latest") as file:
        trick(file, other)
    with pytest.raises(ShardCorruptError, match=r"00000\.h5"):
        ShardReader(shard)


def test_a_newer_schema_names_the_version_it_needs(tmp_path: Path) -> None:
    data, _ = encode_shard([make_sample(0)], config_json="{}", versions_json='{"synthlong":"2.4.0"}')
    shard = tmp_path / "0.h5"
    shard.write_bytes(data.replace(b"synthlong/1", b"synthlong/3"))
    with pytest.raises(InputError, match=r"synthlong/3, newer than synthlong/1; install a synthlong >= 2\.4\.0"):
        ShardReader(shard)
    shard.write_bytes(data.replace(b"synthlong/1", b"synthlonG/1"))
    with pytest.raises(ShardCorruptError, match="is not of schema synthlong/1"):
        ShardReader(shard)


def test_a_long_configuration_does_not_hide_the_schema(tmp_path: Path) -> None:
    config = json.dumps({"note": "x" * 200_000, "like": "synthlong/9"})
    data, _ = encode_shard([make_sample(0)], config_json=config, versions_json="{}")
    (tmp_path / "0.h5").write_bytes(data)
    assert ShardReader(tmp_path / "0.h5").n == 1
    with h5py.File(tmp_path / "0.h5", locking=False) as file:
        assert file.attrs["config"] == config


def test_a_damaged_heap_of_text_attributes_cannot_hang_the_reader(tmp_path: Path) -> None:
    """HDF5 2.0 never returns from `file.attrs["schema"]` here: the next object has size 0."""
    data = bytearray(encode_shard([make_sample(0)], **JSONS)[0])
    data[data.index(b"synthlong/1") - 7] ^= 8
    (tmp_path / "0.h5").write_bytes(data)
    with pytest.raises(ShardCorruptError, match="is not of schema"):
        ShardReader(tmp_path / "0.h5")


# Workers


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_read_the_same(run: Path, start: str) -> None:
    dataset = ShardDataset(run)
    plain = [dataset[k] for k in range(len(dataset))]  # opens handles in the parent, before the fork
    loader = DataLoader(dataset, batch_size=None, num_workers=2, multiprocessing_context=start)
    assert all(equal(a, b) for a, b in zip(loader, plain, strict=True))


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

    (tmp_path / "shards").mkdir()
    sidecars = []
    for number in range(300):
        with (tmp_path / f"shards/{number:05d}.h5").open("wb") as file:
            file.truncate(1000)
        samples = [{"index": number * 64 + k, "subject": f"sub-{k:04d}"} for k in range(64)]
        sidecars.append({"bytes": 1000, "sha256": "0", "n": 64, "samples": samples})
    write_index(tmp_path, "run", sidecars)
    assert len(pickle.dumps(ShardDataset(tmp_path))) < 1_000_000


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "train"}, "number of subjects .4., not 5"),
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


def test_without_a_seed_the_callers_generator_is_used(run: Path) -> None:
    dataset = ShardDataset(run, keys=["recipe"], transform=draw)
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    assert torch.equal(dataset[0][:3], expected)


def test_artifacts_on_one_visit_on_both_and_alike(run: Path) -> None:
    """The transforms know a sample: its float images are changed, its masks and recipe are not."""
    plain = ShardDataset(run)[0]

    def changed(transform: object) -> dict[str, torch.Tensor]:
        sample = ShardDataset(run, transform=transform, seed=1)[0]
        assert all(torch.equal(sample[key], plain[key]) for key in MASKS)
        assert sample["recipe"] == plain["recipe"]
        return {key: sample[key] - plain[key] for key in IMAGES}

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
