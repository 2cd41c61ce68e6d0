"""A bank of real lesion shapes with their places in MNI space, and profiles of real lesions."""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from synthlong.case import Case
from synthlong.errors import ConfigError, InputError
from synthlong.lesions import SMALLEST_EVENT_MM3, TOUCHING, find_lesions
from synthlong.profile import profiles_in, typical, visible
from synthlong.publishing import publish

__all__ = [
    "LesionBank",
    "Shape",
    "build_bank",
    "distinct",
    "read_bank",
    "shape_of",
    "shapes_in",
    "write_bank",
]

_LARGEST_MM3 = 3000.0
_WIDEST = 40
_FULL = 0.15
_FIELDS = ("extents", "centres_mm", "volumes_mm3", "bits", "ends", "profiles")


@dataclass(frozen=True, eq=False)
class Shape:
    """One lesion shape of the bank.

    Args:
        voxels: bool `(i, j, k)` at 1 mm, RAS+, cropped to the lesion.
        centre_mm: Where it was found, MNI coordinates.
    """

    voxels: NDArray[np.bool_]
    centre_mm: tuple[float, float, float]

    def mirrored(self) -> Shape:
        """Return the shape of the other hemisphere."""
        x, y, z = self.centre_mm
        return Shape(self.voxels[::-1], (-x, y, z))


@dataclass(frozen=True, eq=False)
class LesionBank:
    """Real lesion shapes with their places in MNI space, stored as packed bits.

    Args:
        extents: int16 `(n, 3)`, side lengths of each shape's box.
        centres_mm: float32 `(n, 3)`, MNI coordinates.
        volumes_mm3: int32 `(n,)`.
        bits: uint8, the packed boxes in C order, one after the other.
        ends: int64 `(n,)`, end of each in `bits`.
        profiles: float32 `(m, 11)`, see `profiles_in`: of lesions of the scans that the bank was built from, for cases
            with too few lesions of their own.
    """

    extents: NDArray[np.int16]
    centres_mm: NDArray[np.float32]
    volumes_mm3: NDArray[np.int32]
    bits: NDArray[np.uint8]
    ends: NDArray[np.int64]
    profiles: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> Shape:
        if not 0 <= index < len(self):
            raise IndexError(f"shape {index} of a lesion bank of {len(self)}")
        start = int(self.ends[index - 1]) if index else 0
        sides = tuple(int(n) for n in self.extents[index])
        flat = np.unpackbits(self.bits[start : int(self.ends[index])])[: int(np.prod(sides))]
        x, y, z = (float(c) for c in self.centres_mm[index])
        return Shape(flat.astype(bool).reshape(sides), (x, y, z))

    @classmethod
    def from_shapes(cls, shapes: Sequence[Shape], profiles: NDArray[np.float32] | None = None) -> LesionBank:
        """Pack shapes."""
        packed = [np.packbits(s.voxels) for s in shapes]
        return cls(
            extents=np.array([s.voxels.shape for s in shapes], np.int16).reshape(-1, 3),
            centres_mm=np.array([s.centre_mm for s in shapes], np.float32).reshape(-1, 3),
            volumes_mm3=np.array([s.voxels.sum() for s in shapes], np.int32),
            bits=np.concatenate(packed) if packed else np.zeros(0, np.uint8),
            ends=np.cumsum([len(p) for p in packed], dtype=np.int64),
            profiles=np.zeros((0, 11), np.float32) if profiles is None else profiles,
        )

    @cached_property
    def log_volumes(self) -> NDArray[np.float64]:
        """Natural logarithm of the volumes."""
        return np.log(self.volumes_mm3.astype(np.float64))

    @staticmethod
    def default_path() -> Path:
        """Return the shipped bank's path."""
        return Path(__file__).parent / "assets" / "lesion_bank.npz"


def read_bank(path: str | Path | None = None) -> LesionBank:
    """Read a lesion bank (default: the shipped one), once as long as its file is the same.

    Raises:
        InputError: Not a lesion bank.
    """
    path = Path(path or LesionBank.default_path())
    stat = path.stat() if path.exists() else None
    return _read_bank(path, (stat.st_mtime_ns, stat.st_size) if stat else None)


@lru_cache(maxsize=4)
def _read_bank(path: Path, _version: tuple[int, int] | None) -> LesionBank:
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as stored:
            bank = LesionBank(**{name: stored[name] for name in _FIELDS})
        bytes_of = -(-bank.extents.astype(np.int64).prod(axis=1) // 8)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(path, f"not a lesion bank ({type(error).__name__})", "build one anew") from error
    if not len(bank) or not np.array_equal(np.cumsum(bytes_of), bank.ends) or bank.ends[-1] != bank.bits.size:
        raise InputError(path, "the lesion bank's tables disagree", "build one anew")
    return bank


def build_bank(cases: Iterable[Case]) -> LesionBank:
    """Return the bank of the lesions of cases: shapes by `shape_of`, each once, and profiles of typical ones.

    Args:
        cases: Scans with lesion masks, such as `manifest.read_cases` yields.

    Raises:
        ConfigError: The cases have no such lesion, or none that can be told from the tissue around it.
    """
    shapes: list[Shape] = []
    profiles = []
    for case in cases:
        shapes += shapes_in(case.lesions, case.affine)
        lesions = find_lesions(case.lesions, max_event_mm3=_LARGEST_MM3)
        profiles.append(profiles_in(case.flair, lesions)[typical(lesions)])
    if not shapes or not len(visible(np.concatenate(profiles))):
        raise ConfigError("a lesion bank needs lesions over 3 mm3, apart and brighter than tissue; pass more cases")
    return LesionBank.from_shapes(distinct(shapes), np.concatenate(profiles))


def write_bank(bank: LesionBank, out: Path) -> None:
    """Write a bank as `.npz`; use it as `lesion_bank` in a config.

    Raises:
        OutputError: The place cannot be written to.
    """
    file = io.BytesIO()
    np.savez_compressed(file, allow_pickle=False, **{name: getattr(bank, name) for name in _FIELDS})
    publish(out, file.getvalue())


def shapes_in(mask: NDArray, affine: NDArray[np.float64]) -> list[Shape]:
    """Return the shapes of a mask's 26-connected lesions that a bank can hold; see `shape_of`.

    Args:
        mask: Lesion voxels, shape `(I, J, K)`, 1 mm, RAS+.
        affine: Voxel to MNI millimetres.
    """
    labels, _ = ndimage.label(np.asarray(mask) != 0, TOUCHING)
    boxes = enumerate(ndimage.find_objects(labels), start=1)
    found = (shape_of(labels[box] == number, np.array([s.start for s in box]), affine) for number, box in boxes)
    return [shape for shape in found if shape is not None]


def shape_of(voxels: NDArray[np.bool_], first: NDArray[np.int64], affine: NDArray[np.float64]) -> Shape | None:
    """Return a lesion's shape, None if a bank does not hold such.

    Left out: 3 mm3 or less, more than 3,000 mm3, wider than 40 voxels, and what fills under 15 % of its box (sheets and
    strings left by registration).

    Args:
        voxels: The lesion in its bounding box.
        first: First voxel of the box.
        affine: Voxel to MNI millimetres.
    """
    if not SMALLEST_EVENT_MM3 < voxels.sum() <= _LARGEST_MM3 or max(voxels.shape) > _WIDEST or voxels.mean() < _FULL:
        return None
    centre = affine[:3, :3] @ (np.argwhere(voxels).mean(axis=0) + first) + affine[:3, 3]
    return Shape(voxels, (float(centre[0]), float(centre[1]), float(centre[2])))


def distinct(shapes: Iterable[Shape]) -> list[Shape]:
    """Return each shape at its place once."""
    return list({(s.centre_mm, s.voxels.tobytes()): s for s in shapes}.values())
