"""Which files make up the cases: a CSV manifest, or a folder that follows the naming of `prepare`."""

from __future__ import annotations

import csv
import hashlib
import io
import os
import re
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from synthlong.case import Case, mode_as_source, patient_of, read_case, stated_mode
from synthlong.errors import InputError, InputWarning, short
from synthlong.preparation.derivatives import read_native, read_record

__all__ = ["CaseFiles", "check_ids", "checked_id", "find_cases", "manifest_rows", "read_cases", "warn_of_twins"]

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_NEEDED = ("flair", "mask")
_OPTIONAL = ("brain", "tissue")
_KNOWN = {"subject", *_NEEDED, *_OPTIONAL, "session", "t1", "new_lesions", "new_lesions_xfm"}
_IN_MNI = re.compile(r"(.+?)_space-MNI152[A-Za-z0-9]*_(?:res-[A-Za-z0-9]+_)?(.+)\.nii(?:\.gz)?")
_ROLES = {
    "FLAIR": "flair",
    **dict.fromkeys(("desc-lesions_mask", "desc-lesion_mask", "label-lesions_mask", "label-lesion_mask"), "mask"),
    "desc-brain_mask": "brain",
    "dseg": "tissue",
    "desc-healthy_FLAIR": "healthy",
}


@dataclass(frozen=True)
class CaseFiles:
    """Paths of one case's files, and how they are read.

    Args:
        subject: Its id, with `_ses-N` where there are several visits.
        flair: FLAIR, as are the others an argument of `read_case`.
        mask: Lesion mask.
        brain: Brain mask.
        tissue: Labels.
        healthy: The FLAIR without its lesions, as `prepare` wrote it.
        prefer: "sform" or "qform" where a file's two disagree.
    """

    subject: str
    flair: Path
    mask: Path
    brain: Path | None = None
    tissue: Path | None = None
    healthy: Path | None = None
    prefer: str | None = None

    def read(self) -> Case:
        """Read the case, with what `synthlong prepare` recorded of it; see `read_case`."""
        case = read_case(
            self.flair,
            self.mask,
            subject=self.subject,
            brain=self.brain,
            tissue=self.tissue,
            prefer=self.prefer,
        )
        return replace(case, healthy_file=self.healthy, native=read_native(self.flair))

    def hashes(self) -> dict[str, str]:
        """Return the SHA-256 of each file, by role, as `Case.sources` has them.

        Raises:
            InputError: One cannot be read.
        """
        paths = {role: getattr(self, role) for role in (*_NEEDED, *_OPTIONAL)}
        try:
            sums = {r: hashlib.sha256(p.read_bytes()).hexdigest() for r, p in paths.items() if p is not None}
        except OSError as error:
            problem = f"cannot be read ({error.strerror})"
            raise InputError(error.filename or self.flair, problem, "check the path and the permissions") from error
        return {**sums, **mode_as_source(stated_mode(self.flair))}

    @property
    def patient(self) -> str:
        """The subject without its session."""
        return patient_of(self.subject)


def find_cases(source: str | Path, *, prefer: str | None = None) -> list[CaseFiles]:
    """List the cases of a manifest or a folder, sorted by id.

    Args:
        source: CSV file with columns `subject,flair,mask[,session,brain,tissue]`, paths relative to it;
            or a folder of `sub-ID[_ses-N]_space-MNI152_{FLAIR,desc-lesions_mask,...}.nii.gz`, at any depth; any
            MNI152 template, lesion masks also as `label-lesion_mask`.
        prefer: "sform" or "qform" where a file's two disagree.

    Raises:
        InputError: No such place, missing columns, unsafe or repeated ids, paths that do not exist.
    """
    source = Path(source)
    if source.is_dir():
        found = list(_in_folder(source))
        if not found:
            problem = "no sub-*_space-MNI152_FLAIR.nii.gz with its sub-*_space-MNI152_desc-lesions_mask.nii.gz in it"
            raise InputError(source, problem, "pass a manifest, or run `synthlong prepare`")
    elif source.exists():
        found = list(_in_manifest(source))
        if not found:
            raise InputError(source, "the manifest lists no case", "add a row: subject,flair,mask")
    else:
        raise InputError(source, "no such file or folder", "pass a manifest (CSV) or a folder of cases")
    check_ids(source, [files.subject for files in found])
    return sorted((replace(files, prefer=prefer) for files in found), key=lambda f: f.subject)


def read_cases(source: str | Path, *, prefer: str | None = None) -> Iterator[Case]:
    """Yield the cases of a manifest or folder one by one, sorted by id, each read when its turn comes.

    Args:
        source: See `find_cases`.
        prefer: "sform" or "qform" where a file's two disagree.

    Raises:
        InputError: See `find_cases`; or a case cannot be used.
    """
    for files in find_cases(source, prefer=prefer):
        yield files.read()


def warn_of_twins(flairs: Iterable[tuple[str, str]]) -> None:
    """Warn of scans that are there under several ids; `flairs`: id and SHA-256 of each."""
    by_scan: dict[str, dict[str, None]] = {}
    for one, sha256 in flairs:
        by_scan.setdefault(sha256, {})[one] = None
    for ids in by_scan.values():
        if len(ids) > 1:
            warnings.warn(f"{', '.join(ids)}: one scan under {len(ids)} ids", InputWarning, stacklevel=3)


def check_ids(source: Path, ids: Iterable[str]) -> None:
    """Raise an InputError if an id is there twice."""
    seen: set[str] = set()
    for one in ids:
        if one.casefold() in seen:
            problem = f"subject '{one}' appears twice (upper and lower case count as the same)"
            raise InputError(source, problem, "give each case its own id, or a session")
        seen.add(one.casefold())


def checked_id(source: Path, text: str, *, prefix: str = "sub-", where: str = "") -> str:
    """Return a subject or session without its prefix, if it can safely be part of a file name."""
    name = text.strip()
    name = name[len(prefix) :] if name.casefold().startswith(prefix) else name
    if not _ID.fullmatch(name):
        kind = "subject" if prefix == "sub-" else "session"
        way = "use 1 to 64 letters, digits, '.', '_' or '-', starting with a letter or digit"
        raise InputError(source, f"{where}unsafe {kind} id {text.strip()[:40]!a}", way)
    return name


def manifest_rows(
    path: Path, *, needed: tuple[str, ...], optional: tuple[str, ...], existing: bool = True
) -> Iterator[tuple[str, str, dict[str, Path]]]:
    """Yield subject, session ("" if there is none) and files by column of each line of a manifest.

    Args:
        path: CSV file, separated by commas, semicolons or tabs; paths in it are relative to it.
        needed: Columns that each line must fill in, beside `subject`.
        optional: Columns that it may.
        existing: Whether a path that does not exist is refused here; else whoever reads the file says so.

    Raises:
        InputError: Not such a file; missing columns, unsafe ids, paths that do not exist.
    """
    columns = ("subject", *needed)
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            text = file.read()
            head = text.lstrip()
            first = head.partition("\n")[0]
            rows = csv.DictReader(io.StringIO(head, newline=""), delimiter=max(",;\t", key=first.count))
            above = text[: len(text) - len(head)].count("\n")
            found = [c.strip().casefold() for c in rows.fieldnames or []]
            missing = [c for c in columns if c not in found]
            if missing:
                problem = f"column{'s' * (len(missing) > 1)} missing: {', '.join(missing)}"
                more = ",".join(["session", *optional]) if optional else "session"
                way = f"the first line must read {','.join(columns)}[,{more}]"
                raise InputError(path, problem, way)
            if twice := {c for c in found if c in _KNOWN and found.count(c) > 1}:
                raise InputError(path, f"columns named twice: {', '.join(sorted(twice))}", "keep one of each")
            unknown = [c for c in found if c and c not in {*_KNOWN, *needed, *optional}]
            if unknown:
                text = f"{short(path)}: columns not used: {', '.join(ascii(c)[1:-1] for c in unknown)}"
                warnings.warn(text, InputWarning, stacklevel=5)
            lines = [
                (above + rows.line_num, {k.strip().casefold(): (v or "").strip() for k, v in row.items() if k})
                for row in rows
            ]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        problem = f"not a readable CSV file ({type(error).__name__})"
        raise InputError(path, problem, "save it as UTF-8 CSV") from error
    for number, row in lines:
        if not any(row.values()):
            continue
        where = f"line {number}: "
        subject = checked_id(path, row["subject"], where=where)
        session = checked_id(path, row["session"], prefix="ses-", where=where) if row.get("session") else ""
        files: dict[str, Path] = {}
        for role in (*needed, *optional):
            text = row.get(role, "")
            if not text:
                if role in needed:
                    raise InputError(path, f"{where}'{role}' is empty", "fill it in, or remove the line")
                continue
            files[role] = path.parent / text
            if existing and not os.path.lexists(files[role]):
                problem = f"'{short(path)}' line {number} names it, but it does not exist"
                raise InputError(files[role], problem, "correct the path (relative to the manifest)")
        yield subject, session, files


def _in_manifest(path: Path) -> Iterator[CaseFiles]:
    for subject, session, files in manifest_rows(path, needed=_NEEDED, optional=_OPTIONAL, existing=False):
        for file in files.values():
            if not os.path.lexists(file):
                text = f"{short(path)}: names {short(file)}, which does not exist; paths are relative to the manifest"
                warnings.warn(text, InputWarning, stacklevel=4)
        yield CaseFiles(f"{subject}_ses-{session}" if session else subject, **files)  # type: ignore[arg-type]


def _in_folder(folder: Path) -> Iterator[CaseFiles]:
    found: dict[str, dict[str, list[Path]]] = {}
    for path in sorted(folder.rglob("*_space-MNI152*.nii*")):
        matched = _IN_MNI.fullmatch(path.name)
        if matched is None or any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        roles = found.setdefault(matched[1], {})
        if role := _ROLES.get(matched[2]):
            roles.setdefault(role, []).append(path)
    for stem, roles in sorted(found.items()):
        if problem := _problem_of(stem, roles):
            text = f"{short(folder)}: {ascii(stem)[1:-1]} is skipped, {problem}"
            warnings.warn(text, InputWarning, stacklevel=4)
            continue
        files = {role: path for role, (path,) in roles.items()}
        try:
            flags = (read_record(files["flair"]) or {}).get("flags")
        except InputError as error:
            warnings.warn(str(error), InputWarning, stacklevel=4)
            flags = None
        if flags:
            text = (
                f"{short(files['flair'])}: flagged by `prepare` ({'; '.join(flags)}); look at its picture in figures/"
            )
            warnings.warn(text, InputWarning, stacklevel=4)
        yield CaseFiles(checked_id(folder, stem), **files)  # type: ignore[arg-type]


def _problem_of(stem: str, roles: dict[str, list[Path]]) -> str | None:
    """Return why the files of a stem are no case, None if they are."""
    if not stem.startswith("sub-"):
        return "its name does not start with 'sub-'"
    for role, what in (("flair", "its FLAIR"), ("mask", "its lesion mask")):
        if role not in roles:
            return f"{what} is missing"
    for paths in roles.values():
        if len(paths) > 1:
            return f"it has several of a kind ({', '.join(path.name for path in paths)}); pass a manifest"
    return None
