"""A page of pictures: real lesions and made ones, axial slices through their middle, one scale for all."""

from __future__ import annotations

import numpy as np

from synthlong.pictures import data_uri, gray_pixels, upright

from .material import SIDE, Patch

__all__ = ["page_of", "quiz_of"]

_ZOOM = 4


def page_of(title: str, tables: str, groups: dict[str, list[Patch]], count: int = 24) -> str:
    """Return an HTML page: the tables, then some patches of each group, chosen evenly."""
    parts = [f"<pre>{tables}</pre>"]
    for name, patches in groups.items():
        chosen = [patches[n] for n in np.linspace(0, len(patches) - 1, min(count, len(patches))).astype(int)]
        parts.append(f"<h2>{name}</h2><p>{''.join(_image(p) for p in chosen)}</p>")
    return _html(title, parts)


def quiz_of(real: list[Patch], made: list[Patch], count: int = 50, seed: int = 0) -> tuple[str, list[str]]:
    """Return a page of real and made lesions, mixed without labels, and the answers."""
    rng = np.random.default_rng(seed)
    half = min(count // 2, len(real), len(made))
    chosen = [("real", real[n]) for n in rng.permutation(len(real))[:half]]
    chosen += [("made", made[n]) for n in rng.permutation(len(made))[:half]]
    chosen = [chosen[n] for n in rng.permutation(len(chosen))]
    cells = [f"<figure>{_image(p)}<figcaption>{n}</figcaption></figure>" for n, (_, p) in enumerate(chosen, start=1)]
    return _html("Which are real?", cells), [kind for kind, _ in chosen]


def _image(patch: Patch) -> str:
    plane = upright(patch.image[:, :, SIDE // 2])
    pixels = np.kron(gray_pixels(plane), np.ones((_ZOOM, _ZOOM), np.uint8))
    return f'<img src="{data_uri(pixels)}" title="{patch.patient} {patch.centre}">'


def _html(title: str, parts: list[str]) -> str:
    style = (
        "body{background:#111;color:#ddd;font:14px sans-serif}img{margin:2px}figure{display:inline-block;margin:4px}"
    )
    return f"<!doctype html><meta charset=utf-8><title>{title}</title><style>{style}</style>{''.join(parts)}"
