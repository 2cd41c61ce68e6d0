"""The plan of a run: what it will make, fixed before work starts and kept in `run.json`.

Sources, seed, config, assets, versions and machine decide every byte of the shards; the run's id is the hash of
them all. A folder holds one run: another plan in it is refused, key by key.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import synthlong
from synthlong.environment import environment
from synthlong.errors import ConfigError, InputError, OutputError, short
from synthlong.lock import LOCK
from synthlong.plain import canonical_json, differences, plain_hash
from synthlong.publishing import is_leftover, publish
from synthlong.synthesis import SynthesisConfig

__all__ = [
    "adopt_plan",
    "bundled_cases",
    "check_folder",
    "check_space",
    "make_plan",
    "read_plan",
    "shard_config",
    "shard_samples",
    "source_of",
]

SCHEMA = "synthlong-run/1"
_BUNDLED = "bundled"
_NOT_DECISIVE = ("run_id", "source")


def make_plan(
    source: Path,
    out: Path,
    *,
    cases: list[dict[str, Any]],
    pairs: int,
    seed: int,
    shard_size: int,
    config: SynthesisConfig,
    assets: dict[str, str],
    prefer: str | None = None,
) -> dict[str, Any]:
    """Return the plan as plain JSON.

    Args:
        source: Manifest or folder of the cases; kept relative to `out`.
        out: Folder of the run.
        cases: `{subject, patient, sources}` of each usable case, sorted by subject.
        pairs: Number of pairs.
        seed: Seed of every draw.
        shard_size: Pairs in a shard.
        config: How pairs are drawn, "auto" resolved.
        assets: Result of `asset_hashes`.
        prefer: Which of two disagreeing orientations of a scan is used.
    """
    plain = config.as_dict() | dict.fromkeys(assets)  # their hashes stand under "assets"
    plan: dict[str, Any] = {
        "schema": SCHEMA,
        "seed": seed,
        "pairs": pairs,
        "shard_size": shard_size,
        "config": plain,
        "config_sha256": hashlib.sha256(canonical_json(plain).encode()).hexdigest(),
        "assets": assets,
        "cases": cases,
        "prefer": prefer,
        **environment(config.device),
    }
    return {**plan, "run_id": _run_id(plan), "source": _relative(source, out)}


def read_plan(out: Path) -> dict[str, Any]:
    """Return `run.json`.

    Raises:
        InputError: There is none, or it is damaged.
    """
    try:
        plan = json.loads((out / "run.json").read_bytes())
        if plan["run_id"] != _run_id(plan) or plan["schema"] != SCHEMA:
            raise ValueError("not what its id says")
    except FileNotFoundError:
        raise InputError(out, "no run.json in it", "give a folder that `synthlong generate` wrote") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(out / "run.json", "is damaged", "restore it, or generate the run anew") from error
    return plan


def adopt_plan(out: Path, plan: dict[str, Any]) -> None:
    """Write `run.json`, or check that the folder's run is this one.

    Raises:
        ConfigError: The folder holds another run; the message lists what differs.
    """
    if not (out / "run.json").exists():
        publish(out / "run.json", canonical_json(plan).encode())
        return
    old = read_plan(out)
    if old["run_id"] == plan["run_id"]:
        return
    changed = differences(_comparable(old), _comparable(plan))
    same = all(change.startswith(("versions.", "machine.")) for change in changed)
    way = "go on with the versions and the processor that it was begun with, or use another folder"
    raise ConfigError(f"{out.name}: holds another run ({'; '.join(changed)}); {way if same else 'use another folder'}")


def shard_config(plan: dict[str, Any]) -> dict[str, Any]:
    """Return what each shard's attribute `config` holds: how its pairs were drawn, no path in it."""
    return {"synthesis": plan["config"], "assets": plan["assets"], "seed": plan["seed"], "run_id": plan["run_id"]}


def shard_samples(plan: dict[str, Any], number: int) -> list[tuple[int, str]]:
    """Return index and patient of each sample of a shard."""
    cases, first = plan["cases"], number * plan["shard_size"]
    numbers = range(first, min(first + plan["shard_size"], plan["pairs"]))
    return [(k, cases[k % len(cases)]["patient"]) for k in numbers]


def bundled_cases() -> Path:
    """Return the manifest of the cases that come with the package."""
    return Path(synthlong.__file__).parent / "assets" / "cases" / "cases.csv"


def source_of(out: Path, plan: dict[str, Any]) -> Path:
    """Return the manifest or folder that a run took its cases from.

    Raises:
        InputError: It is not where it was, or the run does not say where.
    """
    if plan["source"] == _BUNDLED:
        return bundled_cases()
    path = out / plan["source"] if plan["source"] else None
    if path is None or not path.exists():
        raise InputError(out, "the run's cases are not where they were", "name them with --cases")
    return path


def check_folder(out: Path) -> None:
    """Raise unless a run may live in a folder.

    Raises:
        ConfigError: It holds files but no run.
        OutputError: It is not a folder.
    """
    if not out.exists():
        return
    if not out.is_dir():
        raise OutputError(out, "is not a folder", "name a folder for the run")
    if not (out / "run.json").exists():
        foreign = [p.name for p in out.iterdir() if p.name not in (LOCK, "work") and not is_leftover(p.name)]
        if foreign:
            problem = f"the folder is not empty and holds no run (first: {min(foreign)!a})"
            raise ConfigError(f"{short(out)}: {problem}; name a new or empty folder")


def check_space(out: Path, *, need_mb: float) -> None:
    """Raise if the disk is too full for a run.

    Raises:
        OutputError: It is.
    """
    free_mb = shutil.disk_usage(out).free / 1e6
    if free_mb < need_mb:
        problem = f"too little space: the run needs about {need_mb:.0f} MB, {free_mb:.0f} MB are free"
        raise OutputError(out, problem, "free some, or choose another disk")


def _run_id(plan: dict[str, Any]) -> str:
    decisive = {k: v for k, v in plan.items() if k not in _NOT_DECISIVE}
    return plain_hash(decisive)


def _relative(source: Path, out: Path) -> str | None:
    """Return where the cases lie, seen from `out`; None where that would climb far and tell of the machine."""
    if source.resolve() == bundled_cases().resolve():
        return _BUNDLED
    place = source.parent.resolve() / source.name  # rows of a manifest that is a link are relative to the link
    path = os.path.relpath(place, out.resolve())
    return path if Path(path).parts.count("..") <= 2 and not os.path.isabs(path) else None


def _comparable(plan: dict[str, Any]) -> dict[str, Any]:
    """Return what a message can say of a plan: its id and the config's hash differ whenever anything does."""
    rest = {key: value for key, value in plan.items() if key not in ("run_id", "source", "config_sha256")}
    return {**rest, "cases": {case["subject"]: case["sources"] for case in plan["cases"]}}
