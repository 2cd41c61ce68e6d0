"""Two plain painters that the lesion generator is compared with, and the shapes that they paint.

"ellipsoid": constant brightness inside an ellipsoid with a soft edge. "copypaste": a real lesion of the scan, its
voxels pasted elsewhere, the idea of CarveMix (Zhang et al. 2021, doi 10.1007/978-3-030-87193-2_19; 2023, doi
10.1016/j.neuroimage.2023.120041) within one scan: no other patient's contrast gives the copy away.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from synthlong.bank import LesionBank, Shape
from synthlong.boxes import crop
from synthlong.case import Case
from synthlong.errors import InputError
from synthlong.hole import first_guess, hole_in
from synthlong.lesions import LesionMap
from synthlong.placement import Site, shape_at
from synthlong.profile import Profile, contrast_of, soft_depth

__all__ = ["CopyPainter", "EllipsoidPainter", "donor_of", "shapes_for"]

_EDGE = 0.7


class EllipsoidPainter:
    """Paints the mask evenly bright, whatever lies under it; the edge is a Gaussian's of SD 0.7 voxels."""

    def paint(
        self, x: NDArray, mask: NDArray, *, seed: int, profile: Profile, donor: NDArray | None = None
    ) -> NDArray[np.float32]:
        """Return the box with an evenly bright lesion; see `LesionPainter.paint`. `seed` and `donor` are of no use."""
        mask = np.asarray(mask) != 0
        weight = hole_in(x, mask)
        if not weight.any():
            return np.array(x, np.float32)
        bright = first_guess(x, weight)[mask].mean() + contrast_of(profile, soft_depth(mask), mask)
        share = ndimage.gaussian_filter(mask.astype(np.float32), _EDGE) * (weight > 0)
        return (x + share * (bright - x)).astype(np.float32)


class CopyPainter:
    """Pastes a real lesion's voxels into the mask and its soft edge."""

    def paint(
        self, x: NDArray, mask: NDArray, *, seed: int, profile: Profile, donor: NDArray | None = None
    ) -> NDArray[np.float32]:
        """Return the box with the lesion of `donor`; see `LesionPainter.paint`. `seed` and `profile` are of no use.

        Args:
            x: Box of a scan, shape `(I, J, K)`.
            mask: The lesion's voxels.
            seed: Of no use.
            profile: Of no use.
            donor: Box of the scan around the real lesion, laid over `x`; see `donor_of`.
        """
        if donor is None:
            raise ValueError("donor: a copied lesion needs the voxels to copy")
        weight = hole_in(x, mask)
        return np.where((weight > 0) & (donor > 0), x + weight * (donor - x), x).astype(np.float32)


def shapes_for(painter: str, case: Case, lesions: LesionMap, bank: LesionBank) -> LesionBank:
    """Return the shapes that `Site.shape` counts: the bank's, ellipsoids like them, or the case's own lesions.

    Args:
        painter: "network", "ellipsoid" or "copypaste".
        case: The case.
        lesions: Its lesions.
        bank: Real shapes.

    Raises:
        InputError: Nothing to copy.
    """
    if painter == "ellipsoid":
        return ellipsoids(bank)
    if painter == "network":
        return bank
    if not lesions.mutable.any():
        way = 'leave the case out, or use painter = "network"'
        raise InputError(case.id, "no lesion to copy", way)
    key = ("own shapes", lesions)
    if key not in case.derived:
        case.derived[key] = LesionBank.from_shapes([_own_shape(case, lesions, n) for n in _copied(lesions)])
    return case.derived[key]


def donor_of(case: Case, lesions: LesionMap, site: Site, own: LesionBank, start: tuple[int, ...], side: int) -> NDArray:
    """Return the scan around the lesion that a site copies, laid over the box of `side` voxels at `start`."""
    voxels, first = shape_at(site, own)
    box = lesions.boxes[_copied(lesions)[site.shape] - 1]
    low = [b.start + s - f for b, s, f in zip(box, start, first, strict=True)]
    if site.mirrored:
        low[0] = box[0].start + voxels.shape[0] - side - (start[0] - first[0])
    donor, _ = crop(case.flair, tuple(a + side // 2 for a in low), side)
    return donor[::-1] if site.mirrored else donor


def _copied(lesions: LesionMap) -> NDArray[np.integer]:
    """Return the numbers of the lesions that may be copied."""
    return np.flatnonzero(lesions.mutable) + 1


def _own_shape(case: Case, lesions: LesionMap, number: int) -> Shape:
    box = lesions.boxes[number - 1]
    voxels = lesions.labels[box] == number
    x, y, z = (case.affine @ (*(np.argwhere(voxels).mean(axis=0) + [b.start for b in box]), 1))[:3]
    return Shape(voxels, (float(x), float(y), float(z)))


@lru_cache(maxsize=2)
def ellipsoids(bank: LesionBank) -> LesionBank:
    """Return a bank of ellipsoids with the volumes and the proportions of a bank's shapes."""
    return LesionBank.from_shapes([_ellipsoid(bank[n]) for n in range(len(bank))])


def _ellipsoid(shape: Shape) -> Shape:
    where = np.argwhere(shape.voxels).astype(np.float64)
    spread = np.cov(where.T, bias=True) + np.eye(3) / 12  # a voxel's own extent
    around = np.ceil(2.5 * np.sqrt(np.diag(spread))).astype(int) + 1
    grid = np.stack(np.meshgrid(*(np.arange(-n, n + 1) for n in around), indexing="ij"), axis=-1)
    far = np.einsum("...i,ij,...j", grid, np.linalg.inv(spread), grid)
    voxels = far <= np.sort(far, axis=None)[len(where) - 1]
    filled = ndimage.find_objects(voxels.astype(np.uint8))[0]
    return Shape(voxels[filled], shape.centre_mm)
