"""`synthlong prepare`: raw scans to cases in MNI space."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path

import typer

from .options import PREFER, Prefer


class Recipe(StrEnum):
    """The two preprocessings."""

    kamraoui = "kamraoui"
    schmidt = "schmidt"


def prepare(
    scans: Path = typer.Argument(..., help="Manifest (CSV: subject,flair[,session,mask,t1,brain,...]) or BIDS folder."),
    out: Path = typer.Option(..., "-o", "--out", help="Folder to write; call again to go on where it stopped."),
    recipe: Recipe = typer.Option(None, help="kamraoui: MNI space (default); schmidt: halfway space, z-scores."),
    config: Path = typer.Option(None, help="PreparationConfig as TOML."),
    participant_label: list[str] = typer.Option([], help="Only this subject; may be given several times."),
    brain_mask: str = typer.Option(None, help="Path of brain masks, with {subject} and {session} in it."),
    workers: int = typer.Option(0, help="Processes; 0: one per processor and 4.5 GB of memory."),
    device: str = typer.Option(None, help="Torch device of HD-BET and the inpainter, e.g. cuda:0."),
    break_lock: bool = typer.Option(False, "--break-lock", help="Take the folder from a writer that is gone."),
    dry_run: bool = typer.Option(False, "--dry-run", help="Say what would be prepared, write nothing."),
    prefer: Prefer = PREFER,
) -> None:
    """Prepare raw scans: brain, denoising, bias field, registration to MNI space, intensities, tissue."""
    from dataclasses import replace

    from synthlong.errors import short
    from synthlong.preparation.config import PreparationConfig
    from synthlong.preparation.run import prepare as run
    from synthlong.preparation.scans import find_scans

    from .progress import progress_bar

    chosen = PreparationConfig.from_toml(config) if config else PreparationConfig()
    if recipe:
        chosen = replace(chosen, recipe=recipe.value)
    if device:
        chosen = replace(chosen, device=device)
    found = find_scans(scans, participants=participant_label, brain_mask=brain_mask)
    with progress_bar() as show:
        outcome = run(
            found,
            out,
            config=chosen,
            workers=workers,
            prefer=prefer.value if prefer else None,
            break_lock=break_lock,
            dry_run=dry_run,
            progress=show,
        )
    if dry_run:
        for scan in found:
            if scan.id in outcome.prepared:
                typer.echo(f"would prepare: {scan.id} ({', '.join(scan.files)})")
    for name, flags in outcome.flagged.items():
        typer.echo(f"flagged: {name}: {'; '.join(flags)}; look at its picture in {short(out / 'figures')}", err=True)
    for subject, problem in outcome.failures.items():
        typer.echo(f"failed: {subject}: {problem}", err=True)
    if dry_run:
        bare = sum(scan.mask is None for scan in found)
        text = f"{len(outcome.prepared)} scans to prepare, {len(outcome.there)} are there"
        typer.echo(f"{short(out)}: {text}; {bare} of all {len(found)} have no lesion mask")
    else:
        typer.echo(f"{short(out)}: {len(outcome.prepared)} scans prepared, {len(outcome.there)} were there")
    raise typer.Exit(1 if outcome.failures or outcome.flagged else 0)
