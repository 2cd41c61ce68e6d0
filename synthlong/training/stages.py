"""The three stages of Kamraoui et al. (2022), doi 10.3389/fnimg.2022.948235, sections 2.2 and 2.6.

    segment: lesions of single visits -> pretrain: new lesions of synthetic pairs -> finetune: those of real pairs
             encoder and decoder                 merge and decoder                           merge and decoder

Patches of 64^3, soft Dice, Adam with learning rate 1e-4 and beta1 0.9, artifacts in every stage, an ensemble of five
in the end. The paper names neither steps nor batch, nor how patches are chosen: those are ours.

Patch n of step t is drawn from (seed, t, n) alone, whatever the number of processes and readers.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from torch import Tensor

from synthlong.dataset.plan import read_plan
from synthlong.dataset.shards import subjects_of
from synthlong.dataset.stream import PairStream
from synthlong.dataset.writer import make_place
from synthlong.detection.networks import SegmentationUNet, SiameseUNet
from synthlong.errors import ConfigError
from synthlong.manifest import CaseFiles, find_cases
from synthlong.networks import UNet, UNetConfig, check_device, settled
from synthlong.synthesis import SynthesisConfig
from synthlong.training.augmented import AugmentedPatches
from synthlong.training.loop import (
    Ahead,
    Training,
    TrainingConfig,
    drawn_from,
    fit,
    read_sides,
    rng_at,
    seeded_weights,
    source_sha256,
)
from synthlong.training.patches import Drawn, Network, Patches, check_folds
from synthlong.weights import checkpoint_of, read_weights

__all__ = [
    "FinetuneConfig",
    "PretrainConfig",
    "SegmentConfig",
    "StageConfig",
    "finetune",
    "pretrain",
    "segment",
]

_WARM_UP = 0.03
"""Share of the steps in which the learning rate of the cosine schedule rises."""

_SYNTHESIS = SynthesisConfig(artifacts="kamraoui")
_ARTIFACTS = ("kamraoui", "mild", "clinical", "none")

Progress = Callable[[int, int, float], None]


@dataclass(frozen=True)
class StageConfig(TrainingConfig):
    """How to train a stage. All else: see `TrainingConfig`.

    Args:
        schedule: Of the learning rate: "constant", or "cosine" (ours): a rise over 3 % of the steps, a cosine to 0.
        positive_share: Share of the patches with a voxel of a lesion (a new one, from two visits); the others lie
            anywhere in the brain.
    """

    schedule: Literal["constant", "cosine"] = "constant"
    positive_share: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(("schedule",), lambda v: v in ("constant", "cosine"), "constant or cosine")
        self.check(("positive_share",), lambda v: 0 <= v <= 1, "from 0 to 1")

    def learning_rate_at(self, step: int) -> float:
        """Return Adam's learning rate at a step."""
        if self.schedule == "constant":
            return self.learning_rate
        rising = min((step + 1) / max(_WARM_UP * self.steps, 1), 1)
        return self.learning_rate * rising * (1 + math.cos(math.pi * step / self.steps)) / 2

    def draw(self, patches: Patches, step: int, rank: int) -> Drawn:
        """Draw what one process sees at a step: every `ranks`-th patch of the batch."""
        numbers = range(rank, self.batch, self.ranks)
        drawn = [patches.draw(rng_at(self.seed, step, n), 1, self._positives(step, n)) for n in numbers]
        return tuple(np.concatenate(parts) for parts in zip(*drawn, strict=True))

    def _positives(self, step: int, n: int) -> int:
        """Return 1 where a patch is positive: the first of a step, as many as the share has made whole by then."""
        before, after = (math.floor(s * self.batch * self.positive_share + 1e-9) for s in (step, step + 1))
        return int(n < after - before)

    def check_augmentation(self) -> None:
        """Check artifacts and orientations."""
        self.check(("artifacts",), lambda v: v in _ARTIFACTS, "kamraoui, mild, clinical or none")
        self.check(("orientations",), lambda v: v in ("all", "mirror", "none"), "all, mirror or none")


@dataclass(frozen=True)
class SegmentConfig(StageConfig):
    """How to train stage one. All else: see `StageConfig`.

    Args:
        widths: Feature channels of each level of the network; the later stages have the same.
        artifacts: Preset of `RandomAcquisition`, "kamraoui", "mild" or "clinical"; or "none".
        orientations: "all" 48, "mirror" (left-right) or "none".
    """

    widths: tuple[int, ...] = (16, 32, 64)
    artifacts: Literal["kamraoui", "mild", "clinical", "none"] = "kamraoui"
    orientations: Literal["all", "mirror", "none"] = "all"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "widths", tuple(int(width) for width in self.widths))
        self.check_augmentation()
        try:
            self.check_side(self.network.multiple)
        except ValueError as error:
            raise ConfigError(str(error)) from error

    @property
    def network(self) -> UNetConfig:
        """Size of the network."""
        return UNetConfig(in_channels=SegmentationUNet.channels, widths=self.widths)


@dataclass(frozen=True)
class PretrainConfig(StageConfig):
    """How to train stage two. All else: see `StageConfig`.

    Args:
        trainable: "decoder" (and the merge; the encoder stays as it is) or "all".
        synthesis: How pairs are made on the fly, of boxes of `side` voxels; shards say how theirs were made.
    """

    trainable: Literal["decoder", "all"] = "decoder"
    synthesis: SynthesisConfig = _SYNTHESIS

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(("trainable",), lambda v: v in ("decoder", "all"), "decoder or all")


@dataclass(frozen=True)
class FinetuneConfig(StageConfig):
    """How to train stage three. All else: see `StageConfig`.

    Args:
        trainable: "decoder" (and the merge; the encoder stays as it is) or "all".
        artifacts: Preset of `RandomAcquisition`, "kamraoui", "mild" or "clinical", drawn for each visit; or "none".
        orientations: "all" 48, "mirror" (left-right) or "none"; one for both visits.
        folds: Number of networks; each has another part of the patients for validation, a single one has none.
    """

    folds: int = 5
    trainable: Literal["decoder", "all"] = "decoder"
    artifacts: Literal["kamraoui", "mild", "clinical", "none"] = "kamraoui"
    orientations: Literal["all", "mirror", "none"] = "all"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(("trainable",), lambda v: v in ("decoder", "all"), "decoder or all")
        self.check_augmentation()


def segment(
    source: Path,
    out: Path,
    *,
    config: SegmentConfig,
    card: dict[str, Any],
    readers: int = 2,
    tensorboard: bool = True,
    progress: Progress | None = None,
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
    seen = _DrawnPatches(source, config, SegmentationUNet, readers=readers)
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
    progress: Progress | None = None,
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
    seen: _Seen
    if (source / "run.json").exists():
        if config.synthesis != _SYNTHESIS:
            raise ConfigError("synthesis: shards say how their pairs were made; leave it out, or pass cases")
        config = replace(config, synthesis=SynthesisConfig.from_dict(read_plan(source)["config"]))
        seen = _DrawnPatches(source, config, SiameseUNet, readers=readers)
    else:
        config = replace(config, synthesis=settled(_boxes_of(config)))
        seen = _MadePairs(source, config, work=out.with_suffix(".work"), readers=readers)
    about = {**seen.about, "encoder": sha256}
    model = _Stage("pretrain", config, network, seen, about=about, checkpoint=checkpoint_of(out), progress=progress)
    figures = fit(model, out, card=card, tensorboard=tensorboard)
    if isinstance(seen, _MadePairs):
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
    progress: Progress | None = None,
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
        check_folds(source, folds, of=config.folds)

    def tuned(number: int) -> dict[str, Any]:
        """Train the network of a fold, whose scans are let go then."""
        of_fold = replace(config, fold=number)
        network, sha256 = read_weights(weights, task=SiameseUNet.task, shipped=False)
        assert isinstance(network, SiameseUNet)
        of_fold.check_side(network.config.multiple)
        if config.trainable == "decoder":
            network.freeze_encoder()
        seen = _DrawnPatches(source, of_fold, SiameseUNet, readers=readers)
        about = {**seen.about, "weights": sha256}
        own = out.with_name(f"{out.stem}.fold-{number}.safetensors") if config.folds > 1 else out
        _keep(weights, own)
        place = checkpoint_of(own)
        model = _Stage("finetune", of_fold, network, seen, about=about, checkpoint=place, progress=progress)
        return fit(model, own, card=card, tensorboard=tensorboard)

    return [tuned(number) for number in folds]


class _Seen(Protocol):
    """What a stage learns from and is measured on."""

    about: dict[str, Any]

    def batches(self, first: int, rank: int) -> Iterable[tuple[Tensor, ...]]:
        """Return visits and truth of each step from `first` on, for one process."""

    def validation(self) -> Drawn | None:
        """Return visits and truth of patients held out; None: there are none."""


class _Stage(Training):
    """A network and what it sees."""

    def __init__(self, stage: str, config: StageConfig, network: UNet, seen: _Seen, **options: Any) -> None:
        super().__init__(config, network, **options)
        self.stage, self._seen = stage, seen

    def batches(self) -> Iterable[tuple[Tensor, ...]]:
        return self._seen.batches(self.global_step, self.global_rank)

    def validation(self) -> Drawn | None:
        return self._seen.validation()


class _DrawnPatches:
    """Patches drawn from shards or whole scans; those held out are not augmented."""

    def __init__(self, source: Path, config: StageConfig, network: Network, *, readers: int) -> None:
        training, self._held_out, self.about = read_sides(source, config, network)
        if isinstance(config, SegmentConfig | FinetuneConfig):
            training = AugmentedPatches(training, artifacts=config.artifacts, orientations=config.orientations)
        self._training, self._config, self._readers = training, config, readers

    def batches(self, first: int, rank: int) -> Ahead:
        steps, draw = range(first, self._config.steps), self._config.draw
        return Ahead(self._training, lambda p, step: draw(p, step, rank), steps=steps, readers=self._readers)

    def validation(self) -> Drawn | None:
        return drawn_from(self._held_out, self._config, self._config.positive_share)


class _MadePairs:
    """Pairs made on the fly: pair n of step t is pair `t * batch + n` of a run that is never written."""

    _KEYS = ("baseline", "followup", "new_lesions")

    def __init__(self, source: Path, config: PretrainConfig, *, work: Path, readers: int) -> None:
        files = find_cases(source)
        patients = sorted({one.patient for one in files})
        held_out: set[str] = set()
        if config.folds > 1:
            held_out = subjects_of("validation", patients, fold=config.fold, folds=config.folds)
        self.about: dict[str, Any] = {"patients": sorted(set(patients) - held_out), "held_out": sorted(held_out)}
        self.about["source"] = source_sha256(source, pairs=False)
        self._steps, self._readers, self._work = config.steps, readers, work

        def pairs_of(chosen: list[CaseFiles], *, pairs: int, batch: int) -> PairStream:
            options: dict[str, Any] = {"pairs": pairs, "keys": self._KEYS, "batch_size": batch, "work": work}
            return PairStream(chosen, config.synthesis, config.seed, **options)

        learned = [one for one in files if one.patient not in held_out]
        self._training = pairs_of(learned, pairs=config.batch * config.steps, batch=config.batch // config.ranks)
        self._validation: Drawn | None = None
        if held_out:
            seen = [one for one in files if one.patient in held_out]
            samples = list(pairs_of(seen, pairs=config.validation_patches, batch=1))
            self._validation = tuple(np.stack([s[key].numpy() for s in samples]) for key in self._KEYS)

    def batches(self, first: int, rank: int) -> _Made:
        return _Made(self._training, steps=range(first, self._steps), workers=self._readers)

    def validation(self) -> Drawn | None:
        return self._validation

    def remove(self) -> None:
        """Remove the prepared cases, and nothing else that may lie beside them."""
        for path in self._work.glob("case-*"):
            shutil.rmtree(path, ignore_errors=True)
        with suppress(OSError):
            self._work.rmdir()


class _Made:
    """The batches of a stream from a step on."""

    def __init__(self, stream: PairStream, *, steps: range, workers: int) -> None:
        self._stream, self._steps, self._workers = stream, steps, workers

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        if not self._steps:  # Lightning asks, even where a training stopped after its last step
            return
        loader = self._stream.loader(num_workers=self._workers)
        loader.load_state_dict({**loader.state_dict(), "epoch": 0, "batches": self._steps.start})
        for batch in loader:
            yield tuple(batch[key] for key in self._stream.keys)


def _boxes_of(config: PretrainConfig) -> SynthesisConfig:
    """Return how to make pairs of which a patch is all."""
    if config.synthesis.box not in (_SYNTHESIS.box, config.side):
        raise ConfigError(f"box = {config.synthesis.box}: pairs made on the fly are as large as patches; set `side`")
    try:
        return replace(config.synthesis, box=config.side)
    except ConfigError as error:
        raise ConfigError(f"side = {config.side}: pairs cannot be made in this size ({error})") from error


def _keep(weights: Path, out: Path) -> None:
    """Raise a ConfigError if a training would write over the weights it begins with."""
    if weights.resolve() == out.resolve():
        raise ConfigError(f"-o {out.name}: are the weights that the training begins with; choose another name")
