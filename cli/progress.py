"""The progress bar of long work, on a terminal only."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["progress_bar"]


@contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None]]:
    """Yield a function (stage, done, total) that moves the bar of a stage: done, rate and time left.

    A stage is named by its unit; what follows a comma is shown and may change.
    """
    if sys.stderr is None or not sys.stderr.isatty():  # None where it was closed before the start
        yield lambda *_: None  # older versions of rich end even a bar that is not shown with a line
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    bars: dict[str, TaskID] = {}
    with Progress(*columns, console=Console(stderr=True)) as view:

        def show(stage: str, done: int, total: int) -> None:
            unit = stage.split(",")[0]
            if unit not in bars:
                bars[unit] = view.add_task(stage, total=total, rate="")
            speed = view.tasks[bars[unit]].speed
            rate = f"{speed:.1f} {unit}/s" if speed else ""
            view.update(bars[unit], description=stage, completed=done, total=total, rate=rate)

        yield show
