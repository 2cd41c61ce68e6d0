"""`synthlong demo`: the main job on the bundled scans."""

from __future__ import annotations

from pathlib import Path

import typer


def demo(
    out: Path = typer.Option(Path("demo"), "-o", "--out", help="Folder to write."),
    pairs: int = typer.Option(48, help="Number of pairs."),
    seed: int = typer.Option(7, help="Seed of every draw."),
) -> None:
    """Turn two real scans that come with the package into pairs, shards and a page with pictures."""
    import warnings

    from synthlong.dataset.export import export_pairs
    from synthlong.dataset.plan import bundled_cases
    from synthlong.dataset.run import generate as run
    from synthlong.errors import InputWarning
    from synthlong.report import write_report

    from .progress import progress_bar

    warnings.simplefilter("ignore", InputWarning)  # what `check` says of these two scans is known
    with progress_bar() as show:
        outcome = run(bundled_cases(), out / "pairs", pairs=pairs, seed=seed, shard_size=8, progress=show)
    write_report(out / "pairs", out / "report.html")
    export_pairs(out / "pairs", out / "nifti", numbers=list(range(min(2, pairs))))
    typer.echo(f"{outcome.pairs} pairs in {outcome.shards} shards: {out / 'pairs'}")
    typer.echo(f"look at them: {out / 'report.html'}")
    typer.echo(f"two of them as NIfTI: {out / 'nifti'}")
