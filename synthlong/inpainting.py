"""The inpainter: a scan without its lesions.

A 3-D U-Net learns to restore lesion-free tissue whose lesion-like areas were replaced by noise (Kamraoui et
al. 2022, section 2.3.1, doi 10.3389/fnimg.2022.948235; Manjon et al. 2020, Blind MRI brain lesion inpainting
using deep learning). Applied to a scan with lesions, it fills them with the tissue that might be there. One
departure: the network corrects a smooth first guess instead of starting from nothing, which carries over to
new scanners.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from synthlong.bank import LesionBank
from synthlong.boxes import Region, box_at, crop, on_grid
from synthlong.case import Case
from synthlong.errors import InputError
from synthlong.healthy import stored_healthy
from synthlong.hole import FLUID, corrupt, first_guess, hole_in
from synthlong.networks import UNetConfig
from synthlong.orientation import draw_orientation
from synthlong.sampling import MOST_DRAWS, Sample, draw_variation, vary
from synthlong.texture import roughen, texture_of
from synthlong.weights import TrainedNetwork

__all__ = ["HealthySampler", "Inpainter", "heal"]

NETWORK = UNetConfig(in_channels=3, out_channels=1)
_WINDOW, _STRIDE = 48, 32


class Inpainter(TrainedNetwork):
    """The network that removes lesions; see `fill`. `Inpainter.read()` gives the shipped one."""

    task = "inpainter"

    def fill(self, x: NDArray, mask: NDArray, *, seed: int = 0, grain: bool = True) -> NDArray[np.float32]:
        """Return the image with its lesions replaced by tissue; all else stays bit for bit, background too.

        Windows of 48^3 that hold lesions are filled one by one and blended where they overlap. The first
        guess is made on the whole image, so that large holes agree between windows.

        Args:
            x: Image, shape `(I, J, K)`, brain mode 1, background 0.
            mask: Lesion voxels.
            seed: Seed of the noise in the holes.
            grain: Whether to put the texture back that the mean of all likely tissues lacks.
        """
        x = np.asarray(x, np.float32)
        weight = hole_in(x, mask)
        if not weight.any():
            return x.copy()
        guess = first_guess(x, weight, sweeps=200)
        change = np.zeros_like(x)
        total = np.zeros_like(x)
        for window in _windows(weight > 0):
            part, hole = x[window], weight[window]
            place = int(np.ravel_multi_index([s.start for s in window], x.shape))
            seen = corrupt(part, hole, hole, seed=seed + place, guess=guess[window])
            fade = _fade(part.shape)
            change[window] += fade * self.change(seen)
            total[window] += fade
        filled = np.maximum(guess + change / np.maximum(total, 1e-6), 0)
        smooth = np.where(weight > 0, x + weight * (filled - x), x)
        return roughen(smooth, weight, texture_of(x, weight > 0), seed=seed) if grain else smooth


def heal(case: Case, inpainter: Inpainter) -> Case:
    """Return the case with its healthy volume, the scan without its lesions.

    Some 10 s for a whole brain; none where `case.healthy_file` holds what the same scan, mask and weights gave.

    Args:
        case: The case; without lesions, its scan is healthy as it is.
        inpainter: Such as `Inpainter.read()`.
    """
    stored = stored_healthy(case, inpainter)
    return replace(case, healthy=inpainter.fill(case.flair, case.lesions) if stored is None else stored)


def _windows(hole: NDArray[np.bool_]) -> list[Region]:
    """Cover the hole's voxels by windows on a fixed lattice, each as large as the grid allows."""
    lattice = [
        sorted({min(start, max(n - _WINDOW, 0)) for start in range(0, max(n - _STRIDE // 2, 1), _STRIDE)})
        for n in hole.shape
    ]
    windows = []
    for i in lattice[0]:
        for j in lattice[1]:
            for k in lattice[2]:
                window = on_grid(box_at((i, j, k), (_WINDOW,) * 3), hole.shape)
                if hole[window].any():
                    windows.append(window)
    return windows


def _fade(shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Return weights that fall off towards a window's faces, never 0."""
    ramps = [np.minimum(np.arange(1, n + 1), np.arange(n, 0, -1)).clip(max=12) / 12 for n in shape]
    return (ramps[0][:, None, None] * ramps[1][:, None] * ramps[2]).astype(np.float32)


class HealthySampler:
    """Training samples: lesion-free patches with holes of lesions' shapes where lesions occur.

    Args:
        cases: Scans; patches that hold a lesion voxel are never taken.
        bank: Shapes of the holes.
        frequency: Lesion prior on each case's grid, one array per case.
    """

    def __init__(self, cases: list[Case], *, bank: LesionBank, frequency: list[NDArray[np.float32]]) -> None:
        self.cases, self.bank, self.frequency = cases, bank, frequency
        self._places: dict[tuple[int, int], tuple[NDArray, NDArray]] = {}
        self._small = np.flatnonzero(bank.extents.max(axis=1) <= 14)
        self._bright = [float(np.percentile(c.flair[(c.brain > 0) & (c.lesions == 0)], 99.5)) for c in cases]

    def _usable(self, side: int) -> list[int]:
        return [n for n in range(len(self.cases)) if len(self._places_of(n, side)[0]) > 500]

    def _places_of(self, n: int, side: int) -> tuple[NDArray, NDArray]:
        """Return centres of lesion-free patches (flat indices) and their cumulative probability."""
        if (n, side) not in self._places:
            case = self.cases[n]
            near = ndimage.maximum_filter(case.lesions, size=side + 2)
            weight = np.where((case.tissue >= 2) & (near == 0), self.frequency[n] + 2e-3, 0)
            flat = np.flatnonzero(weight)
            total = np.cumsum(weight.ravel()[flat], dtype=np.float64)
            self._places[n, side] = (flat, total / total[-1] if len(flat) else total)
        return self._places[n, side]

    def draw(self, rng: np.random.Generator, *, side: int, varied: bool = True) -> Sample:
        """Draw one sample of `side`^3 voxels."""
        usable = self._usable(side)
        for _ in range(MOST_DRAWS if usable else 0):
            n = usable[int(rng.integers(len(usable)))]
            flat, cumulative = self._places_of(n, side)
            centre = np.unravel_index(flat[np.searchsorted(cumulative, rng.random())], self.cases[n].shape)
            target, _ = crop(self.cases[n].flair, centre, side)
            mask = self._draw_mask(rng, side)
            tissue = target >= FLUID
            weight = hole_in(target, mask & tissue)
            hole = weight > 0.5
            if hole.sum() < 20 or (target[hole] > self._bright[n]).mean() > 0.02:
                continue  # no tissue there, or hyperintense tissue without a label
            turn = draw_orientation(rng, "all" if varied else "none").apply
            target, weight, tissue = turn(target), turn(weight), turn(tissue)
            if varied:
                target = vary(target, draw_variation(rng))
            inputs = corrupt(target, weight, weight, seed=int(rng.integers(2**31)), tissue=tissue)
            return Sample(inputs, target[None], weight[None])
        names = ", ".join(c.id for c in self.cases)
        raise InputError(names, f"no lesion-free patches of {side}^3 voxels", "pass scans with fewer lesions")

    def _draw_mask(self, rng: np.random.Generator, side: int) -> NDArray[np.bool_]:
        mask = np.zeros((side,) * 3, bool)
        for extra in range(1 + int(rng.poisson(0.7))):
            pool = self._small if side <= 32 else np.arange(len(self.bank))
            voxels = self.bank[int(pool[rng.integers(len(pool))])].voxels
            if rng.random() < 0.5:
                voxels = voxels[::-1]
            spread = side // 2 - 6 if extra else 3
            start = side // 2 + rng.integers(-spread, spread + 1, 3) - np.array(voxels.shape) // 2
            put(mask, voxels, start)
        return mask


def put(mask: NDArray[np.bool_], voxels: NDArray[np.bool_], start: NDArray) -> None:
    """Set a shape's voxels in a mask, leaving out what lies beyond it."""
    where = np.argwhere(voxels) + start
    where = where[((where >= 0) & (where < mask.shape)).all(axis=1)]
    mask[tuple(where.T)] = True
