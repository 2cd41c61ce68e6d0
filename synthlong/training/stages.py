"""The three stages of Kamraoui et al. (2022), doi 10.3389/fnimg.2022.948235, sections 2.2 and 2.6.

    segment: lesions of single visits -> pretrain: new lesions of synthetic pairs -> finetune: those of real pairs
             encoder and decoder                 merge and decoder                           merge and decoder

Patches of 64^3, soft Dice, Adam with learning rate 1e-4 and beta1 0.9, artifacts in every stage, an ensemble of five
in the end. The paper names neither steps nor batch, nor how patches are chosen: those are ours.

Patch n of step t is drawn from (seed, t, n) alone, whatever the number of processes and readers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from synthlong.dataset.plan import read_plan
from synthlong.detection.networks import SegmentationUNet, SiameseUNet
from synthlong.errors import ConfigError
from synthlong.networks import UNet, check_device, settled
from synthlong.progress import StepProgress
from synthlong.publishing import make_place
from synthlong.synthesis import SynthesisConfig
from synthlong.training.loop import Training, fit, seeded_weights
from synthlong.training.patches import Drawn, check_folds
from synthlong.training.seen import DrawnPatches, MadePairs, Seen
from synthlong.training.stage_config import SYNTHESIS, FinetuneConfig, PretrainConfig, SegmentConfig, StageConfig
from synthlong.weights import checkpoint_of, read_weights

__all__ = ["finetune", "pretrain", "segment"]


def segment(
    source: Path,
    out: Path,
    *,
    config: SegmentConfig,
    card: dict[str, Any],
    readers: int = 2,
    tensorboard: bool = True,
    progress: StepProgress | None = None,
) -> dict[str, Any]:
    """Train a `SegmentationUNet` on single visits; write the best weights and their card, return its figures.

    A checkpoint lies beside `out` while training runs; the same call goes on from it.

    Args:
        source: Manifest or folder of cases, see `find_cases`.
        out: The `.safetensors` file.
        config: How to train.
        card: What the card says beside the figures.
        readers: Threads that make patches ahead; they change no bit.
        tensorboard: Log to a folder beside `out`.
        progress: Called as (step, steps, loss).

    Raises:
        InputError: Patches cannot be drawn, the checkpoint is damaged or of another training, the loss is not finite.
        ConfigError: An option that cannot be here.
    """
    check_device(config.device)
    make_place(out)
    seen = DrawnPatches(source, config, SegmentationUNet, readers=readers)
    with seeded_weights(config.seed):
        network = SegmentationUNet(config.network)
    model = _Stage("segment", config, network, seen, about=seen.about, checkpoint=checkpoint_of(out), progress=progress)
    return fit(model, out, card=card, tensorboard=tensorboard)


def pretrain(
    source: Path,
    out: Path,
    *,
    encoder: Path,
    config: PretrainConfig,
    card: dict[str, Any],
    readers: int = 2,
    tensorboard: bool = True,
    progress: StepProgress | None = None,
) -> dict[str, Any]:
    """Train a `SiameseUNet` on synthetic pairs; write the best weights and their card, return its figures.

    From cases, pairs are made on the fly, each seen once; the cases are prepared beside `out` first.

    Args:
        source: Folder that `synthlong generate` wrote; or manifest or folder of cases, see `find_cases`.
        out: The `.safetensors` file.
        encoder: Weights of `segment`.
        config: How to train.
        card: What the card says beside the figures.
        readers: Threads that read patches ahead, or processes that make pairs; they change no bit.
        tensorboard: Log to a folder beside `out`.
        progress: Called as (step, steps, loss).

    Raises:
        InputError: As for `segment`, or the weights are not those of a `SegmentationUNet`.
        ConfigError: An option that cannot be here.
    """
    check_device(config.device)
    make_place(out)
    trained, sha256 = read_weights(encoder, task=SegmentationUNet.task, shipped=False)
    assert isinstance(trained, SegmentationUNet)
    config.check_side(trained.config.multiple)
    with seeded_weights(config.seed):
        network = SiameseUNet.from_segmentation(trained)
    if config.trainable == "decoder":
        network.freeze_encoder()
    _keep(encoder, out)
    seen: Seen
    if (source / "run.json").exists():
        if config.synthesis != SYNTHESIS:
            raise ConfigError("synthesis: shards say how their pairs were made; leave it out, or pass cases")
        config = replace(config, synthesis=SynthesisConfig.from_dict(read_plan(source)["config"]))
        seen = DrawnPatches(source, config, SiameseUNet, readers=readers)
    else:
        config = replace(config, synthesis=settled(_boxes_of(config)))
        seen = MadePairs(source, config, work=out.with_suffix(".work"), readers=readers)
    about = {**seen.about, "encoder": sha256}
    model = _Stage("pretrain", config, network, seen, about=about, checkpoint=checkpoint_of(out), progress=progress)
    figures = fit(model, out, card=card, tensorboard=tensorboard)
    if isinstance(seen, MadePairs):
        seen.remove()
    return figures


def finetune(
    source: Path,
    out: Path,
    *,
    weights: Path,
    config: FinetuneConfig,
    card: dict[str, Any],
    fold: int | None = None,
    readers: int = 2,
    tensorboard: bool = True,
    progress: StepProgress | None = None,
) -> list[dict[str, Any]]:
    """Train a `SiameseUNet` further on real pairs, one for each fold; return the figures of each.

    `w.safetensors` becomes `w.fold-0.safetensors` and so on, but for a single fold. The same call goes on where it was
    stopped; a fold that was finished with the same settings stays.

    Args:
        source: CSV file with columns `subject,baseline,followup,mask`.
        out: The `.safetensors` file.
        weights: Of `pretrain`.
        config: How to train; its `fold` is that of each network.
        card: What the card says beside the figures.
        fold: Train only this one; None: all.
        readers: Threads that make patches ahead; they change no bit.
        tensorboard: Log to folders beside `out`.
        progress: Called as (step, steps, loss), for each network anew.

    Raises:
        InputError: As for `segment`, or the weights are not those of a `SiameseUNet`.
        ConfigError: An option that cannot be here.
    """
    check_device(config.device)
    make_place(out)
    folds = list(range(config.folds)) if fold is None else [fold]
    if config.folds > 1 and source.is_file():
        check_folds(source, folds, of=config.folds, prefer=config.prefer)

    def tuned(number: int) -> dict[str, Any]:
        """Train the network of a fold, whose scans are let go then."""
        of_fold = replace(config, fold=number)
        network, sha256 = read_weights(weights, task=SiameseUNet.task, shipped=False)
        assert isinstance(network, SiameseUNet)
        of_fold.check_side(network.config.multiple)
        if config.trainable == "decoder":
            network.freeze_encoder()
        seen = DrawnPatches(source, of_fold, SiameseUNet, readers=readers)
        about = {**seen.about, "weights": sha256}
        own = out.with_name(f"{out.stem}.fold-{number}.safetensors") if config.folds > 1 else out
        _keep(weights, own)
        place = checkpoint_of(own)
        model = _Stage("finetune", of_fold, network, seen, about=about, checkpoint=place, progress=progress)
        return fit(model, own, card=card, tensorboard=tensorboard)

    return [tuned(number) for number in folds]


class _Stage(Training):
    """A network and what it sees."""

    def __init__(self, stage: str, config: StageConfig, network: UNet, seen: Seen, **options: Any) -> None:
        super().__init__(config, network, **options)
        self.stage, self._seen = stage, seen

    def batches(self) -> Iterable[tuple[Tensor, ...]]:
        return self._seen.batches(self.global_step, self.global_rank)

    def validation(self) -> Drawn | None:
        return self._seen.validation()


def _boxes_of(config: PretrainConfig) -> SynthesisConfig:
    """Return how to make pairs of which a patch is all."""
    if config.synthesis.box not in (SYNTHESIS.box, config.side):
        raise ConfigError(f"box = {config.synthesis.box}: pairs made on the fly are as large as patches; set `side`")
    try:
        return replace(config.synthesis, box=config.side)
    except ConfigError as error:
        raise ConfigError(f"side = {config.side}: pairs cannot be made in this size ({error})") from error


def _keep(weights: Path, out: Path) -> None:
    """Raise a ConfigError if a training would write over the weights it begins with."""
    if weights.resolve() == out.resolve():
        raise ConfigError(f"-o {out.name}: are the weights that the training begins with; choose another name")
