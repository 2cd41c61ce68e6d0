"""Building the lesion prior: from masks of patients, and a published map.

It is the *lesion frequency* f(x): the share of patients who have a lesion at voxel x. With the mean mask m_p(x) of
patient p over that patient's visits, and a map b(x) published from B patients,

    f = R( G_fwhm * (sum_p m_p + B b) / (P + B) ),

where G is a Gaussian and R averages f with its left-right mirror. What is drawn from is the density
(1 - e) f / sum(f) + e / n over the n brain voxels: the floor e keeps every place possible. `fwhm_mm`, R and
the sources were chosen by `assets.build.held_out_log_likelihood`; the figures are in `assets/prior.md`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from synthlong.atlas import MNI_SHAPE, Array, mirror, mni_affine, sample_map, tissue_maps
from synthlong.errors import ConfigError, InputError, short
from synthlong.mask import MOST_OUTSIDE, check_binary
from synthlong.nifti import read_nifti, write_nifti
from synthlong.progress import Progress
from synthlong.publishing import check_place

__all__ = [
    "FLOOR",
    "FWHM_MM",
    "build_prior",
    "patient_in",
    "read_mask",
    "with_floor",
    "write_prior",
]

Subjects = Iterable[tuple[str, NDArray]]

FWHM_MM = 6.0
FLOOR = 0.02
_RIM_MM = 3.0
_MOST_LESIONS_ML = 500
_FWHM_PER_SD = float(np.sqrt(8 * np.log(2)))


def build_prior(
    masks: Subjects,
    *,
    background: tuple[NDArray, float] | None = None,
    fwhm_mm: float = FWHM_MM,
    symmetric: bool = True,
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
    means = patient_means(masks)
    total, patients = np.zeros(MNI_SHAPE, np.float32), float(len(means))
    for mean in means.values():
        total += mean
    if background is not None:
        total += np.float32(background[1]) * np.asarray(background[0], np.float32)
        patients += background[1]
    if patients <= 0:
        raise ConfigError("a lesion prior needs at least one mask")
    return np.clip(smoothed(total / np.float32(patients), fwhm_mm, symmetric), 0, 1)


def with_floor(frequency: Array, *, floor: float = FLOOR) -> Array:
    """Mix a frequency with its mean over the brain, so that no place in the brain is impossible.

    Args:
        frequency: Lesion frequency on the MNI grid.
        floor: Share of the even part, 0 to 1; 0 only cuts.

    Returns:
        `(1 - floor) f + floor mean(f)` in the template's brain and a 3 mm rim around it, 0 beyond.
    """
    brain, rim = brain_and_rim()
    mean = np.float32(floor * frequency[brain].mean(dtype=np.float64))
    return np.where(rim, np.float32(1 - floor) * frequency + mean, np.float32(0))


def write_prior(
    masks: Sequence[str | Path],
    out: str | Path,
    *,
    fwhm_mm: float = FWHM_MM,
    symmetric: bool = True,
    prefer: str | None = None,
    progress: Progress | None = None,
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
        progress: Called as ("masks", done, total).

    Returns:
        The frequency that was written.

    Raises:
        InputError: A mask is unreadable, no lesion mask, or not in MNI152 space; or all are empty.
        ConfigError: No masks, or `out` is one of them or no name of a NIfTI file.
        OutputError: `out` cannot be written to.
    """
    out = Path(out)
    if not out.name.endswith((".nii", ".nii.gz")):
        raise ConfigError(f"{short(out)}: a prior is written as .nii.gz")
    if any(Path(mask).resolve() == out.resolve() for mask in masks):
        raise ConfigError(f"{short(out)}: is one of the masks; choose another name for the prior")
    check_place(out)

    def read() -> Iterator[tuple[str, Array]]:
        for done, mask in enumerate(masks, start=1):
            yield read_mask(mask, prefer=prefer)
            if progress:
                progress("masks", done, len(masks))

    frequency = build_prior(read(), fwhm_mm=fwhm_mm, symmetric=symmetric)
    if not frequency.any():
        raise InputError(masks[0], "no lesion in any of the masks", "give masks of patients with lesions, too")
    frequency = with_floor(frequency)
    write_nifti(out, frequency, mni_affine())
    return frequency


def read_mask(path: str | Path, *, prefer: str | None = None) -> tuple[str, Array]:
    """Read a lesion mask in MNI152 space onto the MNI grid (linear, so 0 to 1).

    Args:
        path: The mask, any orientation and voxel size: 0 and one other value, a positive one, or 0 alone.
        prefer: "sform" or "qform" where the two disagree.

    Returns:
        `(subject, mask)`; see `patient_in` for the subject.

    Raises:
        InputError: The mask is unreadable, not binary, as large as a brain, or has a tenth of its lesions outside the
            MNI brain.
    """
    volume = read_nifti(path, prefer=prefer, allow_empty=True)
    check_binary(volume)
    if not volume.data.any():  # a patient without lesions
        return patient_in(path), np.zeros(MNI_SHAPE, np.float32)
    volume_ml = np.count_nonzero(volume.data) * volume.voxel_mm3 / 1000
    if volume_ml > _MOST_LESIONS_ML:
        raise InputError(path, f"covers {volume_ml:.0f} ml, like a brain mask", "give lesion masks")
    mask = sample_map(volume.data > 0, volume.affine, MNI_SHAPE, mni_affine())
    _, rim = brain_and_rim()
    if (inside := mask[rim].sum()) < (1 - MOST_OUTSIDE) * mask.sum() or not inside:
        share = 1 - inside / max(mask.sum(), 1)
        raise InputError(path, f"{share:.0%} of its lesions lie outside the MNI brain", "give masks in MNI152 space")
    return patient_in(path), mask


def patient_in(path: str | Path) -> str:
    """Return whose a mask is: the `sub-XX` that its name begins with, else the path."""
    found = re.match(r"sub-[^_.]+", Path(path).name)
    return found.group() if found else str(path)


@lru_cache(maxsize=1)
def brain_and_rim() -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return the template's brain, and it with the voxels up to `_RIM_MM` outside it."""
    csf, gm, wm = tissue_maps()
    brain = csf + gm + wm > 0
    return brain, ndimage.distance_transform_edt(~brain) <= _RIM_MM


def patient_means(masks: Subjects) -> Mapping[str, Array]:
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


def smoothed(values: Array, fwhm_mm: float, symmetric: bool) -> Array:
    """Smooth by a Gaussian (cut at 4 SD, 1 mm voxels) and average with the mirror."""
    if fwhm_mm > 0:
        values = ndimage.gaussian_filter(values, fwhm_mm / _FWHM_PER_SD, mode="constant")
    return (values + mirror(values)) / np.float32(2) if symmetric else values
