"""One shard of a run, made in a worker: what it needs of the run is read once per process."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from synthlong.case import Case
from synthlong.dataset.assets import check_assets, kept_synthesis
from synthlong.dataset.cases import case_folder
from synthlong.dataset.index import index_part
from synthlong.dataset.plan import read_plan, shard_config, shard_samples
from synthlong.dataset.reader import IMAGES
from synthlong.dataset.store import MOST_OPEN, open_case
from synthlong.dataset.writer import Sample, image_as_stored, write_shard
from synthlong.errors import OutputError
from synthlong.pair import Pair, render
from synthlong.plain import canonical_json
from synthlong.pool import count, stop_if_told
from synthlong.recipe import draw_recipe, rng_of
from synthlong.synthesis import SynthesisConfig

__all__ = ["ShardTask", "forget", "make_shard"]


@dataclass(frozen=True)
class ShardTask:
    """The task of making one shard; all else stands in the folder's plan."""

    out: Path
    run_id: str
    number: int
    config: SynthesisConfig


def make_shard(task: ShardTask) -> tuple[int, dict[str, Any]]:
    """Make a shard; return its number and what the index needs of it.

    Raises:
        Stopped: The run is being stopped.
        OutputError: The shard cannot be written, or the folder's run is another one.
    """
    plan = _plan_of(task.out, task.run_id, task.config)
    _, painter, bank = kept_synthesis(task.config)
    cases, samples = plan["cases"], []
    for k, patient in shard_samples(plan, task.number):
        stop_if_told()
        case = _opened(case_folder(task.out / "work", cases[k % len(cases)]["subject"]), task.config)
        recipe = draw_recipe(case, task.config, rng_of(plan["seed"], case.id, k))
        samples.append(_sample(render(case, recipe, painter=painter, bank=bank), patient, k))
        count()
    sidecar = write_shard(
        task.out,
        task.number,
        samples,
        first_index=task.number * plan["shard_size"],
        config_json=canonical_json(shard_config(plan)),
        versions_json=canonical_json(plan["versions"]),
        compression=task.config.compression,
    )
    return task.number, index_part(sidecar)


def _sample(pair: Pair, patient: str, index: int) -> Sample:
    images = {name: image_as_stored(getattr(pair, name), f"pair {index} ({patient}): {name}") for name in IMAGES}
    return Sample(
        **images,
        new_lesions=pair.new_lesions,
        evolution=pair.evolution,
        lesions_baseline=pair.lesions_baseline,
        lesions_followup=pair.lesions_followup,
        recipe=pair.recipe.to_json(),
        subject=patient,
    )


def forget() -> None:
    """Forget what this process has kept of a run: files may have changed when it works on the next."""
    for kept in (_plan_of, _opened, kept_synthesis):
        kept.cache_clear()


@lru_cache(maxsize=1)
def _plan_of(out: Path, run_id: str, config: SynthesisConfig) -> dict[str, Any]:
    """Return the plan that the folder holds, checked once per process."""
    plan = read_plan(out)
    if plan["run_id"] != run_id:
        raise OutputError(out, "its run.json was replaced while the run went on", "run the same command again")
    check_assets(config, plan["assets"])
    return plan


@lru_cache(maxsize=MOST_OPEN)
def _opened(folder: Path, config: SynthesisConfig) -> Case:
    return open_case(folder, config)
