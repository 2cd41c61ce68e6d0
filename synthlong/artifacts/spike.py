"""Spikes: single wrong samples of k-space, each a wave across the whole image.

    y = x + sum_s a_s / (I J K) cos(2 pi k_s . n / (I, J, K)),   a_s = intensity max |spectrum with spikes 0 ... s - 1|

This is the real part of the inverse Fourier transform of the spectrum with a_s added at k_s, as in TorchIO, without
that transform. Nor does the maximum need one where it is known to be at the centre of k-space, |sum x|: in an image
of one sign, and in one whose SD is at most its mean (by Parseval, all other points together have the power
(I J K) sum x^2 - (sum x)^2).

Source: TorchIO, Perez-Garcia et al. 2021 (doi:10.1016/j.cmpb.2021.106236); Kamraoui et al. 2022, section 2.4
(doi:10.3389/fnimg.2022.948235).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from synthlong.artifacts.base import Artifact, Params, RandomArtifact
from synthlong.artifacts.kspace import alone
from synthlong.artifacts.ranges import Range, check_number, check_triples
from synthlong.artifacts.volumes import copied, in_slabs, on_volumes
from synthlong.compiling import compiled

__all__ = ["KSpaceSpike", "RandomKSpaceSpike", "kspace_spike"]

Point = tuple[int, int, int]
"""Of k-space: the cycles along each axis, counted from 0 up to its number of voxels."""

_STRONGEST = 100
_MOST_SPIKES = 1000


def kspace_spike(x: Tensor, *, positions: Sequence[Sequence[float]], intensity: float) -> Tensor:
    """Add spikes, as `torchio.Spike` does.

    Args:
        x: Image, shape `(..., I, J, K)`, any intensity unit.
        positions: Where in k-space, as fractions of each axis in [0, 1] from one end to the other; the centre is at
            0.5. No spikes change nothing.
        intensity: Height of each spike over the largest modulus of the spectrum that it is added to, in [-100, 100];
            0 changes nothing.

    Raises:
        ValueError: A parameter outside its range, or `x` not finite floating-point voxels.
    """
    places = check_triples("positions", positions, least=0, most=1)
    intensity = check_number("intensity", intensity, least=-_STRONGEST, most=_STRONGEST)
    if not places or not intensity:
        return copied(x)
    return on_volumes(
        x,
        torch_kernel=lambda volumes: _by_torch(volumes, places, intensity),
        numba_kernel=lambda volumes: _by_numba(volumes, places, intensity),
    )


class KSpaceSpike(Artifact):
    """`kspace_spike` as a transform.

    Args:
        positions: Where in k-space, as fractions of each axis.
        intensity: Height of each spike over the largest modulus of the spectrum.
        **kwargs: See `Artifact`.
    """

    kernel = staticmethod(kspace_spike)

    def __init__(self, positions: Any, intensity: Any, **kwargs: Any) -> None:
        super().__init__({"positions": positions, "intensity": intensity}, **kwargs)


class RandomKSpaceSpike(RandomArtifact):
    """Spikes at random points.

    Args:
        spikes: Their number, or a range of whole numbers; 0 changes nothing.
        intensity: Range of the height over the largest modulus of the spectrum.
        **kwargs: See `RandomArtifact`.
    """

    final = KSpaceSpike
    identity: ClassVar[dict[str, float]] = {"intensity": 0.0}

    def __init__(self, spikes: Any = 1, *, intensity: Any = (1.0, 3.0), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.spikes = Range.of("spikes", spikes, least=0, most=_MOST_SPIKES, whole=True)
        self.intensity = Range.of("intensity", intensity, least=-_STRONGEST, most=_STRONGEST)

    def draw_params(self, rng: np.random.Generator) -> Params:
        """Draw number, intensity and positions."""
        spikes, intensity = range(int(self.spikes.draw(rng))), self.intensity.draw(rng)
        return {"positions": [np.round(rng.random(3), 6).tolist() for _ in spikes], "intensity": intensity}


def _points(places: Sequence[Sequence[float]], shape: Sequence[int]) -> list[Point]:
    """Return the points at these fractions of k-space; 1 is the last plane."""
    i, j, k = ([(min(int(p[a] * n), n - 1) - n // 2) % n for p in places] for a, n in enumerate(shape))
    return list(zip(i, j, k, strict=True))


def _turns(points: Sequence[Point], shape: Sequence[int]) -> list[NDArray[np.complex128]]:
    """Return, for each axis of n voxels, the waves of the points, `(points, n)`; their product is a wave in space."""
    return [np.exp(2j * np.pi / n * np.outer([p[a] for p in points], np.arange(n))) for a, n in enumerate(shape)]


class _Transformed:
    """A volume's spectrum by Fourier transform: the half that tells the rest."""

    def __init__(self, volume: Tensor) -> None:
        self.shape = volume.shape
        with alone():
            self.half = torch.fft.rfftn(volume)

    def at(self, point: Point) -> complex:
        """Return the value at a point."""
        if point[2] < self.half.shape[2]:
            return complex(self.half[point])
        return complex(self.half[self._mirrored(point)]).conjugate()

    def peak(self, changed: dict[Point, complex]) -> float:
        """Return the largest modulus where unchanged; of two mirrored points, one is enough."""
        for point in changed:
            if point[2] < self.half.shape[2] and self._mirrored(point) in changed:
                self.half[point] = 0
        return math.sqrt((self.half.real.square() + self.half.imag.square()).max())

    def _mirrored(self, point: Point) -> Point:
        i, j, k = (-f % n for f, n in zip(point, self.shape, strict=True))
        return i, j, k


class _Centred:
    """A volume's spectrum whose largest modulus is known to be at the centre, and to stay there if changed."""

    def __init__(self, volume: NDArray[np.float32], height: float) -> None:
        self.volume = volume
        self.height = height

    def at(self, point: Point) -> complex:
        """Return the value at a point."""
        i, j, k = (turns[0].conj() for turns in _turns([point], self.volume.shape))
        first = torch.from_numpy(np.stack([i.real, i.imag]).astype(np.float32))
        with alone():
            real, imaginary = (first @ torch.from_numpy(self.volume).view(i.size, -1)).numpy()
        return complex(((real + 1j * imaginary) * np.outer(j, k).ravel()).sum())

    def peak(self, changed: dict[Point, complex]) -> float:
        """Return the largest modulus."""
        return self.height


def _spectrum(volume: NDArray[np.float32], points: Sequence[Point], intensity: float) -> _Transformed | _Centred:
    """Return the spectrum in the form that gives its peak soonest."""
    total, moduli, squares = _sums(volume)
    centred = moduli <= 1.000001 * abs(total) or volume.size * squares <= 2 * total**2
    stays = intensity * total >= 0 or (0, 0, 0) not in points  # a spike cannot lower the peak at the centre
    return _Centred(volume, abs(total)) if centred and stays else _Transformed(torch.from_numpy(volume))


def _heights(points: Sequence[Point], intensity: float, spectrum: _Transformed | _Centred) -> list[float]:
    """Return what each spike adds to its point."""
    heights: list[float] = []
    changed: dict[Point, complex] = {}
    for number, point in enumerate(points):
        heights.append(intensity * max([spectrum.peak(changed), *map(abs, changed.values())]))
        if number + 1 < len(points):
            changed[point] = (changed[point] if point in changed else spectrum.at(point)) + heights[-1]
    return heights


def _by_torch(volumes: Tensor, places: Sequence[Sequence[float]], intensity: float) -> Tensor:
    shape = volumes.shape[1:]
    points = _points(places, shape)
    result = volumes.clone()
    for volume, target in zip(volumes, result, strict=True):
        heights = _heights(points, intensity, _Transformed(volume))
        turns = (torch.from_numpy(turn.astype(np.complex64)).to(volumes.device) for turn in _turns(points, shape))
        for i, j, k, height in zip(*turns, heights, strict=True):
            wave = (i[:, None] * j)[..., None] * k
            target += wave.real * (height / volume.numel())
    return result


def _by_numba(volumes: NDArray[np.float32], places: Sequence[Sequence[float]], intensity: float) -> NDArray[np.float32]:
    points = _points(places, volumes.shape[1:])
    i, j, k = _turns(points, volumes.shape[1:])
    cosines, sines = k.real.astype(np.float32), k.imag.astype(np.float32)
    result = np.empty_like(volumes)
    for volume, target in zip(volumes, result, strict=True):
        heights = np.array(_heights(points, intensity, _spectrum(volume, points, intensity))) / volume.size
        work = partial(_add_waves, volume, heights[:, None] * i, j, cosines, sines, target)
        in_slabs(work, len(volume), volume.size)
    return result


@compiled(fastmath={"reassoc", "contract", "nsz"})
def _sums(volume):  # type: ignore[no-untyped-def, unused-ignore]
    """Return the sums of the voxels, of their moduli, and of their squares."""
    total, moduli, squares = 0.0, 0.0, 0.0
    for i in range(volume.shape[0]):
        for j in range(volume.shape[1]):
            row = volume[i, j]
            line, line_moduli, line_squares = np.float32(0), np.float32(0), np.float32(0)
            for k in range(row.size):
                line += row[k]
                line_moduli += abs(row[k])
                line_squares += row[k] * row[k]
            total += line
            moduli += line_moduli
            squares += line_squares
    return total, moduli, squares


@compiled(fastmath={"reassoc", "contract", "nsz"})
def _add_waves(  # type: ignore[no-untyped-def, unused-ignore]
    volume: NDArray[np.float32],
    turns_i: NDArray[np.complex128],
    turns_j: NDArray[np.complex128],
    cosines: NDArray[np.float32],
    sines: NDArray[np.float32],
    result: NDArray[np.float32],
    start: int,
    stop: int,
) -> None:
    """Write slices `start` to `stop` plus the waves, by cos(a + b) = cos a cos b - sin a sin b."""
    for i in range(start, stop):
        for j in range(volume.shape[1]):
            source, target = volume[i, j], result[i, j]
            for k in range(source.size):
                target[k] = source[k]
            for n in range(len(turns_i)):
                turn = turns_i[n, i] * turns_j[n, j]
                real, imaginary = np.float32(turn.real), np.float32(turn.imag)
                c, s = cosines[n], sines[n]
                for k in range(target.size):
                    target[k] += real * c[k] - imaginary * s[k]
