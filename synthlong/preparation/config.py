"""How scans are prepared: the options of a preparation, from TOML or from code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from synthlong.options import Options

__all__ = ["PreparationConfig"]


@dataclass(frozen=True)
class PreparationConfig(Options):
    """How scans are prepared.

    Args:
        recipe: "kamraoui": MNI152 at 1 mm, brain only, mode 1 (Kamraoui et al. 2022, section 2.5.2); "schmidt": the
            visits' halfway space, whole head, z-scores (Schmidt-Mengin et al. 2022).
        denoise: Whether to denoise the scan.
        denoise_again: Whether to denoise once more on the grid of MNI152.
        correct_bias: Whether to remove the bias field.
        visits: Motion between a patient's visits: "rigid", or "affine" where the scanners differ.
        brain: How HD-BET looks for the brain: "fast", or "accurate" (five networks, mirrored: forty times as long).
        healthy: Whether to fill the lesions, for `generate`.
        inpainter: Weights; default: the shipped ones.
        precision: Of the inpainter: "bf16", "float32", or "auto": bf16 where the processor computes it natively.
        device: Torch device of HD-BET and the inpainter.
        spacing_mm: Voxel side of "schmidt".
    """

    PATHS: ClassVar = ("inpainter",)

    recipe: Literal["kamraoui", "schmidt"] = "kamraoui"
    denoise: bool = True
    denoise_again: bool = False
    correct_bias: bool = True
    visits: Literal["rigid", "affine"] = "rigid"
    brain: Literal["fast", "accurate"] = "fast"
    healthy: bool = True
    inpainter: str | None = None
    precision: Literal["auto", "bf16", "float32"] = "auto"
    device: str = "cpu"
    spacing_mm: float = 0.5

    @property
    def space(self) -> str:
        """Where the scans end up, as file names have it."""
        return "MNI152" if self.recipe == "kamraoui" else "halfway"

    @property
    def fills(self) -> bool:
        """Whether lesions are filled."""
        return self.healthy and self.recipe == "kamraoui"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(("device",), lambda v: v.split(":")[0] in ("cpu", "cuda"), "cpu, or cuda, cuda:0, ...")
        self.check(("spacing_mm",), lambda v: 0.3 <= v <= 2, "in [0.3, 2] mm")
