"""`synthlong atlas`: a lesion prior from masks in MNI space."""

from __future__ import annotations

from pathlib import Path

import typer

from .options import PREFER, Prefer


def atlas(
    masks: list[Path] = typer.Argument(..., help="Lesion masks in MNI152 space, any orientation and voxel size."),
    out: Path = typer.Option(..., "-o", "--out", help="Prior to write (.nii.gz); use it as `prior` in a config."),
    prefer: Prefer = PREFER,
) -> None:
    """Build a lesion prior; several masks of one `sub-ID` count as one patient."""
    from synthlong.prior import patient_in, write_prior

    from .progress import progress_bar

    with progress_bar() as show:
        write_prior(masks, out, prefer=prefer.value if prefer else None, progress=show)
    typer.echo(f"{out.name}: prior of {len(masks)} masks of {len({patient_in(mask) for mask in masks})} patients")
