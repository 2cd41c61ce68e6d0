"""MNI152 space: the lesion prior, which says where lesions occur, and the tissue maps.

All arrays lie on one grid, RAS+, 182x218x182 at 1 mm with x from -91 to 90. There an array flip mirrors
about x = -0.5; the exact anatomical mirror is i -> 182 - i, dropping i = 0. How the prior is built: see `prior`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from synthlong.errors import InputError
from synthlong.nifti import read_nifti

__all__ = [
    "MNI_SHAPE",
    "MNI_VOXELS",
    "Array",
    "decode_log",
    "lesion_prior",
    "mirror",
    "mni_affine",
    "prior_path",
    "sample_map",
    "tissue_maps",
]

Array = NDArray[np.float32]

MNI_SHAPE = (182, 218, 182)
MNI_VOXELS = math.prod(MNI_SHAPE)

ASSETS = Path(__file__).parent / "assets"
TISSUE_LEVELS = 63
LOG_MIN, LOG_MAX = 1e-5, 1.0


def mni_affine() -> NDArray[np.float64]:
    """Return the voxel-to-world affine of the MNI grid, RAS+: 1 mm, origin (-91, -126, -72)."""
    affine = np.eye(4)
    affine[:3, 3] = (-91, -126, -72)
    return affine


def prior_path() -> Path:
    """Return the shipped prior's path."""
    return ASSETS / "prior.npz"


def lesion_prior(path: str | Path | None = None) -> tuple[Array, NDArray[np.float64]]:
    """Return the lesion frequency in MNI152 space and its affine.

    The shipped map is stored as logarithms in 8 bits (relative error up to 2.3 %).

    Args:
        path: A NIfTI file with a lesion frequency in MNI152 space, on any grid; it is resampled linearly.
            None reads the shipped prior.

    Returns:
        `(frequency, affine)`: float32 `(182, 218, 182)`, 0 to 1; positive in the brain for the shipped prior.
        The array is cached and read-only (`.copy()` it to write); the affine is the caller's own.

    Raises:
        InputError: The file is unreadable, has no positive value, or values outside 0..1.
    """
    if path is None:
        return _shipped_prior(), mni_affine()
    stat = Path(path).stat() if Path(path).exists() else None
    return _read_prior(str(path), (stat.st_mtime_ns, stat.st_size) if stat else None), mni_affine()


@lru_cache(maxsize=1)
def tissue_maps() -> tuple[Array, Array, Array]:
    """Return the probabilities of CSF, gray matter and white matter in MNI152 space.

    ICBM 2009a symmetric, in steps of 1/63. They sum to 1 in the brain and to 0 outside it. Where the
    template is certain of neither gray nor white matter, inside the brain, it counts as CSF.

    Returns:
        `(csf, gm, wm)`, each float32 `(182, 218, 182)`, cached and read-only (`.copy()` one to write).
    """
    with np.load(ASSETS / "tissue.npz") as file:
        gm, wm = file["gm"], file["wm"]
        brain = np.unpackbits(file["brain"])[: gm.size].reshape(gm.shape)
    csf = np.where(brain, TISSUE_LEVELS - gm - wm, 0).astype(np.uint8)
    return _probability(csf), _probability(gm), _probability(wm)


def sample_map(values: NDArray, affine: NDArray, shape: Sequence[int], target_affine: NDArray) -> Array:
    """Resample a map by affine on another grid, linearly; beyond its own grid it is 0.

    Grids that differ by a shift of whole voxels are copied, without interpolation.

    Args:
        values: Map, shape `(I, J, K)`.
        affine: Its voxel-to-world affine, `(4, 4)`.
        shape: Shape of the grid to sample on.
        target_affine: The affine of that grid; equal to `affine` (with an equal shape) changes nothing.

    Returns:
        float32 array of that shape, the caller's own.
    """
    to_source = np.linalg.solve(np.asarray(affine, float), np.asarray(target_affine, float))
    matrix, offset = to_source[:3, :3], to_source[:3, 3]
    shift = np.rint(offset)
    if np.allclose(matrix, np.eye(3), atol=1e-6) and np.allclose(offset, shift, atol=1e-4):
        return _shifted(values, shift.astype(int), tuple(shape))
    source = np.asarray(values, np.float32)
    return ndimage.affine_transform(source, matrix, offset, tuple(shape), order=1, mode="grid-constant", cval=0.0)


def mirror(values: NDArray) -> NDArray:
    """Return a map on the MNI grid mirrored about x = 0: i -> 182 - i; i = 0 has no counterpart and is 0."""
    out = np.zeros_like(values)
    out[1:] = values[:0:-1]
    return out


def decode_log(coded: NDArray[np.uint8]) -> Array:
    """Return the values that `assets.build.encode_log` coded."""
    steps = (np.arange(256) - 1) / 254
    table = LOG_MIN * (LOG_MAX / LOG_MIN) ** steps
    table[0] = 0
    return table.astype(np.float32)[coded]


@lru_cache(maxsize=1)
def _shipped_prior() -> Array:
    with np.load(prior_path()) as file:
        frequency = decode_log(_unfold(file["frequency"]))
    frequency.setflags(write=False)
    return frequency


@lru_cache(maxsize=2)
def _read_prior(path: str, version: tuple[int, int] | None) -> Array:
    """Read a prior file; `version` (mtime, size) makes a rewritten file a new cache entry."""
    volume = read_nifti(path)
    low, high = float(volume.data.min()), float(volume.data.max())
    if low < 0 or high > 1:
        raise InputError(path, f"values from {low:g} to {high:g}", "a lesion frequency lies between 0 and 1")
    frequency = sample_map(volume.data, volume.affine, MNI_SHAPE, mni_affine())
    if not frequency.any():
        raise InputError(path, "no positive value on the MNI152 grid", "give a lesion frequency in MNI152 space")
    frequency.setflags(write=False)
    return frequency


def _probability(half: NDArray[np.uint8]) -> Array:
    levels = _unfold(half).astype(np.float32) / np.float32(TISSUE_LEVELS)
    levels.setflags(write=False)
    return levels


def _unfold(half: NDArray) -> NDArray:
    """Return the whole of a symmetric map stored for x = -91..0, i = 0..91: the rest is i = 90..1."""
    return np.concatenate([half, half[-2:0:-1]])


def _shifted(values: NDArray, shift: NDArray[np.int64], shape: tuple[int, ...]) -> Array:
    """Return `values[i + shift]` for each i of `shape`, 0 where that is off the grid."""
    out = np.zeros(shape, np.float32)
    low = np.maximum(0, -shift)
    high = np.minimum(shape, np.array(values.shape) - shift)
    if (high > low).all():
        to = tuple(itertools.starmap(slice, zip(low, high, strict=True)))
        out[to] = values[tuple(itertools.starmap(slice, zip(low + shift, high + shift, strict=True)))]
    return out
