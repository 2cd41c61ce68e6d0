"""`synthlong generate`: cases to shards."""

from __future__ import annotations

from pathlib import Path

import typer

from .options import PREFER, Prefer


def generate(
    cases: Path = typer.Argument(..., help="Manifest (CSV: subject,flair,mask) or folder of cases, in MNI space."),
    out: Path = typer.Option(..., "-o", "--out", help="Folder to write; call again to go on where it stopped."),
    pairs: int = typer.Option(..., help="Number of pairs."),
    seed: int = typer.Option(..., help="Seed of every draw."),
    config: Path = typer.Option(None, help="SynthesisConfig as TOML."),
    shard_size: int = typer.Option(64, help="Pairs in a shard."),
    workers: int = typer.Option(0, min=0, help="Processes; 0: one per processor."),
    scheduler: str = typer.Option(None, help="Dask: an address (tcp://...) or a TOML file (slurm.toml)."),
    device: str = typer.Option(None, help="Torch device of the networks, e.g. cuda:0."),
    strict: bool = typer.Option(False, "--strict", help="Write nothing if a case cannot be used."),
    break_lock: bool = typer.Option(False, "--break-lock", help="Take the folder from a writer that is gone."),
    prefer: Prefer = PREFER,
) -> None:
    """Make a data set of synthetic longitudinal pairs from single-visit scans."""
    from dataclasses import replace

    from synthlong.dataset.run import generate as run
    from synthlong.dataset.writer import shard_name
    from synthlong.errors import name_of
    from synthlong.synthesis import SynthesisConfig

    from .progress import progress_bar

    chosen = SynthesisConfig.from_toml(config) if config else SynthesisConfig()
    if device:
        chosen = replace(chosen, device=device)
    with progress_bar() as show:
        outcome = run(
            cases,
            out,
            pairs=pairs,
            seed=seed,
            config=chosen,
            shard_size=shard_size,
            workers=workers,
            scheduler=scheduler,
            strict=strict,
            break_lock=break_lock,
            prefer=prefer.value if prefer else None,
            progress=show,
        )
    for subject, problem in outcome.failures.items():
        typer.echo(f"left out: {subject}: {problem}", err=True)
    for number, problem in outcome.lost.items():
        typer.echo(f"{name_of(out)}/{shard_name(number)}: {problem}; run the same command again", err=True)
    if outcome.lost:
        typer.echo(f"{name_of(out)}: not finished, {len(outcome.lost)} of {outcome.shards} shards are missing")
        raise typer.Exit(1)
    if outcome.made:
        rate = outcome.made / max(outcome.seconds, 1e-9)
        text = f"{outcome.made} made in {outcome.seconds:.1f} s, {rate:.1f} pairs/s"
    else:
        text = "already complete" + ("; cases mended since want another folder" if outcome.failures else "")
    typer.echo(f"{name_of(out)}: {outcome.pairs} pairs in {outcome.shards} shards ({text})")
    raise typer.Exit(1 if outcome.failures else 0)
