"""New lesions found in two visits, and scored; names resolve on first use, as those of `synthlong`."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {
    "lesion_scores": "scores",
}

__all__ = [*_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'synthlong.detection' has no attribute {name!r}")
    return getattr(import_module(f"synthlong.detection.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
