"""Processes that work on a run: each with one torch thread, counting what it has done, stopping when told.

With two torch threads the bits of a result change; so a pair is always rendered on one.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

import torch

from synthlong.errors import OutputError

__all__ = ["WorkerPool", "count", "job", "stop_if_told", "worker_pool"]

_POLL_S = 0.5
_here: dict[str, Any] = {}


class WorkerPool:
    """A pool of processes; made by `worker_pool`."""

    def __init__(self, executor: ProcessPoolExecutor, counter: Any) -> None:
        self._executor, self._counter = executor, counter

    def run(
        self, work: Callable[..., Any], tasks: Sequence[Any], report: Callable[[int], None] | None = None
    ) -> Iterator[Any]:
        """Yield `work(task)` for each task, as they come; call `report` with the workers' count meanwhile.

        Raises:
            OutputError: A worker was killed.
        """
        waiting: set[Future[Any]] = {self._executor.submit(work, task) for task in tasks}
        while waiting:
            done, waiting = wait(waiting, timeout=_POLL_S, return_when=FIRST_COMPLETED)
            if report:
                report(self._counter.value)
            for future in done:
                try:
                    yield future.result()
                except BrokenProcessPool as error:
                    way = "run it again to go on, with fewer --workers if memory is short"
                    raise OutputError("worker", "a worker process was killed", way) from error


@contextmanager
def worker_pool(workers: int, shared: Any = None) -> Iterator[WorkerPool]:
    """Start processes that see `shared` as `job()`; they are gone when the block ends, however it ends."""
    context = multiprocessing.get_context("spawn")
    counter, stop = context.Value("q", 0), context.Event()
    executor = ProcessPoolExecutor(workers, context, _start, (shared, counter, stop))
    try:
        yield WorkerPool(executor, counter)
    except BaseException:
        stop.set()
        raise
    finally:
        executor.shutdown(cancel_futures=True)


def job() -> Any:
    """Return what the pool was started with; in a worker only."""
    return _here["shared"]


def count(n: int = 1) -> None:
    """Add to the count that the pool reports; in a worker only."""
    with _here["counter"].get_lock():
        _here["counter"].value += n


def stop_if_told() -> None:
    """Give up the task if the run is being stopped; in a worker only."""
    if _here["stop"].is_set():
        raise KeyboardInterrupt


def _start(shared: Any, counter: Any, stop: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops its workers
    torch.set_num_threads(1)
    _here.update(shared=shared, counter=counter, stop=stop)
