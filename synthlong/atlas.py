"""Where lesions occur in MNI152 space: the lesion prior and the tissue maps.

The prior is the *lesion frequency* f(x): the share of patients who have a lesion at voxel x. With the
mean mask m_p(x) of patient p over that patient's visits, and a map b(x) published from B patients,

    f = R( G_fwhm * (sum_p m_p + B b) / (P + B) ),

where G is a Gaussian and R averages f with its left-right mirror. What is drawn from is the density
(1 - e) f / sum(f) + e / n over the n brain voxels: the floor e keeps every place possible. `fwhm_mm`, R and
the sources were chosen by `held_out_log_likelihood`; the figures are in `assets/prior.md`.

All arrays lie on one grid, RAS+, 182x218x182 at 1 mm with x from -91 to 90. There an array flip mirrors
about x = -0.5; the exact anatomical mirror is i -> 182 - i, dropping i = 0.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from synthlong.errors import ConfigError, InputError, short
from synthlong.mask import check_binary
from synthlong.nifti import read_nifti, write_nifti

__all__ = [
    "FLOOR",
    "FWHM_MM",
    "MNI_SHAPE",
    "SYMMETRIC",
    "HeldOut",
    "build_prior",
    "decode_log",
    "encode_log",
    "held_out_log_likelihood",
    "lesion_prior",
    "mirror",
    "mni_affine",
    "patient_in",
    "prior_path",
    "read_mask",
    "sample_map",
    "tissue_maps",
    "with_floor",
    "write_prior",
]

Array = NDArray[np.float32]
Subjects = Iterable[tuple[str, NDArray]]

MNI_SHAPE = (182, 218, 182)
MNI_VOXELS = math.prod(MNI_SHAPE)
FWHM_MM = 6.0
SYMMETRIC = True
FLOOR = 0.02
RIM_MM = 3.0
_MOST_LESIONS_ML = 500

ASSETS = Path(__file__).parent / "assets"
TISSUE_LEVELS = 63
LOG_MIN, LOG_MAX = 1e-5, 1.0
FWHM_PER_SD = float(np.sqrt(8 * np.log(2)))


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

    The shipped map is stored as logarithms in 8 bits (`encode_log`, relative error up to 2.3 %).

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


def sample_map(
    values: NDArray, affine: NDArray, shape: Sequence[int], target_affine: NDArray, *, order: int = 1
) -> Array:
    """Resample a map by affine on another grid; beyond its own grid it is 0.

    Grids that differ by a shift of whole voxels are copied, without interpolation.

    Args:
        values: Map, shape `(I, J, K)`.
        affine: Its voxel-to-world affine, `(4, 4)`.
        shape: Shape of the grid to sample on.
        target_affine: The affine of that grid; equal to `affine` (with an equal shape) changes nothing.
        order: Spline order, 0 (nearest) to 5; 1 is linear.

    Returns:
        float32 array of that shape, the caller's own.
    """
    to_source = np.linalg.solve(np.asarray(affine, float), np.asarray(target_affine, float))
    matrix, offset = to_source[:3, :3], to_source[:3, 3]
    shift = np.rint(offset)
    if np.allclose(matrix, np.eye(3), atol=1e-6) and np.allclose(offset, shift, atol=1e-4):
        return _shifted(values, shift.astype(int), tuple(shape))
    source = np.asarray(values, np.float32)
    return ndimage.affine_transform(source, matrix, offset, tuple(shape), order=order, mode="grid-constant", cval=0.0)


def mirror(values: NDArray) -> NDArray:
    """Return a map on the MNI grid mirrored about x = 0: i -> 182 - i; i = 0 has no counterpart and is 0."""
    out = np.zeros_like(values)
    out[1:] = values[:0:-1]
    return out


def build_prior(
    masks: Subjects,
    *,
    background: tuple[NDArray, float] | None = None,
    fwhm_mm: float = FWHM_MM,
    symmetric: bool = SYMMETRIC,
) -> Array:
    """Return the smoothed lesion frequency over patients.

    Args:
        masks: `(subject, mask)` pairs on the MNI grid, RAS+, values 0 to 1; may be empty when there is a
            background. Masks of one subject (visits) are averaged before they count.
        background: A published frequency on the MNI grid and the number of patients behind it, its weight.
        fwhm_mm: Full width at half maximum of the Gaussian, >= 0; 0 does not smooth.
        symmetric: Average with the exact left-right mirror.

    Returns:
        float32 `(182, 218, 182)`, 0 to 1.

    Raises:
        ConfigError: A mask of another shape, no mask and no background, a negative width.
    """
    if not fwhm_mm >= 0:
        raise ConfigError(f"fwhm_mm is {fwhm_mm}; it must be 0 or more")
    means = _patient_means(masks)
    total, patients = np.zeros(MNI_SHAPE, np.float32), float(len(means))
    for mean in means.values():
        total += mean
    if background is not None:
        total += np.float32(background[1]) * np.asarray(background[0], np.float32)
        patients += background[1]
    if patients <= 0:
        raise ConfigError("a lesion prior needs at least one mask")
    return np.clip(_smooth(total / np.float32(patients), fwhm_mm, symmetric), 0, 1)


def with_floor(frequency: Array, *, floor: float = FLOOR) -> Array:
    """Mix a frequency with its mean over the brain, so that no place in the brain is impossible.

    Args:
        frequency: Lesion frequency on the MNI grid.
        floor: Share of the even part, 0 to 1; 0 only cuts.

    Returns:
        `(1 - floor) f + floor mean(f)` in the template's brain and a 3 mm rim around it, 0 beyond.
    """
    brain, rim = _brain_and_rim()
    mean = np.float32(floor * frequency[brain].mean(dtype=np.float64))
    return np.where(rim, np.float32(1 - floor) * frequency + mean, np.float32(0))


class HeldOut(NamedTuple):
    """Log-likelihood (nats) per lesion voxel of patients that the prior has not seen."""

    mean: float
    sem: float
    per_patient: dict[str, float]
    outside: float
    """Share of all lesion voxels that lie outside the brain; they do not count."""


def held_out_log_likelihood(
    masks: Subjects,
    *,
    use_masks: bool = True,
    background: tuple[NDArray, float] | None = None,
    fwhm_mm: float = FWHM_MM,
    symmetric: bool = SYMMETRIC,
    floor: float = FLOOR,
) -> HeldOut:
    """Score a way of building the prior, leaving out one patient at a time.

    The prior from the other patients (and the background) becomes a density over the n voxels of the
    template's brain, (1 - floor) f / sum(f) + floor / n. A patient's score is the mean logarithm of it over
    the voxels of the patient's own mask (weighted by the share of visits that mark the voxel).

    Args:
        masks: As for `build_prior`.
        use_masks: False scores the background alone, or without one the uniform density.
        background: As for `build_prior`; its patients are never left out.
        fwhm_mm: As for `build_prior`.
        symmetric: As for `build_prior`.
        floor: Share of the density that is spread evenly over the brain, in (0, 1]; 1 is uniform.
    """
    means = _patient_means(masks)
    brain, _ = _brain_and_rim()
    total = np.zeros(MNI_SHAPE, np.float32)
    if background is not None:
        weighted = np.float32(background[1]) * np.asarray(background[0], np.float32)
        total += _smooth(weighted, fwhm_mm, symmetric)
    smooth = {s: _smooth(m, fwhm_mm, symmetric)[brain] for s, m in means.items()} if use_masks else {}
    everyone = total[brain] + sum(smooth.values(), np.zeros(1, np.float32))
    scores, lost, count = {}, 0.0, 0.0
    for subject, mean in means.items():
        frequency = np.maximum(everyone - smooth.get(subject, np.float32(0)), 0).astype(np.float64)
        density = np.full(frequency.size, floor / frequency.size)
        if (mass := frequency.sum()) > 0:
            density += (1 - floor) * frequency / mass
        else:
            density /= floor
        weight = mean[brain]
        scores[subject] = float(weight @ np.log(density) / weight.sum())
        count, lost = count + float(mean.sum()), lost + float(mean[~brain].sum())
    values = np.array(list(scores.values()))
    return HeldOut(float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values))), scores, lost / count)


def write_prior(
    masks: Sequence[str | Path],
    out: str | Path,
    *,
    fwhm_mm: float = FWHM_MM,
    symmetric: bool = SYMMETRIC,
    prefer: str | None = None,
) -> Array:
    """Build a lesion prior from mask files in MNI152 space and write it as NIfTI.

    Masks may have any orientation and voxel size; they are resampled linearly onto the MNI grid. Files whose
    names share a `sub-XX` prefix are visits of one patient; any other file is a patient of its own.

    Args:
        masks: Paths of the masks; a voxel above 0 is lesion.
        out: The NIfTI file to write, float32 lesion frequency.
        fwhm_mm: As for `build_prior`.
        symmetric: As for `build_prior`.
        prefer: "sform" or "qform" where a mask's two disagree.

    Returns:
        The frequency that was written.

    Raises:
        InputError: A mask is unreadable, no lesion mask, or has no lesion on the MNI grid.
        ConfigError: No masks, or `out` is one of them or no name of a NIfTI file.
    """
    out = Path(out)
    if not out.name.endswith((".nii", ".nii.gz")):
        raise ConfigError(f"{short(out)}: a prior is written as .nii.gz")
    if any(Path(mask).resolve() == out.resolve() for mask in masks):
        raise ConfigError(f"{short(out)}: is one of the masks; choose another name for the prior")
    read = partial(read_mask, prefer=prefer)
    frequency = with_floor(build_prior(map(read, masks), fwhm_mm=fwhm_mm, symmetric=symmetric))
    write_nifti(out, frequency, mni_affine())
    return frequency


def read_mask(path: str | Path, *, prefer: str | None = None) -> tuple[str, Array]:
    """Read a lesion mask in MNI152 space onto the MNI grid (linear, so 0 to 1).

    Args:
        path: The mask, any orientation and voxel size: 0 and one other value, a positive one.
        prefer: "sform" or "qform" where the two disagree.

    Returns:
        `(subject, mask)`; see `patient_in` for the subject.

    Raises:
        InputError: The mask is unreadable, not binary, as large as a brain, or has no lesion on the MNI grid.
    """
    volume = read_nifti(path, prefer=prefer)
    check_binary(volume)
    volume_ml = np.count_nonzero(volume.data) * volume.voxel_mm3 / 1000
    if volume_ml > _MOST_LESIONS_ML:
        raise InputError(path, f"covers {volume_ml:.0f} ml, like a brain mask", "give lesion masks")
    mask = sample_map(volume.data > 0, volume.affine, MNI_SHAPE, mni_affine())
    if not mask.any():
        raise InputError(path, "no lesion on the MNI152 grid", "give lesion masks in MNI152 space")
    return patient_in(path), mask


def patient_in(path: str | Path) -> str:
    """Return whose a mask is: the `sub-XX` that its name begins with, else the path."""
    found = re.match(r"sub-[^_.]+", Path(path).name)
    return found.group() if found else str(path)


def encode_log(values: NDArray) -> NDArray[np.uint8]:
    """Code values in 0..1 in 8 bits: 0 below 1e-5, else 1 + 254 log(v / 1e-5) / log(1e5), rounded.

    A step is a factor of 1.046, so the relative error is up to 2.3 %.
    """
    coded = 1 + 254 * np.log(np.clip(values, LOG_MIN, LOG_MAX) / LOG_MIN) / np.log(LOG_MAX / LOG_MIN)
    return np.where(np.asarray(values) < LOG_MIN, 0, np.rint(coded)).astype(np.uint8)


def decode_log(coded: NDArray[np.uint8]) -> Array:
    """Return the values that `encode_log` coded."""
    steps = (np.arange(256) - 1) / 254
    table = LOG_MIN * (LOG_MAX / LOG_MIN) ** steps
    table[0] = 0
    return table.astype(np.float32)[coded]


@lru_cache(maxsize=1)
def _brain_and_rim() -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return the template's brain, and it with the voxels up to `RIM_MM` outside it."""
    csf, gm, wm = tissue_maps()
    brain = csf + gm + wm > 0
    return brain, ndimage.distance_transform_edt(~brain) <= RIM_MM


@lru_cache(maxsize=1)
def _shipped_prior() -> Array:
    with np.load(prior_path()) as file:
        coded = file["frequency"]
    frequency = decode_log(_unfold(coded) if coded.shape != MNI_SHAPE else coded)
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


def _patient_means(masks: Subjects) -> Mapping[str, Array]:
    """Return each subject's mean mask over visits."""
    sums: dict[str, Array] = {}
    visits: dict[str, int] = {}
    for subject, mask in masks:
        if mask.shape != MNI_SHAPE:
            raise ConfigError(f"the mask of {subject} has shape {mask.shape}; the MNI grid is {MNI_SHAPE}")
        if subject in sums:
            sums[subject] += mask
        else:
            sums[subject] = np.array(mask, np.float32)
        visits[subject] = visits.get(subject, 0) + 1
    return {subject: total / np.float32(visits[subject]) for subject, total in sums.items()}


def _smooth(values: Array, fwhm_mm: float, symmetric: bool) -> Array:
    """Smooth by a Gaussian (cut at 4 SD, 1 mm voxels) and average with the mirror."""
    if fwhm_mm > 0:
        values = ndimage.gaussian_filter(values, fwhm_mm / FWHM_PER_SD, mode="constant")
    return (values + mirror(values)) / np.float32(2) if symmetric else values
