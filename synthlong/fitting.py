"""Train the two synthesis networks: one loop for both, seeded, resumable, with a patient held out.

    draw samples -> predict the change to the first guess -> mean squared error in the hole -> Adam

Loss and optimiser are those of Kamraoui et al. 2022, section 2.6 (MSE, Adam with beta1 0.9); the error is
taken in the hole only, each sample counting the same whatever its lesion's size. The Charbonnier loss, square
for errors the size of a scan's noise and linear beyond, is the other choice: a sulcus that nothing foretells
does not outweigh the tissue.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

import synthlong
from synthlong import inpainting, painting
from synthlong.atlas import lesion_prior, sample_map
from synthlong.bank import read_bank
from synthlong.case import Case, patient_of
from synthlong.errors import ConfigError, InputError
from synthlong.lock import file_lock
from synthlong.networks import UNet, UNetConfig, check_device, default_precision, infer
from synthlong.progress import StepProgress
from synthlong.publishing import make_place
from synthlong.sampling import Sample
from synthlong.signals import held_signals
from synthlong.weights import checkpoint_of, finished, read_checkpoint, write_checkpoint, write_weights

__all__ = ["FitConfig", "Sampler", "check_fit", "fit", "fit_on_cases", "hole_errors"]

_STAGE = "fit"
_HELD_OUT_SAMPLES = 64
_CHECKPOINT_EVERY_S = 120
_NOISE = 0.05


class Sampler(Protocol):
    """What draws training samples."""

    def draw(self, rng: np.random.Generator, *, side: int, varied: bool = True) -> Sample:
        """Draw one sample of `side`^3 voxels."""


@dataclass(frozen=True)
class FitConfig:
    """How to train.

    Args:
        steps: Optimiser steps.
        sides: Patch sides in voxels; a step takes one of them.
        voxels: Voxels of a batch: as many patches as fit.
        learning_rate: Of Adam, at its highest: it rises over the first 3 % and falls to 0 along a cosine.
        seed: Seed of everything drawn.
        report_every: Steps between evaluations on the patient held out.
        precision: "bf16", "float32" or "auto".
        device: Torch device.
        loss: "mse" or "charbonnier".
    """

    steps: int = 2000
    sides: tuple[int, ...] = (64,)
    voxels: int = 16 * 32**3
    learning_rate: float = 1e-4
    seed: int = 0
    report_every: int = 100
    precision: str = "auto"
    device: str = "cpu"
    loss: str = "mse"

    def __post_init__(self) -> None:
        if self.precision == "auto":
            object.__setattr__(self, "precision", default_precision(self.device))
        if min(self.steps, self.report_every, self.voxels) < 1 or not 0 < self.learning_rate <= 1 or self.seed < 0:
            raise ConfigError("fit: steps, report_every, voxels must be >= 1, learning_rate in (0, 1], seed >= 0")
        if not self.sides or any(side < 16 or side % 4 for side in self.sides):
            raise ConfigError(f"fit: sides {self.sides} must be multiples of 4 of at least 16 voxels")
        if self.precision not in ("bf16", "float32"):
            raise ConfigError(f"fit: precision {self.precision!a} must be auto, bf16 or float32")
        if self.loss not in ("mse", "charbonnier"):
            raise ConfigError(f"fit: loss {self.loss!a} must be mse or charbonnier")


def check_fit(config: FitConfig, out: Path, *, patients: Collection[str], hold_out: str | None) -> None:
    """Say what is wrong with device, place and patients before the work, not after.

    Args:
        config: How to train.
        out: The `.safetensors` file.
        patients: Of the cases.
        hold_out: Patient who is kept out of training.

    Raises:
        ConfigError: The device is not usable here, no such patient, or none left to train on.
        OutputError: `out` cannot be written to.
    """
    check_device(config.device)
    make_place(out)
    if hold_out is not None and hold_out not in patients:
        raise ConfigError(f"--hold-out {hold_out}: no such patient; there are {', '.join(sorted(patients))}")
    if not set(patients) - {hold_out}:
        raise ConfigError("no patient is left to train on; pass more cases, or hold none out")


def fit(
    config: FitConfig,
    *,
    task: str,
    network: UNetConfig,
    training: Sampler,
    held_out: Sampler | None,
    out: Path,
    card: dict[str, Any],
    about: dict[str, Any] | None = None,
    progress: StepProgress | None = None,
) -> dict[str, Any]:
    """Train, write weights and card to `out`, return the card's figures.

    A checkpoint lies beside `out` while training runs; the same call goes on from it, and gives what an
    uninterrupted one gives, since step t draws from (seed, t) alone. A training that is stopped by Ctrl-C or SIGTERM
    finishes its step and saves it. What was finished with the same settings stays as it is.

    Args:
        config: How to train.
        task: "inpainter" or "generator".
        network: Size of the network.
        training: Draws samples of the training patients.
        held_out: Draws samples of the patient held out.
        out: The `.safetensors` file.
        card: What the card says beside the figures.
        about: What the data are, for the card; a training goes on only from a checkpoint with the same.
        progress: Called as (step, steps, loss).

    Raises:
        InputError: The checkpoint is damaged or of another training, the loss is not finite, the patient held out has
            nothing to measure on; or `out` or its card is there already, and of another training.
        OutputError: `out` cannot be written to.
    """
    check_device(config.device)
    make_place(out)
    torch.manual_seed(config.seed)
    model = UNet(network).to(config.device, memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    adam = torch.optim.Adam(model.parameters(), lr=config.learning_rate, betas=(0.9, 0.999))
    checkpoint = checkpoint_of(out)
    settings = {**asdict(config), "sides": list(config.sides)}
    about = {} if about is None else about
    whole = {**settings, **about, "task": task, "network": network.as_dict()}
    if made := finished(out, whole, part="fit", task=task):
        return {key: made[key] for key in ("curve", "fit", "seconds")}
    resumable = {**whole, "version": synthlong.__version__}
    first, curve, losses, seconds = _resume(checkpoint, resumable, model, adam)
    if held_out is not None:
        for n in range(len(config.sides)):  # one that nothing can be drawn from says so now
            _held_out_sample(held_out, config, n)
    started = saved = time.monotonic()
    with held_signals() as stopped:
        for step in range(first, config.steps):
            for group in adam.param_groups:
                group["lr"] = config.learning_rate * _schedule(step / config.steps)
            batch = _draw_batch(training, config, step)
            model.train()
            loss = _loss(model, batch, config)
            adam.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            adam.step()
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                raise InputError(out, f"the loss is not finite at step {step}", "lower the learning rate")
            done = step + 1
            if progress:
                progress(done, config.steps, losses[-1])
            if done % config.report_every == 0 or done == config.steps:
                point: dict[str, float] = {"step": done, "loss": round(float(np.mean(losses)), 6)}
                if held_out is not None:
                    point |= hole_errors(model, held_out, config)
                curve.append(point)
                losses = []
            if stopped or time.monotonic() - saved > _CHECKPOINT_EVERY_S:
                saved = time.monotonic()
                state = {"step": done, "curve": curve, "losses": losses, "seconds": seconds + saved - started}
                _save(checkpoint, resumable, model, adam, state)
            if stopped:
                break
    figures = {"curve": curve, "fit": settings, "seconds": round(seconds + time.monotonic() - started)}
    write_weights(out, model, task=task, card={**card, **about, **figures})
    checkpoint.unlink(missing_ok=True)
    return figures


def fit_on_cases(
    task: str,
    cases: list[Case],
    out: Path,
    *,
    config: FitConfig,
    hold_out: str | None,
    card: dict[str, Any],
    progress: StepProgress | None = None,
) -> dict[str, Any]:
    """Train the "inpainter" or the "generator" on cases; see `fit`.

    Args:
        task: Which network.
        cases: Scans with lesion masks; several visits of a patient have ids `ID_ses-N`.
        out: The `.safetensors` file.
        config: How to train.
        hold_out: Patient whose visits are kept out of training and measure the error.
        card: What the card says beside the figures.
        progress: Called as (step, steps, loss).

    Raises:
        SynthlongError: As for `check_fit` and `fit`.
    """
    patients = sorted({patient_of(c.id) for c in cases})
    check_fit(config, out, patients=patients, hold_out=hold_out)
    groups = [[c for c in cases if (patient_of(c.id) == hold_out) == kept_out] for kept_out in (False, True)]
    samplers: list[Sampler | None] = [None, None]
    network = inpainting.NETWORK if task == "inpainter" else painting.NETWORK
    for n, group in enumerate(groups):
        if group and task == "inpainter":
            frequency, affine = lesion_prior()
            maps = [sample_map(frequency, affine, c.shape, c.affine) for c in group]
            samplers[n] = inpainting.HealthySampler(group, bank=read_bank(), frequency=maps)
        elif group:
            samplers[n] = painting.LesionSampler(group)
    training, held_out = samplers
    assert training is not None
    about = {"patients": patients, "held_out": hold_out, "sources": {c.id: c.sources for c in cases}}
    with file_lock(out):
        return fit(
            config,
            task=task,
            network=network,
            training=training,
            held_out=held_out,
            out=out,
            card=card,
            about=about,
            progress=progress,
        )


def hole_errors(model: UNet, sampler: Sampler, config: FitConfig) -> dict[str, float]:
    """Return errors in the hole on fixed samples of the patient held out (brain mode = 1).

    `mae` of the network, `mae_first_guess` of the smooth fill that it corrects, `bias` (mean of prediction
    minus truth).
    """
    model.eval()
    errors = []
    for n in range(_HELD_OUT_SAMPLES):
        sample = _held_out_sample(sampler, config, n)
        change = infer(model, sample.inputs, precision=config.precision, device=config.device)
        hole = sample.weight > 0.5
        guess, truth = sample.inputs[1:2][hole], sample.target[hole]
        wrong = guess + change[hole] - truth
        errors.append((np.abs(wrong).mean(), np.abs(guess - truth).mean(), wrong.mean()))
    mae, first, bias = np.mean(errors, axis=0)
    return {
        "mae": round(float(mae), 5),
        "mae_first_guess": round(float(first), 5),
        "bias": round(float(bias), 5),
    }


def _held_out_sample(sampler: Sampler, config: FitConfig, n: int) -> Sample:
    rng = np.random.default_rng(np.random.SeedSequence(config.seed, spawn_key=(1, n)))
    return sampler.draw(rng, side=config.sides[n % len(config.sides)], varied=False)


def _autocast(config: FitConfig) -> torch.autocast:
    kind = torch.device(config.device).type
    return torch.autocast(kind, torch.bfloat16, enabled=config.precision == "bf16")


def _draw_batch(sampler: Sampler, config: FitConfig, step: int) -> list[Tensor]:
    rng = np.random.default_rng(np.random.SeedSequence(config.seed, spawn_key=(0, step)))
    side = config.sides[int(rng.integers(len(config.sides)))]
    size = max(config.voxels // side**3, 1)
    samples = [sampler.draw(rng, side=side) for _ in range(size)]
    fields = ([s.inputs for s in samples], [s.target for s in samples], [s.weight for s in samples])
    return [torch.from_numpy(np.stack(f)).to(config.device) for f in fields]


def _loss(model: UNet, batch: list[Tensor], config: FitConfig) -> Tensor:
    inputs, target, weight = batch
    with _autocast(config):
        change = model(inputs.to(memory_format=torch.channels_last_3d))
    wrong = (inputs[:, 1:2] + change.float() - target) ** 2
    if config.loss == "charbonnier":
        wrong = torch.sqrt(wrong + _NOISE**2) - _NOISE
    return ((wrong * weight).sum(dim=(1, 2, 3, 4)) / weight.sum(dim=(1, 2, 3, 4)).clamp(min=1e-6)).mean()


def _schedule(t: float) -> float:
    return min(t / 0.03 + 0.01, 1.0) * 0.5 * (1 + math.cos(math.pi * t))


def _save(path: Path, settings: dict[str, Any], model: UNet, adam: torch.optim.Adam, state: dict[str, Any]) -> None:
    learned = {"model": model.state_dict(), "adam": adam.state_dict()}
    write_checkpoint(path, {_STAGE: {**learned, **state, "settings": settings}})


def _resume(
    path: Path, settings: dict[str, Any], model: UNet, adam: torch.optim.Adam
) -> tuple[int, list[dict[str, float]], list[float], float]:
    state = read_checkpoint(path, _STAGE, settings)
    if state is None:
        return 0, [], [], 0.0
    model.load_state_dict(state["model"])
    adam.load_state_dict(state["adam"])
    return state["step"], state["curve"], state["losses"], state["seconds"]
