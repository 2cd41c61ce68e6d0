"""Batches read ahead, by threads, while a step is made."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import torch
from torch import Tensor

from synthlong.training.patches import Drawn, Patches

__all__ = ["Ahead"]


class Ahead:
    """The batches of each step, read ahead by threads with files of their own.

    Args:
        patches: Where they come from.
        draw: Called with them, a step and `rank`.
        steps: Which ones.
        rank: Of this process.
        readers: Number of threads; they change no bit.
    """

    def __init__(
        self,
        patches: Patches,
        draw: Callable[[Patches, int, int], Drawn],
        *,
        steps: range,
        rank: int = 0,
        readers: int = 1,
    ) -> None:
        self._patches, self._draw, self._steps, self._rank = patches, draw, steps, rank
        self._readers = max(readers, 1)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        own = threading.local()

        def read(step: int) -> tuple[Tensor, ...]:
            if not hasattr(own, "patches"):
                own.patches = self._patches.reopened()
            return tuple(torch.from_numpy(d) for d in self._draw(own.patches, step, self._rank))

        steps = iter(self._steps)
        with ThreadPoolExecutor(self._readers) as pool:
            waiting = deque(pool.submit(read, step) for step in islice(steps, self._readers + 1))
            while waiting:
                drawn = waiting.popleft().result()
                waiting.extend(pool.submit(read, step) for step in islice(steps, 1))
                yield drawn
