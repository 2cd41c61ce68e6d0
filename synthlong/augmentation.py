"""One artifact on one NIfTI file, or a sheet with all of them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from html import escape
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import synthlong.artifacts as library
from synthlong.artifacts.base import RandomArtifact, axial_axis, spacing_of
from synthlong.case import MOST_NEGATIVE, background_of, mode_of
from synthlong.errors import ConfigError, InputError
from synthlong.nifti import Volume, read_nifti, write_nifti
from synthlong.pictures import Picture, data_uri, gray_pixels, png_bytes, upright
from synthlong.publishing import publish

__all__ = ["ARTIFACTS", "augment", "contact_sheet", "setting_of"]

ARTIFACTS: dict[str, type[RandomArtifact]] = {
    "blur": library.RandomGaussianBlur,
    "unsharp": library.RandomUnsharpMask,
    "slice-thickness": library.RandomSliceThickness,
    "downsampling": library.RandomAnisotropicDownsampling,
    "noise": library.RandomGaussianNoise,
    "bias-field": library.RandomPolynomialBiasField,
    "motion": library.RandomKSpaceMotion,
    "spike": library.RandomKSpaceSpike,
    "ghosting": library.RandomKSpaceGhosting,
    "acquisition": library.RandomAcquisition,
}
"""Name on the command line -> transform."""

_ROUNDS = 20
_CORNER = 3
_COLUMNS = 4


def augment(
    scan: Path,
    out: Path,
    artifact: str,
    *,
    seed: int = 0,
    settings: dict[str, Any] | None = None,
    prefer: str | None = None,
) -> dict[str, Any]:
    """Write a scan with one artifact: float32, with the header's geometry kept digit by digit.

    Intensities are divided by the scan's mode first and multiplied by it again, so that a noise's SD means the same
    on every scan. Where a corner of the grid is empty, as around a skull-stripped brain or in a box that reaches
    beyond one, the background is made even again.

    Args:
        scan: NIfTI file, 3-D.
        out: NIfTI file to write.
        artifact: One of `ARTIFACTS`.
        seed: Of what is drawn.
        settings: Arguments of the transform.
        prefer: "sform" or "qform" where the file's two disagree.

    Returns:
        The parameters drawn, plain JSON.

    Raises:
        InputError: The scan cannot be used.
        ConfigError: An unknown artifact or argument, or a value outside its range.
        OutputError: The place cannot be written to.
    """
    if not out.name.endswith((".nii", ".nii.gz")):
        raise ConfigError(f"{out.name}: give an output that ends in .nii.gz or .nii")
    if out.resolve() == scan.resolve():
        raise ConfigError(f"{out.name}: is the scan itself; choose another name")
    transform = _built(artifact, settings or {})
    volume = read_nifti(scan, prefer=prefer)
    unit = _unit_of(volume)
    params = transform.draw_params(np.random.default_rng(np.random.SeedSequence(seed)))
    changed = _applied(transform, params, volume, unit) * unit
    empty = volume.data == background_of(volume)
    if any(empty[corner].all() for corner in product(*[(slice(_CORNER), slice(-_CORNER, None))] * 3)):
        changed = np.where(empty, volume.data, changed)
    write_nifti(out, changed.astype(np.float32, copy=False), volume.affine, like=volume)
    return params


def contact_sheet(scan: Path, out: Path, *, seed: int = 0, prefer: str | None = None) -> list[str]:
    """Write a picture of the scan's middle slice with each artifact: `.png`, or `.html` with captions.

    Args:
        scan: NIfTI file, 3-D.
        out: File to write.
        seed: Of what is drawn.
        prefer: "sform" or "qform" where the file's two disagree.

    Returns:
        The caption of each picture, row by row, four a row.

    Raises:
        InputError: The scan cannot be used.
        ConfigError: `out` is neither kind of file.
        OutputError: The place cannot be written to.
    """
    if out.suffix not in (".png", ".html"):
        raise ConfigError(f"{out.name}: the sheet of all artifacts needs an output that ends in .html or .png")
    shown = list(_pictures(read_nifti(scan, prefer=prefer), seed))
    if out.suffix == ".html":
        page = _page(scan.name, shown).encode()
    else:
        blank = np.zeros_like(shown[0][1])
        cells = [picture for _, picture in shown] + [blank] * (-len(shown) % _COLUMNS)
        rows = [np.hstack(cells[n : n + _COLUMNS]) for n in range(0, len(cells), _COLUMNS)]
        page = png_bytes(np.vstack(rows))
    publish(out, page)
    return [caption for caption, _ in shown]


def setting_of(text: str) -> tuple[str, Any]:
    """Return name and value of `key=value`; the value is a number, several with commas, a word, or true, false, none.

    Raises:
        ConfigError: Something else.
    """
    key, equals, value = text.partition("=")
    if not (equals and key and value):
        raise ConfigError(f"--set {text}: give key=value, such as degrees=5 or std=0.5,1.75")
    values = [_value_of(part.strip()) for part in value.split(",")]
    return key.strip().replace("-", "_"), values[0] if len(values) == 1 else tuple(values)


def _value_of(text: str) -> Any:
    words = {"true": True, "false": False, "none": None}
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return words.get(text.lower(), text)


def _built(artifact: str, settings: dict[str, Any]) -> RandomArtifact:
    """Build the transform, refusing arguments that it does not have."""
    if artifact not in ARTIFACTS:
        raise ConfigError(f"--artifact {artifact}: must be one of {', '.join(ARTIFACTS)}, all")
    make = ARTIFACTS[artifact]
    known = [name for name in inspect.signature(make).parameters if name not in ("kwargs", "artifacts")]
    for key in settings:
        if key not in known:
            raise ConfigError(f"--set {key}: {artifact} has {', '.join(known)}")
    try:
        return make(**settings)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"--set {error}") from error


def _unit_of(volume: Volume) -> float:
    """Return the mode of the scan's tissue: of what is brighter than air, and than fluid in a stripped brain.

    The bound lies halfway between the means of what is darker and what is brighter (Ridler and Calvard 1978, doi
    10.1109/TSMC.1978.4310039); an even background has no say.
    """
    tissue = volume.data[volume.data != background_of(volume)]
    if (negative := float((tissue < 0).mean())) > MOST_NEGATIVE:
        problem = f"{negative:.0%} of its voxels are negative: its intensities have no zero to scale by"
        raise InputError(volume.path, problem, "give the scan as it was before z-scoring")
    bound = tissue.mean(dtype=np.float64)
    for _ in range(_ROUNDS):
        bright = tissue > bound
        if not bright.any():
            break
        before, bound = bound, (tissue[~bright].mean(dtype=np.float64) + tissue[bright].mean(dtype=np.float64)) / 2
        if bound == before:
            break
    bright = tissue > bound
    unit = mode_of(tissue[bright] if bright.any() else tissue)
    if not unit > 0:
        problem = f"its most frequent intensity is {unit:.3g}, which cannot serve as unit"
        raise InputError(volume.path, problem, "give a scan that is not z-scored")
    return unit


def _applied(transform: RandomArtifact, params: dict[str, Any], volume: Volume, unit: float) -> NDArray[np.float32]:
    x = torch.from_numpy(np.ascontiguousarray(volume.data) / np.float32(unit))
    return transform.final.kernel(x, **transform.final.on_grid(params, volume.affine)).numpy()


def _pictures(volume: Volume, seed: int) -> Iterator[tuple[str, Picture]]:
    """Yield caption and slice: of the scan itself, then with each artifact."""
    unit, axis = _unit_of(volume), axial_axis(volume.affine)
    inside = np.flatnonzero((volume.data > 0.5 * unit).any(axis=tuple(a for a in range(3) if a != axis)))
    middle = int(np.median(inside))
    sides = np.delete(spacing_of(volume.affine), axis)
    pixels = np.maximum(np.rint(sides / sides.min() * max(1, 440 // max(volume.data.shape))), 1).astype(int)

    def cut(voxels: NDArray[np.float32]) -> Picture:
        plane = np.moveaxis(voxels, axis, 0)[middle]
        return upright(gray_pixels(plane).repeat(pixels[0], axis=0).repeat(pixels[1], axis=1))

    yield "no artifact", cut(np.divide(volume.data, unit))
    for number, name in enumerate(ARTIFACTS):
        transform = ARTIFACTS[name]() if name != "acquisition" else library.RandomAcquisition("kamraoui")
        params = transform.draw_params(np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(number,))))
        said = ", ".join(f"{key} {_said(value)}" for key, value in params.items() if key != "seed")
        yield f"{name}: {said}", cut(_applied(transform, params, volume, unit))


def _said(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "(" + ", ".join(_said(v) for v in value) + ")" if len(value) <= 6 else f"({len(value)} numbers)"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_said(v)}" for key, v in value.items())
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _page(name: str, shown: list[tuple[str, Picture]]) -> str:
    figures = "".join(
        f'<figure><img src="{data_uri(picture)}"><figcaption>{escape(caption)}</figcaption></figure>\n'
        for caption, picture in shown
    )
    style = (
        "body{background:#111;color:#ddd;font:14px system-ui}main{display:flex;flex-wrap:wrap;gap:12px}"
        "figure{margin:0;width:300px}img{width:100%}figcaption{padding:4px 0 12px;overflow-wrap:anywhere}"
    )
    return (
        f'<!doctype html><meta charset="utf-8"><title>Artifacts on {escape(name)}</title><style>{style}</style>'
        f"<h1>Artifacts on {escape(name)}</h1><main>{figures}</main>"
    )
