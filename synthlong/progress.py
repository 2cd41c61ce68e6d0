"""How long work says how far it is."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["Progress", "StepProgress"]

Progress = Callable[[str, int, int], None]
"""Called as (stage, done, total)."""

StepProgress = Callable[[int, int, float], None]
"""Of a training: called as (step, steps, loss)."""
