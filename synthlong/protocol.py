"""Scanners and protocols: a visit's own gray scale. White matter stays where it is, CSF and lesions do not.

    y = 1 + contrast (x^gamma - 1)

where the brain's mode is 1 and the background 0, and both stay so.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["AS_IT_IS", "Tone", "toned"]

Tone = tuple[float, float]
"""Contrast, a factor on the distance from the brain's mode, and gamma, an exponent."""

AS_IT_IS: Tone = (1.0, 1.0)

_DARKEST = 0.01


def toned(x: NDArray[np.float32], tone: Tone) -> NDArray[np.float32]:
    """Return a scan with another gray scale; what is above 0 stays above 0."""
    if tone == AS_IT_IS:
        return x
    contrast, gamma = tone
    brain = x > 0
    y = 1 + contrast * (np.power(x, np.float32(gamma), where=brain, out=np.zeros_like(x)) - 1)
    return np.where(brain, np.maximum(y, _DARKEST), 0).astype(np.float32, copy=False)
