"""Back: a mask on a prepared scan's grid, on the grid of the scan as it left the scanner."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from synthlong.case import Case
from synthlong.errors import InputError
from synthlong.manifest import CaseFiles
from synthlong.nifti import read_nifti
from synthlong.preparation.derivatives import read_native
from synthlong.resampling import Grid, carry_mask

__all__ = ["to_native"]


def to_native(mask: NDArray | str | Path, case: Case | CaseFiles | str | Path) -> NDArray[np.uint8]:
    """Return a lesion mask in the grid of the scan that a case was prepared from; its affine is `native.grid.affine`.

    Every lesion keeps its volume; see `resampling.carry_mask`.

    Args:
        mask: Lesion voxels on the prepared scan's grid, shape `(I, J, K)`, or their NIfTI file.
        case: The prepared case, its files, or the path of its FLAIR.

    Raises:
        InputError: The case was not prepared by `synthlong prepare`, or the mask has another shape.
    """
    if isinstance(case, Case):
        native, grid, name = case.native, Grid(case.shape, case.affine), case.id
    else:
        path = case.flair if isinstance(case, CaseFiles) else Path(case)
        flair = read_nifti(path)
        native, grid, name = read_native(path), Grid(flair.data.shape, flair.affine), str(path)
    if native is None:
        raise InputError(name, "no record of the scan it was made from", "prepare the scan by `synthlong prepare`")
    if isinstance(mask, (str, Path)):
        volume = read_nifti(mask, allow_empty=True)
        source, voxels = Grid(volume.data.shape, volume.affine), volume.data
    else:
        source, voxels = grid, mask
    if voxels.shape != source.shape or source.shape != grid.shape:
        problem = f"a mask of shape {voxels.shape}, but the prepared scan has {grid.shape}"
        raise InputError(name, problem, "give a mask on the prepared scan's grid")
    step = native.grid.step_to(source, np.linalg.inv(native.way))
    return carry_mask(voxels != 0, step, native.grid.shape)
