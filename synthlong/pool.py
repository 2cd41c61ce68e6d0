"""Where the tasks of a run are worked on: processes of this machine, or those of a cluster (`dataset/cluster.py`).

A task is a function and one argument, both picklable, and carries all it needs. A worker renders with one torch
thread: with two, the bits of a result change. A worker that dies (out of memory, preempted) takes down its task
only, which is tried again.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Iterator, MutableSequence, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, InvalidStateError, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import Any

import pebble
import torch

__all__ = ["LocalPool", "Lost", "Pool", "Stopped", "begin", "call", "count", "processors", "stop_if_told"]

_AHEAD = 2
_POLL_S = 0.5

_counts: MutableSequence[int] | None = None
_slot = 0
_told_to_stop: Callable[[], bool] | None = None


class Stopped(Exception):
    """The run was told to stop while this task was worked on."""


@dataclass(frozen=True)
class Lost:
    """A task that was given up: its worker died three times.

    Args:
        task: The task.
        counted: How far the last worker came, where that is known.
        problem: How it ended.
    """

    task: Any
    counted: int
    problem: str


class Pool(ABC):
    """Workers that tasks can be submitted to.

    Attributes:
        size: Number of workers.
        deaths: What a future raises when its worker died.
        chances: How many such deaths a task is given.
    """

    size: int
    deaths: tuple[type[BaseException], ...]
    chances: int
    _used = 0

    @abstractmethod
    def submit(self, slot: int, work: Callable[[Any], Any], task: Any) -> Future[Any]:
        """Have `work(task)` done; `slot` is the task's own place among the counts."""

    @abstractmethod
    def count(self, slot: int) -> int:
        """Return what a task has counted so far, where that is known, or when it ended."""

    def is_broken(self) -> bool:
        """Whether no task that was submitted will be done any more."""
        return False

    @abstractmethod
    def stop(self) -> None:
        """End all workers of this machine; those of a cluster stop after the sample, or the case, that they work on."""

    def run(
        self, work: Callable[[Any], Any], tasks: Sequence[Any], report: Callable[[int], None] | None = None
    ) -> Iterator[Any]:
        """Yield `work(task)` of each task, as they come, or a `Lost`.

        Args:
            work: A function of a module.
            tasks: Its arguments.
            report: Called now and then with the sum of what the tasks have counted.
        """
        slots = range(self._used, self._used + len(tasks))
        self._used = slots.stop
        waiting = deque(zip(slots, tasks, strict=True))
        deaths = Counter[int]()  # of tasks that have not ended
        running: dict[Future[Any], tuple[int, Any]] = {}
        ended = 0  # what tasks have counted that are done or given up
        while waiting or running:
            most = _AHEAD * self.size
            while waiting and len(running) < most:
                slot, task = waiting.popleft()
                running[self.submit(slot, work, task)] = slot, task
            done, _ = wait(running, timeout=_POLL_S, return_when=FIRST_COMPLETED)
            if self.is_broken():
                for future in running:
                    with suppress(InvalidStateError):  # it was done
                        future.set_exception(BrokenProcessPool("all workers died"))
            if report:
                report(ended + sum(map(self.count, {*deaths, *(slot for slot, _ in running.values())})))
            for future in [one for one in running if one in done]:  # in the order of the tasks
                slot, task = running.pop(future)
                try:
                    result = future.result()
                except self.deaths as error:
                    deaths[slot] += 1
                    if deaths[slot] < self.chances:
                        waiting.append((slot, task))
                        continue
                    result = Lost(task, self.count(slot), str(error))
                ended += self.count(slot)
                del deaths[slot]
                yield result

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


class LocalPool(Pool):
    """Processes of this machine.

    Args:
        size: How many.
        tasks: How many tasks it will get in all.
    """

    chances = 3

    def __init__(self, size: int, *, tasks: int) -> None:
        self.size, self.deaths = size, (pebble.ProcessExpired, BrokenProcessPool)
        # Each task counts in a slot of its own: nothing is locked that a killed worker could keep.
        self._counts = multiprocessing.get_context("spawn").RawArray("q", tasks)
        self._open()

    def submit(self, slot: int, work: Callable[[Any], Any], task: Any) -> Future[Any]:  # noqa: D102
        if self.is_broken():
            self.stop()
            self._open()
        return self._pool.schedule(call, (slot, work, task))

    def count(self, slot: int) -> int:  # noqa: D102
        return int(self._counts[slot])

    def is_broken(self) -> bool:  # noqa: D102
        return not self._pool.active  # pebble gives the whole pool up if a worker dies between two tasks

    def stop(self) -> None:  # noqa: D102
        self._pool.stop()
        for process in self._context.started:
            if process.is_alive():
                process.terminate()  # all at once; `join` waits for one after the other
        self._pool.join()

    def _open(self) -> None:
        self._context = _Spawning()
        self._pool = pebble.ProcessPool(
            self.size, initializer=_start, initargs=(self._counts, os.getpid()), context=self._context
        )
        try:
            with _interrupts_for_us():
                self._pool.active  # noqa: B018 - starts the workers
        except BaseException:
            self.stop()
            raise


class _Spawning(SpawnContext):
    """Spawns processes and remembers them."""

    def __init__(self) -> None:
        self.started: list[SpawnProcess] = []

    def Process(self, *args: Any, **options: Any) -> SpawnProcess:  # type: ignore[override]
        self.started.append(SpawnProcess(*args, **options))
        return self.started[-1]


def processors() -> int:
    """Return the number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def call(slot: int, work: Callable[[Any], Any], task: Any) -> Any:
    """Do a task, in a worker."""
    global _slot
    _slot = slot
    if _counts is not None:
        _counts[slot] = 0  # whatever a worker counted that died with this task
    return work(task)


def count(n: int = 1) -> None:
    """Add to the count of the task at work."""
    if _counts is not None:
        _counts[_slot] += n


def stop_if_told() -> None:
    """Give up the task if the run is being stopped.

    Raises:
        Stopped: It is.
    """
    if _told_to_stop is not None and _told_to_stop():
        raise Stopped


def begin(counts: MutableSequence[int], told_to_stop: Callable[[], bool]) -> None:
    """Make this process a worker: where its tasks count, and what tells them to stop."""
    global _counts, _told_to_stop
    _counts, _told_to_stop = counts, told_to_stop


def _start(counts: MutableSequence[int], parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops its workers
    torch.set_num_threads(1)
    begin(counts, lambda: os.getppid() != parent)  # a killed parent tells no one


@contextmanager
def _interrupts_for_us() -> Iterator[None]:
    """Let a Ctrl-C wait; processes started meanwhile never see one, not even while they import."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # a process too; starting it would end the blocking
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
