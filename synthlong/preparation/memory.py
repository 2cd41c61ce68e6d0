"""How much memory this process may use: that of the machine, or less where a container or a job has a limit."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

__all__ = ["usable_memory_gb"]

_LIMITS = {"v1": "memory.limit_in_bytes", "v2": "memory.max"}


def usable_memory_gb(own: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> float | None:
    """Return the memory of this machine or control group, the smaller one, in 10^9 bytes; None: nobody knows.

    Args:
        own: File that lists the control groups of this process, of either version.
        root: Where their file systems are mounted.
    """
    sizes = []
    with suppress(AttributeError, ValueError, OSError):
        sizes.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for file in _limits(own, root):
        with suppress(OSError, ValueError):  # not there, or "max"
            sizes.append(int(file.read_text()))
    return min(sizes) / 1e9 if sizes else None


def _limits(own: Path, root: Path) -> Iterator[Path]:
    """Yield the files that may hold a limit: of each group that the process is in, and of those around it."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            place, name = root, _LIMITS["v2"]
        elif "memory" in controllers.split(","):
            place, name = root / "memory", _LIMITS["v1"]
        else:
            continue
        path = PurePosixPath(group.lstrip("/"))
        for part in (path, *path.parents):
            yield place / part / name
