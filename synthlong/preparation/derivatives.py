"""The files that a preparation leaves, named after BIDS derivatives, and what the one beside each FLAIR records.

sub-ID[_ses-N]_space-MNI152_{FLAIR,T1w,desc-brain_mask,desc-lesions_mask,dseg,desc-healthy_FLAIR}.nii.gz
sub-ID[_ses-N]_space-MNI152_desc-newlesions_mask.nii.gz     of a follow-up whose new lesions are known
sub-ID[_ses-N]_from-FLAIR_to-MNI152_mode-image_xfm.txt      maps points of MNI152 to points of the scan
sub-ID[_ses-N]_space-MNI152_FLAIR.json                      the scan's own grid, figures, flags, what it is made of
figures/sub-ID[_ses-N]_desc-registration_FLAIR.png
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

import synthlong
from synthlong.errors import InputError
from synthlong.nifti import sidecar_of
from synthlong.resampling import Grid, Native

__all__ = ["FIGURES", "description", "figure_name", "file_name", "read_native", "read_record", "sha256_of", "way_name"]

FIGURES = "figures"


def file_name(scan: str, what: str, *, space: str = "MNI152") -> str:
    """Return the name of a prepared volume or record, such as `what="desc-brain_mask.nii.gz"`."""
    return f"sub-{scan}_space-{space}_{what}"


def way_name(scan: str, *, space: str = "MNI152") -> str:
    """Return the name of the transform that carries the scan into a space."""
    return f"sub-{scan}_from-FLAIR_to-{space}_mode-image_xfm.txt"


def figure_name(scan: str) -> str:
    """Return the name of a scan's picture."""
    return f"{FIGURES}/sub-{scan}_desc-registration_FLAIR.png"


def description() -> dict[str, Any]:
    """Return `dataset_description.json`."""
    generator = {"Name": "synthlong", "Version": synthlong.__version__}
    name = "Scans prepared for synthlong"
    return {"Name": name, "BIDSVersion": "1.10.0", "DatasetType": "derivative", "GeneratedBy": [generator]}


def read_record(flair: str | Path) -> dict[str, Any] | None:
    """Return what is recorded beside a prepared FLAIR, None if nothing is.

    Raises:
        InputError: The record is damaged.
    """
    flair = Path(flair)
    path = sidecar_of(flair)
    try:
        data = path.read_bytes()
        if "_space-" not in path.name and b'"synthlong"' not in data:  # another tool's, in whatever encoding
            return None
        record = json.loads(data)
        return record if isinstance(record, dict) and "synthlong" in record else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise InputError(path, "is not a readable record", "run `synthlong prepare` again") from error


def read_native(flair: str | Path) -> Native | None:
    """Return where a prepared FLAIR came from, None if it was not prepared.

    Raises:
        InputError: Its record or transform is damaged.
    """
    from synthlong.preparation.ways import read_way

    record = read_record(flair)
    if record is None:
        return None
    try:
        i, j, k = record["native"]["shape"]
        grid = Grid((int(i), int(j), int(k)), np.array(record["native"]["affine"], np.float64).reshape(4, 4))
        name = record["native"]["transform"]
    except (KeyError, ValueError, TypeError) as error:
        raise InputError(flair, "its record lacks the scan's grid", "run `synthlong prepare` again") from error
    return Native(grid, read_way(Path(flair).parent / Path(name).name))


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, "" if it cannot be read."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return ""
