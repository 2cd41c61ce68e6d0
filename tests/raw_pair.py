"""A real raw pair of visits, quick to prepare: cropped to the brain, at half its resolution in the plane."""

import csv
import shutil
from pathlib import Path

import numpy as np

from synthlong.nifti import read_nifti, write_nifti
from synthlong.preparation.ways import read_way
from synthlong.resampling import Grid, carry_mask

RAW = Path(__file__).parent.parent / "examples" / "raw"
SIDE = 130  # voxels of 1.4 mm: the brain and little around it


def grid_of(volume):
    return Grid(volume.data.shape, volume.affine)


def carried(what, session, grid):
    """A mask of the common space on a visit's grid, by the publishers' transform."""
    mask = read_nifti(RAW / f"sub-lo01_space-common_desc-{what}_mask.nii.gz")
    way = read_way(RAW / f"sub-lo01_ses-{session}_from-FLAIR_to-common_xfm.txt")
    return carry_mask(mask.data, grid.step_to(grid_of(mask), np.linalg.inv(way)), grid.shape)


def write_raw_pair(folder):
    """Write both visits with voxels of 1.4 x 1.4 x 3-4 mm; the second has a lesion mask and a brain mask of its own."""
    rows = [["subject", "session", "flair", "mask", "brain", "new_lesions", "new_lesions_xfm"]]
    for session in (1, 2):
        scan = read_nifti(RAW / f"sub-lo01_ses-{session}_FLAIR.nii.gz")
        middle = np.argwhere(carried("brain", session, grid_of(scan))).mean(axis=0).astype(int)
        i, j = (int(np.clip(m - SIDE, 0, n - 2 * SIDE)) for m, n in zip(middle[:2], scan.data.shape[:2], strict=True))
        box = scan.data[i : i + 2 * SIDE, j : j + 2 * SIDE]
        half = np.ascontiguousarray(box.reshape(SIDE, 2, SIDE, 2, -1).mean(axis=(1, 3)), np.float32)
        affine = scan.affine @ np.diag([2, 2, 1, 1])
        affine[:3, 3] = (scan.affine @ [i + 0.5, j + 0.5, 0, 1])[:3]
        write_nifti(folder / f"{session}.nii.gz", half, affine, code=1)
        rows.append(["lo01", str(session), f"{session}.nii.gz", "", "", "", ""])
    grid = Grid(half.shape, affine)
    write_nifti(folder / "brain.nii.gz", carried("brain", 2, grid), affine, code=1)
    write_nifti(folder / "lesions.nii.gz", carried("new", 2, grid), affine, code=1)
    new, xfm = "sub-lo01_space-common_desc-new_mask.nii.gz", "sub-lo01_ses-2_from-FLAIR_to-common_xfm.txt"
    for name in (new, xfm):
        shutil.copy(RAW / name, folder)
    rows[2][3:] = ["lesions.nii.gz", "brain.nii.gz", new, xfm]
    with open(folder / "scans.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    return folder / "scans.csv"
