"""Every artifact against its peers, in one process and one thread; the table of `docs/artifacts/benchmark.md`.

    python benchmarks/artifacts.py [--quick] [--out docs/artifacts/benchmark.md]

Calls are interleaved (ours, peer, peer, ours, ...), medians are taken, images are float32. A peer is listed only where
it does the same thing. `--out` writes the table, and the costs into the pages beside it. Takes about 8 minutes, 1 with
`--quick`.
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
from importlib.metadata import version
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
STD, NOISE, FACTOR = 1.125, 0.06, 2.5  # the middles of the ranges, so that all do the same amount of work

Calls = dict[str, Callable[[], Any]]


class Row(NamedTuple):
    """One artifact: ours, and the goals of issue 4 (times faster than the best peer; ms on the volume)."""

    title: str
    transform: RandomArtifact
    function_goal: float | None
    transform_goal: float | None
    volume_goal: float | None
    signed: bool = False


def in_torchio() -> list[RandomArtifact]:
    """The seven of the nine that TorchIO has too, in the order in which `acquire` applies them."""
    return [
        ours.RandomKSpaceMotion(movements=2),
        ours.RandomPolynomialBiasField(),
        ours.RandomKSpaceGhosting(),
        ours.RandomAnisotropicDownsampling(factor=(FACTOR, FACTOR)),
        ours.RandomKSpaceSpike(),
        ours.RandomGaussianNoise(std=(NOISE, NOISE)),
        ours.RandomGaussianBlur(std=(STD, STD)),
    ]


ROWS = {
    "blur": Row("Gaussian blur", ours.RandomGaussianBlur(std=(STD, STD)), 10, 7, 16.4),
    "unsharp": Row("unsharp mask", ours.RandomUnsharpMask(std=(STD, STD)), 14, 9, 18.3),
    "slice-thickness": Row("slice thickness, size 3", ours.RandomSliceThickness(size=3), 5, 1.5, 3.5),
    "downsampling": Row(
        "downsampling 2.5, cubic B-spline", ours.RandomAnisotropicDownsampling(factor=(FACTOR, FACTOR)), 120, 70, 38
    ),
    "noise": Row("Gaussian noise", ours.RandomGaussianNoise(std=(NOISE, NOISE)), 3, 1.8, 13),
    "bias-field": Row("bias field, order 3", ours.RandomPolynomialBiasField(), 12, 6, 3.8),
    "motion": Row("motion, two movements", ours.RandomKSpaceMotion(movements=2), 6, 5.5, 142),
    "spike": Row("spike, image >= 0", ours.RandomKSpaceSpike(), 30, 12, 9),
    "spike-signed": Row("spike, signed image", ours.RandomKSpaceSpike(), 4, 3, 75, signed=True),
    "ghosting": Row("ghosting", ours.RandomKSpaceGhosting(), 9, 6, 41),
    "seven": Row(
        "chain of the seven in TorchIO",
        ours.RandomAcquisition("kamraoui", artifacts=in_torchio(), count=7),
        None,
        15,
        None,
    ),
    "acquisition": Row(
        "chain of all nine (TorchIO: its seven)", ours.RandomAcquisition("kamraoui", count=9), None, 15, None
    ),
}


def of_torchio(x: Tensor) -> Calls:
    subject = tio.Subject(image=tio.ScalarImage(tensor=x))

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

    names = ("motion", "bias-field", "ghosting", "downsampling", "spike", "noise", "blur")
    made = dict(zip(names, chain(), strict=True))
    made["spike-signed"] = made["spike"]
    made["seven"] = made["acquisition"] = tio.Compose(chain(copy=False))  # its fastest way: one copy for all
    return {name: lambda t=t: t(subject) for name, t in made.items()}


def of_monai(x: Tensor) -> Calls:
    import monai.transforms as mt
    from monai.data import set_track_meta

    set_track_meta(False)
    blur, spike = mt.GaussianSmooth(sigma=STD), mt.KSpaceSpikeNoise(loc=(20, 25, 28), k_intensity=12)
    noise, bias = (
        mt.RandGaussianNoise(prob=1, std=NOISE, sample_std=False),
        mt.RandBiasField(prob=1, coeff_range=(-0.5, 0.5)),
    )
    box = mt.ImageFilter(torch.full((1, 1, 3), 1 / 3))
    return {
        "blur": lambda: blur(x),
        "unsharp": lambda: x + (x - blur(x)),
        "slice-thickness": lambda: box(x),
        "noise": lambda: noise(x),
        "bias-field": lambda: bias(x),
        "spike": lambda: spike(x),
        "spike-signed": lambda: spike(x),
    }


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

NOTES = """\
Function: on a tensor. Transform: `Random*` on a `torchio.Subject` with one image, drawing and copying included.
TorchIO is called in the same way; in the chains it copies the subject once. The other peers get a bare tensor or array.

Peers, where they differ a little: MONAI's blur is padded with zeros; batchgeneratorsv2's is cut off at 3 SD, not 4, and
both of its transforms change the image in place. Unsharp of MONAI and scipy: `x + (x - blur(x))` with their blur.
MONAI's mean filter is `ImageFilter` with a (1, 1, 3) box; it has no even sizes. MONAI's bias field is a sum of Legendre
polynomials of the same order. MONAI's spike replaces one coefficient, at a fixed place.

Left out, because they do something else: MONAI's `GaussianSharpen` (blurs twice) and batchgeneratorsv2's sharpening
(a Laplacian); both libraries' low-resolution simulation (all axes; nearest and linear, not cubic B-spline). TorchIO has
no unsharp mask and no slice thickness; nobody else has motion or ghosting."""


def function_of(row: Row, x: Tensor) -> Callable[[], Tensor]:
    """Our plain function, with parameters drawn beforehand."""
    rng, final = np.random.default_rng(0), row.transform.final
    drawn = cycle([final.on_grid(row.transform.draw_params(rng), np.eye(4)) for _ in range(15)])
    return lambda: final.kernel(x, **next(drawn))


def medians_ms(calls: Calls, seconds: float, least: int) -> dict[str, float]:
    """Call all in turns for about so many seconds, and at least so many rounds."""
    for call in list(calls.values()) * 2:
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    stop, rounds = time.perf_counter() + seconds, 0
    while rounds < least or time.perf_counter() < stop:
        rounds += 1
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            times[name].append(1000 * (time.perf_counter() - started))
    return {name: statistics.median(t) for name, t in times.items()}


def measure(name: str, row: Row, shape: tuple[int, ...], seconds: float, least: int) -> dict[str, float]:
    """Medians in ms: "function", "transform", "two threads" (volume only), and each peer's."""
    x = torch.rand(1, *shape) + 0.1 - row.signed * 0.6
    subject = tio.Subject(image=tio.ScalarImage(tensor=x))
    calls: Calls = {"function": function_of(row, x), "transform": lambda: row.transform(subject)}
    for library, of in PEERS.items():
        try:
            calls |= {library: call for key, call in of(x).items() if key == name}
        except ImportError:
            continue
    result = medians_ms(calls, seconds, least)
    if shape == VOLUME:
        torch.set_num_threads(2)
        result["two threads"] = medians_ms({"": calls["function"]}, seconds / 4, least)[""]
        torch.set_num_threads(1)
    return result


def goal(value: float, wanted: float | None) -> str:
    return "" if wanted is None else f" ({wanted:g}: {'met' if value >= wanted else 'missed'})"


def table(shape: tuple[int, ...], seconds: float, least: int, costs: dict[str, list[str]]) -> str:
    """Measure one size and return its Markdown table; add our times to the costs of the pages."""
    whole = shape == VOLUME
    lines = [
        f"| artifact | function, ms |{' two threads | goal |' if whole else ''} transform, ms | peers, ms"
        f" | function{'' if whole else ' (goal)'} | transform{'' if whole else ' (goal)'} |",
        f"|---|---|{'---|---|' if whole else ''}---|---|---|---|",
    ]
    for name, row in ROWS.items():
        ms = measure(name, row, shape, seconds, least)
        peers = sorted((ms[library], library) for library in PEERS if library in ms)
        best = peers[0][0]
        faster = [best / ms["function"], best / ms["transform"]]
        goals = [None, None] if whole else [row.function_goal, row.transform_goal]
        shown = [f"{f:.1f}x{goal(f, g)}" for f, g in zip(faster, goals, strict=True)]
        cells = [row.title, f"{ms['function']:.2f}"]
        if whole:
            limit = row.volume_goal
            cells.append(f"{ms['two threads']:.2f}")
            cells.append("" if limit is None else f"{limit:g}: {'met' if ms['function'] <= limit else 'missed'}")
        cells += [f"{ms['transform']:.2f}", ", ".join(f"{library} {t:.2f}" for t, library in peers), *shown]
        lines.append(f"| {' | '.join(cells)} |")
        costs.setdefault(name, []).append(f"{ms['function']:.2g}")
        print(lines[-1], file=sys.stderr)
    x = torch.rand(1, *shape)
    nothing = tio.Lambda(lambda voxels: voxels)
    subject = tio.Subject(image=tio.ScalarImage(tensor=x))
    floor = medians_ms({"copy": x.clone, "call": lambda: nothing(subject)}, seconds / 2, least)
    blank = " | |" if whole else ""
    lines.append(
        f"| a copy; TorchIO's call that does nothing | {floor['copy']:.2f} |{blank} {floor['call']:.2f} | | | |"
    )
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
    for name, row in ROWS.items():
        if row.signed or name in ("seven", "acquisition"):
            continue
        command = [sys.executable, "-W", "ignore", "-c", program, type(row.transform).__name__]
        spent = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
        imports.append(float(spent[0]))
        first[name] = 1000 * float(spent[1])
    calls = ", ".join(f"{name} {ms:.0f}" for name, ms in first.items())
    return (
        f"`import synthlong.artifacts` after torch and torchio: {statistics.median(imports):.2f} s (goal: under 1.5)."
        f"\nFirst call in a new process, on the patch, numba's cache warm, ms (goal: under 50): {calls}."
    )


def machine() -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    bf16 = " with AVX-512 BF16" if info.exists() and "avx512_bf16" in info.read_text() else ""
    libraries = ("torch", "torchio", "monai", "batchgeneratorsv2", "scipy", "numba", "numpy")
    found = []
    for library in libraries:
        try:
            found.append(f"{library} {version(library)}")
        except ImportError:
            found.append(f"{library} missing")
    cpu = f"{names[0] if names else platform.processor()}{bf16}, {os.cpu_count()} cores"
    return f"{cpu}, one thread unless said; Python {platform.python_version()}, {', '.join(found)}."


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
    patch = table(PATCH, *((0.5, 5) if options.quick else (4, 25)), costs)
    volume = table(VOLUME, *((1, 2) if options.quick else (20, 7)), costs)
    page = f"""# What the artifacts cost

Made by `python benchmarks/artifacts.py`{" --quick" if options.quick else ""}. {machine()}

## Patch 64^3

{patch}

The last two columns: how many times faster than the fastest peer, and whether that meets the goal.

## Volume 182x218x182

{volume}

Goal: at most so many ms for the function, one thread.

## Starting

{started_afresh()}

## How to read it

{NOTES}
"""
    print(page)
    if options.out:
        options.out.write_text(page)
        for name, (small, large) in costs.items():
            beside = options.out.parent / f"{name}.md"
            if beside.exists():
                line = f"Cost: {small} ms on 64^3, {large} ms on 182x218x182"
                beside.write_text(re.sub(r"^Cost: [^(]*[^( ]", line, beside.read_text(), flags=re.MULTILINE))


if __name__ == "__main__":
    main()
