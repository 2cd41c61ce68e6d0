"""What a folder of prepared scans holds, as two tables.

prepared.csv    a line per scan: status, what is wrong, figures
pairs.csv       baseline, follow-up and mask of the new lesions, where those are known; no flagged scans
"""

from __future__ import annotations

import csv
import io
import warnings
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from synthlong.errors import InputError, InputWarning
from synthlong.preparation.derivatives import file_name, read_record
from synthlong.preparation.scans import Scan, scan_id
from synthlong.publishing import publish

__all__ = ["KEYS", "Records", "read_records", "write_tables"]

Records = dict[str, dict[str, Any]]

KEYS = {"scan", "subject", "session", "space", "visits", "native", "figures", "flags", "files", "stamp"}
"""What each record has."""


def read_records(out: Path) -> Records:
    """Return the records of all scans that lie in a folder, by scan; one that is damaged is named and left out."""
    records = {}
    for path in sorted(out.glob("sub-*_FLAIR.nii.gz")):
        try:
            record = read_record(path)
        except InputError as error:
            warnings.warn(str(error), InputWarning, stacklevel=2)
            continue
        if record and record.keys() >= KEYS:
            records[str(record["scan"])] = record
    return records


def write_tables(out: Path, records: Records, failed: Sequence[tuple[Scan, str]], *, subjects: Collection[str]) -> None:
    """Write both tables.

    Args:
        out: The folder.
        records: What lies there.
        failed: Scans that could not be prepared by this call, and why.
        subjects: Those that this call came to; what earlier calls said of the failure of others stays.
    """
    rows = _failed_earlier(out / "prepared.csv", but=subjects)
    rows |= {
        name: {
            "subject": record["subject"],
            "session": record["session"],
            "flair": record.get("flair", ""),
            "status": "flagged" if record["flags"] else "ok",
            "problem": "; ".join(record["flags"]),
            **record["figures"],
        }
        for name, record in records.items()
    }
    for scan, problem in failed:
        row = {"subject": scan.subject, "session": scan.session, "flair": scan.flair.name}
        rows[scan.id] = {**row, "status": "failed", "problem": problem}
    pairs = []
    for name, record in records.items():
        mask = file_name(name, "desc-newlesions_mask.nii.gz", space=record["space"])
        place = record["visits"].index(name)
        if mask not in record["files"] or not place:
            continue
        before = record["visits"][place - 1]
        if _made_together(record, records.get(before)) and not (record["flags"] or records[before]["flags"]):
            one, other = (file_name(visit, "FLAIR.nii.gz", space=record["space"]) for visit in (before, name))
            pairs.append({"subject": record["subject"], "baseline": one, "followup": other, "mask": mask})
    _write_csv(out / "prepared.csv", [rows[name] for name in sorted(rows)])
    if pairs:
        _write_csv(out / "pairs.csv", pairs)
    else:
        (out / "pairs.csv").unlink(missing_ok=True)


def _made_together(one: dict[str, Any], other: dict[str, Any] | None) -> bool:
    """Whether two visits were registered to each other, by one preparation."""
    return other is not None and all(one[key] == other[key] for key in ("visits", "stamp"))


def _failed_earlier(path: Path, *, but: Collection[str]) -> dict[str, dict[str, Any]]:
    """Return the lines of failed scans in an earlier table, without those of some subjects, by scan."""
    try:
        with path.open(newline="") as file:
            lines = list(csv.DictReader(file))
        failed = [line for line in lines if line["status"] == "failed" and line["subject"] not in but]
        keys = ("subject", "session", "flair", "status", "problem")
        return {scan_id(line["subject"], line["session"]): {key: line.get(key) for key in keys} for line in failed}
    except (OSError, ValueError, KeyError, csv.Error):  # there is none, or somebody edited it
        return {}


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, columns, lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    publish(path, text.getvalue().encode())
