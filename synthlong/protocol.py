"""Scanners and protocols: a visit's own gray scale. White matter stays where it is, CSF and lesions do not.

y = 1 + contrast (x^gamma - 1)
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["AS_IT_IS", "Tone", "toned"]

Tone = tuple[float, float]
"""Contrast, a factor on the distance from the brain's mode, and gamma, an exponent; both above 0."""

AS_IT_IS: Tone = (1.0, 1.0)

_DARKEST = 0.01


def toned(x: NDArray[np.float32], tone: Tone, brain: NDArray[np.bool_] | None = None) -> NDArray[np.float32]:
    """Return a scan in another gray scale, of the same shape; (1, 1) changes no bit.

    Args:
        x: The scan, brain mode 1, which stays 1; below 0 counts as 0.
        tone: Contrast and gamma.
        brain: Where it applies, and nothing is darker than 0.01 afterwards; default: where the scan is above 0.
    """
    if tone == AS_IT_IS:
        return x
    contrast, gamma = tone
    brain = x > 0 if brain is None else brain
    y = 1 + contrast * (np.power(np.maximum(x, 0), np.float32(gamma)) - 1)
    return np.where(brain, np.maximum(y, _DARKEST), x).astype(np.float32, copy=False)
