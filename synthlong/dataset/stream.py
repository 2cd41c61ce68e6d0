"""Pairs made on the fly: an endless run that is never written, as an iterable torch dataset.

    cases -> prepared once, on disk -> workers: draw_recipe -> render -> batches

Pair k of epoch e is pair `e * pairs + k` of the run that `generate` would write with the same cases, config and
seed: nothing depends on workers, ranks or the order of anything. An epoch is cut into blocks of `batch_size`
pairs; block j belongs to rank j mod R, and its blocks go to the workers in turn, as a DataLoader collects them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import distributed
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from synthlong.bank import LesionBank
from synthlong.case import Case
from synthlong.dataset.assets import asset_hashes, check_assets, synthesis_of
from synthlong.dataset.prepared import PreparedCases
from synthlong.dataset.reader import IMAGES
from synthlong.dataset.shards import checked_keys, seeded, tell_affine
from synthlong.dataset.writer import image_as_stored
from synthlong.errors import ConfigError
from synthlong.inpainting import Inpainter, heal
from synthlong.manifest import CaseFiles
from synthlong.networks import one_thread, settled
from synthlong.pair import Painter, render
from synthlong.plain import differences, plain_hash
from synthlong.progress import Progress
from synthlong.recipe import draw_recipe, rng_of
from synthlong.synthesis import SynthesisConfig

__all__ = ["PairLoader", "PairStream"]


class PairStream(IterableDataset[dict[str, Any]]):
    """Pairs rendered as they are asked for, an iterable torch dataset.

    It yields the dicts of `ShardDataset`, with the same numbers: images float32 `(1, S, S, S)`, rounded to float16
    as in a shard, masks uint8 `(1, S, S, S)`, `recipe` a JSON string. Take batches from `loader()`, which goes on
    from epoch to epoch and can save and restore its place. A plain `DataLoader` works too: give it the same
    `batch_size`; it repeats a whole epoch (as for validation) until `set_epoch` names another.

    Making a stream prepares its cases (reads them and fills their lesions, some 10 s each); workers map the result
    from disk. With several ranks, name one `work` folder: they share the work. Where `config.device` is a GPU,
    workers must be spawned (`multiprocessing_context="spawn"`).

    Args:
        cases: Manifest or folder of cases in MNI space, or the cases or their files; those without `healthy` get it.
        config: How pairs are drawn.
        seed: Seed of every draw, 0 or more.
        pairs: Pairs in an epoch, over all ranks and workers. Several ranks get the same number of whole batches;
            the pairs that are left over, fewer than `batch_size * world_size`, are not made in that epoch. One
            rank gets them all, its last batch may be smaller.
        keys: Entries of a sample; default all.
        transform: Called with each sample's dict, whose images have the attribute `affine`; its result is returned in
            its place. It runs with torch's generators seeded from `(seed, epoch, pair)` and restored afterwards, and
            with one torch thread.
        batch_size: Of the loader.
        rank: Of this process among those that share an epoch; default: as `torch.distributed` says when a pass
            begins, alone if it is not initialised.
        world_size: Number of ranks.
        work: Folder where prepared cases are kept and found again, 140 MB for a whole brain; what another config,
            version or machine prepared there is left alone. Default: a temporary one, removed with the stream.
        progress: Called as ("cases", done, total) while cases are prepared.

    Raises:
        InputError: A case cannot be used.
        ConfigError: An option outside its range.
        OutputError: `work` cannot be written.
    """

    def __init__(
        self,
        cases: str | Path | Iterable[CaseFiles | Case],
        config: SynthesisConfig | None = None,
        seed: int = 0,
        *,
        pairs: int = 1000,
        keys: Sequence[str] | None = None,
        transform: Callable[[dict[str, Any]], Any] | None = None,
        batch_size: int = 1,
        rank: int | None = None,
        world_size: int | None = None,
        work: str | Path | None = None,
        progress: Progress | None = None,
    ) -> None:
        for name, value, low in (("seed", seed, 0), ("pairs", pairs, 1), ("batch_size", batch_size, 1)):
            if value < low:
                raise ConfigError(f"{name} = {value}: must be {low} or more")
        self.keys = checked_keys(keys)
        if (rank is None) != (world_size is None) or not 0 <= (rank or 0) < (1 if world_size is None else world_size):
            raise ConfigError(f"rank = {rank}, world_size = {world_size}: give both or neither, rank below world_size")
        self.seed, self.pairs, self.batch_size, self.transform = seed, pairs, batch_size, transform
        self._rank, self._world_size = rank, world_size
        self._batches()  # raises if an epoch is too short for the ranks
        config = settled(config or SynthesisConfig())
        self.config = config.absolute()  # the working directory may change
        self._assets = asset_hashes(self.config)
        self._next, self._restored = [0, 0], False  # epoch and batch that a loader's next pass begins with
        self._pass = torch.zeros(2, dtype=torch.int64).share_memory_()  # those of the pass at work, for its workers
        self._goes_on = False  # in a loader's workers: its passes may begin in mid-epoch
        self._synthesis: tuple[Inpainter, Painter, LesionBank] | None = None
        rank, ranks = self._ranks()
        with one_thread():
            self._cases = PreparedCases(
                cases, self.config, self._assets, heal=self._heal, work=work, begin=rank / ranks, progress=progress
            )
        own = plain_hash([config.as_dict(), self._assets])
        self._identity = {"cases": self._cases.sha256, "config": own}

    def __len__(self) -> int:
        """Return the number of samples in an epoch of this rank."""
        return self.pairs if self._ranks()[1] == 1 else self._batches() * self.batch_size

    def __iter__(self) -> Iterator[Any]:
        rank, ranks = self._ranks()
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        check_assets(self.config, self._assets)
        epoch, first = self._pass.tolist()
        first = first if self._goes_on else 0
        mine = range(first + number, self._batches(), workers)  # a loader begins with worker 0 wherever it begins
        return self._samples(epoch, (batch * ranks + rank for batch in mine))

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__ | {"_synthesis": None}
        if distributed.is_available() and distributed.is_initialized():
            state["_rank"], state["_world_size"] = self._ranks()  # a spawned worker could not tell
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._pass.share_memory_()  # a copy's is not

    def loader(self, *, num_workers: int = 0, **options: Any) -> PairLoader:
        """Return a loader of this stream's batches; one at a time.

        Args:
            num_workers: Processes that render.
            options: Of `torch.utils.data.DataLoader`.
        """
        return PairLoader(self, num_workers=num_workers, **options)

    def set_epoch(self, epoch: int) -> None:
        """Let the next pass be that of an epoch, from its beginning or a place that was just loaded.

        Call it between passes; workers that stay see it, too.

        Raises:
            ConfigError: `epoch` is negative.
        """
        if epoch < 0:
            raise ConfigError(f"epoch must be 0 or more, not {epoch}")
        if not (self._restored and self._next[0] == epoch):
            self._next = [epoch, 0]
        self._pass.copy_(torch.tensor([epoch, 0]))

    def _begin(self) -> list[int]:
        """Tell the workers where a pass begins, and return the list that it counts in: a pass before it has another."""
        self._next, self._restored = list(self._next), False
        self._pass.copy_(torch.tensor(self._next))
        return self._next

    def _ranks(self) -> tuple[int, int]:
        """Return this process's rank and the number of ranks."""
        if self._rank is not None and self._world_size is not None:
            return self._rank, self._world_size
        if distributed.is_available() and distributed.is_initialized():
            return distributed.get_rank(), distributed.get_world_size()
        return 0, 1

    def _batches(self) -> int:
        """Return the number of batches in an epoch of each rank."""
        ranks = self._ranks()[1]
        if ranks == 1:
            return -(-self.pairs // self.batch_size)
        least = self.batch_size * ranks
        if self.pairs < least:
            raise ConfigError(f"pairs = {self.pairs}: {ranks} ranks with batches of {self.batch_size} need {least}")
        return self.pairs // least

    def _samples(self, epoch: int, blocks: Iterable[int]) -> Iterator[Any]:
        for block in blocks:
            first = block * self.batch_size
            for k in range(first, min(first + self.batch_size, self.pairs)):
                yield self._sample(epoch, epoch * self.pairs + k)

    def _sample(self, epoch: int, index: int) -> Any:
        sample: dict[str, Any] = {}
        with one_thread():
            _, painter, bank = self._read_synthesis()
            case = self._cases[index % len(self._cases)]
            recipe = draw_recipe(case, self.config, rng_of(self.seed, case.id, index))
            pair = render(case, recipe, painter=painter, bank=bank)
            for key in self.keys:
                sample[key] = recipe.to_json() if key == "recipe" else _tensor(getattr(pair, key), key, index, case.id)
            if self.transform is None:
                return sample
            tell_affine(sample, recipe.affine)
            with seeded(self.seed, epoch, index):
                return self.transform(sample)

    def _read_synthesis(self) -> tuple[Inpainter, Painter, LesionBank]:
        """Return inpainter, painter and lesion bank, read once per process."""
        if self._synthesis is None:
            self._synthesis = synthesis_of(self.config)
        return self._synthesis

    def _heal(self, case: Case) -> Case:
        return heal(case, self._read_synthesis()[0])


class PairLoader(DataLoader[Any]):
    """The batches of a stream, the same ones in the same order whatever the number of workers.

    Each pass goes on where the last one ended: after an epoch's last batch comes the next epoch, after a pass that
    was broken off the next batch. Nothing that was skipped is rendered.

    Args:
        stream: Where batches come from, and their size.
        num_workers: Processes that render.
        options: Of `torch.utils.data.DataLoader`.

    Raises:
        ConfigError: An option that would change which batches come, or their order.
    """

    dataset: PairStream

    def __init__(self, stream: PairStream, *, num_workers: int = 0, **options: Any) -> None:
        if options.pop("batch_size", stream.batch_size) != stream.batch_size:
            raise ConfigError(f"batch_size is the stream's ({stream.batch_size}); give it to PairStream")
        if not options.get("in_order", True):
            raise ConfigError("in_order = False: a place in the stream is a number of batches; leave it out")
        super().__init__(stream, batch_size=stream.batch_size, num_workers=num_workers, **options)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        if not len(self):
            raise ConfigError(f"drop_last leaves no batch of {self.batch_size} in {self.dataset.pairs} pairs")
        at = self.dataset._begin()
        self.dataset._goes_on = True  # workers that start here keep it; plain passes begin with batch 0
        try:
            batches = super().__iter__()
        finally:
            self.dataset._goes_on = False
        return self._counted(batches, at)

    def _counted(self, batches: Iterator[Any], at: list[int]) -> Iterator[Any]:
        for batch in batches:
            at[1] += 1
            if at[1] == len(self):
                at[:] = at[0] + 1, 0
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Return the place in the stream, plain JSON, the same on every rank.

        `epoch` and `batches` say how much was handed out, prefetched batches not counted; the rest identifies the
        stream.
        """
        stream = self.dataset
        epoch, batches = stream._next
        own = {"seed": stream.seed, "pairs": stream.pairs, "batch_size": stream.batch_size}
        return {"epoch": epoch, "batches": batches, **own, "ranks": stream._ranks()[1], **stream._identity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next pass go on from a place that `state_dict` returned, whatever the number of workers.

        Raises:
            ConfigError: It is of another stream, or no such state.
        """
        mine = self.state_dict()
        own = mine.keys() - {"epoch", "batches"}
        if changed := differences({key: state.get(key) for key in own}, {key: mine[key] for key in own}):
            raise ConfigError(f"the state is of another stream ({'; '.join(changed)})")
        epoch, batches = state.get("epoch"), state.get("batches")
        if type(epoch) is not int or type(batches) is not int or epoch < 0 or not 0 <= batches < len(self):
            raise ConfigError(f"epoch = {epoch}, batches = {batches}: no place in epochs of {len(self)} batches")
        self.dataset._next, self.dataset._restored = [epoch, batches], True


def _tensor(volume: NDArray[Any], key: str, index: int, case: str) -> torch.Tensor:
    """Return a volume as `ShardDataset` returns it."""
    if key in IMAGES:
        volume = image_as_stored(volume, f"pair {index} ({case}): {key}").astype(np.float32)
    return torch.from_numpy(volume[None])
