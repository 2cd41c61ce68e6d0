"""Fluid that is brighter in places: CSF that flows, and meninges that skull stripping left at one visit.

Both differ from visit to visit and neither is a lesion, but both are bright where it was dark.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from synthlong.boxes import Region, on_grid, widened, within
from synthlong.case import Case
from synthlong.tissue import CSF

__all__ = ["flow_field", "flow_weight"]

_KNOT = 5
_WIDTH = 3.5
_RIM = 3
_EDGE = 0.7
_CALM = 0.5
_PAD = _RIM + 4


def flow_weight(case: Case, region: Region) -> NDArray[np.float32]:
    """Return where fluid may be brighter: 1 in CSF and within 3 voxels of the brain's surface, with a soft edge.

    Args:
        case: The case.
        region: Part of its grid.
    """
    wide = on_grid(widened(region, _PAD), case.shape)
    brain = case.brain[wide] > 0
    rim = brain & ~ndimage.binary_erosion(brain, iterations=_RIM, border_value=1)
    fluid = (rim | (case.tissue[wide] == CSF)).astype(np.float32)
    return (ndimage.gaussian_filter(fluid, _EDGE) * brain)[within(region, wide)]


def flow_field(shape: tuple[int, ...], region: Region, *, seed: int) -> NDArray[np.float32]:
    """Return how much brighter: 0 in most places, smooth, 1 at most; the same from any region.

    Args:
        shape: Of the whole grid.
        region: Part of it.
        seed: Of the field.
    """
    knots = [np.arange(-_KNOT, n + 2 * _KNOT, _KNOT) for n in shape]
    field = np.random.default_rng(seed).standard_normal([len(k) for k in knots])
    for axis, (at, part) in enumerate(zip(knots, region, strict=True)):
        near = np.exp(-0.5 * ((np.arange(part.start, part.stop)[:, None] - at) / _WIDTH) ** 2)
        near /= np.linalg.norm(near, axis=1, keepdims=True)
        field = np.moveaxis(np.tensordot(near, field, (1, axis)), 0, axis)
    return np.clip(field - _CALM, 0, 1).astype(np.float32)
