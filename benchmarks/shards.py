"""Shards beside h5py, zarr, WebDataset and torch.save: reads a second, size, and what checks, writing and opening cost.

    python benchmarks/shards.py [--pairs 96] [--repeats 5]        # pip install "synthlong[bench]"

Real crops with artifacts, made by `generate` from the bundled scans. Every layout gives what `ShardDataset[i]` does:
two float32 images, four uint8 masks, the recipe; all store the images as float16, and the files are in the page
cache. Reads a second: of the median read, and in parentheses of the fastest twentieth, which a busy machine disturbs
less; of a loader the median round and the best.
"""

from __future__ import annotations

import argparse
import io
import os
import pickle
import sys
import tarfile
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from synthlong.dataset.index import write_index
from synthlong.dataset.plan import bundled_cases
from synthlong.dataset.reader import IMAGES, VOLUMES
from synthlong.dataset.run import generate
from synthlong.dataset.shards import ShardDataset
from synthlong.dataset.verify import verify
from synthlong.dataset.writer import Sample, write_shard
from synthlong.errors import InputWarning

try:
    import webdataset
    import zarr
except ImportError as error:
    sys.exit(f'{error}: the other layouts need `pip install "synthlong[bench]"`')

SHARD_SIZE = 32
JSONS: dict[str, Any] = {"config_json": '{"run_id":"benchmark"}', "versions_json": "{}"}
Arrays = dict[str, Any]


def as_sample(arrays: Arrays) -> Arrays:
    """Return stored arrays as `ShardDataset` gives them; torch is the fastest from float16 to float32."""
    volumes = {name: torch.from_numpy(arrays[name])[None] for name in VOLUMES}
    return {**volumes, **{name: volumes[name].float() for name in IMAGES}, "recipe": arrays["recipe"]}


class Reader(Dataset[Arrays]):
    """Samples of one layout: what `opened` opens, once in each process, and `read` reads from."""

    def __init__(self, n: int, opened: Callable[[], Any], read: Callable[[Any, int], Arrays]) -> None:
        self.n, self.opened, self.read = n, opened, read
        self.files: tuple[int, Any] = (0, None)

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> Arrays:
        if self.files[0] != os.getpid():
            self.files = (os.getpid(), self.opened())
        return self.read(self.files[1], i)


def plain_hdf5(folder: Path, pairs: list[Arrays], **filters: Any) -> Reader:
    parts = [pairs[first : first + SHARD_SIZE] for first in range(0, len(pairs), SHARD_SIZE)]
    for number, part in enumerate(parts):
        with h5py.File(folder / f"{number}.h5", "w", libver="latest") as file:
            for key in VOLUMES:
                data = np.stack([pair[key] for pair in part])
                file.create_dataset(key, data=data, chunks=(1, *data.shape[1:]), **filters)
            file["recipe"] = [pair["recipe"] for pair in part]

    def opened() -> list[dict[str, Any]]:
        files = [h5py.File(folder / f"{number}.h5", rdcc_nbytes=0) for number in range(len(parts))]
        return [{name: file[name] for name in (*VOLUMES, "recipe")} for file in files]

    def read(files: list[dict[str, Any]], i: int) -> Arrays:
        data, k = files[i // SHARD_SIZE], i % SHARD_SIZE
        return as_sample({**{key: data[key][k] for key in VOLUMES}, "recipe": data["recipe"][k].decode()})

    return Reader(len(pairs), opened, read)


def synthlong_by_h5py(folder: Path, pairs: list[Arrays]) -> Reader:
    write_shards(folder, pairs)

    def opened() -> list[dict[str, Any]]:
        files = [h5py.File(path, locking=False, rdcc_nbytes=0) for path in sorted(folder.glob("shards/*.h5"))]
        return [{name: file[name] for name in (*VOLUMES, "recipe_json", "recipe_end")} for file in files]

    def read(files: list[dict[str, Any]], i: int) -> Arrays:
        data, k = files[i // SHARD_SIZE], i % SHARD_SIZE
        end = data["recipe_end"][:]
        recipe = data["recipe_json"][end[k - 1] if k else 0 : end[k]].tobytes().decode()
        return as_sample({**{key: data[key][k] for key in VOLUMES}, "recipe": recipe})

    return Reader(len(pairs), opened, read)


def zarr_blosc(folder: Path, pairs: list[Arrays]) -> Reader:
    group = zarr.create_group(folder / "data.zarr")
    blosc = zarr.codecs.BloscCodec(cname="lz4", clevel=5, shuffle="shuffle")
    for key in VOLUMES:
        data = np.stack([pair[key] for pair in pairs])
        group.create_array(key, data=data, chunks=(1, *data.shape[1:]), compressors=blosc)
    group.attrs["recipes"] = [pair["recipe"] for pair in pairs]

    def opened() -> Arrays:
        group = zarr.open_group(folder / "data.zarr", mode="r")
        return {**{key: group[key] for key in VOLUMES}, "recipes": group.attrs["recipes"]}

    def read(data: Arrays, i: int) -> Arrays:
        return as_sample({**{key: data[key][i] for key in VOLUMES}, "recipe": data["recipes"][i]})

    return Reader(len(pairs), opened, read)


def torch_saved(folder: Path, pairs: list[Arrays]) -> Reader:
    for k, pair in enumerate(pairs):
        tensors = {key: torch.from_numpy(pair[key])[None] for key in VOLUMES}
        torch.save({**tensors, "recipe": pair["recipe"]}, folder / f"{k}.pt")

    def read(_: None, i: int) -> Arrays:
        sample: Arrays = torch.load(folder / f"{i}.pt", weights_only=True)
        return sample | {key: sample[key].float() for key in IMAGES}

    return Reader(len(pairs), lambda: None, read)


def web_dataset(folder: Path, pairs: list[Arrays]) -> Any:
    """Return a stream, which has no `[i]`: its rate is that of reading all samples in their order."""
    for k, pair in enumerate(pairs):
        with tarfile.open(folder / f"{k // SHARD_SIZE}.tar", "a") as tar:
            members = {f"{key}.npy": npy(pair[key]) for key in VOLUMES} | {"recipe.txt": pair["recipe"].encode()}
            for name, data in members.items():
                info = tarfile.TarInfo(f"{k:06d}.{name}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))

    def decoded(item: dict[str, bytes]) -> Arrays:
        arrays: Arrays = {key: np.load(io.BytesIO(item[f"{key}.npy"])) for key in VOLUMES}
        return as_sample({**arrays, "recipe": item["recipe.txt"].decode()})

    tars = [str(path) for path in sorted(folder.glob("*.tar"))]
    return webdataset.WebDataset(tars, shardshuffle=False, empty_check=False).map(decoded)


OTHERS: dict[str, Callable[[Path, list[Arrays]], Any]] = {
    "h5py, one-sample chunks": plain_hdf5,
    "h5py, one-sample chunks, fletcher32": partial(plain_hdf5, fletcher32=True),
    "h5py on synthlong's default shards": synthlong_by_h5py,
    "zarr v3, blosc-lz4": zarr_blosc,
    "torch.save, a file a sample": torch_saved,
    "WebDataset, .npy in tar, in order": web_dataset,
}


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def write_shards(folder: Path, pairs: list[Arrays], compression: str = "blosc-lz4") -> float:
    """Write pairs as shards of synthlong; return the seconds that they took, fsync included."""
    started, sidecars = time.perf_counter(), []
    for number, first in enumerate(range(0, len(pairs), SHARD_SIZE)):
        samples = [Sample(**pair, subject="s") for pair in pairs[first : first + SHARD_SIZE]]
        sidecars.append(write_shard(folder, number, samples, first_index=first, compression=compression, **JSONS))
    seconds = time.perf_counter() - started
    write_index(folder, "benchmark", sidecars)
    return seconds


def timed(run: Callable[[], Any]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def read_seconds(data: Dataset[Arrays], order: list[int]) -> list[float]:
    seconds = []
    for i in order:
        started = time.perf_counter()
        data[i]
        seconds.append(time.perf_counter() - started)
    return seconds


def stream_seconds(stream: Any) -> list[float]:
    seconds, samples = [], iter(stream)
    started = time.perf_counter()
    for _ in samples:
        seconds.append(time.perf_counter() - started)
        started = time.perf_counter()
    return seconds


def loader_rate(data: Any, order: list[int] | None, workers: int) -> float:
    """Return samples a second of a loader, from its first sample on: the start of workers is not reading."""
    samples = iter(DataLoader(data, batch_size=None, sampler=order, num_workers=workers))
    next(samples)
    started = time.perf_counter()
    return sum(1 for _ in samples) / (time.perf_counter() - started)


def shown(seconds: list[float]) -> str:
    """Return the rate of the median read, and of the read that only a twentieth undercut."""
    return f"{1 / np.median(seconds):,.0f} ({1 / np.quantile(seconds, 0.05):,.0f})"


def compare_layouts(folder: Path, pairs: list[Arrays], repeats: int) -> None:
    """Print a row for each layout; rounds go through all layouts, so that a busy minute hits each alike."""
    layouts: dict[str, tuple[Path, Any]] = {}
    for number, (name, store) in enumerate(OTHERS.items()):
        path = folder / f"other-{number}"
        path.mkdir()
        layouts[name] = path, store(path, pairs)
    for compression in ("blosc-lz4", "none"):
        write_shards(path := folder / compression, pairs, compression)
        for check in ("always", "off"):
            layouts[f"synthlong {compression}, check={check}"] = path, ShardDataset(path, check=check)
    reads: dict[str, list[float]] = {name: [] for name in layouts}
    loaded: dict[str, list[list[float]]] = {name: [] for name in layouts}
    for repeat in range(4 * repeats + 1):
        order = np.random.default_rng(repeat).permutation(len(pairs)).tolist()  # no chunk twice from a cache
        for name, (_, data) in layouts.items():
            random = isinstance(data, Reader | ShardDataset)
            seconds = read_seconds(data, order) if random else stream_seconds(data)
            if repeat:  # the first round opens files and fills caches
                reads[name] += seconds
            if repeat % 4 == 1:
                loaded[name].append([loader_rate(data, order if random else None, w) for w in (0, 2)])
    plain = sum(2 * 4 * pair["baseline"].size + 4 * pair["evolution"].size for pair in pairs)
    print("| layout | random reads/s | DataLoader, 0 workers | 2 workers | size / (float32 pair + uint8 masks) |")
    print("|---|---|---|---|---|")
    for name, (path, _) in sorted(layouts.items(), key=lambda item: np.median(reads[item[0]])):
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        through = [f"{np.median(rates):,.0f} ({max(rates):,.0f})" for rates in zip(*loaded[name], strict=True)]
        print(f"| {name} | {shown(reads[name])} | {' | '.join(through)} | {size / plain:.3f} |")
    print()
    for compression in ("blosc-lz4", "none"):
        always, off = (np.median(reads[f"synthlong {compression}, check={check}"]) for check in ("always", "off"))
        print(f"{compression}: {1 - off / always:.0%} of a read is spent on its crc32c")


def first_use(run: Path, repeats: int) -> None:
    size, n = sum(p.stat().st_size for p in run.glob("shards/*.h5")), len(list(run.glob("shards/*.h5")))
    firsts = [timed(lambda: [ShardDataset(run)[k * SHARD_SIZE] for k in range(n)]) / n for _ in range(repeats)]
    median = np.median(firsts)
    print(
        f"first use of a shard (open, SHA-256, layout, crc32c; {size / n / 1e6:.0f} MB): {1e3 * median:.0f} ms, ",
        end="",
    )
    print(f"{size / n / median / 1e6:,.0f} MB/s")


def whole_verify(run: Path, pairs: list[Arrays], repeats: int) -> None:
    reports = [verify(run) for _ in range(repeats)]
    assert not reports[0].problems
    seconds = np.median([report.seconds for report in reports])
    decoded = sum(pair[name].nbytes for pair in pairs for name in VOLUMES)
    print(f"verify: {reports[0].bytes / seconds / 1e6:,.0f} MB/s of files, {decoded / seconds / 1e6:,.0f} MB/s decoded")


def many_shards(folder: Path, repeats: int, n: int = 10_000) -> None:
    """Time the opening of many shards: the index of 64 samples each, and hard links to one small file."""
    (folder / "shards").mkdir(parents=True)
    (folder / "small").write_bytes(bytes(1000))
    sidecars = []
    for number in range(n):
        (folder / f"shards/{number:05d}.h5").hardlink_to(folder / "small")
        (folder / f"shards/{number:05d}.json").touch()
        samples = [{"index": 64 * number + k, "subject": f"sub-{(64 * number + k) % 60:02d}"} for k in range(64)]
        sidecars.append({"bytes": 1000, "sha256": f"{number:064x}", "n": 64, "samples": samples})
    write_index(folder, "many", sidecars)
    del sidecars
    seconds = [timed(lambda: ShardDataset(folder)) for _ in range(repeats)]
    state = len(pickle.dumps(ShardDataset(folder)))
    print(
        f"opening {n:,} shards of 64: {np.median(seconds):.2f} s ({min(seconds):.2f}); pickled: {state / 1e3:.0f} kB",
        end="",
    )
    quick = [timed(lambda: verify(folder, quick=True)) for _ in range(repeats)]
    print(f"; verify --quick: {np.median(quick):.2f} s ({min(quick):.2f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    warnings.simplefilter("ignore", InputWarning)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        workers = len(os.sched_getaffinity(0))
        outcome = generate(
            bundled_cases(), folder / "run", pairs=options.pairs, seed=1, shard_size=SHARD_SIZE, workers=workers
        )
        torch.set_num_threads(1)
        data = ShardDataset(folder / "run")
        pairs = [
            {key: item[0].numpy() if key != "recipe" else item for key, item in data[k].items()}
            for k in range(len(data))
        ]
        for pair in pairs:
            pair.update({key: pair[key].astype(np.float16) for key in IMAGES})
        print(
            f"{len(pairs)} pairs, {SHARD_SIZE} a shard; load {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors\n"
        )
        compare_layouts(folder, pairs, options.repeats)
        first_use(folder / "run", options.repeats)
        whole_verify(folder / "run", pairs, options.repeats)
        written = min(write_shards(folder / f"written-{k}", pairs) for k in range(options.repeats))
        made = outcome.seconds * min(workers, outcome.shards)
        print(f"writing: {1e3 * written / len(pairs):.1f} ms a pair (lz4, hashes, fsync), ", end="")
        print(f"{written / made:.1%} of the {1e3 * made / len(pairs):.0f} ms that a pair takes one worker")
        many_shards(folder / "many", options.repeats)


if __name__ == "__main__":
    main()
