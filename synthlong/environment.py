"""What besides config, weights and scans decides the bytes that are made: versions, and the machine's arithmetic."""

from __future__ import annotations

from functools import cache
from importlib.metadata import version
from typing import Any

import torch

import synthlong
from synthlong.networks import arithmetic

__all__ = ["environment"]

_LIBRARIES = ("torch", "numpy", "scipy", "numba", "h5py", "hdf5plugin")


def environment(device: str) -> dict[str, Any]:
    """Return the versions of what computes on this machine, and its processor, for work on a device."""
    cpu = torch.backends.cpu.get_cpu_capability()
    return {
        "versions": {"synthlong": synthlong.__version__, **_library_versions()},
        "machine": {"cpu": cpu, "device": device, "arithmetic": arithmetic(device)},
    }


@cache
def _library_versions() -> dict[str, str]:
    return {name: version(name) for name in _LIBRARIES}
