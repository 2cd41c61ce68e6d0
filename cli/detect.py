"""`synthlong detect`: new lesions of a follow-up."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path

import typer

from .options import PREFER, Prefer

_SHIPPED = ("concat", "siamese")


class Precision(StrEnum):
    """How the networks compute."""

    auto = "auto"
    bf16 = "bf16"
    float32 = "float32"


def detect(
    baseline: Path = typer.Argument(..., help="FLAIR of the first visit, NIfTI: raw or prepared."),
    followup: Path = typer.Argument(..., help="FLAIR of the second visit."),
    out: Path = typer.Option(..., "-o", "--out", help="Mask to write, on the follow-up's grid; its JSON beside it."),
    weights: list[Path] = typer.Option(
        [], help="Network, or siamese or concat, as shipped; several are averaged.  [default: concat]"
    ),
    threshold: float = typer.Option(0.5, min=0, max=1, help="New is where the probability is higher."),
    min_volume: float = typer.Option(3.0, min=0, help="Lesions of this volume in mm3 or less are left out."),
    window: int = typer.Option(
        None, min=1, help="Side of the windows the networks see.  [default: that of the weights]"
    ),
    mirror: bool = typer.Option(True, help="Average with what is found in the mirror image: twice the time."),
    probability: Path = typer.Option(None, help="Map of probabilities to write, NIfTI."),
    picture: Path = typer.Option(None, help="Picture to write, .png: a row per lesion, the 20 largest."),
    baseline_brain: Path = typer.Option(None, help="Brain mask on the baseline's grid, in place of HD-BET's."),
    followup_brain: Path = typer.Option(None, help="Brain mask on the follow-up's grid."),
    work: Path = typer.Option(None, help="Folder for prepared scans, used again.  [default: a temporary one]"),
    config: Path = typer.Option(None, help="PreparationConfig as TOML, for raw scans."),
    precision: Precision = typer.Option(Precision.auto, help="auto: bf16 where it does not change the mask."),
    device: str = typer.Option(None, help="Torch device, e.g. cuda:0.  [default: cpu, or what --config says]"),
    threads: int = typer.Option(0, min=0, help="CPU threads; 0: all. They change no bit."),
    prefer: Prefer = PREFER,
) -> None:
    """Find the lesions of a follow-up that the baseline does not have.

    Scans with a skull or off the MNI grid are prepared first, both together. The mask comes from the networks alone.
    """
    from dataclasses import replace

    import torch

    from synthlong.detection import inference, sliding
    from synthlong.detection.findings import check_places, write_findings
    from synthlong.detection.visits import read_visits
    from synthlong.networks import check_device
    from synthlong.preparation.config import PreparationConfig
    from synthlong.preparation.derivatives import sha256_of

    from .progress import progress_bar

    weights = [inference.shipped_detector(path.name) if str(path) in _SHIPPED else path for path in weights]
    inputs = [path for path in (baseline, followup, baseline_brain, followup_brain, *weights) if path is not None]
    cards = [path.with_suffix(".json") for path in weights]
    check_places(out, inputs=[*inputs, *cards], probability=probability, picture=picture)
    inference.check_limits(threshold, min_volume)
    chosen = PreparationConfig.from_toml(config) if config else PreparationConfig()
    device = device or chosen.device
    check_device(device)
    paths = weights or [inference.shipped_detector()]
    networks = inference.read_detectors(paths)
    window = sliding.window_of(networks, window)
    if threads:
        torch.set_num_threads(threads)
    with progress_bar() as show:
        visits = read_visits(
            baseline,
            followup,
            baseline_brain=baseline_brain,
            followup_brain=followup_brain,
            work=work,
            config=replace(chosen, device=device),
            prefer=prefer.value if prefer else None,
            progress=show,
            tell=lambda why: typer.echo(f"both visits are prepared first, about 3 minutes each: {why}", err=True),
        )
        detection = inference.detect(
            visits.baseline,
            visits.followup,
            networks,
            threshold=threshold,
            min_volume_mm3=min_volume,
            window=window,
            mirrored=mirror,
            precision=precision.value,
            device=device,
            progress=show,
        )
    settings = {
        "weights": [{"file": path.name, "sha256": sha256_of(path)} for path in paths],
        "threshold": threshold,
        "min_volume_mm3": min_volume,
        "window": window,
        "mirrored": mirror,
        "precision": precision.value,
    }
    found = write_findings(out, detection, visits, settings=settings, probability=probability, picture=picture)
    count = len(found.lesions)
    lesions = f"{count} new lesion{'s' * (count > 1)}, {found.volume_mm3:.0f} mm3" if count else "no new lesion"
    typer.echo(f"{out.name}: {lesions}")
