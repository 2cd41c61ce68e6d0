"""`synthlong verify`: look for damage in a run."""

from __future__ import annotations

from pathlib import Path

import typer


def verify(
    out: Path = typer.Argument(..., help="Folder that `generate` wrote."),
    quick: bool = typer.Option(False, "--quick", help="Names and sizes only."),
    rebuild_index: bool = typer.Option(
        False, "--rebuild-index", help="If all shards are sound, write index.json again."
    ),
) -> None:
    """Check every byte of a run: one line for each problem; exit code 1 if there is one."""
    from synthlong.dataset import verify as checks
    from synthlong.errors import ConfigError, name_of

    from .progress import progress_bar

    if quick and rebuild_index:
        raise ConfigError("--quick, --rebuild-index: the index is rebuilt from shards read whole; leave one out")
    with progress_bar() as show:
        if rebuild_index:
            report = checks.rebuild_index(out, progress=show)
        else:
            report = checks.verify(out, quick=quick, progress=show)
    for problem in report.problems:
        typer.echo(f"{name_of(out)}/{problem}", err=True)
    wrong, left = len(report.problems), len(report.leftovers)
    sound = f"{report.shards} shards, {report.samples} samples, {report.bytes / 1e6:.0f} MB sound"
    harmless = f", {left} leftover temporary file{'s' * (left != 1)} (harmless)" if left else ""
    verdict = (
        f"{wrong} problem{'s' * (wrong != 1)}" if wrong else "index.json rebuilt" if rebuild_index else "no problem"
    )
    typer.echo(f"{name_of(out)}: {verdict}; {sound} ({report.seconds:.1f} s){harmless}")
    raise typer.Exit(1 if wrong else 0)
