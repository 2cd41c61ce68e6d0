"""Raw scans to cases in MNI space, and masks back to the scan's own grid (extra `prepare`)."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {
    "PreparationConfig": "config",
    "Scan": "scans",
    "find_scans": "scans",
    "prepare": "run",
    "to_native": "native",
}

__all__ = [*_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'synthlong.preparation' has no attribute {name!r}")
    return getattr(import_module(f"synthlong.preparation.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
