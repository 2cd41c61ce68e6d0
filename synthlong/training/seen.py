"""What a stage sees: patches drawn from shards or scans, or pairs made on the fly."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from synthlong.dataset.assets import asset_hashes
from synthlong.dataset.shards import subjects_of
from synthlong.dataset.stream import PairStream
from synthlong.frame import MOVING
from synthlong.manifest import CaseFiles, find_cases
from synthlong.training.ahead import Ahead
from synthlong.training.augmented import AugmentedPatches
from synthlong.training.patches import Drawn, Network
from synthlong.training.sides import drawn_from, read_sides, source_sha256
from synthlong.training.stage_config import FinetuneConfig, PretrainConfig, SegmentConfig, StageConfig

__all__ = ["DrawnPatches", "MadePairs", "Seen"]


class Seen(Protocol):
    """What a stage learns from and is measured on."""

    about: dict[str, Any]

    def batches(self, first: int, rank: int) -> Iterable[tuple[Tensor, ...]]:
        """Return visits and truth of each step from `first` on, for one process."""

    def validation(self) -> Drawn | None:
        """Return visits and truth of patients held out; None: there are none."""


class DrawnPatches:
    """Patches drawn from shards or whole scans; those held out are not augmented."""

    def __init__(self, source: Path, config: StageConfig, network: Network, *, readers: int) -> None:
        augmented = config if isinstance(config, SegmentConfig | FinetuneConfig) else None
        training, self._held_out, self.about = read_sides(source, config, network, margin=MOVING if augmented else 0)
        if augmented:
            training = AugmentedPatches(training, artifacts=augmented.artifacts, orientations=augmented.orientations)
        self._training, self._config, self._readers = training, config, readers

    def batches(self, first: int, rank: int) -> Ahead:
        """See `Seen`."""
        steps = range(first, self._config.steps)
        return Ahead(self._training, self._config.draw, steps=steps, rank=rank, readers=self._readers)

    def validation(self) -> Drawn | None:
        """See `Seen`."""
        return drawn_from(self._held_out, self._config, self._config.positive_share)


class MadePairs:
    """Pairs made on the fly: pair n of step t is pair `t * batch + n` of a run that is never written."""

    _KEYS = ("baseline", "followup", "new_lesions")

    def __init__(self, source: Path, config: PretrainConfig, *, work: Path, readers: int) -> None:
        files = find_cases(source, prefer=config.prefer)
        patients = sorted({one.patient for one in files})
        held_out: set[str] = set()
        if config.folds > 1:
            held_out = subjects_of("validation", patients, fold=config.fold, folds=config.folds)
        self.about: dict[str, Any] = {"patients": sorted(set(patients) - held_out), "held_out": sorted(held_out)}
        self.about |= {"source": source_sha256(source, pairs=False), "assets": asset_hashes(config.synthesis)}
        self._steps, self._readers, self._work = config.steps, readers, work

        def pairs_of(chosen: list[CaseFiles], **options: Any) -> PairStream:
            return PairStream(chosen, config.synthesis, config.seed, keys=self._KEYS, work=work, **options)

        learned, seen = ([one for one in files if (one.patient in held_out) == out] for out in (False, True))
        batch = config.batch // config.ranks
        self._learned = partial(pairs_of, learned, pairs=config.batch * config.steps, batch_size=batch)
        self._held_out = (
            partial(pairs_of, seen, pairs=config.validation_patches, rank=0, world_size=1) if seen else None
        )

    def batches(self, first: int, rank: int) -> _Made:
        """See `Seen`."""
        return _Made(self._learned(), steps=range(first, self._steps), workers=self._readers)

    def validation(self) -> Drawn | None:
        """See `Seen`."""
        return self._validation

    @cached_property
    def _validation(self) -> Drawn | None:
        if self._held_out is None:
            return None
        samples = list(self._held_out())
        return tuple(np.stack([s[key].numpy() for s in samples]) for key in self._KEYS)

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
        loader = self._stream.loader(num_workers=self._workers, worker_init_fn=_leave_signals_to_the_trainer)
        loader.load_state_dict({**loader.state_dict(), "epoch": 0, "batches": self._steps.start})
        for batch in loader:
            yield tuple(batch[key] for key in self._stream.keys)


def _leave_signals_to_the_trainer(_worker: int) -> None:
    """Let Ctrl-C and the first SIGTERM pass: they come to all processes, and the step at work is to be saved."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
