"""`synthlong report`: a page with pictures of a run."""

from __future__ import annotations

from pathlib import Path

import typer


def report(
    run: Path = typer.Argument(..., help="Folder that `generate` wrote."),
    out: Path = typer.Option(..., "-o", "--out", help="HTML file to write."),
    samples: int = typer.Option(12, help="Pairs to show."),
) -> None:
    """Write one self-contained HTML page: slices through the changes, counts, volumes, placements."""
    from synthlong.errors import ConfigError
    from synthlong.report import write_report

    from .progress import progress_bar

    if out.suffix not in (".html", ".htm"):
        raise ConfigError(f"-o {out.name}: a report is named *.html")
    with progress_bar() as show:
        write_report(run, out, samples=samples, progress=show)
    typer.echo(f"{out.name} written")
