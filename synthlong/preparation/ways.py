"""Ways between spaces: 4x4 matrices in RAS+ mm, read and written as ITK's transforms, and the middle of several.

A way from A to B maps points of A to points of B. Format: ITK's text transforms, and the binary `.mat` that ANTs
writes (MATLAB 4).
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import linalg
from scipy.io import loadmat
from scipy.spatial.transform import Rotation

from synthlong.errors import InputError

__all__ = ["middle_of", "read_way", "way_of", "way_text"]

_AFFINE = ("AffineTransform", "MatrixOffsetTransformBase")
_RIGID = ("Euler3DTransform", "VersorRigid3DTransform")
_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


def way_of(parameters: NDArray, centre: NDArray) -> NDArray[np.float64]:
    """Return the way that ITK's twelve parameters and centre of rotation describe, `(4, 4)`."""
    way = np.eye(4)
    way[:3, :3] = np.reshape(parameters[:9], (3, 3))
    way[:3, 3] = parameters[9:12] + centre - way[:3, :3] @ centre
    return _LPS @ way @ _LPS


def way_text(way: NDArray) -> str:
    """Return a way as ITK's text transform; its numbers read back exactly."""
    lps = _LPS @ way @ _LPS
    numbers = [float(n) for n in (*lps[:3, :3].ravel(), *lps[:3, 3])]
    return (
        "#Insight Transform File V1.0\n#Transform 0\nTransform: AffineTransform_double_3_3\n"
        f"Parameters: {' '.join(map(repr, numbers))}\nFixedParameters: 0 0 0\n"
    )


def read_way(path: str | Path) -> NDArray[np.float64]:
    """Read a linear transform, `(4, 4)`.

    Raises:
        InputError: Missing, not one linear ITK transform, or it cannot be inverted.
    """
    path = Path(path)
    give = "give one ITK affine or rigid transform, .txt or ANTs' .mat"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(path, f"cannot be read ({error.strerror})", "check the path") from error
    try:
        kind, parameters, centre = _text(data) if data.startswith(b"#Insight") else _matlab(data)
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(path, "is not an ITK transform", give) from error
    name = kind.split("_")[0]
    if name in _RIGID and parameters.size == 6:
        parameters, centre = _as_affine(name, parameters, centre), centre[:3]
    elif name not in _AFFINE or parameters.size != 12:
        raise InputError(path, f"holds a {kind[:60]!a}", give)
    if centre.size != 3:
        raise InputError(path, f"holds a {kind[:60]!a} without its centre", give)
    with np.errstate(all="ignore"):
        way = way_of(parameters, centre)
        good = np.isfinite(way).all() and 1e-6 < abs(np.linalg.det(way[:3, :3])) < np.inf
    if not good:
        raise InputError(path, "its transform cannot be inverted", give)
    return way


def _as_affine(name: str, parameters: NDArray, centre: NDArray) -> NDArray[np.float64]:
    """Return the twelve parameters of a rigid transform: three angles or the part of a unit quaternion, and a shift."""
    if name == "VersorRigid3DTransform":
        rest = np.sqrt(max(0.0, 1 - float(parameters[:3] @ parameters[:3])))
        rotation = Rotation.from_quat([*parameters[:3], rest])
    else:
        x, y, z = parameters[:3]
        about_z_last = centre.size > 3 and centre[3] != 0  # ITK's flag ComputeZYX
        rotation = Rotation.from_euler("ZYX", [z, y, x]) if about_z_last else Rotation.from_euler("ZXY", [z, x, y])
    return np.concatenate([rotation.as_matrix().ravel(), parameters[3:]])


def _text(data: bytes) -> tuple[str, NDArray, NDArray]:
    lines = dict(line.split(": ", 1) for line in data.decode().splitlines() if ": " in line)
    if data.count(b"Transform: ") != 1:
        return "list of several transforms", np.empty(0), np.empty(0)
    numbers = [np.array(lines[key].split(), float) for key in ("Parameters", "FixedParameters")]
    return lines["Transform"].strip(), numbers[0], numbers[1]


def _matlab(data: bytes) -> tuple[str, NDArray, NDArray]:
    try:
        held = {k: v for k, v in loadmat(io.BytesIO(data)).items() if not k.startswith("__")}
    except Exception as error:  # loadmat's own, IndexError, ...: whatever it stumbles on
        raise ValueError("not a MATLAB file") from error
    centre = np.ravel(held.pop("fixed")).astype(float)
    (kind, parameters), *_ = held.items()
    return kind, np.ravel(parameters).astype(float), centre


def middle_of(ways: list[NDArray]) -> list[NDArray[np.float64]]:
    """Return the ways from the middle of several visits to each of them.

    The middle is the mean of the ways' matrix logarithms: for two visits halfway, so that each is moved alike
    (Reuter et al. 2012, doi 10.1016/j.neuroimage.2012.02.084).

    Args:
        ways: From the first visit to each, the first of them the identity; rigid or nearly so.
    """
    logs = [np.real(linalg.logm(way)) for way in ways]
    from_middle = linalg.inv(linalg.expm(np.mean(logs, axis=0)))
    return [way @ from_middle for way in ways]
