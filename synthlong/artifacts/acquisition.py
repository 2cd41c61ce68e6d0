"""An acquisition: some of the nine artifacts, one after the other, as a scanner makes them.

    motion -> bias field -> ghosting -> slices, resolution -> spikes, noise -> filters of the console (blur, sharpening)

Preset "kamraoui" mixes 1-3 of the nine at the ranges of Kamraoui et al. 2022, section 2.4
(doi:10.3389/fnimg.2022.948235), which gives no count. Preset "mild" leaves 30 % untouched and mixes 1-2 at half
severity: heavy artifacts in training have been found to hurt. Its spikes start from an intensity of 0.1-0.5: TorchIO's
1-3 draws stripes 1 to 3 times the image's mean, which leave little else to see. Preset "clinical" is "mild" with slices
as clinics make them: 60 % of the images, whatever else they have, get axial slices of 2-4 voxels, averaged as a scanner
does. Two such visits do not cut the cortex alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from synthlong.artifacts.base import Artifact, Params, RandomArtifact, part_of, softened
from synthlong.artifacts.bias_field import PolynomialBiasField, RandomPolynomialBiasField
from synthlong.artifacts.blur import GaussianBlur, RandomGaussianBlur
from synthlong.artifacts.downsampling import AnisotropicDownsampling, RandomAnisotropicDownsampling
from synthlong.artifacts.ghosting import KSpaceGhosting, RandomKSpaceGhosting
from synthlong.artifacts.motion import KSpaceMotion, RandomKSpaceMotion
from synthlong.artifacts.noise import GaussianNoise, RandomGaussianNoise
from synthlong.artifacts.ranges import Range, check_number
from synthlong.artifacts.slices import RandomSliceThickness, SliceThickness
from synthlong.artifacts.spike import KSpaceSpike, RandomKSpaceSpike
from synthlong.artifacts.unsharp import RandomUnsharpMask, UnsharpMask
from synthlong.artifacts.volumes import copied

__all__ = ["Acquisition", "RandomAcquisition", "acquire"]

Steps = Sequence[Sequence[Any]]

_STEPS: tuple[type[Artifact], ...] = (
    KSpaceMotion,
    PolynomialBiasField,
    KSpaceGhosting,
    SliceThickness,
    AnisotropicDownsampling,
    KSpaceSpike,
    GaussianNoise,
    GaussianBlur,
    UnsharpMask,
)
_BY_NAME = {step.__name__: step for step in _STEPS}
_ORDER = {step.__name__: n for n, step in enumerate(_STEPS)}
_ALL_NINE: tuple[type[RandomArtifact], ...] = (
    RandomKSpaceMotion,
    RandomPolynomialBiasField,
    RandomKSpaceGhosting,
    RandomSliceThickness,
    RandomAnisotropicDownsampling,
    RandomKSpaceSpike,
    RandomGaussianNoise,
    RandomGaussianBlur,
    RandomUnsharpMask,
)


class _Preset(NamedTuple):
    untouched: float
    counts: tuple[int, int]
    severity: float
    spikes: tuple[float, float]
    thick_slices: float


_PRESETS = {
    "mild": _Preset(0.3, (1, 2), 0.5, (0.1, 0.5), 0.0),
    "kamraoui": _Preset(0.0, (1, 3), 1.0, (1.0, 3.0), 0.0),
    "clinical": _Preset(0.3, (1, 2), 0.5, (0.1, 0.5), 0.6),
}
_THICK = RandomAnisotropicDownsampling(factor=(2, 4), axes="axial", prefilter=True)


def acquire(
    x: Tensor, *, steps: Steps, affine: NDArray[np.float64] | None = None, zero_background: bool = False
) -> Tensor:
    """Apply artifacts one after the other.

    Args:
        x: Image, shape `(..., I, J, K)`, brain mode 1 (for the noise's SD to mean what it says).
        steps: `(name, params)` of each, the name being that of the deterministic transform: `("GaussianBlur",
            {"std": 1.0})`; none changes nothing.
        affine: Of the image, `(4, 4)`; default: RAS+, 1 mm.
        zero_background: Set voxels that are exactly 0 in `x` back to 0: scans are skull-stripped after they are
            acquired.

    Raises:
        ValueError: An unknown name or a parameter outside its range; names the step.
    """
    result = copied(x)
    result = result.float() if result.element_size() < 4 else result  # halves are rounded once, in the end
    affine = np.eye(4) if affine is None else affine
    for each in steps:
        if len(each) != 2 or not isinstance(each[1], dict):
            raise ValueError(f"step {each!r}: must be a name and a dict of parameters")
        name, params = each
        if not isinstance(name, str) or name not in _BY_NAME:
            raise ValueError(f"step {name!r}: must be one of {', '.join(_BY_NAME)}")
        step = _BY_NAME[name]
        try:
            result = step.kernel(result, **step.on_grid(params, affine))
        except KeyError as error:
            raise ValueError(f"step {name}: {error} is missing") from error
        except (TypeError, ValueError) as error:
            raise ValueError(f"step {name}: {error}") from error
    if zero_background and steps:
        result = torch.where(x.as_subclass(Tensor) == 0, 0, result)
    return result.to(x.dtype)


class Acquisition(Artifact):
    """`acquire` as a transform.

    Args:
        steps: `(name, params)` of each artifact, in order.
        zero_background: Set voxels that are exactly 0 back to 0 in the end.
        **kwargs: See `Artifact`.
    """

    kernel = staticmethod(acquire)

    def __init__(self, steps: Any, *, zero_background: Any = False, **kwargs: Any) -> None:
        super().__init__({"steps": steps, "zero_background": zero_background}, **kwargs)

    @staticmethod
    def on_grid(params: Params, affine: NDArray[np.float64]) -> Params:
        """Hand the affine on to the steps."""
        return {**params, "affine": affine}


class RandomAcquisition(RandomArtifact):
    """A random mixture of the nine artifacts, each at most once, and thick slices.

    Args:
        preset: "mild", "kamraoui" or "clinical"; the other arguments replace what it says.
        severity: 1 takes each artifact's ranges as they are, 0.5 moves them half-way to what changes nothing, 0 all the
            way; in [0, 1].
        untouched: Share of the images that get none of `artifacts`, in [0, 1].
        thick_slices: Share of the images with axial slices of 2-4 voxels, whatever `severity`, `untouched` and `count`
            say of the other artifacts, in [0, 1].
        count: How many artifacts, a whole number or a range.
        artifacts: Random transforms to choose from, applied in this order; default: all nine.
        zero_background: Set voxels that are exactly 0 back to 0 in the end.
        **kwargs: See `RandomArtifact`.
    """

    final = Acquisition

    def __init__(
        self,
        preset: Literal["mild", "kamraoui", "clinical"] = "mild",
        *,
        severity: float | None = None,
        untouched: float | None = None,
        thick_slices: float | None = None,
        count: int | tuple[int, int] | None = None,
        artifacts: Sequence[RandomArtifact] | None = None,
        zero_background: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not isinstance(preset, str) or preset not in _PRESETS:
            raise ValueError(f"preset = {preset!r}: must be one of {', '.join(_PRESETS)}; transforms go in artifacts=")
        given = _PRESETS[preset]
        if artifacts is None:
            ranges: dict[type, Params] = {RandomKSpaceSpike: {"intensity": given.spikes}}
            artifacts = [make(**ranges.get(make, {})) for make in _ALL_NINE]
        self.artifacts = [artifacts] if isinstance(artifacts, RandomArtifact) else list(artifacts)
        for artifact in self.artifacts:
            if not isinstance(artifact, RandomArtifact) or artifact.final not in _STEPS:
                raise ValueError(f"artifacts: {artifact!r} is none of {', '.join(c.__name__ for c in _ALL_NINE)}")
            theirs = (
                artifact.probability < 1,
                artifact.include,
                artifact.exclude,
                artifact.shared,
                artifact.correlation,
            )
            if any(theirs) or artifact.seed is not None:
                ours = "p, include, exclude, shared, correlation and seed are the mixture's, not its artifacts'"
                raise ValueError(f"artifacts: {artifact.name} has its own; {ours}")
        most = len(self.artifacts)
        self.severity = check_number("severity", given.severity if severity is None else severity, least=0, most=1)
        self.untouched = check_number("untouched", given.untouched if untouched is None else untouched, least=0, most=1)
        thick = given.thick_slices if thick_slices is None else thick_slices
        self.thick_slices = check_number("thick_slices", thick, least=0, most=1)
        few, many = (min(n, most) for n in given.counts)
        self.count = Range.of("count", (few, many) if count is None else count, least=0, most=most, whole=True)
        self.zero_background = bool(zero_background)

    def draw_params(self, rng: np.random.Generator) -> Params:
        """Draw which artifacts, and the parameters of each."""
        slices, choice = part_of(rng, 0), part_of(rng, 1)
        thick = _THICK.draw_params(slices) if self.thick_slices and slices.random() < self.thick_slices else None
        steps: list[list[Any]] = []
        if choice.random() >= self.untouched and self.severity:
            count = int(self.count.draw(choice))
            for n in sorted(np.argsort(choice.random(len(self.artifacts)))[:count].tolist()):
                artifact = self.artifacts[n]
                drawn = softened(artifact.draw_params(part_of(rng, 2 + n)), artifact.identity, self.severity)
                steps.append([artifact.final.__name__, drawn])
        if thick:
            name = _THICK.final.__name__
            place = next((n for n, (other, _) in enumerate(steps) if _ORDER[other] > _ORDER[name]), len(steps))
            steps.insert(place, [name, thick])
        return {"steps": steps, "zero_background": self.zero_background}
