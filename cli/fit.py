"""`synthlong fit`: train the inpainter or the lesion generator."""

from __future__ import annotations

import shlex
import subprocess
from enum import StrEnum
from pathlib import Path
from typing import Any

import typer

from .options import PREFER, Prefer


class Task(StrEnum):
    """The two synthesis networks."""

    inpainter = "inpainter"
    generator = "generator"


def fit(
    task: Task = typer.Argument(..., help="Which network to train."),
    cases: Path = typer.Argument(..., help="Manifest or folder of cases."),
    out: Path = typer.Option(..., "-o", "--out", help="Weights to write (.safetensors), with a card beside them."),
    steps: int = typer.Option(None, help="Optimiser steps.  [default: 2000]"),
    hold_out: str = typer.Option(None, help="Patient kept out of training, on whom the error is measured."),
    learning_rate: float = typer.Option(None, help="Highest learning rate of Adam.  [default: 1e-4]"),
    sides: str = typer.Option(
        None, help="Patch sides in voxels, e.g. 32,48: crops around the areas train faster.  [default: 64]"
    ),
    patches: int = typer.Option(
        None, min=1, help="Patches of 32 voxels a side in a batch; fewer larger ones.  [default: 16]"
    ),
    seed: int = typer.Option(None, help="Seed of everything drawn.  [default: 0]"),
    threads: int = typer.Option(0, help="CPU threads; 0: all."),
    device: str = typer.Option(None, help="Torch device, e.g. cuda:0.  [default: cpu]"),
    precision: str = typer.Option(None, help="bf16, float32 or auto.  [default: auto]"),
    loss: str = typer.Option(None, help="mse, or charbonnier: linear for large errors.  [default: mse]"),
    licence: str = typer.Option("unknown", help="Licence of the data, for the card."),
    prefer: Prefer = PREFER,
) -> None:
    """Train a synthesis network on single-visit scans with lesion masks.

    Goes on from its checkpoint when stopped and called again. Cases that cannot be used are left out.
    """
    import torch

    import synthlong
    from synthlong.errors import ConfigError, InputError, name_of
    from synthlong.fitting import FitConfig, check_fit, fit_on_cases
    from synthlong.manifest import find_cases

    from .progress import progress_bar

    given: dict[str, Any] = {"steps": steps, "learning_rate": learning_rate, "seed": seed}
    given |= {"precision": precision, "device": device, "loss": loss}
    try:
        given["sides"] = None if sides is None else tuple(int(side) for side in sides.split(","))
    except ValueError as error:
        raise ConfigError(f"--sides {sides}: give whole numbers such as 32,48") from error
    given["voxels"] = None if patches is None else patches * 32**3
    config = FitConfig(**{name: value for name, value in given.items() if value is not None})
    if out.suffix != ".safetensors":
        raise ConfigError(f"-o {out.name}: weights are named *.safetensors")
    files = find_cases(cases, prefer=prefer.value if prefer else None)
    hold_out = hold_out.removeprefix("sub-") if hold_out else None
    check_fit(config, out, patients={each.patient for each in files}, hold_out=hold_out)
    if threads:
        torch.set_num_threads(threads)
    words = ["synthlong", "fit", task.value, name_of(cases), "-o", out.name]
    words += ["--steps", str(config.steps), "--learning-rate", str(config.learning_rate)]
    words += ["--sides", ",".join(map(str, config.sides)), "--seed", str(config.seed)]
    words += ["--patches", str(patches)] if patches else []
    words += ["--loss", loss] if loss else []
    words += ["--hold-out", hold_out] if hold_out else []
    words += ["--device", device] if device else []
    words += ["--precision", precision] if precision else []
    words += ["--prefer", prefer.value] if prefer else []
    card = {"command": shlex.join(words), "licence": licence, "version": synthlong.__version__, "commit": commit()}
    usable = []
    with progress_bar() as show:
        for done, each in enumerate(files, start=1):
            try:
                usable.append(each.read())
            except InputError as error:
                typer.echo(f"left out: {each.subject}: {error}", err=True)
            show("cases", done, len(files))
        if not usable:
            raise InputError(cases, "no case can be used", "see `synthlong check`")
        figures = fit_on_cases(
            task.value,
            usable,
            out,
            config=config,
            hold_out=hold_out,
            card=card,
            progress=lambda step, total, loss: show(f"steps, loss {loss:.4f}", step, total),
        )
    last = figures["curve"][-1]
    typer.echo(f"{out.name}: " + ", ".join(f"{k} {v:g}" for k, v in last.items()))
    raise typer.Exit(0 if len(usable) == len(files) else 1)


def commit() -> str | None:
    """Return the commit of the code, with `-dirty` if it was changed since; None outside a checkout.

    A repository around an installed package is none.
    """
    here = Path(__file__)

    def git(*words: str) -> str:
        command = ["git", "-C", str(here.parent), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)
        return git("describe", "--always", "--abbrev=40", "--dirty", "--exclude", "*")
    except (OSError, subprocess.SubprocessError):
        return None
