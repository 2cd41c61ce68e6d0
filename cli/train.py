"""`synthlong train STAGE`: train the networks that find new lesions."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import typer

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def train() -> None:
    """Train the networks that find new lesions."""


@app.command("ohem")
def ohem(
    source: Path = typer.Argument(..., help="Folder of shards, or CSV of scans: subject,baseline,followup,mask."),
    out: Path = typer.Option(..., "-o", "--out", help="Weights to write (.safetensors), with a card beside them."),
    momentum: float = typer.Option(None, help="Of the moving average that finds hard patches; 0: the network itself."),
    oversample: float = typer.Option(None, help="No mining: each patch has a new lesion with this probability."),
    config: Path = typer.Option(None, help="OhemConfig as TOML; the options here overrule it."),
    steps: int = typer.Option(None, help="Optimiser steps.  [default: 30000]"),
    seed: int = typer.Option(None, help="Seed of everything drawn.  [default: 0]"),
    fold: int = typer.Option(None, help="Which part of the patients is held out.  [default: 0]"),
    folds: int = typer.Option(None, help="Number of parts.  [default: 4]"),
    device: str = typer.Option(None, help="cpu or cuda.  [default: cpu]"),
    devices: int = typer.Option(None, help="GPUs or processes of a node.  [default: 1]"),
    nodes: int = typer.Option(None, help="Nodes.  [default: 1]"),
    threads: int = typer.Option(0, help="CPU threads; 0: all. With 1 the weights are the same again, bit for bit."),
    readers: int = typer.Option(2, help="Threads that read patches ahead."),
    tensorboard: bool = typer.Option(True, help="Log to a folder beside the weights."),
    licence: str = typer.Option("unknown", help="Licence of the data, for the card."),
) -> None:
    """Train on hard patches, found by a moving average of the network (Schmidt-Mengin et al. 2022).

    Keeps the weights with the best Dice on patients held out. Goes on from its checkpoint when called again.
    """
    import torch

    import synthlong
    from synthlong.errors import ConfigError

    from .fit import commit
    from .progress import progress_bar

    try:
        from lightning.pytorch.utilities import rank_zero_only

        from synthlong.training.ohem import OhemConfig, train_ohem
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] not in ("lightning", "tensorboard"):
            raise
        raise ConfigError('training needs Lightning: pip install "synthlong[train]"') from error
    if momentum is not None and oversample is not None:
        raise ConfigError("--momentum and --oversample: give one of them; without mining nothing is averaged")
    if out.suffix != ".safetensors":
        raise ConfigError(f"-o {out.name}: weights are named *.safetensors")
    if threads:
        torch.set_num_threads(threads)
    given: dict[str, Any] = {"momentum": momentum, "steps": steps, "seed": seed, "fold": fold, "folds": folds}
    given |= {"device": device, "devices": devices, "nodes": nodes}
    given = {name: value for name, value in given.items() if value is not None}
    words = ["synthlong", "train", "ohem", source.name, "-o", out.name]
    words += ["--config", config.name] if config else []
    words += [word for name, value in given.items() for word in (f"--{name}", f"{value}")]
    if momentum is not None:
        given |= {"mining": True}
    if oversample is not None:
        given |= {"mining": False, "positive_share": oversample}
        words += ["--oversample", f"{oversample}"]
    chosen = OhemConfig.from_toml(config, **given) if config else OhemConfig.from_dict(given)
    card = {"command": shlex.join(words), "licence": licence, "version": synthlong.__version__, "commit": commit()}
    with progress_bar() as show:
        figures = train_ohem(
            source,
            out,
            config=chosen,
            card=card,
            readers=readers,
            tensorboard=tensorboard,
            progress=lambda step, total, loss: show(f"steps, loss {loss:.4f}", step, total),
        )
    last_words = f"{out.name}: " + ", ".join(f"{k} {v:g}" for k, v in figures["best"].items())
    rank_zero_only(typer.echo)(last_words)
