"""Hundreds of faults at random; `make soak`. The same ones, a few of each, are in the other tests."""

import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest
from running import bytes_of, kill_group, made, started
from test_faults import OPTIONS, arguments
from test_reader import flips
from test_shards import flip_bit

from synthlong import ShardDataset
from synthlong.dataset.verify import verify
from synthlong.errors import ShardCorruptError

PUBLISH = """
import sys
from pathlib import Path
from synthlong.publishing import publish
data = Path(sys.argv[1]).read_bytes()
out = Path(sys.argv[2])
print("ready", flush=True)
for k in range(100000):
    publish(out / f"{k % 50:05d}.h5", data)
"""

pytestmark = [pytest.mark.soak, pytest.mark.timeout(7200)]


def test_two_hundred_kills_while_publishing(tmp_path):
    data = bytes(random.Random(0).randbytes(3_000_000))
    (tmp_path / "data").write_bytes(data)
    out, draw = tmp_path / "out", random.Random(1)
    out.mkdir()
    torn = temporaries = published = 0
    for _ in range(200):
        command = [sys.executable, "-c", PUBLISH, tmp_path / "data", out]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout.readline() == b"ready\n"
            time.sleep(draw.uniform(0, 0.2))
            process.send_signal(signal.SIGKILL)
        for file in out.iterdir():
            whole = file.read_bytes() == data
            published += ".tmp-" not in file.name
            temporaries += ".tmp-" in file.name
            torn += ".tmp-" not in file.name and not whole
        shutil.rmtree(out)
        out.mkdir()
    print(f"\npublishing: 200 kills, {published} shards published, {torn} torn, {temporaries} temporaries left")
    assert torn == 0
    assert published > 200
    assert temporaries > 20  # or the kills missed the writing


def test_forty_kills_of_whole_runs(manifest):
    """Killed and resumed until it is complete, again and again; the bytes are those of a run left alone."""
    expected, draw = made(manifest, "alone", **OPTIONS), random.Random(2)
    kills = runs = 0
    while kills < 40:
        out = manifest.parent / f"run-{runs}"
        runs += 1
        while not (out / "index.json").exists():
            with started(*arguments(manifest, out, workers=2)) as process:
                try:
                    process.wait(timeout=draw.uniform(0, 14))
                except subprocess.TimeoutExpired:
                    kill_group(process.pid)
                    kills += 1
                else:
                    assert process.returncode == 0, process.stderr.read()
            for name, data in bytes_of(out).items() if out.exists() else ():
                if name.startswith("shards/") and ".tmp-" not in name:
                    assert data == expected[name], name
        assert bytes_of(out) == expected
        shutil.rmtree(out)
    print(f"\nruns: {kills} kills, {runs} runs completed, all bytes those of a run left alone")


def test_five_hundred_flipped_bits_of_a_real_run(manifest):
    """Half of them in a shard's first 6 KB; each is found by `verify`, and no read returns other numbers."""
    out = manifest.parent / "flipped"
    made(manifest, "flipped", **OPTIONS)
    found = refused = 0
    for number in range(12):
        shard = out / "shards" / f"{number:05d}.h5"
        for offset, bit in flips(shard, 21, seed=number):
            flip_bit(shard, offset, bit)
            found += [p.file for p in verify(out).problems] == [f"shards/{shard.name}"]
            with suppress(ShardCorruptError):
                ShardDataset(out)[number * OPTIONS["shard_size"]]
                refused -= 1
            refused += 1
            flip_bit(shard, offset, bit)
    print(f"\nflips: 504, found by verify {found}, refused by the reader {refused}")
    assert found == refused == 504
    assert not verify(out).problems
