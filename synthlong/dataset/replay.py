"""A pair made again from its recipe, and compared with what the shard holds."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import synthlong
from synthlong.dataset.assets import check_assets, synthesis_of
from synthlong.dataset.plan import read_plan, source_of
from synthlong.dataset.reader import IMAGES, VOLUMES
from synthlong.dataset.shards import ShardDataset
from synthlong.dataset.writer import image_as_stored
from synthlong.environment import environment
from synthlong.errors import ConfigError, InputError, InputWarning, SynthlongError, name_of
from synthlong.inpainting import heal
from synthlong.manifest import find_cases
from synthlong.networks import one_thread
from synthlong.pair import Pair, render
from synthlong.progress import Progress
from synthlong.recipe import Recipe
from synthlong.synthesis import SynthesisConfig

__all__ = ["replay"]

_LAST_BITS = 0.05
"""Of the brain's mode: what bf16 makes of the last bits, and artifacts of that."""


def replay(
    run: Path,
    number: int,
    *,
    source: Path | None = None,
    config: SynthesisConfig | None = None,
    whole: bool = False,
    progress: Progress = lambda *_: None,
) -> tuple[Pair, float]:
    """Render pair `number` of a run again; its box is compared with the shard, bit for bit.

    On another processor, or with other libraries, images may differ a little.

    Args:
        run: Folder that `generate` wrote.
        number: Of the pair.
        source: Manifest or folder of the cases; None: where the run found them.
        config: The run's, if it named its own prior, bank or weights: a run keeps their hashes, not their paths.
        whole: Return the pair on the case's whole grid.
        progress: Called as ("steps, what comes", done, total).

    Returns:
        The pair, and how far its images are from those in the shard at most, brain mode 1; 0: the same.

    Raises:
        InputError: The scans, the weights or the version are not those of the run.
        SynthlongError: The pair comes out different.
    """
    plan = read_plan(run)
    dataset = ShardDataset(run)
    if not 0 <= number < len(dataset):
        raise ConfigError(f"{name_of(run)} has pairs 0..{len(dataset) - 1}, not {number}")
    stored = dataset[number]
    recipe = Recipe.from_json(stored["recipe"])
    drawn = SynthesisConfig.from_dict({k: v for k, v in plan["config"].items() if v is not None})
    config = replace(config, precision=drawn.precision, device=drawn.device, painter=drawn.painter) if config else drawn
    source = source or source_of(run, plan)
    files = {f.subject: f for f in find_cases(source, prefer=plan["prefer"])}.get(recipe.case_id)
    if files is None:
        raise InputError(source, f"case '{recipe.case_id}' is not in it", "name the run's cases with --cases")
    steps = 4 if whole else 3
    with one_thread():
        progress("steps, reading the case", 0, steps)
        case = files.read()
        recorded = next(c["sources"] for c in plan["cases"] if c["subject"] == recipe.case_id)
        if case.sources != recorded:
            role = next(r for r in {**recorded, **case.sources} if recorded.get(r) != case.sources.get(r))
            path = getattr(files, role, files.flair) or files.flair
            raise InputError(path, "has changed since the run (its SHA-256 differs)", "restore the file")
        check_assets(config, plan["assets"])
        inpainter, painter, bank = synthesis_of(config)
        progress("steps, filling its lesions", 1, steps)
        healed = heal(case, inpainter)
        progress("steps, rendering the box", 2, steps)
        pair = render(healed, recipe, painter=painter, bank=bank)
        apart = _compare(pair, stored, run, number, plan)
        if whole:
            progress("steps, rendering the whole grid", 3, steps)
            pair = render(healed, recipe, painter=painter, bank=bank, whole=True)
        progress("steps, done", steps, steps)
        return pair, apart


def _compare(pair: Pair, stored: dict[str, Any], run: Path, number: int, plan: dict[str, Any]) -> float:
    """Return how far images are apart; raise if that is not what another machine rounds otherwise."""
    made_by, apart = plan["versions"]["synthlong"], 0.0
    for name in VOLUMES:
        made, kept = getattr(pair, name), stored[name][0].numpy()
        if name in IMAGES:
            made = image_as_stored(made, f"pair {number}: {name}").astype(np.float32)
        if np.array_equal(made, kept):
            continue
        if made_by != synthlong.__version__:
            problem = f"made by synthlong {made_by}, this is {synthlong.__version__}"
            raise InputError(run, problem, "install that version to make it again")
        here = environment(plan["machine"]["device"])
        elsewhere = any(here[kind] != plan[kind] for kind in here)
        off = float(np.abs(made - kept).max()) if name in IMAGES else np.inf
        if not elsewhere or off > _LAST_BITS:
            problem = f"pair {number} does not come out as stored ({name})"
            raise SynthlongError(f"{name_of(run)}: {problem}; run `synthlong report`")
        apart = max(apart, off)
    if apart:
        text = f"pair {number}: images differ by up to {apart:.2g}: other processor or libraries than the run's"
        warnings.warn(text, InputWarning, stacklevel=3)
    return apart
