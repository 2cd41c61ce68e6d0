"""Pictures of a pair: slices as gray or colour pixels, and as PNG without an imaging library."""

from __future__ import annotations

import base64
import struct
import zlib

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from synthlong.pair import ENLARGED, NEW, SHRUNK, STABLE, VANISHED

__all__ = [
    "COLOURS",
    "DIFFERENCE_STOPS",
    "DIFFERENCE_TOP",
    "GRAY_TOP",
    "Picture",
    "data_uri",
    "gray_pixels",
    "panels",
    "png_bytes",
    "rgb",
    "upright",
]

COLOURS = {
    STABLE: "#57b894",
    NEW: "#ff4f4f",
    VANISHED: "#4aa3ff",
    ENLARGED: "#ffb020",
    SHRUNK: "#b97bff",
}
"""Colour of each code of `evolution`."""

GRAY_TOP, DIFFERENCE_TOP = 2.0, 0.5
DIFFERENCE_STOPS = np.array([[176, 232, 255], [28, 112, 226], [24, 24, 29], [228, 92, 32], [255, 226, 138]], np.float64)

Picture = NDArray[np.uint8]


def png_bytes(pixels: Picture) -> bytes:
    """Return gray `(rows, columns)` or colour `(rows, columns, 3)` pixels as a PNG file."""
    rows, columns = pixels.shape[:2]
    flat = pixels.reshape(rows, -1)
    above = np.vstack([np.zeros_like(flat[:1]), flat[:-1]])
    filtered = np.hstack([np.full((rows, 1), 2, np.uint8), flat - above])  # filter 2: minus the pixel above
    head = struct.pack(">IIBBBBB", columns, rows, 8, 2 if pixels.ndim == 3 else 0, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(filtered.tobytes(), 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    )


def data_uri(pixels: Picture) -> str:
    """Return pixels as the source of an image in HTML; see `png_bytes`."""
    return "data:image/png;base64," + base64.b64encode(png_bytes(pixels)).decode()


def rgb(code: int) -> tuple[int, int, int]:
    """Return the colour of a kind of change as red, green and blue, 0 to 255."""
    red, green, blue = bytes.fromhex(COLOURS[code][1:])
    return red, green, blue


def upright(plane: NDArray) -> NDArray:
    """Return a slice as rows and columns: its first axis to the right, its second one upwards."""
    return plane.swapaxes(0, 1)[::-1]


def gray_pixels(plane: NDArray) -> Picture:
    """Return intensities 0 to 2 (brain mode 1) as gray."""
    return np.rint(np.clip(plane / GRAY_TOP, 0, 1) * 255).astype(np.uint8)


def _diverging(plane: NDArray) -> Picture:
    at, stops = np.clip(plane / DIFFERENCE_TOP, -1, 1), np.linspace(-1, 1, len(DIFFERENCE_STOPS))
    return np.stack([np.rint(np.interp(at, stops, c)) for c in DIFFERENCE_STOPS.T], axis=-1).astype(np.uint8)


def _outlined(gray: Picture, evolution: Picture) -> Picture:
    """Return a gray picture in colour with a line just outside each kind of lesion, new ones on top."""
    colour = np.repeat(gray[..., None], 3, axis=2)
    for code in (STABLE, SHRUNK, ENLARGED, VANISHED, NEW):
        mask = evolution == code
        edge = ndimage.binary_dilation(mask, np.ones((3, 3), bool)) & ~ndimage.binary_erosion(mask, border_value=1)
        colour[edge] = rgb(code)
    return colour


def panels(baseline: NDArray, followup: NDArray, evolution: Picture, *, side: int = 256) -> dict[str, Picture]:
    """Return four pictures of one slice by name, each voxel a square of whole pixels.

    Args:
        baseline: Upright slice `(rows, columns)` of the first visit.
        followup: Of the second.
        evolution: Of the codes.
        side: The pictures are at most this high, and at least one pixel a voxel.
    """
    zoom = np.ones((max(1, side // len(baseline)),) * 2, np.uint8)
    gray, codes = np.kron(gray_pixels(followup), zoom), np.kron(evolution, zoom)
    return {
        "baseline": np.kron(gray_pixels(baseline), zoom),
        "follow-up": gray,
        "difference": np.kron(_diverging(followup - baseline), zoom[..., None]),
        "follow-up, outlined": _outlined(gray, codes),
    }
