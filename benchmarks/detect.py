"""New lesions of a whole brain: `probability_map` beside MONAI's `sliding_window_inference`, same network and windows.

    python benchmarks/detect.py [--threads 1 2] [--weights W.safetensors ...] [--window 32]

Without weights, a network of each kind learns for a few minutes to find bright balls in the second of two noisy copies
of a bundled scan; untrained ones would hardly cross 0.5 anywhere. They look for such balls in the other bundled scan.
MONAI runs as one would call it: float32, four windows at a time, those of background, too.
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch.nn import functional as F

from synthlong.case import Case
from synthlong.dataset.plan import bundled_cases
from synthlong.detection.inference import read_detectors
from synthlong.detection.networks import ConcatUNet, LongitudinalUNet, SiameseUNet
from synthlong.detection.sliding import probability_map, window_of
from synthlong.errors import InputWarning
from synthlong.manifest import read_cases
from synthlong.tissue import WHITE

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from monai.inferers import sliding_window_inference

_SIDE, _BATCH, _STEPS = 32, 4, 300


def two_visits(case: Case, rng: np.random.Generator, balls: int) -> tuple[NDArray, NDArray, NDArray]:
    """Return two noisy copies of a scan, the second with balls of three sizes, and where those are."""
    sites = np.argwhere(case.tissue == WHITE)
    new = np.zeros(case.shape, np.float32)
    for radius, strength in ((2.0, 0.6), (3.5, 0.5), (5.0, 0.4)):
        elsewhere = np.ones(case.shape, bool)
        elsewhere[tuple(sites[rng.integers(len(sites), size=balls)].T)] = False
        new[ndimage.distance_transform_edt(elsewhere) <= radius] = strength
    visits = [case.flair + rng.normal(0, 0.04, case.shape) + extra for extra in (0, new)]
    before, after = (np.where(case.brain, np.maximum(v, 0), 0).astype(np.float32) for v in visits)
    return before, after, (new > 0) & (case.brain > 0)


def trained(kind: type[LongitudinalUNet], case: Case) -> LongitudinalUNet:
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    network = kind().to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    adam = torch.optim.Adam(network.parameters())
    before, after, new = two_visits(case, rng, 100)
    volumes = kind.normalised(before), kind.normalised(after), new.astype(np.float32)
    places = [np.argwhere(new), np.argwhere(case.brain)]
    for step in range(_STEPS):
        adam.param_groups[0]["lr"] = 2e-3 * (1 - step / _STEPS)
        windows = []
        for k in range(_BATCH):
            centre = places[k % 2][rng.integers(len(places[k % 2]))]
            start = np.clip(centre - rng.integers(4, _SIDE - 4, 3), 0, np.array(case.shape) - _SIDE)
            windows.append(tuple(slice(s, s + _SIDE) for s in start))
        a, b, truth = (torch.from_numpy(np.stack([v[w] for w in windows])[:, None]) for v in volumes)
        with torch.autocast("cpu", torch.bfloat16):
            logits = network(a, b)
        p = logits.float().sigmoid()
        dice = (2 * (p * truth).sum() + 1) / (p.sum() + truth.sum() + 1)
        adam.zero_grad()
        (F.binary_cross_entropy_with_logits(logits.float(), truth) - dice).backward()
        adam.step()
    return network.to(memory_format=torch.contiguous_format).eval()


def of_monai(network: LongitudinalUNet, before: NDArray, after: NDArray, brain: NDArray, window: int) -> NDArray:
    both = torch.from_numpy(np.stack([before, after]))[None]
    with torch.inference_mode():
        found = sliding_window_inference(both, window, 4, lambda x: network(*x.split(1, dim=1)).sigmoid(), overlap=0.25)
    return np.where(brain, found[0, 0].numpy(), 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--weights", type=Path, nargs="+", default=[])
    parser.add_argument("--window", type=int, help="default: what the weights say")
    options = parser.parse_args()
    warnings.simplefilter("ignore", InputWarning)
    school, case = read_cases(bundled_cases())
    torch.set_num_threads(1)
    networks = [read_detectors([path])[0] for path in options.weights]
    networks = networks or [trained(kind, school) for kind in (ConcatUNet, SiameseUNet)]
    before, after, new = two_visits(case, np.random.default_rng(1), 4)
    parts = {"the whole grid": np.s_[:, :, :], "the brain's box, as in `detect`": ndimage.find_objects(case.brain)[0]}
    for network in networks:
        window = window_of([network], options.window)
        for threads in options.threads:
            torch.set_num_threads(threads)
            for name, part in parts.items():
                volumes = [network.normalised(v)[part] for v in (before, after)]
                started = time.perf_counter()
                theirs = of_monai(network, *volumes, case.brain[part], window)
                seconds, mask = time.perf_counter() - started, theirs > 0.5
                dice = 2 * (new[part] & mask).sum() / (new[part].sum() + mask.sum())
                print(f"{type(network).__name__}, threads {threads}, {name}, Dice {dice:.2f}: MONAI {seconds:.1f} s")
                for precision in ("float32", "bf16", "auto"):
                    started = time.perf_counter()
                    ours = probability_map([network], *volumes, case.brain[part], window=window, precision=precision)
                    took = time.perf_counter() - started
                    differ, apart = ((ours > 0.5) != mask).sum(), np.abs(ours - theirs).max()
                    text = f"{differ} of {mask.sum()} mask voxels differ, probabilities by up to {apart:.4f}"
                    print(f"  {precision:8s} {took:6.1f} s, {seconds / took:4.1f} times as fast; {text}", flush=True)


if __name__ == "__main__":
    main()
