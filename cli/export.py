"""`synthlong export`: pairs as NIfTI in BIDS layout."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import typer

from .options import ranges_of


def export(
    run: Path = typer.Argument(..., help="Folder that `generate` wrote."),
    out: Path = typer.Option(..., "-o", "--out", help="Folder to write."),
    pairs: str = typer.Option(None, help="Which pairs, e.g. 0,5 or 0-9; default: all."),
) -> None:
    """Write pairs as NIfTI: both visits in BIDS layout, masks and recipe under derivatives/, patients in a table."""
    from synthlong.dataset.export import export_pairs
    from synthlong.errors import name_of

    from .progress import progress_bar

    numbers = None if pairs is None else chain(*ranges_of(pairs, "--pairs"))
    with progress_bar() as show:
        folders = export_pairs(run, out, numbers=numbers, progress=show)
    typer.echo(f"{name_of(out)}: {len(folders)} pairs, {folders[0].name} to {folders[-1].name}")
