"""Which raw scans there are: a CSV manifest, or a BIDS folder."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from synthlong.errors import ConfigError, InputError, InputWarning, short
from synthlong.manifest import check_ids, checked_id, manifest_rows
from synthlong.preparation.tools import load_bids

__all__ = ["Scan", "find_scans", "scan_id", "some", "visits_of"]

_PREPARED = re.compile(r"_space-(?:MNI|halfway)")
_LESION_MASK = re.compile(r"_(?:(?:desc|label)-(?:lesions?|wmh)_(?:.*_)?(?:mask|roi)|lesionmask)\.nii", re.IGNORECASE)
_LESIONS = re.compile("lesion|wmh", re.IGNORECASE)
_MOST_NAMED = 3
_FILES = ("flair", "mask", "t1", "brain", "tissue", "new_lesions", "new_lesions_xfm")


@dataclass(frozen=True)
class Scan:
    """The files of one visit as it left the scanner.

    Args:
        subject: Without `sub-`.
        flair: FLAIR, whole head, any grid.
        session: Without `ses-`; "" where there is one visit only.
        mask: Lesion mask on the FLAIR's grid.
        t1: T1-weighted scan of the same visit, on its own grid.
        brain: Brain mask on the FLAIR's grid.
        tissue: Labels on the FLAIR's grid (0 background, 1 CSF, 2 GM, 3 WM).
        new_lesions: Mask of the lesions that are new at this visit, on its own grid.
        new_lesions_xfm: ITK transform that maps points of that mask's space to points of this FLAIR.
        problem: Why the visit cannot be prepared, where that is known by now.
    """

    subject: str
    flair: Path
    session: str = ""
    mask: Path | None = None
    t1: Path | None = None
    brain: Path | None = None
    tissue: Path | None = None
    new_lesions: Path | None = None
    new_lesions_xfm: Path | None = None
    problem: str | None = None

    @property
    def id(self) -> str:
        """Subject and session, as file names have them after `sub-`."""
        return scan_id(self.subject, self.session)

    @property
    def files(self) -> dict[str, Path]:
        """The files that there are, by role."""
        return {role: getattr(self, role) for role in _FILES if getattr(self, role) is not None}


def scan_id(subject: str, session: str) -> str:
    """Return what names a scan; `session` may be ""."""
    return f"{subject}_ses-{session}" if session else subject


def find_scans(source: str | Path, *, participants: Collection[str] = (), brain_mask: str | None = None) -> list[Scan]:
    """List the scans of a manifest or a BIDS folder, by subject and session.

    Args:
        source: CSV file with the columns `subject,flair[,session,mask,t1,brain,tissue,new_lesions,new_lesions_xfm]`,
            paths relative to it; or a BIDS folder: `*_FLAIR.nii.gz`, `*_T1w.nii.gz` of the same session, and of its
            derivatives `*_desc-lesions_mask.nii.gz` or `*_label-lesion_mask.nii.gz`.
        participants: Only these subjects, with or without `sub-`.
        brain_mask: Where brain masks lie, with `{subject}` and `{session}` to be filled in.

    Raises:
        InputError: No such place, no scan, missing columns, unsafe or repeated ids, files that do not exist.
        ConfigError: A participant that is not there; no pybids.
    """
    source = Path(source)
    wanted = {p.casefold().removeprefix("sub-") for p in participants}
    if source.is_dir():
        found = list(_in_bids(source, wanted))
        if not found and not wanted:
            raise InputError(source, "no *_FLAIR.nii.gz in it", "pass a BIDS folder, or a manifest (CSV)")
    elif source.exists():
        rows = manifest_rows(source, needed=("flair",), optional=_FILES[1:])
        found = [Scan(subject, session=session, **files) for subject, session, files in rows]  # type: ignore[arg-type]
        if not found:
            raise InputError(source, "the manifest lists no scan", "add a row: subject,flair")
    else:
        raise InputError(source, "no such file or folder", "pass a manifest (CSV) or a BIDS folder")
    check_ids(source, [scan.id for scan in found])
    visited = visits_of(found)
    check_ids(source, [subject for subject, _ in visited])
    for subject, visits in visited:
        if len(visits) > 1 and not all(visit.session for visit in visits):
            raise InputError(
                source, f"subject '{subject}' has several scans", "name their sessions in column 'session'"
            )
        if len(visits) > 1 and visits[0].new_lesions is not None:
            order = ", ".join(visit.session for visit in visits)
            problem = f"new_lesions of subject '{subject}' at session '{visits[0].session}', the first of {order}"
            raise InputError(source, problem, "name sessions so that they sort in the order of time, such as 1, 2, 10")
        for visit in visits:
            if visit.new_lesions_xfm is not None and visit.new_lesions is None:
                problem = f"{visit.id} has a new_lesions_xfm, but no new_lesions"
                raise InputError(source, problem, "fill in both, or the mask alone")
    if unknown := wanted - {scan.subject.casefold() for scan in found}:
        raise ConfigError(f"--participant-label {' '.join(sorted(unknown))}: not in {short(source)}")
    found = [scan for scan in found if not wanted or scan.subject.casefold() in wanted]
    if brain_mask is not None:
        found = [_with_brain(scan, brain_mask) for scan in found]
    return [scan for _, visits in visits_of(found) for scan in visits]


def visits_of(scans: Collection[Scan]) -> list[tuple[str, list[Scan]]]:
    """Return the scans of each subject; sessions in their order, 2 before 10."""

    def key(scan: Scan) -> Any:
        parts = re.split(r"(\d+)", scan.session)
        return scan.subject, [(int(p), "") if p.isdecimal() else (-1, p) for p in parts]

    return [(subject, list(group)) for subject, group in groupby(sorted(scans, key=key), key=lambda s: s.subject)]


def some(names: list[str]) -> str:
    """Return the first few of some names, and how many more there are."""
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(names[:_MOST_NAMED]) + more


def _with_brain(scan: Scan, pattern: str) -> Scan:
    try:
        path = Path(pattern.format(subject=scan.subject, session=scan.session))
    except (LookupError, ValueError, AttributeError, TypeError) as error:
        raise ConfigError(f"--brain-mask {pattern}: only {{subject}} and {{session}} are filled in") from error
    if not path.exists():
        raise InputError(path, "no such brain mask", "correct --brain-mask, or leave it out for HD-BET")
    return replace(scan, brain=path)


def _in_bids(folder: Path, wanted: Collection[str]) -> Iterator[Scan]:
    bids = load_bids()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", "Derivative indexing was requested", UserWarning
            )  # said below, in one line
            indexer = bids.BIDSLayoutIndexer(validate=False, index_metadata=False)
            layout = bids.BIDSLayout(folder, derivatives=True, validate=False, indexer=indexer)
    except Exception as error:  # pybids' own, of JSON, of files: all speak of the folder
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        problem = f"pybids cannot read it ({said.replace(f'{folder.resolve()}/', '')})"
        raise InputError(folder, problem, "correct its JSON files, or pass a manifest (CSV)") from error
    _warn_of_unseen_masks(folder)

    def files(scope: str, **entities: Any) -> list[Path]:
        found = layout.get(scope=scope, extension=[".nii", ".nii.gz"], **entities)
        return sorted(Path(f.path) for f in found if not _PREPARED.search(f.filename))

    scans = layout.get(scope="raw", suffix="FLAIR", extension=[".nii", ".nii.gz"])
    scans = [f for f in scans if not _PREPARED.search(f.filename)]
    places = sorted(
        {(f.entities["subject"], f.entities.get("session")) for f in scans if "subject" in f.entities}, key=str
    )
    used: set[Path] = set()
    for subject, session in places:
        if wanted and subject.casefold() not in wanted:
            continue
        place = {"subject": subject, "session": session}
        where = f"sub-{subject}" + (f"_ses-{session}" if session else "")
        found = files("raw", suffix="FLAIR", **place)
        masks = [p for p in files("derivatives", **place) if _LESION_MASK.search(p.name)]
        used |= {*masks}
        yield Scan(
            checked_id(folder, subject),
            found[0],
            checked_id(folder, session, prefix="ses-") if session else "",
            mask=masks[0] if masks else None,
            t1=_first(where, files("raw", suffix="T1w", **place)),
            problem=_several(folder, where, "FLAIR", found) or _several(folder, where, "lesion mask", masks),
        )
    chosen = {"subject": [subject for subject, _ in places if subject.casefold() in wanted]} if wanted else {}
    unused = [p.name for p in files("all", **chosen) if _LESIONS.search(p.name) and p not in used]
    if unused:
        text = f"{short(folder)}: no scan uses {some(unused)}; name masks in a manifest (CSV)"
        warnings.warn(text, InputWarning, stacklevel=4)


def _warn_of_unseen_masks(folder: Path) -> None:
    """Warn of lesion masks in derivatives that pybids passes over."""
    place = folder / "derivatives"
    if not place.is_dir() or (place / "dataset_description.json").exists():
        return
    for part in sorted(p for p in place.iterdir() if p.is_dir() and not (p / "dataset_description.json").exists()):
        names = [p.name for p in part.rglob("*_mask.nii*")]
        if any(_LESION_MASK.search(name) and not _PREPARED.search(name) for name in names):
            text = f"{short(part)}: its lesion masks are not used, it lacks a dataset_description.json"
            warnings.warn(text, InputWarning, stacklevel=5)


def _several(folder: Path, where: str, what: str, paths: list[Path]) -> str | None:
    if len(paths) < 2:
        return None
    names = ", ".join(p.name for p in paths)
    return str(InputError(folder, f"{where} has several {what}s ({names})", "pass a manifest (CSV) that names one"))


def _first(where: str, paths: list[Path]) -> Path | None:
    if len(paths) > 1:
        warnings.warn(f"{where}: of {len(paths)} T1w scans {paths[0].name} is used", InputWarning, stacklevel=4)
    return paths[0] if paths else None
