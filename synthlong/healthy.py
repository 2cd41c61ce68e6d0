"""The healthy volume on disk: filled once per case, used only where it would come out the same.

Beside it lies what it was made of: the SHA-256 of the case's files, of the inpainter's weights and of the volume
itself, and what else decides the bits.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from synthlong.case import Case
from synthlong.environment import environment
from synthlong.errors import InputError, InputWarning, short
from synthlong.nifti import read_nifti, sidecar_of, write_nifti
from synthlong.plain import canonical_json
from synthlong.publishing import publish

if TYPE_CHECKING:
    from synthlong.inpainting import Inpainter

__all__ = ["stored_healthy", "write_healthy"]


def write_healthy(path: Path, case: Case, inpainter: Inpainter) -> None:
    """Fill a case's lesions and write the volume with what it was made of.

    Args:
        path: `.nii.gz` file; the record is written beside it as `.json`.
        case: As it is read from its files.
        inpainter: Fills the lesions.
    """
    healthy = inpainter.fill(case.flair, case.lesions)
    write_nifti(path, healthy, case.affine)
    record = {**_made_of(case, inpainter), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    publish(sidecar_of(path), canonical_json(record).encode())


def stored_healthy(case: Case, inpainter: Inpainter) -> NDArray[np.float32] | None:
    """Return a case's stored healthy volume; None, with a warning, if filling again would give another result."""
    path = case.healthy_file
    if path is None:
        return None
    try:
        record = json.loads(sidecar_of(path).read_bytes())
        now = _made_of(case, inpainter)
        other = [key for key in now if record.get(key) != now[key]]
        volume = read_nifti(path)
        if volume.sha256 != record["sha256"] or volume.data.shape != case.shape:
            other.append("sha256")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, InputError):
        other = ["no readable record"]
    if other:
        text = f"{short(path)}: made of something else ({', '.join(other)}); filled again"
        warnings.warn(text, InputWarning, stacklevel=3)
        return None
    return np.ascontiguousarray(volume.data)


def _made_of(case: Case, inpainter: Inpainter) -> dict[str, Any]:
    weights = {"inpainter": inpainter.sha256, "precision": inpainter.precision}
    return {"sources": case.sources, **weights, **environment(inpainter.device)}
