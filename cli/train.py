"""`synthlong train STAGE`: train the networks that find lesions and new lesions."""

from __future__ import annotations

import inspect
import os
import shlex
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import typer

from synthlong.errors import ConfigError, name_of

from .options import PREFER, Prefer

if TYPE_CHECKING:
    from synthlong.training.training_config import TrainingConfig

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)

Config = TypeVar("Config", bound="TrainingConfig")


@app.callback()
def train() -> None:
    """Train the networks that find lesions and new lesions."""


def _shared(
    config: Path = typer.Option(None, help="All settings as TOML; the options here overrule it."),
    steps: int = typer.Option(None, help="Optimiser steps.  [default: 20000, ohem 30000]"),
    batch: int = typer.Option(None, help="Patches that a step learns from.  [default: 4, ohem 32]"),
    learning_rate: float = typer.Option(None, help="Highest learning rate of Adam.  [default: 1e-4, ohem 1e-3]"),
    side: int = typer.Option(None, help="Edge of a patch in voxels.  [default: 64, ohem 32]"),
    seed: int = typer.Option(None, help="Seed of everything drawn.  [default: 0]"),
    fold: int = typer.Option(None, help="Which part of the patients is held out.  [default: 0, finetune all in turn]"),
    folds: int = typer.Option(None, help="Number of parts.  [default: 4, finetune 5]"),
    device: str = typer.Option(None, help="cpu or cuda.  [default: cpu]"),
    devices: int = typer.Option(None, help="GPUs or processes of a node.  [default: 1]"),
    nodes: int = typer.Option(None, help="Nodes.  [default: 1]"),
    prefer: Prefer = PREFER,
    threads: int = typer.Option(
        0, min=0, help="CPU threads; 0: all. With 1 the weights come out the same, bit for bit."
    ),
    readers: int = typer.Option(2, min=0, help="Threads that read patches ahead, or processes that make pairs."),
    tensorboard: bool = typer.Option(True, help="Log to a folder beside the weights."),
    licence: str = typer.Option("unknown", help="Licence of the data, for the card."),
) -> None:
    """The options of every stage."""


class _Asked:
    """What was asked for on the command line.

    Args:
        stage: Name of the verb.
        source: Where the data are.
        out: The weights to write.
        options: All others, by name; what is not given is None.
    """

    def __init__(self, stage: str, source: Path, out: Path, options: dict[str, Any]) -> None:
        import torch

        if out.suffix != ".safetensors":
            raise ConfigError(f"-o {out.name}: weights are named *.safetensors")
        names = inspect.signature(_shared).parameters
        shared = {name: options[name] for name in names}
        self._file, self._licence = shared.pop("config"), shared.pop("licence")
        threads = shared.pop("threads")
        self.of_fit = {name: shared.pop(name) for name in ("readers", "tensorboard")}
        self.given = {name: str(v) if name == "prefer" else v for name, v in shared.items() if v is not None}
        self._words = ["synthlong", "train", stage, name_of(source), "-o", out.name]
        self._words += ["--config", self._file.name] if self._file else []
        self.say(**self.given)
        if threads:
            os.environ["OMP_NUM_THREADS"] = str(threads)  # for Lightning, where it starts several processes
            torch.set_num_threads(threads)
            self.say(threads=threads)

    def say(self, **options: Any) -> None:
        """Add options to the command that the card keeps."""
        for name, value in options.items():
            self._words += [f"--{name.replace('_', '-')}", f"{value}"]

    def note(self, **options: Any) -> None:
        """Add options of one stage to the config, where they are given."""
        given = {name: value for name, value in options.items() if value is not None}
        self.given |= given
        self.say(**given)

    def config(self, kind: type[Config]) -> Config:
        """Return the config: what was given here, else what the file says."""
        return kind.from_toml(self._file, **self.given) if self._file else kind.from_dict(self.given)

    def says(self, name: str) -> bool:
        """Whether an option was given, here or in the file."""
        return name in self.given or (self._file is not None and name in tomllib.loads(self._file.read_text()))

    @contextmanager
    def running(self) -> Iterator[dict[str, Any]]:
        """Show progress; yield the options that every training takes."""
        import synthlong

        from .fit import commit
        from .progress import progress_bar

        card = {"command": shlex.join(self._words), "licence": self._licence}
        card |= {"version": synthlong.__version__, "commit": commit()}
        with progress_bar() as show:

            def shown(step: int, total: int, loss: float) -> None:
                show(f"steps, loss {loss:.4f}", step, total)

            yield {**self.of_fit, "card": card, "progress": shown}


def _stage(verb: Callable[..., None]) -> Callable[..., None]:
    """Register a verb with the shared options after its own; it gets them as `asked`."""
    own = [p for p in inspect.signature(verb).parameters.values() if p.name != "asked"]
    shared = inspect.signature(_shared).parameters

    @wraps(verb)
    def run(**options: Any) -> None:
        mine = {p.name: options[p.name] for p in own}
        verb(**mine, asked=_Asked(verb.__name__, mine["source"], mine["out"], options))

    run.__signature__ = inspect.Signature([*own, *shared.values()])  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in (*own, *shared.values())}
    return app.command(verb.__name__)(run)


@contextmanager
def _needing_lightning() -> Iterator[None]:
    """Name the extra where what it installs is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] not in ("lightning", "tensorboard"):
            raise
        raise ConfigError('training needs Lightning: pip install "synthlong[train]"') from error


def _tell(name: str, figures: dict[str, Any]) -> None:
    from lightning.pytorch.utilities import rank_zero_only

    rank_zero_only(typer.echo)(f"{name}: " + ", ".join(f"{k} {v:g}" for k, v in figures["best"].items()))


@_stage
def segment(
    source: Path = typer.Argument(..., help="Manifest or folder of cases: single visits with lesion masks."),
    out: Path = typer.Option(..., "-o", "--out", help="Weights to write (.safetensors), with a card beside them."),
    schedule: str = typer.Option(None, help="Of the learning rate: constant or cosine.  [default: constant]"),
    *,
    asked: _Asked,
) -> None:
    """Train on the lesions of single visits: stage one of Kamraoui et al. (2022).

    Keeps the weights with the best Dice on patients held out. Goes on from its checkpoint when called again.
    """
    with _needing_lightning():
        from synthlong.training import stage_config, stages
    asked.note(schedule=schedule)
    with asked.running() as options:
        figures = stages.segment(source, out, config=asked.config(stage_config.SegmentConfig), **options)
    _tell(out.name, figures)


@_stage
def pretrain(
    source: Path = typer.Argument(..., help="Folder of shards, or cases of which pairs are made on the fly."),
    out: Path = typer.Option(..., "-o", "--out", help="Weights to write (.safetensors), with a card beside them."),
    encoder: Path = typer.Option(..., help="Weights of `train segment`."),
    schedule: str = typer.Option(None, help="Of the learning rate: constant or cosine.  [default: constant]"),
    *,
    asked: _Asked,
) -> None:
    """Train on the new lesions of synthetic pairs, the encoder frozen: stage two of Kamraoui et al. (2022).

    Keeps the weights with the best Dice on patients held out. Goes on from its checkpoint when called again.
    """
    with _needing_lightning():
        from synthlong.training import stage_config, stages
    asked.note(schedule=schedule)
    asked.say(encoder=encoder.name)
    with asked.running() as options:
        figures = stages.pretrain(
            source, out, encoder=encoder, config=asked.config(stage_config.PretrainConfig), **options
        )
    _tell(out.name, figures)


@_stage
def finetune(
    source: Path = typer.Argument(..., help="CSV of real pairs: subject,baseline,followup,mask."),
    out: Path = typer.Option(..., "-o", "--out", help="w.safetensors: writes w.fold-0.safetensors and so on."),
    weights: Path = typer.Option(..., help="Weights of `train pretrain`."),
    schedule: str = typer.Option(None, help="Of the learning rate: constant or cosine.  [default: constant]"),
    *,
    asked: _Asked,
) -> None:
    """Train an ensemble on real pairs, the encoders frozen: stage three of Kamraoui et al. (2022).

    One network for each fold of the patients, each the one with the best Dice on its own patients held out. Goes on
    where it was stopped when called again.
    """
    with _needing_lightning():
        from synthlong.training import stage_config, stages
    asked.note(schedule=schedule)
    asked.say(weights=weights.name)
    config = asked.config(stage_config.FinetuneConfig)
    fold = config.fold if asked.says("fold") else None
    with asked.running() as options:
        made = stages.finetune(source, out, weights=weights, config=config, fold=fold, **options)
    for figures in made:
        one = f"{out.stem}.fold-{figures['train']['fold']}{out.suffix}"
        _tell(one if config.folds > 1 else out.name, figures)


@_stage
def ohem(
    source: Path = typer.Argument(..., help="Folder of shards, or CSV of scans: subject,baseline,followup,mask."),
    out: Path = typer.Option(..., "-o", "--out", help="Weights to write (.safetensors), with a card beside them."),
    momentum: float = typer.Option(None, help="Of the moving average that finds hard patches; 0: the network itself."),
    oversample: float = typer.Option(None, help="No mining: each patch has a new lesion with this probability."),
    *,
    asked: _Asked,
) -> None:
    """Train on hard patches, found by a moving average of the network (Schmidt-Mengin et al. 2022).

    Keeps the weights with the best Dice on patients held out. Goes on from its checkpoint when called again.
    """
    with _needing_lightning():
        from synthlong.training import ohem
    if momentum is not None and oversample is not None:
        raise ConfigError("--momentum and --oversample: give one of them; without mining nothing is averaged")
    asked.note(momentum=momentum)
    if momentum is not None:
        asked.given |= {"mining": True}
    if oversample is not None:
        asked.given |= {"mining": False, "positive_share": oversample}
        asked.say(oversample=oversample)
    with asked.running() as options:
        figures = ohem.train_ohem(source, out, config=asked.config(ohem.OhemConfig), **options)
    _tell(out.name, figures)
