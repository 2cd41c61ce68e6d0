"""`synthlong evaluate`: MSSEG-2 scores of predicted masks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from .options import PREFER, Prefer

if TYPE_CHECKING:
    from synthlong.detection.scores import LesionScores


def evaluate(
    truth: Path = typer.Option(..., help="True mask of new lesions, or a folder of them, a file per patient."),
    prediction: Path = typer.Option(..., help="Predicted mask, or a folder of them under the same file names."),
    out: Path = typer.Option(..., "-o", "--out", help="CSV file to write, a row per patient."),
    against: Path = typer.Option(None, help="Another method's masks: scored too, and compared by a Wilcoxon test."),
    prefer: Prefer = PREFER,
) -> None:
    """Score predicted masks of new lesions as the MSSEG-2 challenge does.

    Scores that are undefined for a patient (PPV if nothing is predicted) are left out of the mean and counted.
    """
    from synthlong.detection.evaluation import evaluate as score
    from synthlong.detection.evaluation import write_scores
    from synthlong.errors import ConfigError, short
    from synthlong.publishing import check_place

    from .progress import progress_bar

    folders = {"prediction": prediction} | ({"against": against} if against else {})
    if out.suffix.lower() != ".csv":  # nor is it one of the masks, then
        raise ConfigError(f"-o {short(out)}: scores are named *.csv")
    check_place(out)
    with progress_bar() as show:
        methods = {
            method: score(truth, folder, prefer=prefer.value if prefer else None, progress=show)
            for method, folder in folders.items()
        }
    for method, scores in methods.items():
        typer.echo(f"{method} {short(folders[method])}\n")
        typer.echo("\n".join(_cohort(scores)) + "\n")
    if against:
        typer.echo("\n".join(_comparison(methods["prediction"], methods["against"])) + "\n")
    write_scores(out, methods)
    typer.echo(f"{short(out)}: {len(methods['prediction'])} patients")


def _cohort(scores: Mapping[str, LesionScores]) -> list[str]:
    """Return the table of one method as lines."""
    from synthlong.detection.evaluation import WITH_NEW, WITHOUT_NEW, average, measured

    numbers, volumes = (measured(scores, name) for name in WITHOUT_NEW)
    lines = []
    for patients, kind, names in (
        (len(scores) - len(numbers), "with", WITH_NEW),
        (len(numbers), "without", WITHOUT_NEW),
    ):
        lines.append(f"patients {kind} new lesions: {patients}")
        if patients:
            lines.append(f"  {'':16}{'mean':>10}{'SEM':>10}{'patients':>10}{'undefined':>11}")
            for name in names:
                a = average(scores, name)
                lines.append(f"  {name:16}{a.mean:10.4f}{a.sem:10.4f}{a.patients:10}{a.undefined:11}")
    lines += [f"  {patient}: {numbers[patient]} lesions, {volumes[patient]:.1f} mm3" for patient in numbers]
    return lines


def _comparison(scores: Mapping[str, LesionScores], others: Mapping[str, LesionScores]) -> list[str]:
    """Return the table of two methods as lines."""
    from synthlong.detection.evaluation import WITH_NEW, WITHOUT_NEW, compare

    lines = [
        "prediction minus against, paired Wilcoxon test (two-sided, not corrected for the number of tests)",
        f"  {'':16}{'difference':>12}{'p':>10}{'patients':>10}{'differing':>11}{'least p':>10}",
    ]
    for name in (*WITH_NEW, *WITHOUT_NEW):
        c = compare(scores, others, name)
        if c.patients:
            numbers = f"{c.difference:12.4f}{c.p:10.2g}{c.patients:10}{c.differing:11}{c.least_p:10.2g}"
            lines.append(f"  {name:16}{numbers}")
    return [*lines, "  least p: 2/2^n, below which n differing patients cannot come"]
