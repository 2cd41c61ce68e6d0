"""`synthlong replay`: render a pair again from its recipe."""

from __future__ import annotations

from pathlib import Path

import typer


def replay(
    run: Path = typer.Argument(..., help="Folder that `generate` wrote."),
    number: int = typer.Argument(..., help="Number of the pair."),
    out: Path = typer.Option(..., "-o", "--out", help="Folder to write (NIfTI, BIDS layout)."),
    whole: bool = typer.Option(False, "--whole", help="On the case's whole grid instead of the box."),
    cases: Path = typer.Option(None, help="The run's cases, if they are no longer where they were."),
    config: Path = typer.Option(None, help="The run's config, if it names its own prior, bank or weights."),
) -> None:
    """Render a pair again from its recipe, check it against the shard, and write it as NIfTI."""
    from synthlong.dataset.export import write_pair
    from synthlong.dataset.plan import read_plan
    from synthlong.dataset.replay import replay as again
    from synthlong.synthesis import SynthesisConfig

    from .progress import progress_bar

    chosen = SynthesisConfig.from_toml(config) if config else None
    with progress_bar() as show:
        pair, apart = again(run, number, source=cases, config=chosen, whole=whole, progress=show)
    folder = write_pair(out, number, pair, run_id=read_plan(run)["run_id"])
    same = f"as in the shard, within {apart:.2g}" if apart else "the same as in the shard"
    typer.echo(f"{folder.name}: {same}" + (", here on the whole grid" if whole else ""))
