"""Weights on disk: a safetensors file and, beside it, its card.

The card (`NAME.json`) says what the weights were trained on, under which licence, by which command, with
which loss curve and held-out error, and carries the SHA-256 of the weights: safetensors itself accepts NaN,
other dtypes and flipped bits. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from synthlong.errors import InputError
from synthlong.networks import UNet, UNetConfig

__all__ = ["read_weights", "write_weights"]

_KEY = "synthlong"
_FORMAT = "synthlong-weights/1"


def write_weights(path: Path, network: UNet, *, task: str, card: dict[str, Any]) -> str:
    """Write weights and card; return the weights' SHA-256.

    Args:
        path: `.safetensors` file; the card is written beside it as `.json`.
        network: The trained network.
        task: "inpainter" or "generator".
        card: Plain JSON: data, licence, command, curve, errors.
    """
    from synthlong.dataset.shards import publish

    tensors = {name: t.detach().cpu().float().contiguous() for name, t in network.state_dict().items()}
    about = {"format": _FORMAT, "task": task, "network": network.config.as_dict()}
    # one metadata key: with several, safetensors' hash order changes the bytes at every save
    data = save(tensors, metadata={_KEY: json.dumps(about, sort_keys=True)})
    sha256 = hashlib.sha256(data).hexdigest()
    publish(path, data)
    text = json.dumps({**about, "sha256": sha256, **card}, indent=1, sort_keys=True) + "\n"
    publish(path.with_suffix(".json"), text.encode())
    return sha256


def read_weights(path: Path, *, task: str) -> tuple[UNet, str]:
    """Read a network; strict about keys, shapes, dtype, finite values and, beside a card, its SHA-256.

    Args:
        path: `.safetensors` file.
        task: What the weights must be for.

    Returns:
        The network in evaluation mode, and the SHA-256 of its file.

    Raises:
        InputError: Missing, damaged, of another task, or not what its card describes.
    """
    way = f"train them with `synthlong fit {task}`, or leave the option out for the shipped ones"
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
        if about["format"] != _FORMAT:
            raise ValueError(f"format {about['format']}")
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise InputError(path, f"not synthlong weights ({type(error).__name__})", way) from error
    if found != task:
        raise InputError(path, f"weights of the {found}, not of the {task}", way)
    network = UNet(config)
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
