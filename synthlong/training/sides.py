"""The two sides of a training: patients to learn from, and patients held out; and what is drawn of each."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from synthlong.detection.networks import ConcatUNet, SegmentationUNet
from synthlong.manifest import find_cases, manifest_rows, warn_of_twins
from synthlong.plain import plain_hash
from synthlong.training.patches import PAIR, Drawn, Network, Patches, read_patches
from synthlong.training.training_config import TrainingConfig

__all__ = ["drawn_from", "read_sides", "rng_at", "source_sha256"]

_TRAINING, _VALIDATION = 0, 1
"""First word of the spawn keys."""


def rng_at(seed: int, step: int, which: int) -> np.random.Generator:
    """Return the generator of a step, one of several."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(_TRAINING, step, which)))


def read_sides(
    source: Path, config: TrainingConfig, network: Network = ConcatUNet, *, margin: int = 0
) -> tuple[Patches, Patches | None, dict[str, Any]]:
    """Return the patches to learn from, those of the patients held out if there are any, and what they are in words.

    Args:
        source: See `read_patches`.
        config: Side, folds, seed.
        network: Whose intensities they have.
        margin: Of the patches to learn from.
    """
    options: dict[str, Any] = {"side": config.side, "fold": config.fold, "folds": config.folds, "network": network}
    options["prefer"] = config.prefer
    held_out = read_patches(source, split="validation", **options) if config.folds > 1 else None
    training = read_patches(source, split="train" if held_out else None, margin=margin, **options)
    about = {"patients": training.subjects, "held_out": held_out.subjects if held_out else []}
    return training, held_out, {**about, "source": source_sha256(source, pairs=network is not SegmentationUNet)}


def drawn_from(held_out: Patches | None, config: TrainingConfig, positive_share: float) -> Drawn | None:
    """Return the patches of the patients held out that a training is measured on."""
    if held_out is None:
        return None
    rng = np.random.default_rng(np.random.SeedSequence(config.seed, spawn_key=(_VALIDATION,)))
    return held_out.draw(rng, config.validation_patches, round(positive_share * config.validation_patches))


def source_sha256(source: Path, *, pairs: bool) -> str:
    """Return the SHA-256 of a run's index; of a manifest or folder of cases, a hash of all the files it lists.

    Warns of a follow-up that several patients have: they may be on both sides.

    Args:
        source: Where the data are.
        pairs: A manifest lists pairs of visits, not cases.
    """
    if (source / "index.json").exists():
        return hashlib.sha256((source / "index.json").read_bytes()).hexdigest()
    if not pairs:
        return plain_hash({files.subject: files.hashes() for files in find_cases(source)})
    rows = manifest_rows(source, needed=PAIR, optional=())
    hashes = [[subject, *(_file_sha256(paths[role]) for role in PAIR)] for subject, _, paths in rows]
    warn_of_twins((subject, followup) for subject, _, followup, _ in hashes)
    return plain_hash(hashes)


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
