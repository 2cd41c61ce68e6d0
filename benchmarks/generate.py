"""Pairs per second of `generate` on the bundled scans, and where the time of a pair goes.

    python benchmarks/generate.py [--pairs 128] [--workers 2]

Prints wall time and rate of a whole run (cases prepared before), the share of each step in one process, and the
peak memory of the largest process.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import resource
import tempfile
import time
import warnings
from pathlib import Path

import torch

from synthlong.dataset.assets import synthesis_of
from synthlong.dataset.plan import bundled_cases
from synthlong.dataset.run import generate
from synthlong.errors import InputWarning
from synthlong.inpainting import heal
from synthlong.manifest import read_cases
from synthlong.networks import default_precision
from synthlong.pair import render
from synthlong.recipe import draw_recipe, rng_of
from synthlong.synthesis import SynthesisConfig

_STEPS = ("infer", "first_guess", "soft_hole", "draw_recipe", "put_back_real", "add_synthetic", "render")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=128)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    warnings.simplefilter("ignore", InputWarning)
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        outcome = generate(
            bundled_cases(), Path(folder) / "run", pairs=options.pairs, seed=1, shard_size=16, workers=options.workers
        )
        whole = time.perf_counter() - started
        size = sum(p.stat().st_size for p in Path(folder).rglob("*.h5")) / options.pairs
    rate = outcome.made / outcome.seconds
    print(f"generate: {outcome.made} pairs, {options.workers} workers: {rate:.2f} pairs/s", end="")
    print(f" ({outcome.seconds:.1f} s; {whole - outcome.seconds:.1f} s to prepare 2 cases), {size / 1e6:.2f} MB a pair")
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
    print(f"peak memory of the largest worker: {children:.2f} GB")

    torch.set_num_threads(1)
    config = SynthesisConfig(precision=default_precision())
    inpainter, painter, bank = synthesis_of(config)
    case = heal(next(read_cases(bundled_cases())), inpainter)
    draw_recipe(case, config, rng_of(0, case.id, 0))
    profile = cProfile.Profile()
    started = time.perf_counter()
    profile.enable()
    for k in range(40):
        render(case, draw_recipe(case, config, rng_of(1, case.id, k)), painter=painter, bank=bank)
    profile.disable()
    total = time.perf_counter() - started
    print(f"one process, one thread, without writing: {1000 * total / 40:.0f} ms a pair, of which (cumulative)")
    for (_, _, name), (_, calls, _, seconds, _) in pstats.Stats(profile).stats.items():  # type: ignore[attr-defined]
        if name in _STEPS:
            print(f"  {name:15s} {1000 * seconds / 40:6.1f} ms, {calls / 40:.1f} calls")


if __name__ == "__main__":
    main()
