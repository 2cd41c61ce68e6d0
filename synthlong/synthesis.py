"""How pairs are drawn: the options of a run, from TOML or from code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from synthlong.hole import REACH
from synthlong.options import Options

__all__ = ["SynthesisConfig"]


@dataclass(frozen=True)
class SynthesisConfig(Options):
    """How pairs are drawn. Shares and probabilities lie in [0, 1], means are per pair (whole brain).

    Args:
        box: Side of the rendered cubes, voxels of 1 mm.
        with_new_lesions: Share of the recipes that have new lesions anywhere in the brain.
        around_events: Share of the boxes placed around an event (a new lesion where there is one); the others
            lie at random over the brain's bounding box.
        new_mean: Mean number of new lesions in recipes that have any (1 + geometric).
        new_max: Most new lesions.
        real_share: Share of real lesions of the case among those that change, as far as it has enough of them. A part
            that `max_event_mm3` splits off a confluent lesion counts as one; the rest of that lesion may stay.
        vanished_mean: Mean number of vanished lesions (Poisson).
        enlarging_mean: Mean number of enlarging lesions (Poisson).
        shrinking_mean: Mean number of shrinking lesions (Poisson).
        stable_mean: Mean number of synthetic lesions present at both visits (Poisson).
        removed_share: Probability that a real lesion is removed from both visits.
        core_share: Range of the volume share that an enlarging or shrinking lesion has when small.
        volume_median_mm3: Median volume of synthetic lesions (log-normal).
        volume_log_sd: SD of the volume's natural logarithm.
        contrast: Range of a factor on the contrast of synthetic lesions; 1: that of a real lesion of the same size.
            Copies keep their own.
        max_event_mm3: Largest lesion that may change; larger real ones are split at their necks.
        gray_matter: Weight of gray matter beside white matter's 1 in the placement of lesions.
        margin: Voxels between a synthetic lesion and any other.
        registration_sd_mm: SD along each axis of the residual misregistration: the baseline is translated by it, at
            most 0.9 mm, not turned. The masks stay with the follow-up.
        flow_share: Probability, for each visit, that its CSF and the outermost voxels of its brain are brighter in
            places: flow artifacts, and meninges that skull stripping left.
        protocol_spread: Each visit's own gray scale, as other scanners have: the logarithms of its contrast and gamma
            lie anywhere from minus to plus this; 0: both visits have that of the scan.
        artifacts: Each visit's own: "mild", "kamraoui" or "clinical" (presets of `artifacts.RandomAcquisition`),
            "none", or "before_editing": those of "kamraoui", on the scan before its lesions are edited, as in Kamraoui
            et al.
        orientations: "all" 48 orthogonal ones, "mirror" (left-right only) or "none"; one for both visits.
        prior: Lesion prior, NIfTI in MNI space; default: the shipped one.
        lesion_bank: Lesion bank (.npz); default: the shipped one.
        inpainter: Weights; default: the shipped ones.
        generator: Weights; default: the shipped ones.
        painter: How synthetic lesions are made: "network", or to compare with it "copypaste" (real lesions of the
            case, pasted elsewhere) or "ellipsoid" (evenly bright).
        precision: Of the networks: "bf16", "float32", or "auto": bf16 where the processor computes it
            natively.
        device: Torch device of the networks.
        compression: Of the shards: "blosc-lz4" or "none".
    """

    PATHS: ClassVar = ("prior", "lesion_bank", "inpainter", "generator")

    box: int = 64
    with_new_lesions: float = 0.6
    around_events: float = 0.75
    new_mean: float = 3.0
    new_max: int = 30
    real_share: float = 0.4
    vanished_mean: float = 0.4
    enlarging_mean: float = 0.5
    shrinking_mean: float = 0.3
    stable_mean: float = 1.0
    removed_share: float = 0.1
    core_share: tuple[float, float] = (0.3, 0.7)
    volume_median_mm3: float = 45.0
    volume_log_sd: float = 1.1
    contrast: tuple[float, float] = (1.0, 1.0)
    max_event_mm3: float = 3000.0
    gray_matter: float = 0.3
    margin: int = 5
    registration_sd_mm: float = 0.0
    flow_share: float = 0.0
    protocol_spread: float = 0.0
    artifacts: Literal["mild", "kamraoui", "clinical", "none", "before_editing"] = "mild"
    orientations: Literal["all", "mirror", "none"] = "all"
    prior: str | None = None
    lesion_bank: str | None = None
    inpainter: str | None = None
    generator: str | None = None
    painter: Literal["network", "copypaste", "ellipsoid"] = "network"
    precision: Literal["auto", "bf16", "float32"] = "auto"
    device: str = "cpu"
    compression: Literal["blosc-lz4", "none"] = "blosc-lz4"

    def __post_init__(self) -> None:
        super().__post_init__()
        shares = ("with_new_lesions", "around_events", "real_share", "removed_share", "gray_matter", "flow_share")
        means = ("vanished_mean", "enlarging_mean", "shrinking_mean", "stable_mean")
        self.check(shares, lambda v: 0 <= v <= 1, "in [0, 1]")
        self.check(means, lambda v: 0 <= v <= 100, "in [0, 100]")
        self.check(("box",), lambda v: 16 <= v <= 160, "a whole number in 16..160")
        self.check(("new_mean",), lambda v: 1 <= v <= 100, "in [1, 100]")
        self.check(("new_max",), lambda v: 1 <= v <= 200, "a whole number in 1..200")
        self.check(("volume_median_mm3",), lambda v: 4 <= v <= 3000, "in [4, 3000] mm3")
        self.check(("volume_log_sd",), lambda v: 0 <= v <= 3, "in [0, 3]")
        self.check(("max_event_mm3",), lambda v: 10 <= v <= 1e5, "in [10, 1e5] mm3")
        self.check(("margin",), lambda v: 2 * REACH - 1 <= v <= 20, f"a whole number in {2 * REACH - 1}..20")
        self.check(("core_share",), lambda v: _rising(v, 0.05, 0.95), "two numbers in [0.05, 0.95], rising")
        self.check(("contrast",), lambda v: _rising(v, 0.05, 3), "two numbers in [0.05, 3], rising")
        self.check(("registration_sd_mm",), lambda v: 0 <= v <= 0.4, "in [0, 0.4] mm")
        self.check(("protocol_spread",), lambda v: 0 <= v <= 0.5, "in [0, 0.5]")


def _rising(values: tuple[float, ...], low: float, high: float) -> bool:
    return len(values) == 2 and low <= values[0] <= values[1] <= high
