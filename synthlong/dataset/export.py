"""Pairs as NIfTI files in BIDS layout, for viewers and for other tools."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import nibabel as nib
import numpy as np

from synthlong.case import BRAIN_MODE
from synthlong.dataset.shards import MASKS, ShardDataset, publish
from synthlong.errors import ConfigError, OutputError
from synthlong.nifti import sidecar_of, write_nifti
from synthlong.pair import Pair
from synthlong.recipe import Recipe

__all__ = ["export_pairs", "write_pair"]

_VERSION = "1.9.0"


def export_pairs(run: Path, out: Path, *, numbers: Iterable[int] | None = None) -> list[Path]:
    """Write pairs of a finished run as NIfTI; return the subjects' folders.

    Args:
        run: Folder that `generate` wrote.
        out: Folder to write.
        numbers: Which pairs; None: all.

    Raises:
        ConfigError: A number that the run does not have.
    """
    dataset = ShardDataset(run)
    chosen = []
    for number in range(len(dataset)) if numbers is None else numbers:
        if not 0 <= number < len(dataset):
            raise ConfigError(f"--pairs: {run.name} has pairs 0..{len(dataset) - 1}, not {number}")
        chosen.append(number)
    folders = []
    for number in chosen:
        sample = dataset[number]
        recipe = Recipe.from_json(sample["recipe"])
        arrays = {k: v[0].numpy() for k, v in sample.items() if k != "recipe"}
        folders.append(write_pair(out, number, Pair(**arrays, affine=recipe.affine, recipe=recipe)))
    return folders


def write_pair(out: Path, number: int, pair: Pair) -> Path:
    """Write one pair: visits under `sub-synNNNN/ses-{1,2}/anat`, masks and recipe under `derivatives`.

    Args:
        out: Root of the BIDS data set.
        number: Of the pair.
        pair: What to write.

    Returns:
        The subject's folder.

    Raises:
        OutputError: Another pair lies there, or `out` is no folder.
    """
    if out.exists() and not out.is_dir():
        raise OutputError(out, "is not a folder", "name a folder")
    subject = f"sub-syn{number:04d}"
    _check_same(out, subject, pair)
    for ses, image in (("1", pair.baseline), ("2", pair.followup)):
        path = _made(out / subject / f"ses-{ses}" / "anat") / f"{subject}_ses-{ses}_FLAIR.nii.gz"
        write_nifti(path, image, pair.affine)
        publish(sidecar_of(path), json.dumps({BRAIN_MODE: 1.0, "SkullStripped": True}).encode() + b"\n")
    derived = _made(out / "derivatives" / "synthlong" / subject)
    for name in MASKS:
        kind = "dseg" if name == "evolution" else "mask"
        label = "".join(word.capitalize() if n else word for n, word in enumerate(name.split("_")))
        path = derived / f"{subject}_space-MNI152_desc-{label}_{kind}.nii.gz"
        write_nifti(path, np.asarray(getattr(pair, name), np.uint8), pair.affine)
    publish(derived / f"{subject}_desc-recipe.json", pair.recipe.to_json().encode() + b"\n")
    _describe(out, "synthlong pairs", "raw")
    _describe(out / "derivatives" / "synthlong", "synthlong truth", "derivative")
    return out / subject


def _check_same(out: Path, subject: str, pair: Pair) -> None:
    """Raise an OutputError if another pair lies there under the same number."""
    recipe = out / "derivatives" / "synthlong" / subject / f"{subject}_desc-recipe.json"
    baseline = out / subject / "ses-1" / "anat" / f"{subject}_ses-1_FLAIR.nii.gz"
    if recipe.exists() and (
        recipe.read_text().strip() != pair.recipe.to_json()
        or (baseline.exists() and nib.load(baseline).shape != pair.baseline.shape)
    ):
        raise OutputError(recipe, "another pair of this number is there", "choose another folder")


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _describe(folder: Path, name: str, kind: str) -> None:
    about = {"Name": name, "BIDSVersion": _VERSION, "DatasetType": kind, "GeneratedBy": [{"Name": "synthlong"}]}
    text = json.dumps(about, indent=1) + "\n"
    path = folder / "dataset_description.json"
    if not path.exists():
        publish(path, text.encode())
