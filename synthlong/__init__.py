"""Synthetic longitudinal MS lesion data from single-visit FLAIR scans.

Names resolve on first use (PEP 562), so that `import synthlong` costs no torch import.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.4.0"

_HOME = {
    "Case": "case",
    "read_case": "case",
    "read_cases": "manifest",
    "SynthesisConfig": "synthesis",
    "LesionEvent": "event",
    "Recipe": "recipe",
    "draw_recipe": "recipe",
    "Pair": "pair",
    "render": "pair",
    "Inpainter": "inpainting",
    "LesionPainter": "painting",
    "ShardDataset": "dataset.shards",
    "PairStream": "dataset.stream",
    "InputError": "errors",
    "ShardCorruptError": "errors",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'synthlong' has no attribute {name!r}")
    return getattr(import_module(f"synthlong.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
