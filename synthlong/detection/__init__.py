"""Finding new lesions between two visits: networks, inference, scores.

Names resolve on first use (PEP 562), so that the scores cost no torch import.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {
    "ConcatUNet": "networks",
    "SegmentationUNet": "networks",
    "SiameseUNet": "networks",
    "detect": "inference",
    "lesion_scores": "scores",
    "read_detectors": "inference",
    "read_visits": "visits",
}

__all__ = [*_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'synthlong.detection' has no attribute {name!r}")
    return getattr(import_module(f"synthlong.detection.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
