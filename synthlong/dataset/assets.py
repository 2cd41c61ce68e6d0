"""Prior, lesion bank and networks that a config names, or the shipped ones: read, hashed, compared."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path
from typing import Any

from synthlong.atlas import prior_path
from synthlong.bank import LesionBank, read_bank
from synthlong.errors import InputError
from synthlong.inpainting import Inpainter
from synthlong.painting import LesionPainter
from synthlong.pair import Painter, painter_of
from synthlong.synthesis import SynthesisConfig

__all__ = ["asset_hashes", "check_assets", "kept_synthesis", "synthesis_of"]


def asset_hashes(config: SynthesisConfig) -> dict[str, str]:
    """Return the SHA-256 of prior, lesion bank and weights that a config names.

    Raises:
        InputError: One of them cannot be read.
    """
    paths = {
        "prior": config.prior or prior_path(),
        "lesion_bank": config.lesion_bank or LesionBank.default_path(),
        "inpainter": config.inpainter or Inpainter.default_path(),
        "generator": config.generator or LesionPainter.default_path(),
    }
    sums = {}
    for name, path in paths.items():
        try:
            sums[name] = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        except OSError as error:
            way = f"correct '{name}' in the config"
            raise InputError(path, f"{name} cannot be read ({error.strerror})", way) from error
    return sums


def synthesis_of(config: SynthesisConfig) -> tuple[Inpainter, Painter, LesionBank]:
    """Return the inpainter, the painter and the lesion bank that a config names."""
    common: dict[str, Any] = {"precision": config.precision, "device": config.device}
    network = config.painter == "network"
    painter = LesionPainter.read(config.generator, **common) if network else painter_of(config.painter)
    return Inpainter.read(config.inpainter, **common), painter, read_bank(config.lesion_bank)


@lru_cache(maxsize=1)
def kept_synthesis(config: SynthesisConfig) -> tuple[Inpainter, Painter, LesionBank]:
    """Return `synthesis_of(config)`, read once per process."""
    return synthesis_of(config)


def check_assets(config: SynthesisConfig, assets: dict[str, str]) -> None:
    """Raise unless prior, lesion bank and weights are those of a run.

    Raises:
        InputError: One of them differs.
    """
    for name, sha256 in asset_hashes(config).items():
        if sha256 != assets[name]:
            raise InputError(name, f"the run used another {name}", "name it by --config, as for `generate`")
