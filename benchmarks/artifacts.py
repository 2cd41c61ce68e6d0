"""Every artifact against its peers, in one process and one thread; the table of `docs/artifacts/benchmark.md`.

    python benchmarks/artifacts.py [--quick] [--out docs/artifacts/benchmark.md]

Calls are interleaved (ours three times, a peer three times, the next, ours again, ...), so that caches are as warm for
all; medians are taken, images are float32. A peer is listed only where it does the same thing. `--out` writes the
table, and the costs into the pages beside it. Takes about 8 minutes, 4 with `--quick`; a machine that does something
else as well gives wrong figures.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"

import numpy as np
import SimpleITK as sitk
import torch
import torchio as tio
from scipy import ndimage
from torch import Tensor

import synthlong.artifacts as ours
from synthlong.artifacts.base import RandomArtifact

PATCH, VOLUME = (64, 64, 64), (182, 218, 182)
STD, NOISE, FACTOR = 1.125, 0.06, 2.5  # the middles of the ranges: all do the same amount of work

Calls = dict[str, Callable[[], Any]]


class Row(NamedTuple):
    """One artifact of ours."""

    title: str
    transform: RandomArtifact
    signed: bool = False


BLUR, NOISY = ours.RandomGaussianBlur((STD, STD)), ours.RandomGaussianNoise((NOISE, NOISE))
COARSE = ours.RandomAnisotropicDownsampling((FACTOR, FACTOR))
BIAS, MOTION = ours.RandomPolynomialBiasField(0.5), ours.RandomKSpaceMotion(5, translation_mm=4, movements=2)
SPIKE, GHOSTS = ours.RandomKSpaceSpike(), ours.RandomKSpaceGhosting()
OTHERS = [ours.RandomSliceThickness(3), ours.RandomUnsharpMask((STD, STD))]
SEVEN: list[RandomArtifact] = [MOTION, BIAS, GHOSTS, COARSE, SPIKE, NOISY, BLUR]

ROWS = {
    "blur": Row("Gaussian blur", BLUR),
    "unsharp": Row("unsharp mask", OTHERS[1]),
    "slice-thickness": Row("slice thickness, size 3", OTHERS[0]),
    "downsampling": Row("downsampling by 2.5", COARSE),
    "noise": Row("Gaussian noise", NOISY),
    "bias-field": Row("bias field, order 3", BIAS),
    "motion": Row("motion, two movements", MOTION),
    "spike": Row("spike, image >= 0", SPIKE),
    "spike-signed": Row("spike, signed image", SPIKE, signed=True),
    "ghosting": Row("ghosting", GHOSTS),
    "seven": Row("the seven that TorchIO has", ours.RandomAcquisition("kamraoui", artifacts=SEVEN, count=7)),
    "acquisition": Row(
        "all nine (TorchIO: its seven)",
        ours.RandomAcquisition("kamraoui", artifacts=[*SEVEN[:3], OTHERS[0], *SEVEN[3:], OTHERS[1]], count=9),
    ),
}


def of_torchio(x: Tensor) -> Calls:
    def chain(**kwargs: Any) -> list[tio.Transform]:
        return [
            tio.RandomMotion(degrees=5, translation=4, num_transforms=2, **kwargs),
            tio.RandomBiasField(coefficients=0.5, order=3, **kwargs),
            tio.RandomGhosting(**kwargs),
            tio.RandomAnisotropy(downsampling=(FACTOR, FACTOR), image_interpolation="bspline", **kwargs),
            tio.RandomSpike(**kwargs),
            tio.RandomNoise(std=(NOISE, NOISE), **kwargs),
            tio.RandomBlur(std=(STD, STD), **kwargs),
        ]

    subject = tio.Subject(image=tio.ScalarImage(tensor=x))
    names = ("motion", "bias-field", "ghosting", "downsampling", "spike", "noise", "blur")
    made = dict(zip(names, chain(), strict=True))
    made["spike-signed"] = made["spike"]
    made["seven"] = made["acquisition"] = tio.Compose(chain(copy=False))  # its fastest way: one copy for all
    return {name: lambda t=t: t(subject) for name, t in made.items()}


def of_monai(x: Tensor) -> Calls:
    import monai.transforms as mt
    from monai.data import set_track_meta

    set_track_meta(False)
    blur, box = mt.GaussianSmooth(sigma=STD), mt.ImageFilter(torch.full((1, 1, 3), 1 / 3))
    noise = mt.RandGaussianNoise(prob=1, std=NOISE, sample_std=False)
    bias = mt.RandBiasField(prob=1, coeff_range=(-0.5, 0.5))
    spike = mt.KSpaceSpikeNoise(loc=(20, 25, 28), k_intensity=12)
    made = {"blur": blur, "slice-thickness": box, "noise": noise, "bias-field": bias, "spike": spike}
    made |= {"spike-signed": spike, "unsharp": lambda x: x + (x - blur(x))}
    return {name: lambda t=t: t(x) for name, t in made.items()}


def of_batchgeneratorsv2(x: Tensor) -> Calls:
    from batchgeneratorsv2.transforms.intensity.gaussian_noise import GaussianNoiseTransform
    from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform

    scratch = {"image": x.clone()}  # changed in place
    blur, noise = GaussianBlurTransform(STD), GaussianNoiseTransform(NOISE)
    return {"blur": lambda: blur(**scratch), "noise": lambda: noise(**scratch)}


def of_scipy(x: Tensor) -> Calls:
    a = x[0].numpy()
    return {
        "blur": lambda: ndimage.gaussian_filter(a, STD),
        "unsharp": lambda: a + (a - ndimage.gaussian_filter(a, STD)),
        "slice-thickness": lambda: ndimage.uniform_filter1d(a, 3, axis=2),
    }


PEERS = {"TorchIO": of_torchio, "MONAI": of_monai, "batchgeneratorsv2": of_batchgeneratorsv2, "scipy": of_scipy}

SHORTER = ("blur", "batchgeneratorsv2")  # listed, but no measure: cut off at 3 SD, not 4

NOTES = """\
Function: on a tensor, parameters drawn before. Transform: `Random*` on a `torchio.Subject` with one image, drawing and
copying included; TorchIO is called in the same way, in its chain with one copy for all. The other peers get a bare
tensor or array. Faster: than the fastest peer.

Where peers differ a little: MONAI's blur is padded with zeros; batchgeneratorsv2's is cut off at 3 SD, not 4 (so it is
listed, but not counted), and both of its transforms change the image in place. Unsharp mask of MONAI and scipy:
`x + (x - blur(x))` with their blur. MONAI's mean is `ImageFilter` with a (1, 1, 3) box; its bias field is a sum of
Legendre polynomials of the same order; its spike replaces one coefficient, at a fixed place.

What limits ours on the patch: the check for NaN and infinity (0.015 ms), and the pages of a new image, which cost
several times a warm copy's 0.03 ms after a peer has used the memory; by itself, its caches warm, a call takes half to
two thirds of the time given. Blur: its taps are summed in groups of four, so an SD up to 1 is cheaper than 1.125.

Left out, because they do something else: MONAI's `GaussianSharpen` (blurs twice), batchgeneratorsv2's sharpening (a
Laplacian), the low-resolution simulation of both (all axes, linear). TorchIO has no unsharp mask and no mean along an
axis; nobody else has motion or ghosting."""


def medians_ms(calls: Calls, seconds: float, least: int) -> dict[str, float]:
    """Call all in turns for about so many seconds, and at least so many rounds."""
    for call in list(calls.values()) * 2:
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    stop, rounds = time.perf_counter() + seconds, 0
    while rounds < least or time.perf_counter() < stop:
        rounds += 1
        for name, call in calls.items():
            for _ in range(3):
                started = time.perf_counter()
                call()
                times[name].append(1000 * (time.perf_counter() - started))
    return {name: statistics.median(t) for name, t in times.items()}


def calls_of(name: str, row: Row, shape: tuple[int, ...]) -> Calls:
    """Ours as "function" and "transform", and the peers under their names."""
    x = torch.rand(1, *shape) + (-0.5 if row.signed else 0.1)
    subject, rng, final = tio.Subject(image=tio.ScalarImage(tensor=x)), np.random.default_rng(0), row.transform.final
    drawn = cycle([final.on_grid(row.transform.draw_params(rng), np.eye(4)) for _ in range(15)])
    calls: Calls = {"function": lambda: final.kernel(x, **next(drawn)), "transform": lambda: row.transform(subject)}
    for library, of in PEERS.items():
        try:
            found = of(x)
        except ImportError:
            continue  # told as missing below the table
        if name in found:
            calls[library] = found[name]
    return calls


def table(shape: tuple[int, ...], seconds: float, least: int, costs: dict[str, list[str]]) -> str:
    """Measure one size and return its Markdown table; add the functions' times to the costs."""
    lines = ["| artifact | function | two threads | transform | peers | function faster | transform faster |"]
    lines.append("|---" * 7 + "|")
    for name, row in ROWS.items():
        calls = calls_of(name, row, shape)
        ms = medians_ms(calls, seconds, least)
        two = ""
        if shape == VOLUME:
            torch.set_num_threads(2)
            both = medians_ms({"function": calls["function"]}, seconds / 4, least)
            two = f"{both['function']:.2f}"
            torch.set_num_threads(1)
        peers = sorted((ms[library], library) for library in PEERS if library in ms)
        best = min(t for t, library in peers if (name, library) != SHORTER)
        faster = [best / ms["function"], best / ms["transform"]]
        cells = [row.title, f"{ms['function']:.2f}", two, f"{ms['transform']:.2f}"]
        cells += [", ".join(f"{library} {t:.2f}" for t, library in peers), *(f"{f:.1f}x" for f in faster)]
        lines.append(f"| {' | '.join(cells)} |")
        costs.setdefault(name, []).append(f"{float(format(ms['function'], '.2g')):g}")
        print(lines[-1], file=sys.stderr)
    x = torch.rand(1, *shape)
    subject, nothing = tio.Subject(image=tio.ScalarImage(tensor=x)), tio.Lambda(lambda voxels: voxels)
    floor = medians_ms({"copy": x.clone, "call": lambda: nothing(subject)}, seconds / 2, least)
    lines.append(f"| a copy; TorchIO's empty `Lambda` | {floor['copy']:.2f} | | {floor['call']:.2f} | | | |")
    return "\n".join(lines)


def started_afresh() -> str:
    """Import time and first calls in new processes, numba's cache warm."""
    program = """
import sys, time
import numpy as np, torch, torchio
torch.set_num_threads(1)
times = [time.perf_counter()]
import synthlong.artifacts as artifacts
times.append(time.perf_counter())
transform, x = getattr(artifacts, sys.argv[1])(), torch.rand(64, 64, 64)
params = transform.final.on_grid(transform.draw_params(np.random.default_rng(0)), np.eye(4))
times.append(time.perf_counter())
transform.final.kernel(x, **params)
times.append(time.perf_counter())
print(times[1] - times[0], times[3] - times[2])
"""
    imports, first = [], {}
    for name in list(ROWS)[:-2]:
        command = [sys.executable, "-W", "ignore", "-c", program, type(ROWS[name].transform).__name__]
        spent = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
        imports.append(float(spent[0]))
        first[name] = 1000 * float(spent[1])
    calls = ", ".join(f"{name} {ms:.0f}" for name, ms in first.items() if name != "spike-signed")
    return (
        f"`import synthlong.artifacts` after torch and torchio: {statistics.median(imports):.2f} s.\n"
        f"First call in a new process, on the patch, numba's cache warm, ms: {calls}."
    )


def machine() -> str:
    def found(library: str) -> str:
        try:
            return f"{library} {version(library)}"
        except PackageNotFoundError:
            return f"{library} missing"

    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = re.findall(r"model name\s*: (.*)", info) or [platform.processor()]
    libraries = ("torch", "torchio", "monai", "batchgeneratorsv2", "scipy", "numba", "numpy")
    cpu = f"{names[0]}{', AVX-512 BF16' * ('avx512_bf16' in info)}, {os.cpu_count()} cores, one thread unless said"
    return f"{cpu}; Python {platform.python_version()}, {', '.join(map(found, libraries))}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    torch.manual_seed(0)
    costs: dict[str, list[str]] = {}
    patch = table(PATCH, *((1, 7) if options.quick else (3, 10)), costs)
    volume = table(VOLUME, *((1, 1) if options.quick else (5, 2)), costs)
    command = f"python benchmarks/artifacts.py{' --quick' * options.quick}"
    page = (
        f"# What the artifacts cost\n\nMilliseconds, medians, made by `{command}` on {machine()}.\n\n"
        f"## Patch 64^3\n\n{patch}\n\n## Volume 182x218x182\n\n{volume}\n\n"
        f"## Starting\n\n{started_afresh()}\n\n## How to read it\n\n{NOTES}\n"
    )
    print(page)
    if options.out:
        options.out.write_text(page)
        for name, (small, large) in costs.items():
            beside = options.out.parent / f"{name}.md"
            if beside.exists():
                cost = f"Cost: {small} ms on 64^3, {large} ms on 182x218x182 ("
                beside.write_text(re.sub(r"^Cost: [^(]*\(", cost, beside.read_text(), flags=re.MULTILINE))


if __name__ == "__main__":
    main()
