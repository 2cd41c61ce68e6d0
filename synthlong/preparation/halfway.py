"""One patient's raw scans in the halfway space of the visits.

    scan -> middle of the visits, resampled once -> z-scores

Whole heads, as Schmidt-Mengin et al. 2022, doi 10.3389/fnins.2022.1004050, work on them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from synthlong.nifti import read_nifti, write_nifti
from synthlong.pictures import png_bytes
from synthlong.preparation.config import PreparationConfig
from synthlong.preparation.derivatives import figure_name, file_name
from synthlong.preparation.quality import agreement, halfway_flags, halfway_picture
from synthlong.preparation.registration import Image, align_visits, upright
from synthlong.preparation.scans import Scan
from synthlong.preparation.visit import (
    MOTION,
    VISIT_MM,
    Record,
    carried,
    check_new_lesions,
    grid_of,
    orientation_flags,
    read_mask,
    read_new_lesions,
    write_way,
)
from synthlong.resampling import Grid, carry_mask, resample

__all__ = ["halfway"]

_PICTURE_MM = 1.0
"""Voxels of pictures and figures, about."""


def halfway(
    scans: Sequence[Scan], folder: Path, config: PreparationConfig, prefer: str | None, report: Callable[[], None]
) -> list[Record]:
    """Write the visits in their halfway space: whole heads, z-scored over the grid that holds them all."""
    flairs = [read_nifti(scan.flair, prefer=prefer) for scan in scans]
    masks = [read_mask(scan, flair, prefer) for scan, flair in zip(scans, flairs, strict=True)]
    new = [read_new_lesions(scan, flair, prefer) for scan, flair in zip(scans, flairs, strict=True)]
    for scan, flair, drawn in zip(scans, flairs, new, strict=True):
        if drawn is not None:
            check_new_lesions(scan, *drawn, flair, np.ones(flair.data.shape, bool))
    grids = [grid_of(flair) for flair in flairs]
    heads = []
    for flair, grid in zip(flairs, grids, strict=True):
        heads.append(upright(Image(flair.data, grid), spacing_mm=VISIT_MM))
        report()
    ways = align_visits(heads, motion=MOTION[config.visits], report=report)
    target = Grid.around(grids, ways, spacing_mm=config.spacing_mm)
    report()
    every = max(round(_PICTURE_MM / config.spacing_mm), 1)
    images, drawn_on, moments, natives = [], [], [], []
    for scan, flair, grid, way, mask, drawn in zip(scans, flairs, grids, ways, masks, new, strict=True):

        def write(what: str, data: NDArray, scan: Scan = scan) -> None:
            write_nifti(folder / file_name(scan.id, what, space="halfway"), data, target.affine, code=2)

        step = target.step_to(grid, way)
        image = resample(flair.data, step, target.shape)
        mean, sd = float(image.mean(dtype=np.float64)), float(image.std(dtype=np.float64))
        image = (image - np.float32(mean)) / np.float32(sd)
        write("FLAIR.nii.gz", image)
        lesions = np.zeros(target.shape, np.uint8)
        if mask is not None:
            lesions |= (own := carry_mask(mask.data != 0, step, target.shape))
            write("desc-lesions_mask.nii.gz", own)
        if drawn is not None:
            lesions |= (own := carried(drawn, way, target))
            write("desc-newlesions_mask.nii.gz", own)
        images.append(image[::every, ::every, ::every].copy())
        drawn_on.append(lesions[::every, ::every, ::every].copy())
        moments.append({"mean": mean, "sd": sd})
        natives.append(write_way(scan, grid, way, folder, space="halfway"))
        report()
    within = [seen > 0 for seen in images]
    alike = agreement(list(images), within)
    records = []
    for scan, flair, seen, marked, moment, native, same in zip(
        scans, flairs, images, drawn_on, moments, natives, alike, strict=True
    ):
        (folder / figure_name(scan.id)).write_bytes(png_bytes(halfway_picture(seen, marked, within[0])))
        figures: dict[str, object] = {**moment, "agreement": None if same is None else round(same, 4)}
        records.append(Record(native, figures, halfway_flags(same) + orientation_flags(flair)))
    return records
