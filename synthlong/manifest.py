"""Which files make up the cases: a CSV manifest, or a folder that follows the naming of `prepare`."""

from __future__ import annotations

import csv
import os
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from synthlong.case import Case, read_case
from synthlong.errors import InputError, InputWarning, short

__all__ = ["CaseFiles", "find_cases", "read_cases"]

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_COLUMNS = ("subject", "flair", "mask")
_OPTIONAL = ("t1", "brain", "tissue")
_KNOWN = {*_COLUMNS, *_OPTIONAL, "session", "new_lesions", "new_lesions_xfm"}
_SPACE = "space-MNI152"
_SUFFIXES = {
    "flair": "FLAIR",
    "mask": "desc-lesions_mask",
    "t1": "T1w",
    "brain": "desc-brain_mask",
    "tissue": "dseg",
}


@dataclass(frozen=True)
class CaseFiles:
    """Paths of one case's files; `subject` is its id, with `_ses-N` where there are several visits."""

    subject: str
    flair: Path
    mask: Path
    t1: Path | None = None
    brain: Path | None = None
    tissue: Path | None = None

    def read(self, *, prefer: str | None = None) -> Case:
        """Read the case; see `read_case`."""
        return read_case(
            self.flair,
            self.mask,
            subject=self.subject,
            t1=self.t1,
            brain=self.brain,
            tissue=self.tissue,
            prefer=prefer,
        )

    @property
    def patient(self) -> str:
        """The subject without its session."""
        return self.subject.split("_ses-")[0]


def find_cases(source: str | Path) -> list[CaseFiles]:
    """List the cases of a manifest or a folder, sorted by id.

    Args:
        source: CSV file with the columns `subject,flair,mask[,session,t1,brain,tissue]`, paths relative to it; or a
            folder of `sub-ID[_ses-N]_space-MNI152_{FLAIR,desc-lesions_mask,...}.nii.gz`.

    Raises:
        InputError: No such place, missing columns, unsafe or repeated ids, paths that do not exist.
    """
    source = Path(source)
    if source.is_dir():
        found = list(_in_folder(source))
        if not found:
            raise InputError(source, f"no *_{_SPACE}_FLAIR.nii.gz in it", "pass a manifest, or run `synthlong prepare`")
    elif source.exists():
        found = list(_in_manifest(source))
        if not found:
            raise InputError(source, "the manifest lists no case", "add a row: subject,flair,mask")
    else:
        raise InputError(source, "no such file or folder", "pass a manifest (CSV) or a folder of cases")
    seen: dict[str, str] = {}
    for files in found:
        twin = seen.setdefault(files.subject.casefold(), files.subject)
        if twin is not files.subject:
            raise InputError(source, f"subject '{files.subject}' appears twice", "give each case its own id, or a session")
    return sorted(found, key=lambda f: f.subject)


def read_cases(source: str | Path, *, prefer: str | None = None) -> Iterator[Case]:
    """Yield the cases of a manifest or folder one by one, sorted by id."""
    for files in find_cases(source):
        yield files.read(prefer=prefer)


def _checked_id(source: Path, text: str) -> str:
    subject = text.strip()
    if not _ID.fullmatch(subject):
        shown = ascii(subject[:40])
        way = "use 1 to 64 letters, digits, '.', '_' or '-', starting with a letter or digit"
        raise InputError(source, f"unsafe subject id {shown}", way)
    return subject.removeprefix("sub-") or subject


def _in_manifest(path: Path) -> Iterator[CaseFiles]:
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            columns = [c.strip() for c in rows.fieldnames or []]
            missing = [c for c in _COLUMNS if c not in columns]
            if missing:
                problem = f"column{'s' * (len(missing) > 1)} missing: {', '.join(missing)}"
                raise InputError(path, problem, "the first line must read subject,flair,mask[,t1,brain,tissue]")
            unknown = [c for c in columns if c not in _KNOWN]
            if unknown:
                text = f"{short(path)}: columns not used: {', '.join(ascii(c)[1:-1] for c in unknown)}"
                warnings.warn(text, InputWarning, stacklevel=4)
            lines = [(rows.line_num, {(k or "").strip(): (v or "") for k, v in r.items() if k}) for r in rows]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(path, f"not a readable CSV file ({type(error).__name__})", "save it as UTF-8 CSV") from error
    for number, row in lines:
        subject = _checked_id(path, row["subject"])
        if row.get("session", "").strip():
            subject += "_ses-" + _checked_id(path, row["session"]).removeprefix("ses-")
        files: dict[str, Path] = {}
        for role in ("flair", "mask", *_OPTIONAL):
            text = row.get(role, "").strip()
            if not text:
                if role in _COLUMNS:
                    raise InputError(path, f"line {number}: '{role}' is empty", "fill it in, or remove the line")
                continue
            files[role] = path.parent / text
            if not os.path.lexists(files[role]):
                problem = f"'{short(path)}' line {number} names it, but it does not exist"
                raise InputError(files[role], problem, "correct the path (relative to the manifest)")
        yield CaseFiles(subject, **files)


def _in_folder(folder: Path) -> Iterator[CaseFiles]:
    def of(stem: str, suffix: str) -> Path | None:
        found = [p for p in (folder / f"{stem}_{_SPACE}_{suffix}{e}" for e in (".nii.gz", ".nii")) if p.exists()]
        return found[0] if found else None

    stems = {p.name.split(f"_{_SPACE}_")[0] for p in folder.iterdir() if f"_{_SPACE}_" in p.name}
    for stem in sorted(stems):
        if not stem.startswith("sub-"):
            continue
        files = {role: of(stem, suffix) for role, suffix in _SUFFIXES.items()}
        if files["flair"] is None or files["mask"] is None:
            lacking = "its FLAIR" if files["flair"] is None else "its lesion mask"
            warnings.warn(f"{short(folder)}: {stem} is skipped, {lacking} is missing", InputWarning, stacklevel=4)
            continue
        yield CaseFiles(_checked_id(folder, stem), **files)  # type: ignore[arg-type]
