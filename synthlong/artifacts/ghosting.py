"""Ghosting: every g-th plane of k-space is weaker, as when the head pulsates in time with the phase encoding.

    y = x - intensity IFFT(c FFT(x)),   c = 1 on planes 0, g, 2 g, ... of k-space, 0 on the others and at its centre

As in TorchIO, planes count from the end of k-space along `axis`, and the real part is kept. The mask varies along one
axis, so the other transforms cancel (see `kspace`).

Source: TorchIO, Perez-Garcia et al. 2021 (doi:10.1016/j.cmpb.2021.106236); Kamraoui et al. 2022, section 2.4
(doi:10.3389/fnimg.2022.948235).
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from synthlong.artifacts.base import Artifact, Params, RandomArtifact
from synthlong.artifacts.kspace import Mask, add_filtered
from synthlong.artifacts.ranges import Range, check_axes, check_number
from synthlong.artifacts.volumes import copied, on_volumes

__all__ = ["KSpaceGhosting", "RandomKSpaceGhosting", "kspace_ghosting"]

_MOST_GHOSTS = 10_000
_STRONGEST = 100


def kspace_ghosting(x: Tensor, *, ghosts: int, axis: int, intensity: float, restore: float | None = None) -> Tensor:
    """Add ghosts along an axis, as `torchio.Ghosting` does.

    Args:
        x: Image, shape `(..., I, J, K)`, any intensity unit.
        ghosts: About how many: every `ghosts`-th plane of k-space is weakened; whole, in [0, 10000]; 0 changes
            nothing.
        axis: Along which the ghosts lie, the direction of phase encoding: 0 for I, 1 for J, 2 for K.
        intensity: Fraction taken from the planes, in [0, 100]; 0 changes nothing, 1 empties them.
        restore: Fraction of the planes left as they were, around the centre of k-space, in [0, 1]; None: the central
            plane. Planes are counted in pairs: less than two of them spare none, not even the centre.

    Raises:
        ValueError: A parameter outside its range, or `x` not finite floating-point voxels.
    """
    ghosts = int(check_number("ghosts", ghosts, least=0, most=_MOST_GHOSTS, whole=True))
    axis = int(check_number("axis", axis, least=0, most=2, whole=True))
    intensity = check_number("intensity", intensity, least=0, most=_STRONGEST)
    restore = None if restore is None else check_number("restore", restore, least=0, most=1)
    if not ghosts or not intensity:
        return copied(x)

    def kernel(volumes: Tensor) -> Tensor:
        comb = _comb(volumes.shape[1 + axis], ghosts, restore)
        return add_filtered(volumes, [volumes], [comb], axis=axis, scale=-intensity) if any(comb) else volumes.clone()

    return on_volumes(x, torch_kernel=kernel)


class KSpaceGhosting(Artifact):
    """`kspace_ghosting` as a transform.

    Args:
        ghosts: Every `ghosts`-th plane of k-space is weakened.
        axis: Along which the ghosts lie.
        intensity: Fraction taken from the planes.
        restore: Fraction of the planes left as they were, around the centre; None: the central plane.
        **kwargs: See `Artifact`.
    """

    kernel = staticmethod(kspace_ghosting)

    def __init__(self, ghosts: Any, axis: Any, intensity: Any, restore: Any = None, **kwargs: Any) -> None:
        super().__init__({"ghosts": ghosts, "axis": axis, "intensity": intensity, "restore": restore}, **kwargs)


class RandomKSpaceGhosting(RandomArtifact):
    """A random number of ghosts along a random axis.

    Args:
        ghosts: Range of whole numbers.
        axes: To choose from.
        intensity: Range of the fraction taken from the planes.
        restore: Range of the fraction of the planes left as they were; None: the central plane.
        **kwargs: See `RandomArtifact`.
    """

    final = KSpaceGhosting
    identity: ClassVar[dict[str, float]] = {"intensity": 0.0}

    def __init__(
        self,
        ghosts: Any = (4, 10),
        *,
        axes: Any = (0, 1, 2),
        intensity: Any = (0.5, 1.0),
        restore: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.ghosts = Range.of("ghosts", ghosts, least=0, most=_MOST_GHOSTS, whole=True)
        self.axes = check_axes(axes)
        self.intensity = Range.of("intensity", intensity, least=0, most=_STRONGEST)
        self.restore = None if restore is None else Range.of("restore", restore, least=0, most=1)

    def draw_params(self, rng: np.random.Generator) -> Params:
        """Draw number, axis, intensity and restored fraction."""
        return {
            "ghosts": self.ghosts.draw(rng),
            "axis": self.axes[int(rng.random() * len(self.axes))],
            "intensity": self.intensity.draw(rng),
            "restore": None if self.restore is None else self.restore.draw(rng),
        }


def _comb(n: int, ghosts: int, restore: float | None) -> Mask:
    """Return 1 on the planes to weaken, 0 on the others, from one end of k-space to the other."""
    centre = n // 2
    half = round(restore * n) // 2 if restore is not None else None
    kept = range(centre, centre + 1) if half is None else range(centre - half, centre + half)
    return tuple(float(plane % ghosts == 0 and plane not in kept) for plane in range(n))
