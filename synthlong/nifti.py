"""NIfTI volumes: files that cannot be trusted are read to the last byte, once, or refused.

A file is decompressed piece by piece and never beyond what its header claims, so neither a header that lies
nor a gzip bomb costs memory. nibabel's header classes decode the fields; sizes, checks and scaling are done
here, since nibabel repairs many faults silently and SimpleITK reads over truncation and NaN.

Format: NIfTI-1.1 and NIfTI-2, single file, plain or gzip (https://nifti.nimh.nih.gov).
"""

from __future__ import annotations

import hashlib
import re
import stat
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import nibabel as nib
import numpy as np
from nibabel.quaternions import quat2mat
from nibabel.spatialimages import HeaderDataError
from numpy.typing import ArrayLike, NDArray

from synthlong.errors import ConfigError, InputError
from synthlong.publishing import publish

__all__ = ["TOLERANCE_MM", "Volume", "corner_distance_mm", "read_nifti", "sidecar_of", "write_nifti"]

TOLERANCE_MM = 0.1
"""How far two grids may lie apart at a corner and still be one: headers are rounded."""

_LONGEST_SIDE = 2048
_MOST_VOXELS = 10**9
_MOST_EXTENSION_BYTES = 1 << 26  # between header and voxels
_MOST_PADDING_BYTES = 1 << 16  # zeros after the voxels
_BLOCK, _PIECE = 1 << 16, 1 << 20  # bytes read, and bytes inflated, at a time
_GEOMETRY = (
    *("qform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"),
    *("sform_code", "srow_x", "srow_y", "srow_z", "pixdim", "xyzt_units"),
)
_AGAIN = "copy or export it again"
_CONVERT = "give a single 3-D .nii or .nii.gz file"


@dataclass(frozen=True, eq=False)
class Volume:
    """One 3-D image as read from disk.

    Args:
        data: Voxels after scaling, shape `(I, J, K)`, float32, all finite, Fortran order as stored.
        affine: Voxel index to RAS+ world in mm, shape `(4, 4)`, float64, invertible.
        path: The file.
        sha256: Hex digest of the file's bytes as stored.
        coded: Whether sform or qform is set (code above 0); if not, `affine` is a guess from voxel sizes.
        header: nibabel's header, as stored.
    """

    data: NDArray[np.float32]
    affine: NDArray[np.float64]
    path: Path
    sha256: str
    coded: bool
    header: Any

    @property
    def voxel_mm3(self) -> float:
        """Volume of a voxel."""
        return float(abs(np.linalg.det(self.affine[:3, :3])))


class _Layout(NamedTuple):
    header: Any
    shape: tuple[int, int, int]
    dtype: np.dtype[Any]
    start: int  # of the voxels, in bytes

    @property
    def end(self) -> int:
        return self.start + int(np.prod(self.shape, dtype=object)) * self.dtype.itemsize


def read_nifti(path: str | Path, *, prefer: str | None = None, allow_empty: bool = False) -> Volume:
    """Read one 3-D volume from a single-file NIfTI, plain or gzip (told by content, not by name).

    Axes of length one after the third are dropped. Voxels may be followed by up to 64 KiB of zeros. The
    sform is used where set, else the qform, else nibabel's guess from the voxel sizes (`coded=False`).

    Args:
        path: The file; symbolic links are followed.
        prefer: "sform" or "qform", used if set, and then the two need not agree; None demands that they
            place the grid's corners within 0.1 mm of each other where both are set.
        allow_empty: Accept a constant volume, such as a mask without lesions.

    Raises:
        InputError: The file is missing, unreadable, damaged, or not a usable volume.
        ConfigError: `prefer` is something else.
    """
    if prefer not in (None, "sform", "qform"):
        raise ConfigError(f"prefer must be sform or qform, not {prefer!r}")
    path = Path(path)
    digest = hashlib.sha256()
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            kind = "a folder" if stat.S_ISDIR(mode) else "not a regular file"
            raise InputError(path, f"is {kind}", "give a .nii or .nii.gz file")
        with path.open("rb") as stream:
            layout, content = _read_content(path, stream, digest)
    except FileNotFoundError:
        raise InputError(path, "does not exist", "check the path") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or error
        raise InputError(path, f"cannot be read ({reason})", "check the path and its permissions") from None
    with np.errstate(all="ignore"):
        affine, coded = _affine(path, layout, prefer)
        data = _voxels(path, layout, content)
    if not allow_empty and data.min() == data.max():
        problem = f"is constant (all voxels {data.flat[0]:g})"
        raise InputError(path, problem, "give an image with contrast")
    return Volume(data, affine, path, digest.hexdigest(), coded, layout.header)


def write_nifti(
    path: str | Path, data: NDArray, affine: ArrayLike, *, code: int = 4, like: Volume | None = None
) -> None:
    """Write a volume as NIfTI-1, whole or not at all; equal arguments give equal bytes.

    sform and qform both hold `affine`; one with shear, which a qform cannot hold, goes to the sform only.

    Args:
        path: The file, replaced if it exists; gzip at level 6 if it ends in `.gz`, else plain.
        data: Voxels, shape `(I, J, K)`, float32 or uint8; stored unscaled.
        affine: Voxel index to RAS+ world in mm, shape `(4, 4)`.
        code: NIfTI xform code of both forms, 1 to 5; 4 is MNI152.
        like: Take both forms, codes, voxel sizes and units of this one's header instead, digit by digit.

    Raises:
        OutputError: The place cannot be written to.
        ValueError: `data` has another dtype or number of axes.
    """
    path, data = Path(path), np.asarray(data)
    if data.dtype not in (np.float32, np.uint8) or data.ndim != 3:
        raise ValueError(f"data must be 3-D float32 or uint8, not {data.ndim}-D {data.dtype}")
    header = nib.Nifti1Header(endianness="<")
    header.set_data_shape(data.shape)
    header.set_data_dtype(data.dtype)
    header.set_xyzt_units("mm")
    header.set_slope_inter(1, 0)
    header["vox_offset"] = 352
    header.set_sform(affine, code)
    header.set_qform(affine, code)
    if not corner_distance_mm(data.shape, header.get_sform(), header.get_qform()) <= TOLERANCE_MM:
        header["qform_code"] = 0
    if like is not None:
        for name in _GEOMETRY:
            header[name] = like.header[name]
    voxels = data.astype(data.dtype.newbyteorder("<"), copy=False).tobytes(order="F")
    content = header.binaryblock + bytes(4) + voxels
    if path.name.endswith(".gz"):
        member = zlib.compressobj(6, zlib.DEFLATED, 31)  # zlib's own header: no time, no name
        content = member.compress(content) + member.flush()
    publish(path, content)


def sidecar_of(path: Path) -> Path:
    """Return where the JSON that belongs to a file lies: beside it, under its name."""
    return path.with_name(re.sub(r"\.nii(\.gz)?$", "", path.name, flags=re.IGNORECASE) + ".json")


def _pieces(stream: BinaryIO, digest: Any) -> Iterator[bytes]:
    """Yield a plain or gzip file's content, at most 1 MiB at a time; digest the bytes as stored."""
    member = None
    gzipped = False
    while block := stream.read(_BLOCK):
        digest.update(block)
        if stream.tell() == len(block):
            gzipped = block.startswith(b"\x1f\x8b")
        if not gzipped:
            yield block
            continue
        while block:
            if member is None or member.eof:
                member = zlib.decompressobj(31)
            yield member.decompress(block, _PIECE)
            block = member.unused_data if member.eof else member.unconsumed_tail
    if member is not None and not member.eof:
        raise EOFError


def _read_content(path: Path, stream: BinaryIO, digest: Any) -> tuple[_Layout, bytearray]:
    """Read all that the header claims, and stop as soon as there is more."""
    layout, content = None, bytearray()
    try:
        for piece in _pieces(stream, digest):
            content += piece
            if layout is None and len(content) >= 540:
                layout = _layout(path, bytes(content[:540]))
            if layout is not None and len(content) > layout.end + _MOST_PADDING_BYTES:
                break
    except EOFError:
        raise InputError(path, "is a truncated gzip file", _AGAIN) from None
    except zlib.error:
        raise InputError(path, "is a corrupt gzip file", _AGAIN) from None
    if not content:
        raise InputError(path, "is empty", _AGAIN)
    layout = layout or _layout(path, bytes(content))
    if len(content) < layout.end:
        problem = f"its header claims {layout.end} bytes but {len(content)} are there"
        raise InputError(path, problem, _AGAIN)
    if len(content) > layout.end + _MOST_PADDING_BYTES or any(content[layout.end :]):
        raise InputError(path, f"holds more than the {layout.end} bytes its header claims", _AGAIN)
    return layout, content


def _layout(path: Path, start: bytes) -> _Layout:
    """Decode and check what the header says about sizes, before any of it is believed."""
    header = _header(path, start)
    rank = int(header["dim"][0])
    if not 1 <= rank <= 7:
        raise InputError(path, f"its header claims {rank} dimensions", _AGAIN)
    sides = [int(side) for side in header["dim"][1 : rank + 1]]
    size = " x ".join(map(str, sides))
    if min(sides) <= 0 or max(sides) > _LONGEST_SIDE or np.prod(sides[:3], dtype=object) > _MOST_VOXELS:
        raise InputError(path, f"its header claims {size} voxels", _AGAIN)
    if rank > 3 and max(sides[3:]) > 1:
        count = np.prod(sides[3:], dtype=object)
        raise InputError(path, f"holds {count} volumes ({size})", "give one 3-D volume")
    if rank < 3 or min(sides[:3]) == 1:
        raise InputError(path, f"is not 3-D ({size})", "give one 3-D volume")
    try:
        dtype = header.get_data_dtype()
    except (HeaderDataError, KeyError):
        dtype = np.dtype(np.void)
    if dtype.kind not in "iuf":
        problem = f"its voxels have NIfTI datatype {int(header['datatype'])}"
        raise InputError(path, problem, "convert them to real numbers, such as int16 or float32")
    offset, least = float(header["vox_offset"]), header.single_vox_offset
    if offset and not (least <= offset <= least + _MOST_EXTENSION_BYTES and offset.is_integer()):
        raise InputError(path, f"its header claims that voxels start at byte {offset:g}", _AGAIN)
    return _Layout(header, (sides[0], sides[1], sides[2]), dtype, int(offset) or least)


def _header(path: Path, start: bytes) -> Any:
    """Return nibabel's header of either byte order, neither checked nor repaired."""
    for kind, at in ((nib.Nifti1Header, 344), (nib.Nifti2Header, 4)):
        for order in "<>":
            size = int(kind.sizeof_hdr)
            if len(start) < size or struct.unpack_from(f"{order}i", start)[0] != size:
                continue
            magic = start[at : at + 4]
            if magic == kind.single_magic + b"\0":
                return kind(start[:size], endianness=order, check=False)
            if magic == kind.pair_magic + b"\0":
                raise InputError(path, "is the header of a .hdr/.img pair", _CONVERT)
    if start[128:132] == b"DICM":
        raise InputError(path, "is DICOM, not NIfTI", "convert its series, for example with dcm2niix")
    raise InputError(path, "is not NIfTI", _CONVERT)


def _affine(path: Path, layout: _Layout, prefer: str | None) -> tuple[NDArray[np.float64], bool]:
    """Return the affine to use, and whether the header declares it."""
    header = layout.header
    if int(header["xyzt_units"]) & 7 in (1, 3):
        raise InputError(path, "its header gives lengths in metres or microns", "convert them to mm")
    coded = [form for form in ("sform", "qform") if header[f"{form}_code"] > 0]
    used = [prefer] if prefer in coded else coded
    mend = "correct its header" + (" or pass --prefer sform" if "sform" in coded else "")
    if used != ["sform"] and not all(0 < side < np.inf for side in header["pixdim"][1:4]):
        raise InputError(path, "its voxel sizes (pixdim) are not all positive", mend)
    affines = [header.get_sform() if form == "sform" else _qform(path, header, mend) for form in used]
    affine = np.asarray(affines[0] if affines else header.get_base_affine(), np.float64)
    if len(affines) == 2 and not (off := corner_distance_mm(layout.shape, *affines)) <= TOLERANCE_MM:
        problem = f"its sform and qform disagree by {off:.3g} mm"
        raise InputError(path, problem, "pass --prefer sform or --prefer qform, or correct its header")
    sides = np.linalg.norm(affine[:3, :3], axis=0)
    if not (np.isfinite(affine).all() and np.all((sides > 1e-3) & (sides < 1e3))):
        raise InputError(path, "its affine is not finite or has no plausible voxel size", "correct its header")
    if abs(np.linalg.det(affine[:3, :3] / sides)) < 1e-3:
        raise InputError(path, "its affine is singular", "correct its header")
    return affine, bool(coded)


def _qform(path: Path, header: Any, mend: str) -> NDArray[np.float64]:
    """Return the qform as nifti1_io.c does: a rotation within rounding of 180 degrees is taken as 180."""
    bcd = np.array([header[f"quatern_{axis}"] for axis in "bcd"], np.float64)
    rest = 1 - float(bcd @ bcd)
    flip = float(header["pixdim"][0])
    if not (rest > -1e-5 and np.isfinite(flip)):
        raise InputError(path, "its qform is not a rotation", mend)
    sides = np.asarray(header["pixdim"][1:4], np.float64) * (1, 1, -1 if flip < 0 else 1)
    affine = np.eye(4)
    affine[:3, :3] = quat2mat([np.sqrt(rest) if rest > 1e-7 else 0.0, *bcd]) * sides
    affine[:3, 3] = [header[f"qoffset_{axis}"] for axis in "xyz"]
    return affine


def corner_distance_mm(shape: tuple[int, ...], one: NDArray, other: NDArray) -> float:
    """Return how far apart two affines put a grid's corner at most."""
    corners = np.indices((2, 2, 2)).reshape(3, 8) * (np.array(shape)[:, None] - 1)
    apart = np.asarray(one - other, np.float64)
    return float(np.linalg.norm(apart[:3, :3] @ corners + apart[:3, 3:], axis=0).max())


def _voxels(path: Path, layout: _Layout, content: bytearray) -> NDArray[np.float32]:
    """Scale voxels in float64, slice by slice, and demand finite float32."""
    slope, inter = float(layout.header["scl_slope"]), float(layout.header["scl_inter"])
    if slope == 0 or np.isnan(slope):  # NIfTI: not scaled; nibabel and ITK read NaN so, too
        slope, inter = 1.0, 0.0
    if not (np.isfinite(slope) and np.isfinite(inter)):
        raise InputError(path, f"its scaling is not finite ({slope:g}, {inter:g})", "correct its header")
    count = int(np.prod(layout.shape))
    stored = np.frombuffer(content, layout.dtype, count, layout.start).reshape(layout.shape, order="F")
    data = np.empty(layout.shape, np.float32, order="F")
    bad = 0
    for k in range(layout.shape[2]):
        plain = slope == 1 and inter == 0
        data[..., k] = stored[..., k] if plain else stored[..., k].astype(np.float64) * slope + inter
        bad += data[..., k].size - int(np.count_nonzero(np.isfinite(data[..., k])))
    if bad:
        raise InputError(path, f"holds {bad} NaN or infinite voxels", "replace them, for example by 0")
    return data
