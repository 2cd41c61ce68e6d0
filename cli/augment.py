"""`synthlong augment`: one artifact on one NIfTI file."""

from __future__ import annotations

from pathlib import Path

import typer

from .options import PREFER, Prefer


def augment(
    scan: Path = typer.Argument(..., help="NIfTI file."),
    out: Path = typer.Option(..., "-o", "--out", help="NIfTI file to write; .html or .png for --artifact all."),
    artifact: str = typer.Option(
        ...,
        help="blur, unsharp, slice-thickness, downsampling, noise, bias-field, motion, spike, ghosting, acquisition,"
        " or all for a sheet of pictures.",
    ),
    seed: int = typer.Option(0, min=0, help="Seed of what is drawn."),
    settings: list[str] = typer.Option(
        [], "--set", help="key=value, e.g. degrees=5 (draws from -5..5) or degrees=5,5 (is 5); can be repeated."
    ),
    prefer: Prefer = PREFER,
) -> None:
    """Put one MRI artifact on a scan; the header's geometry is kept."""
    import json

    from synthlong.augmentation import augment as put
    from synthlong.augmentation import contact_sheet, setting_of
    from synthlong.errors import ConfigError

    chosen = prefer.value if prefer else None
    if artifact == "all":
        if settings:
            raise ConfigError("--set: --artifact all takes none; name one artifact")
        captions = contact_sheet(scan, out, seed=seed, prefer=chosen)
        typer.echo("\n".join(f"{n // 4 + 1}.{n % 4 + 1}  {text}" for n, text in enumerate(captions)))
        return
    drawn = dict(setting_of(text) for text in settings)
    params = put(scan, out, artifact, seed=seed, settings=drawn, prefer=chosen)
    typer.echo(f"{out.name}: {artifact} {json.dumps(params)}")
