"""`synthlong check`: read and validate every case, write nothing."""

from __future__ import annotations

from pathlib import Path

import typer

from .options import PREFER, Prefer


def check(
    cases: Path = typer.Argument(..., help="Manifest (CSV: subject,flair,mask[,session,...]) or folder of cases."),
    prefer: Prefer = PREFER,
) -> None:
    """Read and validate every case: one line each; exit code 1 if one cannot be used."""
    import warnings

    from synthlong.derived import placements_of
    from synthlong.errors import InputError, InputWarning
    from synthlong.lesions import find_lesions
    from synthlong.manifest import find_cases, warn_of_twins
    from synthlong.synthesis import SynthesisConfig

    failed, flairs = 0, {}
    for files in find_cases(cases, prefer=prefer.value if prefer else None):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", InputWarning)
            try:
                case = files.read()
                placements_of(case, SynthesisConfig())
            except InputError as error:
                failed += 1
                typer.echo(f"FAIL  {files.subject}: {error}")
                continue
        flairs[files.subject] = case.sources["flair"]
        lesions = find_lesions(case.lesions, max_event_mm3=float("inf"))
        grid = " x ".join(str(n) for n in case.shape)
        volume_ml = lesions.volumes_mm3.sum() / 1000
        typer.echo(f"ok    {files.subject}: {grid} mm, {len(lesions)} lesions, {volume_ml:.1f} ml")
        for warning in caught:
            if issubclass(warning.category, InputWarning):
                typer.echo(f"      warning: {warning.message}")
    warn_of_twins(flairs)
    raise typer.Exit(1 if failed else 0)
