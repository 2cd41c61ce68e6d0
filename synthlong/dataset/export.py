"""Pairs as NIfTI files in BIDS layout, for viewers and for other tools.

DIR/sub-synNNNN/ses-{1,2}/anat/sub-synNNNN_ses-{1,2}_FLAIR.{nii.gz,json}
DIR/{README,participants.{tsv,json}}           whose scan each pair was made from
DIR/derivatives/synthlong/sub-synNNNN/sub-synNNNN_recipe.json
DIR/derivatives/synthlong/sub-synNNNN/ses-{1,2}/anat/sub-synNNNN_ses-{1,2}_space-MNI152_desc-*_{mask,dseg}.nii.gz
                                           .../ses-2/anat/..._desc-evolution_dseg.json    which run made the pair
DIR/derivatives/synthlong/desc-evolution_dseg.tsv                                         what its labels mean
DIR/derivatives/synthlong/space-MNI152_{mask,dseg}.json                                   which space that is
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from synthlong.case import BRAIN_MODE, patient_of
from synthlong.dataset.index import Index
from synthlong.dataset.shards import ShardDataset
from synthlong.errors import ConfigError, OutputError, name_of
from synthlong.nifti import sidecar_of, write_nifti
from synthlong.pair import ENLARGED, NEW, SHRUNK, STABLE, VANISHED, Pair
from synthlong.preparation.derivatives import description
from synthlong.progress import Progress
from synthlong.publishing import publish
from synthlong.recipe import Recipe

__all__ = ["export_pairs", "write_pair"]

_MASKS = {
    "new_lesions": ("2", "desc-newLesions_mask"),
    "evolution": ("2", "desc-evolution_dseg"),
    "lesions_baseline": ("1", "desc-lesionsBaseline_mask"),
    "lesions_followup": ("2", "desc-lesionsFollowup_mask"),
}
_LABELS = {STABLE: "stable", NEW: "new", VANISHED: "vanished", ENLARGED: "enlarged part", SHRUNK: "shrunk part"}
_COLUMNS = "participant_id\tsource_subject\tsource_case\n"
_README = """Pairs of visits with exactly known changes, made by synthlong from real scans.

`sub-synNNNN` is pair NNNN of a run: `ses-1` the baseline, `ses-2` the follow-up. Masks, labels and each pair's recipe
are in `derivatives/synthlong`. Several pairs are of one patient: make folds by `source_subject` in `participants.tsv`.
"""
_PARTICIPANTS = {
    "participant_id": {"Description": "pair of the run"},
    "source_subject": {"Description": "patient whose scan the pair was made from"},
    "source_case": {"Description": "that scan: the patient, and the visit where there are several"},
}
_SPACE = {"SpatialReference": "https://nist.mni.mcgill.ca/icbm-152-nonlinear-atlases-2009/"}


def export_pairs(
    run: Path,
    out: Path,
    *,
    numbers: Iterable[int] | None = None,
    progress: Progress | None = None,
) -> list[Path]:
    """Write pairs of a finished run as NIfTI; return the subjects' folders.

    Args:
        run: Folder that `generate` wrote.
        out: Folder to write.
        numbers: Which pairs, each written once; None: all.
        progress: Called as ("pairs", done, total).

    Raises:
        ConfigError: A number that the run does not have.
        OutputError: As for `write_pair`.
    """
    dataset, run_id = ShardDataset(run), Index.read(run).run_id
    chosen: dict[int, None] = {}  # each once, in the order given
    for number in range(len(dataset)) if numbers is None else numbers:
        if not 0 <= number < len(dataset):
            raise ConfigError(f"--pairs: {name_of(run)} has pairs 0..{len(dataset) - 1}, not {number}")
        chosen[number] = None
    _describe(out)
    folders = []
    try:
        for number in chosen:
            sample = dataset[number]
            recipe = Recipe.from_json(sample["recipe"])
            arrays = {k: v[0].numpy() for k, v in sample.items() if k != "recipe"}
            pair = Pair(**arrays, affine=recipe.affine, recipe=recipe)
            folders.append(_write(out, number, pair, run_id))
            if progress:
                progress("pairs", len(folders), len(chosen))
    except BaseException:
        with suppress(OSError, OutputError):  # a full disk is told of once, by the file that did not fit
            _list_participants(out)
        raise
    _list_participants(out)
    return folders


def write_pair(out: Path, number: int, pair: Pair, *, run_id: str) -> Path:
    """Write one pair: visits under `sub-synNNNN/ses-{1,2}/anat`, masks and recipe under `derivatives`.

    Args:
        out: Root of the BIDS data set.
        number: Of the pair.
        pair: What to write.
        run_id: Of the run that made it.

    Returns:
        The subject's folder.

    Raises:
        OutputError: Another pair or data set lies there, or `out` is no folder.
    """
    _describe(out)
    folder = _write(out, number, pair, run_id)
    _list_participants(out)
    return folder


def _write(out: Path, number: int, pair: Pair, run_id: str) -> Path:
    """Write one pair, its records first: what lies there without them is not ours."""
    subject = f"sub-syn{number:04d}"
    visits = {"1": pair.baseline, "2": pair.followup}
    raw = {ses: out / subject / f"ses-{ses}" / "anat" / f"{subject}_ses-{ses}_FLAIR.nii.gz" for ses in visits}
    masks = {
        name: _truth(out) / subject / f"ses-{ses}" / "anat" / f"{subject}_ses-{ses}_space-MNI152_{what}.nii.gz"
        for name, (ses, what) in _MASKS.items()
    }
    records = {
        _truth(out) / subject / f"{subject}_recipe.json": pair.recipe.to_json(),
        sidecar_of(masks["evolution"]): json.dumps({"Run": run_id, "Shape": pair.baseline.shape}),
    }
    for path, text in records.items():
        if path.read_text() != text + "\n" if path.exists() else raw["1"].exists():
            raise OutputError(path, "another pair of this number is there", "choose another folder")
    for path in (*raw.values(), *masks.values()):
        path.parent.mkdir(parents=True, exist_ok=True)
    for path, text in records.items():
        publish(path, text.encode() + b"\n")
    for ses, path in raw.items():
        write_nifti(path, visits[ses], pair.affine)
        publish(sidecar_of(path), json.dumps({BRAIN_MODE: 1.0, "SkullStripped": True}).encode() + b"\n")
    for name, path in masks.items():
        write_nifti(path, np.asarray(getattr(pair, name), np.uint8), pair.affine)
    return out / subject


def _truth(out: Path) -> Path:
    return out / "derivatives" / "synthlong"


def _describe(out: Path) -> None:
    """Write what says which data set this is, unless it is there.

    Raises:
        OutputError: `out` is no folder, or another data set's.
    """
    if out.exists() and not out.is_dir():
        raise OutputError(out, "is not a folder", "name a folder")
    table = out / "participants.tsv"
    if table.exists() and not table.read_bytes().startswith(_COLUMNS.encode()):
        raise OutputError(table, "is of another data set", "choose another folder")
    _truth(out).mkdir(parents=True, exist_ok=True)
    for folder, name, kind in ((out, "synthlong pairs", "raw"), (_truth(out), "synthlong truth", "derivative")):
        path = folder / "dataset_description.json"
        if not path.exists():
            publish(path, _json(description() | {"Name": name, "DatasetType": kind}))
    rows = "".join(f"{code}\t{name}\n" for code, name in _LABELS.items())
    publish(_truth(out) / "desc-evolution_dseg.tsv", f"index\tname\n{rows}".encode())
    for suffix, of_all in (("mask", {"Type": "Lesion"}), ("dseg", {})):
        publish(_truth(out) / f"space-MNI152_{suffix}.json", _json(_SPACE | of_all))
    publish(_truth(out) / ".bidsignore", b"*_recipe.json\n")
    if not (out / "participants.json").exists():
        publish(out / "participants.json", _json(_PARTICIPANTS))
    if not any((out / f"README{suffix}").exists() for suffix in ("", ".md", ".rst", ".txt")):
        publish(out / "README", _README.encode())


def _json(plain: dict[str, Any]) -> bytes:
    return (json.dumps(plain, indent=1) + "\n").encode()


def _list_participants(out: Path) -> None:
    """Write the table of all pairs whose recipes are there, whichever call wrote them."""
    rows = []
    for recipe in sorted(_truth(out).glob("sub-syn*/*_recipe.json")):
        case = json.loads(recipe.read_bytes())["case"]
        rows.append(f"{recipe.parent.name}\t{patient_of(case)}\t{case}\n")
    publish(out / "participants.tsv", (_COLUMNS + "".join(rows)).encode())
