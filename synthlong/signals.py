"""Ctrl-C and SIGTERM, held back until a step is done and saved."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["held_signals", "hold_signals"]


def hold_signals(noted: list[int]) -> dict[int, Any]:
    """Note Ctrl-C and SIGTERM in a list instead; a second one is a KeyboardInterrupt.

    Args:
        noted: Gets the first signal's number.

    Returns:
        The handlers that were there; none outside the main thread, where nothing is held.
    """

    def note(number: int, _frame: Any) -> None:
        if noted:
            raise KeyboardInterrupt
        noted.append(number)

    if threading.current_thread() is not threading.main_thread():
        return {}
    return {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}


@contextmanager
def held_signals() -> Iterator[list[int]]:
    """Yield a list that Ctrl-C and SIGTERM are noted in until the block ends; the first is raised again then."""
    noted: list[int] = []
    before = hold_signals(noted)
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if noted:
        signal.raise_signal(noted[0])
        raise KeyboardInterrupt
