"""Weights on disk: a safetensors file and, beside it, its card.

The card (`NAME.json`) says what the weights were trained on, under which licence, by which command, with
which loss curve and held-out error, and carries the SHA-256 of the weights: safetensors itself accepts NaN,
other dtypes and flipped bits. Nothing is ever unpickled; the checkpoint of a training that goes on holds tensors and
plain values.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load, save

from synthlong.detection.networks import ConcatUNet, LongitudinalUNet, SegmentationUNet, SiameseUNet, sees
from synthlong.errors import InputError
from synthlong.networks import UNet, UNetConfig, infer
from synthlong.plain import differences
from synthlong.publishing import publish

__all__ = [
    "TrainedNetwork",
    "checkpoint_of",
    "finished",
    "read_checkpoint",
    "read_weights",
    "write_checkpoint",
    "write_weights",
]

_KEY = "synthlong"
_MOST_SAID = 5
_DETECTORS = (SegmentationUNet, SiameseUNet, ConcatUNet)
_NETWORKS: dict[str, type[UNet]] = {"inpainter": UNet, "generator": UNet, **{c.task: c for c in _DETECTORS}}
_FORMATS = dict.fromkeys(_NETWORKS, "synthlong-weights/1") | {"generator": "synthlong-weights/2"}
"""What is read and written; the generator's second one corrects a guess along a smoothed outline (`profile`)."""

_FITTED_BY = {
    "inpainter": "fit inpainter",
    "generator": "fit generator",
    "segmentation": "train segment",
    "siamese": "train pretrain",
    "concat": "train ohem",
}


@dataclass(frozen=True, eq=False)
class TrainedNetwork:
    """A network with its weights, for use.

    Args:
        network: In evaluation mode, on `device`.
        sha256: Of the weights' file.
        precision: "bf16" or "float32".
        device: Torch device.
    """

    task: ClassVar[str]
    network: UNet
    sha256: str
    precision: str = "float32"
    device: str = "cpu"

    @classmethod
    def default_path(cls) -> Path:
        """Return the shipped weights' path."""
        return Path(__file__).parent / "assets" / f"{cls.task}.safetensors"

    @classmethod
    def read(cls, path: str | Path | None = None, *, precision: str = "float32", device: str = "cpu") -> Self:
        """Read weights (default: the shipped ones); see `read_weights`."""
        network, sha256 = read_weights(path or cls.default_path(), task=cls.task)
        return cls(network.to(device), sha256, precision, device)

    def change(self, seen: NDArray) -> NDArray[np.float32]:
        """Return what the network adds to the first guess, shape `(I, J, K)`, from what it sees `(3, I, J, K)`."""
        return infer(self.network, seen, precision=self.precision, device=self.device)[0]


def write_weights(path: Path, network: UNet, *, task: str, card: dict[str, Any]) -> str:
    """Write weights and card; return the weights' SHA-256.

    Args:
        path: `.safetensors` file; the card is written beside it as `.json`.
        network: The trained network.
        task: "inpainter" or "generator", or of a detector the class's `task`.
        card: Plain JSON: data, licence, command, curve, errors.
    """
    tensors = {name: t.detach().cpu().float().contiguous() for name, t in network.state_dict().items()}
    about: dict[str, Any] = {"format": _FORMATS[task], "task": task, "network": network.config.as_dict()}
    if isinstance(network, LongitudinalUNet):
        about["window"] = network.window
    # one metadata key: with several, safetensors' hash order changes the bytes at every save
    data = save(tensors, metadata={_KEY: json.dumps(about, sort_keys=True)})
    sha256 = hashlib.sha256(data).hexdigest()
    publish(path, data)
    text = json.dumps({**about, "sha256": sha256, **card}, indent=1, sort_keys=True) + "\n"
    publish(path.with_suffix(".json"), text.encode())
    return sha256


def checkpoint_of(out: Path) -> Path:
    """Return where the state of a training lies until its weights are written to `out`."""
    return out.with_suffix(".checkpoint")


def write_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write the state of a training: all of it, or what was there before stays."""
    data = BytesIO()
    torch.save(state, data)
    publish(path, data.getvalue())


def read_checkpoint(path: Path, stage: str, settings: dict[str, Any]) -> dict[str, Any] | None:
    """Return what a training has left in its checkpoint, on the CPU; None: there is none.

    Args:
        path: The checkpoint.
        stage: Name of the training, under which it has written.
        settings: What has to be the same to go on.

    Raises:
        InputError: It is damaged, or of another training.
    """
    if not path.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")[stage]
        made = state["settings"]
    except (OSError, EOFError, KeyError, TypeError, RuntimeError, UnpicklingError) as error:
        problem = f"the checkpoint is damaged or of another stage ({type(error).__name__})"
        raise InputError(path, problem, "remove it") from error
    if changed := differing(made, settings):
        raise InputError(path, f"the checkpoint is of another training ({changed})", "remove it")
    return state


def finished(out: Path, settings: dict[str, Any], *, part: str, task: str) -> dict[str, Any] | None:
    """Return the card of weights that are there already, made with the same settings.

    None: there are none, or a checkpoint to go on from.

    Args:
        out: The `.safetensors` file.
        settings: What decides the weights; in the card under `part`, or beside it.
        part: Name of the settings in the card.
        task: What the weights must be for.

    Raises:
        InputError: There are weights or a JSON of another training, or of none, which must not be written over.
    """
    card = out.with_suffix(".json")
    if checkpoint_of(out).exists() or not (out.exists() or card.exists()):
        return None
    way = "choose another name, or remove it"
    try:
        made: dict[str, Any] = json.loads(card.read_bytes())
        done = {**{key: made.get(key) for key in settings}, **made[part]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        found = card if card.exists() else out
        raise InputError(found, "is there already, and this training did not write it", way) from error
    if not out.exists():
        return None
    if changed := differing(done, settings):
        raise InputError(out, f"is there already, of another training ({changed})", way)
    read_weights(out, task=task)
    return made


def differing(made: dict[str, Any], settings: dict[str, Any]) -> str:
    """Return in words which settings differ from those made before, the first of them; "": none."""
    found = differences({key: made.get(key) for key in settings}, settings)
    return "; ".join(found[:_MOST_SAID] + [f"and {len(found) - _MOST_SAID} more"] * (len(found) > _MOST_SAID))


def read_weights(path: str | Path, *, task: str | tuple[str, ...], shipped: bool = True) -> tuple[UNet, str]:
    """Read a network; strict about keys, shapes, dtype, finite values and, beside a card, its SHA-256.

    Args:
        path: `.safetensors` file.
        task: What the weights must be for; several: one of these.
        shipped: Whether the shipped ones are a way out where these cannot be used.

    Returns:
        The network in evaluation mode, and the SHA-256 of its file.

    Raises:
        InputError: Missing, damaged, of another task, or not what its card describes.
    """
    path, tasks = Path(path), (task,) if isinstance(task, str) else task
    way = f"train them with `synthlong {_FITTED_BY[tasks[0]]}`"
    if shipped:
        way += ", or leave the option out for the shipped ones"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(path, f"weights cannot be read ({error.strerror})", way) from error
    sha256 = hashlib.sha256(data).hexdigest()
    try:
        tensors = load(data)
        about = json.loads(_metadata(data)[_KEY])
        config = UNetConfig(**about["network"])
        found = about["task"]
        made = str(about["format"])
        if not made.startswith("synthlong-weights/"):
            raise ValueError(f"format {made}")
        with torch.random.fork_rng(devices=()):  # its first weights are drawn, only to be replaced
            network = _NETWORKS[found](config)
        if isinstance(network, LongitudinalUNet) and "window" in about:
            network.window = int(about["window"])
            if not sees(network.window, config):
                raise ValueError(f"window {network.window}")
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise InputError(path, f"not synthlong weights ({type(error).__name__})", way) from error
    if found not in tasks:
        raise InputError(path, f"weights of the {found}, not of the {' or '.join(tasks)}", way)
    if made != _FORMATS[found]:
        raise InputError(path, f"weights of format {made!a}, this version reads {_FORMATS[found]}", way)
    wanted = network.state_dict()
    if wanted.keys() != tensors.keys():
        odd = sorted(wanted.keys() ^ tensors.keys())
        raise InputError(path, f"its tensors do not fit the network (first: {odd[0]})", way)
    for name, tensor in tensors.items():
        if tensor.shape != wanted[name].shape or tensor.dtype != torch.float32:
            problem = f"{name} is {tensor.dtype} {tuple(tensor.shape)}, not float32 {tuple(wanted[name].shape)}"
            raise InputError(path, problem, way)
        if not torch.isfinite(tensor).all():
            raise InputError(path, f"{name} holds NaN or infinite values", way)
    card = path.with_suffix(".json")
    if card.exists():
        try:
            described = json.loads(card.read_bytes())["sha256"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(card, "not a card of weights", "restore it, or remove it") from error
        if described != sha256:
            raise InputError(path, "differs from the SHA-256 in its card", "restore the file, or remove the card")
    network.load_state_dict(tensors)
    return network.eval(), sha256


def _metadata(data: bytes) -> dict[str, str]:
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size])["__metadata__"]
