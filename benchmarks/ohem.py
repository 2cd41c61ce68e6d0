"""One iteration of `train ohem` at full size, and where its time goes.

    python benchmarks/ohem.py OUT [--threads 1] [--iterations 3] [--device cpu]

OUT is a folder of 64^3 shards with two patients or more. "plain" is the same iteration in float32 with contiguous
tensors, all candidates in one batch, read when they are needed. Medians, in seconds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from synthlong.training import losses, ohem
from synthlong.training.patches import Patches, read_patches


def timed(work: Callable[[], Any], device: str) -> tuple[float, Any]:
    started = time.perf_counter()
    result = work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started, result


def parts(config: ohem.OhemConfig, patches: Patches, iterations: int) -> dict[str, float]:
    """Return the median seconds of drawing, mining and learning; the first iteration warms up."""
    torch.manual_seed(0)
    model = ohem.Ohem(config, patches, patches, about={}, checkpoint=Path("none")).to(config.device)
    adam = model.configure_optimizers()
    seconds: dict[str, list[float]] = {"data": [], "mining": [], "training": []}
    for step in range(iterations + 1):
        took, drawn = timed(lambda step=step: config.draw(patches, step, 0), config.device)
        seconds["data"].append(took)
        batch = [torch.from_numpy(d).to(config.device) for d in drawn]
        took, hardest = timed(lambda batch=batch: model.hardest(*batch), config.device)
        seconds["mining"].append(took)

        def learn(chosen: list[torch.Tensor]) -> None:
            with torch.autocast(config.device, torch.bfloat16, enabled=config.precision == "bf16"):
                loss = model.loss_on(*chosen)
            adam.zero_grad()
            loss.backward()
            adam.step()
            model.follow()

        chosen = [b[hardest] for b in batch]
        seconds["training"].append(timed(lambda chosen=chosen: learn(chosen), config.device)[0])
    return {name: float(np.median(s[1:])) for name, s in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    patches = read_patches(options.out, side=32, split="train", fold=0, folds=2)
    chunk = losses._CPU_CHUNK
    for name, precision in (("plain", "float32"), ("ours", "auto")):
        config = ohem.OhemConfig(precision=precision, mining_precision=precision, device=options.device)
        losses._CPU_CHUNK = config.candidates if name == "plain" else chunk
        seconds = parts(config, patches, options.iterations)
        each = ", ".join(f"{part} {s:.3f}" for part, s in seconds.items())
        print(f"{name}, {config.precision}: {sum(seconds.values()):.2f} s ({each})", flush=True)


if __name__ == "__main__":
    main()
