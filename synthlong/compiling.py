"""Numba's compiler, as all kernels use it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import njit

__all__ = ["compiled"]


def compiled(*signature: str, **options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Compile a function without the GIL, and keep the result for the next process where there is a place to.

    Numba writes beside the module, below the user's home, or to `NUMBA_CACHE_DIR`. In a container that runs as another
    user none of these may exist: each process then compiles for itself, which takes seconds.
    """

    def decorated(function: Callable[..., Any]) -> Callable[..., Any]:
        try:
            return njit(*signature, nogil=True, cache=True, **options)(function)
        except RuntimeError:  # no place to write to
            return njit(*signature, nogil=True, **options)(function)

    return decorated
