"""The pictures of `docs/artifacts`: a bundled scan without an artifact, at three strengths, and below them the change.

    python examples/plot_artifacts.py [FOLDER]

FOLDER is `docs/artifacts` by default.
"""

import argparse
import warnings
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

import synthlong.artifacts as library
from synthlong.artifacts.base import Artifact, softened
from synthlong.dataset.plan import bundled_cases
from synthlong.errors import InputWarning
from synthlong.manifest import read_cases
from synthlong.pictures import Picture, gray_pixels, png_bytes, upright

CORONAL, AXIAL = (1, 110), (2, 95)  # axis and slice: ventricles, and a small lesion behind the left one
ZOOM = np.ones((2, 2), np.uint8)
STDS = (0.5, 1.125, 1.75)


def motions() -> list[Artifact]:
    """The same two movements at a third, two thirds and the whole of their size."""
    degrees, shifts = np.array([[2, -1, 5], [-3, 2, -4]]), np.array([[1, 4, -2], [-2, -3, 1]])
    sizes = (1 / 3, 2 / 3, 1)
    return [library.KSpaceMotion((s * degrees).tolist(), (s * shifts).tolist(), [0.44, 0.56], axis=1) for s in sizes]


def bias_fields() -> list[Artifact]:
    """The same field at a third, two thirds and the whole of its size."""
    drawn = library.RandomPolynomialBiasField().draw_params(np.random.default_rng(6))
    return [library.PolynomialBiasField(**softened(drawn, {"coefficients": 0}, s)) for s in (1 / 3, 2 / 3, 1)]


def gallery() -> dict[str, tuple[tuple[int, int], list[Artifact]]]:
    """Page -> cut, and the artifact at three strengths."""
    return {
        "blur": (AXIAL, [library.GaussianBlur(std) for std in STDS]),
        "unsharp": (AXIAL, [library.UnsharpMask(std) for std in STDS]),
        "slice-thickness": (CORONAL, [library.SliceThickness(size) for size in (2, 3, 4)]),
        "downsampling": (AXIAL, [library.AnisotropicDownsampling(factor, axis=1) for factor in (1.5, 2.75, 4)]),
        "noise": (AXIAL, [library.GaussianNoise(std, seed=1) for std in (0.02, 0.06, 0.1)]),
        "bias-field": (AXIAL, bias_fields()),
        "motion": (AXIAL, motions()),
        "spike": (AXIAL, [library.KSpaceSpike([[0.62, 0.57, 0.5]], intensity) for intensity in (1, 2, 3)]),
        "ghosting": (AXIAL, [library.KSpaceGhosting(5, 1, intensity) for intensity in (0.5, 0.75, 1)]),
    }


def acquisitions() -> list[Artifact]:
    """Seven draws of the full-strength mixture, chosen to show each of the nine."""
    mixture = library.RandomAcquisition("kamraoui")
    drawn = [mixture.draw_params(np.random.default_rng(seed)) for seed in (8, 11, 14, 18, 21, 26, 28)]
    print("acquisition:", "; ".join(" + ".join(name for name, _ in params["steps"]) for params in drawn))
    return [mixture.final(**params) for params in drawn]


def main(folder: str) -> None:
    warnings.simplefilter("ignore", InputWarning)
    case = next(case for case in read_cases(bundled_cases()) if "cs07" in case.id)
    scan = torch.from_numpy(case.flair)
    grid = range(3)
    inside = [np.flatnonzero(case.brain.any(axis=tuple({0, 1, 2} - {axis})))[[0, -1]] for axis in grid]

    def cut(volume: torch.Tensor, plane: tuple[int, int]) -> NDArray[np.float32]:
        """Return a slice, cropped to the brain."""
        boxes = [slice(first - 3, last + 4) for first, last in inside]
        return upright(volume.numpy()[*(plane[1] if axis == plane[0] else boxes[axis] for axis in grid)])

    def sheet(rows: list[list[NDArray[np.float32]]]) -> Picture:
        gap = np.full((len(rows[0][0]), 4), 9.0)
        wide = [np.hstack([part for plane in row for part in (plane, gap)][:-1]) for row in rows]
        return np.kron(gray_pixels(np.vstack(wide)) & 0xFC, ZOOM)  # 64 grays make smaller files

    for page, (plane, twins) in gallery().items():
        clean = cut(scan, plane)
        planes = [cut(twin(scan), plane) for twin in twins]
        change = [1 + 2 * (shown - clean) for shown in (clean, *planes)]
        Path(folder, f"{page}.png").write_bytes(png_bytes(sheet([[clean, *planes], change])))
    planes = [cut(twin(scan), AXIAL) for twin in acquisitions()]
    Path(folder, "acquisition.png").write_bytes(png_bytes(sheet([[cut(scan, AXIAL), *planes[:3]], planes[3:]])))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", default="docs/artifacts")
    main(parser.parse_args().folder)
