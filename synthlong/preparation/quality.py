"""Whether a scan was prepared well: figures, the flags that they raise, and a picture to look at."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from synthlong.looks import BRAIN_ML
from synthlong.pair import NEW, VANISHED
from synthlong.pictures import Picture, gray_pixels, rgb, upright
from synthlong.preparation.registration import mni_brain, mni_scan
from synthlong.resampling import Grid

__all__ = [
    "Figures",
    "agreement",
    "correlation",
    "figures_of",
    "flags_of",
    "halfway_flags",
    "halfway_picture",
    "picture_of",
    "snr_of",
]

_LEAST_OVERLAP, _LEAST_TEMPLATE, _LEAST_AGREEMENT, _LEAST_SNR = 0.9, 0.2, 0.8, 5.0
_ZOOM = 2


@dataclass(frozen=True)
class Figures:
    """How well one visit was prepared.

    Args:
        brain_ml: Volume of the brain in the scan.
        snr: Signal-to-noise ratio of the scan; see `snr_of`.
        overlap: Dice of the prepared brain and that of MNI152.
        template: Correlation with the MNI template of the contrast, within both brains.
        agreement: Correlation of the visit with the first one within both brains; None for a single visit.
        lesions: Lesions of the mask (26-connected); None where there is no mask, as are the next two.
        lesions_ml: Their volume in the scan.
        lesions_prepared: Lesions of the prepared mask.
    """

    brain_ml: float
    snr: float
    overlap: float
    template: float
    agreement: float | None
    lesions: int | None
    lesions_ml: float | None
    lesions_prepared: int | None

    def as_dict(self) -> dict[str, Any]:
        """Return the figures as plain JSON, rounded."""
        return {k: round(v, 4) if isinstance(v, float) else v for k, v in asdict(self).items()}


def flags_of(figures: Figures) -> list[str]:
    """Return what is wrong with a prepared scan, in a few words each."""
    low, high = BRAIN_ML
    flags = []
    if not low <= figures.brain_ml <= high:
        flags.append(f"brain of {figures.brain_ml:.0f} ml")
    if figures.overlap < _LEAST_OVERLAP:
        flags.append(f"overlap with the MNI brain {figures.overlap:.2f}")
    if figures.template < _LEAST_TEMPLATE:  # 0.08 where a head is upside down or turned about
        flags.append(f"correlation with the template {figures.template:.2f}")
    flags += halfway_flags(figures.agreement)
    if figures.snr < _LEAST_SNR:
        flags.append(f"signal-to-noise ratio {figures.snr:.1f}")
    return flags


def halfway_flags(agreement: float | None) -> list[str]:
    """Return what is wrong with a visit in the halfway space: all that is known there is how alike the visits are."""
    low = agreement is not None and agreement < _LEAST_AGREEMENT
    return [f"correlation of the visits {agreement:.2f}"] if low else []


def figures_of(
    scan: NDArray,
    brain: NDArray[np.bool_],
    grid: Grid,
    lesions: NDArray | None,
    *,
    prepared: NDArray,
    prepared_brain: NDArray[np.bool_],
    prepared_lesions: NDArray,
    agreement: float | None,
) -> Figures:
    """Return the figures of one visit, from its scan and from what was made of it in MNI152."""
    usual = mni_brain()
    full = np.ones((3, 3, 3))
    return Figures(
        brain_ml=float(brain.sum() * grid.voxel_mm3 / 1000),
        snr=snr_of(scan, brain, grid.spacing_mm),
        overlap=float(2 * (prepared_brain & usual).sum() / (prepared_brain.sum() + usual.sum())),
        template=correlation(prepared, mni_scan("FLAIR"), prepared_brain & usual),
        agreement=agreement,
        lesions=None if lesions is None else ndimage.label(lesions, full)[1],
        lesions_ml=None if lesions is None else float(np.count_nonzero(lesions) * grid.voxel_mm3 / 1000),
        lesions_prepared=None if lesions is None else ndimage.label(prepared_lesions, full)[1],
    )


def snr_of(scan: NDArray, brain: NDArray[np.bool_], spacing_mm: NDArray) -> float:
    """Return the brain's median over the SD of its noise.

    The noise is the median absolute second difference along the axis of the finest voxel sides (the first of them),
    which is blind to anatomy's slopes; scans interpolated by the scanner look less noisy than they are.
    """
    finest = int(np.argmin(np.round(spacing_mm, 3)))
    scan, brain = np.moveaxis(scan, finest, 0), np.moveaxis(brain, finest, 0)
    within = brain[:-2] & brain[1:-1] & brain[2:]
    second = (scan[:-2] - 2 * scan[1:-1] + scan[2:])[within]
    noise = 1.4826 * float(np.median(np.abs(second))) / 6**0.5
    return float(np.median(scan[brain])) / max(noise, 1e-9)


def correlation(one: NDArray, other: NDArray, where: NDArray[np.bool_]) -> float:
    """Return Pearson's correlation over some voxels, 0 where there are none."""
    a, b = one[where].astype(np.float64), other[where].astype(np.float64)
    return float(np.corrcoef(a, b)[0, 1]) if a.size > 1 and a.std() > 0 and b.std() > 0 else 0.0


def agreement(images: list[NDArray], brains: list[NDArray[np.bool_]]) -> list[float | None]:
    """Return each visit's correlation with the first within both brains; None for a single visit.

    The first one's is the best of the others': if it is a good scan, a bad visit does not agree with it, but others do.
    """
    if len(images) == 1:
        return [None]
    others = [correlation(images[0], x, brains[0] & b) for x, b in zip(images[1:], brains[1:], strict=True)]
    return [max(others), *others]


def picture_of(image: NDArray, lesions: NDArray) -> Picture:
    """Return three planes with the outlines of the MNI brain (blue) and the lesions (red).

    The upper row lies through the middle of the brain, the lower one through the largest lesion, if there is one.

    Args:
        image: Prepared scan on the grid of MNI152, brain mode 1.
        lesions: Lesion voxels.
    """
    return _rows(image, lesions, mni_brain())


def halfway_picture(image: NDArray, lesions: NDArray, head: NDArray[np.bool_]) -> Picture:
    """Return the same of a visit in the halfway space, with the outline of the first visit's head.

    Args:
        image: z-scored scan.
        lesions: Lesion voxels.
        head: Voxels of the first visit's head on the same grid.
    """
    outlined = ndimage.gaussian_filter(head.astype(np.float32), 2) > 0.5
    return _rows(image / max(float(np.quantile(image, 0.99)), 1e-6) * 1.6, lesions, outlined)


def _rows(image: NDArray, lesions: NDArray, outlined: NDArray[np.bool_]) -> Picture:
    places = [np.argwhere(outlined).mean(axis=0).astype(int)]
    labels, count = ndimage.label(lesions, np.ones((3, 3, 3)))
    if count:
        largest = np.bincount(labels.ravel())[1:].argmax() + 1
        inside = np.argwhere(labels == largest)
        places.append(inside[len(inside) // 2])
    return np.vstack([_row(image, lesions, outlined, place) for place in places])


def _row(image: NDArray, lesions: NDArray, outlined: NDArray, place: NDArray) -> Picture:
    planes = []
    for axis in (2, 1, 0):
        plane, lesion, outline = (upright(np.take(a, place[axis], axis)) for a in (image, lesions, outlined))
        pixels = np.kron(np.repeat(gray_pixels(plane)[..., None], 3, axis=2), np.ones((_ZOOM, _ZOOM, 1), np.uint8))
        for mask, colour in ((outline, rgb(VANISHED)), (lesion, rgb(NEW))):
            pixels[_edge(np.kron(mask != 0, np.ones((_ZOOM, _ZOOM), bool)))] = colour
        planes.append(pixels)
    height = _ZOOM * max(image.shape[1:])
    return np.hstack([np.pad(p, ((height - len(p), 0), (0, 0), (0, 0))) for p in planes])


def _edge(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return the pixels just outside a mask."""
    return ndimage.binary_dilation(mask) & ~mask
