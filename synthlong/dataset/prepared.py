"""Prepared cases that outlive a process: each in a folder named by a hash of all that it depends on.

Processes that name the same folder share the work without a lock: `store_case` renames what is whole.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from synthlong.case import Case
from synthlong.dataset.store import MOST_OPEN, open_case, stamp_of, store_case, stored_stamp
from synthlong.errors import ConfigError, InputError, OutputError
from synthlong.manifest import CaseFiles, find_cases
from synthlong.plain import plain_hash
from synthlong.progress import Progress
from synthlong.synthesis import SynthesisConfig

__all__ = ["PreparedCases"]

_ARRAYS = ("flair", "lesions", "brain", "tissue", "healthy", "affine")


class PreparedCases:
    """Cases on disk, opened by number, in the order of their ids; pickled without their arrays.

    Args:
        cases: Manifest or folder of cases in MNI space, or the cases or their files; those without `healthy` get it.
        config: How pairs are drawn from them.
        assets: Result of `asset_hashes`.
        heal: Gives a case its healthy volume.
        work: Where; default: a temporary folder, removed with this object.
        begin: Where in the list to start, 0 to 1; another place for each process that shares the folder, so that
            they do not all begin with the same case.
        progress: Called as ("cases", done, total).

    Attributes:
        sha256: Of what all cases are made of.

    Raises:
        InputError: A case cannot be used.
        OutputError: `work` cannot be written.
    """

    def __init__(
        self,
        cases: str | Path | Iterable[CaseFiles | Case],
        config: SynthesisConfig,
        assets: dict[str, str],
        *,
        heal: Callable[[Case], Case],
        work: str | Path | None = None,
        begin: float = 0,
        progress: Progress | None = None,
    ) -> None:
        found = _found(cases)
        self._config, self._folder = config, _folder(work)
        self._open: dict[int, Case] = {}
        if work is None:
            weakref.finalize(self, _remove, self._folder, os.getpid())
        sources = {_id(one): _sources(one) for one in found}
        self.sha256 = plain_hash(sources)
        stamps = [
            stamp_of(_id(one), sources[_id(one)], config, assets, prefer=getattr(one, "prefer", None)) for one in found
        ]
        self._names = [f"case-{plain_hash(stamp)}" for stamp in stamps]
        first = int(begin * len(found))
        for done, n in enumerate((*range(first, len(found)), *range(first)), start=1):
            folder, one = self._folder / self._names[n], found[n]
            if stored_stamp(folder) != stamps[n]:
                case = _read(one, sources[_id(one)]) if isinstance(one, CaseFiles) else one
                store_case(folder, heal(case) if case.healthy is None else case, config, stamp=stamps[n])
            if progress:
                progress("cases", done, len(found))

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, number: int) -> Case:
        if number not in self._open:
            if len(self._open) >= MOST_OPEN:
                del self._open[next(iter(self._open))]
            folder = self._folder / self._names[number]
            try:
                self._open[number] = open_case(folder, self._config)
            except (OSError, ValueError, KeyError) as error:
                problem = f"a prepared case cannot be opened ({getattr(error, 'strerror', None) or error})"
                way = "remove the folder if it is there, and make the stream anew"
                raise InputError(folder, problem, way) from error
        return self._open[number]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}


def _found(cases: str | Path | Iterable[CaseFiles | Case]) -> list[CaseFiles | Case]:
    """Return the cases or their files, sorted by id."""
    if isinstance(cases, (str, Path)):
        return list(find_cases(cases))
    found = sorted(cases, key=_id)
    if not found:
        raise ConfigError("cases is empty: give at least one")
    for one, other in pairwise(found):
        if _id(one) == _id(other):
            raise InputError(_id(one), "two cases have this id", "give each its own")
    return list(found)


def _id(one: CaseFiles | Case) -> str:
    return one.subject if isinstance(one, CaseFiles) else one.id


def _sources(one: CaseFiles | Case) -> dict[str, str]:
    """Return the SHA-256 of all that a case is made of: of its files, or of its arrays if it has been read."""
    if isinstance(one, CaseFiles):
        return one.hashes()
    arrays = {name: getattr(one, name) for name in _ARRAYS}
    sums = {
        name: hashlib.sha256(f"{a.dtype.str}{a.shape}".encode() + np.ascontiguousarray(a).tobytes()).hexdigest()
        for name, a in arrays.items()
        if a is not None
    }
    return {**sums, "scan": repr((float(one.scan_mean), float(one.scan_sd)))}


def _read(files: CaseFiles, sources: dict[str, str]) -> Case:
    """Read a case whose files are still those that were hashed."""
    case = files.read()
    for role, sha256 in sources.items():
        if case.sources.get(role) != sha256:
            raise InputError(
                getattr(files, role, files.flair), "was changed while the cases were prepared", "make the stream anew"
            )
    return case


def _folder(work: str | Path | None) -> Path:
    """Return the folder of the prepared cases, made if need be."""
    try:
        if work is None:
            return Path(tempfile.mkdtemp(prefix="synthlong-"))
        Path(work).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        way = "name a folder that you may write to by work="
        raise OutputError(work or tempfile.gettempdir(), f"cannot be made ({error.strerror})", way) from error
    return Path(work).absolute()


def _remove(folder: Path, process: int) -> None:
    """Remove a temporary folder, in the process that made it: a forked worker has the stream, too."""
    if os.getpid() == process:
        shutil.rmtree(folder, ignore_errors=True)
