"""One shard: the same arrays as h5py reads, no number from a changed byte, nothing from a file made to mislead."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from contextlib import suppress
from pathlib import Path

import h5py
import hdf5plugin
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_shards import JSONS, SIDE, TABLE, equal, flip_bit, make_sample, write_run

from synthlong.dataset.reader import ShardReader
from synthlong.dataset.shards import ShardDataset
from synthlong.dataset.writer import Sample, encode_shard
from synthlong.errors import InputError, ShardCorruptError


def slow(path: Path, position: int) -> dict[str, np.ndarray]:
    """What h5py reads: the reference."""
    with h5py.File(path, locking=False) as file:
        return {name: file[name][position] for name in TABLE}


def slow_recipes(path: Path) -> list[str]:
    with h5py.File(path, locking=False) as file:
        end, text = file["recipe_end"][:], file["recipe_json"][:].tobytes()
    return [text[a:b].decode() for a, b in zip([0, *end[:-1]], end, strict=True)]


# The same as h5py


@st.composite
def samples(draw: st.DrawFn) -> list[Sample]:
    """Shards of one to three pairs: constant, smooth or pure noise, so that chunks are packed or stored plain."""
    side, n = draw(st.integers(1, 12)), draw(st.integers(1, 3))
    rng, shape = np.random.default_rng(draw(st.integers(0, 2**32))), (side, side, side)

    def image() -> np.ndarray:
        kind = draw(st.sampled_from(("constant", "smooth", "noise")))
        if kind == "noise":
            return (rng.integers(0, 2**16, shape, np.uint16) & 0xFBFF).view(np.float16)  # all finite bit patterns
        return np.full(shape, -0.0) if kind == "constant" else np.linspace(-1, 65504, side**3).reshape(shape)

    def mask(highest: int) -> np.ndarray:
        return rng.integers(0, draw(st.integers(1, highest + 1)), shape, np.uint8)

    text = st.text(st.characters(codec="utf-8"), min_size=1, max_size=40)
    return [
        Sample(
            image(),
            image(),
            mask(1),
            mask(5),
            mask(1),
            mask(1),
            draw(text),
            "sub",
        )
        for _ in range(n)
    ]


@settings(deadline=None, max_examples=60)
@given(samples(), st.sampled_from(("blosc-lz4", "none")))
def test_what_was_written_is_what_h5py_reads(
    tmp_path_factory: pytest.TempPathFactory, made: list[Sample], compression: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "random.h5"
    path.write_bytes(encode_shard(made, compression=compression, **JSONS)[0])
    shard = ShardReader(path)
    for position, sample in enumerate(made):
        fast, reference = shard.volumes(position), slow(path, position)
        for name, dtype in TABLE.items():
            assert (fast[name].dtype, fast[name].shape) == (reference[name].dtype, reference[name].shape)
            assert fast[name].tobytes() == reference[name].tobytes()
            assert fast[name].tobytes() == getattr(sample, name).astype(dtype).tobytes()
            assert fast[name].flags.writeable
    assert [shard.recipe(k) for k in range(shard.n)] == slow_recipes(path) == [sample.recipe for sample in made]
    shard.close()


def test_chunks_that_do_not_shrink_are_stored_plain_and_read(tmp_path: Path) -> None:
    """Else the property above would not have met them."""
    sample = make_sample(0)
    noise = np.random.default_rng(0).integers(0, 2**14, (SIDE,) * 3, np.uint16).view(np.float16)
    made = Sample(**{**vars(sample), "baseline": noise})
    (tmp_path / "0.h5").write_bytes(encode_shard([made], **JSONS)[0])
    with h5py.File(tmp_path / "0.h5") as file:
        masks = {name: file[name].id.get_chunk_info(0).filter_mask for name in TABLE}
    assert (masks["baseline"], masks["new_lesions"]) == (1, 0)
    np.testing.assert_array_equal(ShardReader(tmp_path / "0.h5").volumes(0)["baseline"], noise)


def test_a_sample_lies_in_one_piece(tmp_path: Path) -> None:
    """So that reading it from a disk or over a network is one access."""
    (tmp_path / "0.h5").write_bytes(encode_shard([make_sample(k, side=64) for k in range(3)], **JSONS)[0])
    layout = ShardReader(tmp_path / "0.h5").layout
    start, end = layout.volumes["offset"], layout.volumes["offset"] + layout.volumes["size"]
    assert (start[1:].min(axis=1) >= end[:-1].max(axis=1)).all()
    assert ((start[:, 1:] - end[:, :-1]) < 4096).all()


def headers_of(data: bytes) -> list[tuple[int, int, int, dict[int, int]]]:
    """Of each object: where its header begins and where its checksum stands, its flags, and where each message begins.

    HDF5 File Format Specification 3.0, section IV.A.1.b.
    """
    found, at = [], -1
    while (at := data.find(b"OHDR", at + 1)) >= 0:
        flags = data[at + 5]
        width, place = 1 << (flags & 3), at + 6 + 16 * (flags >> 5 & 1) + 4 * (flags >> 4 & 1)
        end = place + width + int.from_bytes(data[place : place + width], "little")
        place, messages = place + width, {}
        while place < end - 4:
            kind, size = data[place], int.from_bytes(data[place + 1 : place + 3], "little")
            place += 4 + 2 * (flags >> 2 & 1)
            messages[kind], place = place, place + size
        found.append((at, end, flags, messages))
    return found


def lookup3(data: bytes) -> int:
    """Bob Jenkins's hash `hashlittle` with initial value 0, the checksum of HDF5's metadata."""

    def turn(x: int, by: int) -> int:
        return (x << by | x >> 32 - by) & 0xFFFFFFFF

    def word(part: bytes, n: int) -> int:
        return int.from_bytes(part[4 * n : 4 * n + 4], "little")

    v = [(0xDEADBEEF + len(data)) & 0xFFFFFFFF] * 3
    while True:
        part, data = data[:12], data[12:]
        v = [(x + word(part, n)) & 0xFFFFFFFF for n, x in enumerate(v)]
        if not data:
            break
        for n, by in enumerate((4, 6, 8, 16, 19, 4)):
            a, b, c = n % 3, (n + 1) % 3, (n + 2) % 3
            v[a] = (v[a] - v[c] & 0xFFFFFFFF) ^ turn(v[c], by)
            v[c] = v[c] + v[b] & 0xFFFFFFFF
    for n, by in enumerate((14, 11, 25, 16, 4, 14, 24)):
        a, b = (2 + n) % 3, (1 + n) % 3
        v[a] = (v[a] ^ v[b]) - turn(v[b], by) & 0xFFFFFFFF
    return v[2]


@pytest.mark.parametrize("compression", ["blosc-lz4", "none"])
def test_hdf5_of_2016_can_read_it_and_no_header_holds_a_time(compression: str) -> None:
    """HDF5 2.0 would write layout messages of version 5, which 1.14 refuses; 1.10 knows 4."""
    data = encode_shard([make_sample(0)], **JSONS, compression=compression)[0]
    headers = headers_of(data)
    assert data[8] == 3  # the superblock's version, of 1.10
    assert len(headers) == 1 + len(TABLE) + 2
    assert all(lookup3(data[start:end]) == int.from_bytes(data[end : end + 4], "little") for start, end, *_ in headers)
    assert not any(flags & 0x20 for _, _, flags, _ in headers)
    assert [data[messages[8]] for *_, messages in headers if 8 in messages] == [4] * (len(TABLE) + 2)


def test_a_format_of_a_newer_hdf5_is_no_damage(tmp_path: Path) -> None:
    """Those who have an older HDF5 than the writer's are not told to delete the shard."""
    data = bytearray(encode_shard([make_sample(0)], **JSONS)[0])
    start, end, _, messages = headers_of(bytes(data))[1]
    data[messages[8]] = 9
    data[end : end + 4] = lookup3(bytes(data[start:end])).to_bytes(4, "little")
    (tmp_path / "newer.h5").write_bytes(data)
    with pytest.raises(InputError, match=r"format that HDF5 \d\S+ does not know; install a newer h5py") as refusal:
        ShardReader(tmp_path / "newer.h5")
    assert not isinstance(refusal.value, ShardCorruptError)


def test_a_disk_may_give_fewer_bytes_than_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, _ = encode_shard([make_sample(k) for k in range(2)], **JSONS)
    (tmp_path / "0.h5").write_bytes(data)
    read = os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, into, offset: read(file, [into[0][:1000]], offset))
    shard = ShardReader(tmp_path / "0.h5", sha256=hashlib.sha256(data).digest())
    for position in range(2):
        given = shard.volumes(position)
        assert all(np.array_equal(given[name], values) for name, values in slow(tmp_path / "0.h5", position).items())


# Releases after this one


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
    config = json.dumps({"note": "x" * 200_000, "like": "synthlong/9", "run_id": "7"})
    data, _ = encode_shard([make_sample(0)], config_json=config, versions_json="{}")
    (tmp_path / "0.h5").write_bytes(data)
    assert ShardReader(tmp_path / "0.h5").run_id() == "7"


# Changed bytes


def flips(path: Path, number: int, *, seed: int = 0) -> list[tuple[int, int]]:
    """Return places of bits to flip: all over the file, and as many in its first 6 KB, where HDF5 keeps its own."""
    size, rng = path.stat().st_size, np.random.default_rng(seed)
    offsets = [*rng.integers(0, size, number), *rng.integers(0, min(size, 6144), number)]
    return [(int(offset), int(rng.integers(8))) for offset in offsets]


def check_flips(out: Path, number: int, *, seed: int = 0) -> None:
    """Flip bits of the one shard in `out`, one after the other: each is seen before a sample is given."""
    path = out / "shards/00000.h5"
    clean = list(ShardDataset(out))
    for offset, bit in flips(path, number, seed=seed):
        flip_bit(path, offset, bit)
        for check in ("always", "first"):
            with pytest.raises(ShardCorruptError, match=r"shards/00000\.h5: its SHA-256"):
                ShardDataset(out, check=check)[0]
        flip_bit(path, offset, bit)
    assert all(map(equal, ShardDataset(out), clean))


@pytest.mark.parametrize("compression", ["blosc-lz4", "none"])
def test_a_flipped_bit_never_gives_other_numbers(tmp_path: Path, compression: str) -> None:
    check_flips(write_run(tmp_path, shards=1, size=2, compression=compression), 15)


@pytest.mark.parametrize("compression", ["blosc-lz4", "none"])
def test_flips_under_an_open_dataset_name_the_sample(tmp_path: Path, compression: str) -> None:
    """Those of stored chunks are seen by the read that meets them, the others matter no more."""
    out = write_run(tmp_path, shards=1, size=2, compression=compression)
    path = out / "shards/00000.h5"
    dataset = ShardDataset(out)
    clean = list(dataset)
    chunks = ShardReader(path).layout.volumes
    rng = np.random.default_rng(0)
    for sample, name in np.ndindex(chunks.shape):
        offset = int(chunks[sample, name]["offset"]) + int(rng.integers(chunks[sample, name]["size"]))
        flip_bit(path, offset, 5)
        with pytest.raises(ShardCorruptError, match=rf"00000\.h5: sample {sample}: .*crc32c"):
            dataset[sample]
        assert equal(dataset[1 - sample], clean[1 - sample])
        flip_bit(path, offset, 5)
    for offset, bit in flips(path, 40):
        flip_bit(path, offset, bit)
        for k in range(2):
            with suppress(ShardCorruptError):
                assert equal(dataset[k], clean[k]), offset
        flip_bit(path, offset, bit)


@pytest.mark.parametrize("compression", ["blosc-lz4", "none"])
def test_without_any_sum_a_flip_still_ends_in_an_array_or_an_error(tmp_path: Path, compression: str) -> None:
    """Unchecked layouts and blosc streams: nothing hangs, dies or reads beyond its chunk."""
    out = write_run(tmp_path, shards=1, size=2, compression=compression)
    for offset, bit in flips(out / "shards/00000.h5", 60):
        flip_bit(out / "shards/00000.h5", offset, bit)
        for k in range(2):
            with suppress(ShardCorruptError):
                assert ShardDataset(out, check="off")[k]["baseline"].shape == (1, SIDE, SIDE, SIDE)
        flip_bit(out / "shards/00000.h5", offset, bit)


def test_a_damaged_heap_of_text_attributes_cannot_hang_the_reader(tmp_path: Path) -> None:
    """HDF5 2.0 never returns from `file.attrs["schema"]` here: the next object has size 0."""
    data = bytearray(encode_shard([make_sample(0)], **JSONS)[0])
    data[data.index(b"synthlong/1") - 7] ^= 8
    (tmp_path / "0.h5").write_bytes(data)
    with pytest.raises(ShardCorruptError, match="is not of schema"):
        ShardReader(tmp_path / "0.h5")


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


def vlen(file: h5py.File, other: Path) -> None:
    n = len(file["recipe_end"])
    del file["recipe_json"]
    file.create_dataset("recipe_json", (n,), h5py.string_dtype(), chunks=(n,))


def references(file: h5py.File, other: Path) -> None:
    del file["recipe_end"]
    file.create_dataset("recipe_end", (2,), h5py.ref_dtype, chunks=(2,), fletcher32=True)


def unknown_filter(file: h5py.File, other: Path) -> None:
    values = file["followup"][:]
    del file["followup"]
    file.create_dataset("followup", data=values, chunks=(1, *values.shape[1:]), **hdf5plugin.Zstd())


def shuffled(file: h5py.File, other: Path) -> None:
    """Chunks of the right size, their bytes in another order."""
    values = file["followup"][:]
    del file["followup"]
    chunks = (1, *values.shape[1:])
    file.create_dataset("followup", data=values, chunks=chunks, shuffle=True, fletcher32=True)


def terabytes(file: h5py.File, other: Path) -> None:
    """All datasets of the contract, of a size that no disk holds, in a file of a few KB."""
    for name, dtype in TABLE.items():
        del file[name]
        file.create_dataset(name, (2, 8000, 8000, 8000), dtype, chunks=(1, 1000, 1000, 1000), fletcher32=True)


def huge_chunk(file: h5py.File, other: Path) -> None:
    """A chunk that claims to be 1000 times what lz4 could make of its bytes."""
    del file["recipe_json"]
    length = 10_000_000
    dataset = file.create_dataset(
        "recipe_json", (length,), np.uint8, chunks=(length,), fletcher32=True, **hdf5plugin.Blosc(cname="lz4")
    )
    write_raw(dataset, blosc_header(length, 100) + bytes(84))


def lying_header(file: h5py.File, other: Path) -> None:
    """The chunk's own header says that it unpacks to more than its shape."""
    write_raw(file["followup"], blosc_header(10**9, 1000) + bytes(984))


def another_codec(file: h5py.File, other: Path) -> None:
    write_raw(file["followup"], blosc_header(2 * SIDE**3, 1000, codec=4) + bytes(984))


def garbage(file: h5py.File, other: Path) -> None:
    write_raw(file["followup"], blosc_header(2 * SIDE**3, 1000) + bytes(range(246)) * 4)


def too_short(file: h5py.File, other: Path) -> None:
    write_raw(file["followup"], bytes(30), filter_mask=1)


def recipes_out_of_bounds(file: h5py.File, other: Path) -> None:
    end = file["recipe_end"][:]
    file["recipe_end"][:] = end + 1


def recipes_backwards(file: h5py.File, other: Path) -> None:
    end = file["recipe_end"][:]
    file["recipe_end"][0] = end[-1] + 5


def blosc_header(nbytes: int, cbytes: int, *, codec: int = 1) -> bytes:
    return struct.pack("<BBBBIII", 2, 1, codec << 5 | 1, 2, nbytes, min(nbytes, 2**18), cbytes)


def write_raw(dataset: h5py.Dataset, data: bytes, *, filter_mask: int = 0) -> None:
    """Store a first chunk as it is; its fletcher32 is wrong, which the fast path leaves to crc32c and SHA-256."""
    dataset.id.write_direct_chunk((0,) * len(dataset.shape), data + bytes(4), filter_mask)


ALL_TRICKS = [
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
    vlen,
    references,
    unknown_filter,
    shuffled,
    terabytes,
    huge_chunk,
    lying_header,
    another_codec,
    garbage,
    too_short,
    recipes_out_of_bounds,
    recipes_backwards,
]


@pytest.mark.parametrize("trick", ALL_TRICKS)
def test_a_misleading_shard_is_refused(tmp_path: Path, trick) -> None:
    data, _ = encode_shard([make_sample(k) for k in range(2)], **JSONS)
    shard, other = tmp_path / "00000.h5", tmp_path / "other.h5"
    shard.write_bytes(data)
    other.write_bytes(data)
    with h5py.File(shard, "r+", libver="latest") as file:
        trick(file, other)
    with pytest.raises(ShardCorruptError, match=r"00000\.h5"):
        ShardReader(shard).volumes(0)


def test_a_user_block_is_refused(tmp_path: Path) -> None:
    """It shifts all offsets."""
    data, _ = encode_shard([make_sample(0)], **JSONS)
    (tmp_path / "0.h5").write_bytes(bytes(512) + data)
    with h5py.File(tmp_path / "0.h5") as file:
        assert file.userblock_size == 512
    with pytest.raises(ShardCorruptError, match="schema"):
        ShardReader(tmp_path / "0.h5")
