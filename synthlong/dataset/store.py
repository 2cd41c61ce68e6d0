"""Prepared cases on disk, for the workers of a run: arrays that are mapped, not loaded.

Reading a scan, filling its lesions and working out where lesions may lie takes seconds; a worker that makes one
pair of each of a hundred cases must not pay that again. Everything lies under `OUT/work/` until the run is complete.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from synthlong.bank import read_bank
from synthlong.case import Case
from synthlong.comparison import shapes_for
from synthlong.derived import bounds_of, histogram_of, lesions_of, placements_of, profiles_of
from synthlong.environment import environment
from synthlong.errors import OutputError
from synthlong.lesions import LesionMap
from synthlong.placement import PlacementMap, allowed_of
from synthlong.synthesis import SynthesisConfig

__all__ = ["MOST_OPEN", "open_case", "stamp_of", "store_case", "stored_stamp"]

MOST_OPEN = 16
"""Cases that a process keeps open: each holds a dozen file descriptors, and opening one takes milliseconds."""

_ARRAYS = ("flair", "lesions", "brain", "tissue", "healthy")


def stamp_of(
    case_id: str, sources: dict[str, str], config: SynthesisConfig, assets: dict[str, str], *, prefer: str | None
) -> dict[str, Any]:
    """Return all that a stored case depends on, plain JSON.

    Args:
        case_id: The case.
        sources: SHA-256 of what it is made of.
        config: Of the run.
        assets: Result of `asset_hashes`; they stand for the paths in the config.
        prefer: Which of two disagreeing orientations of its scan is used.
    """
    plain = config.as_dict() | dict.fromkeys(assets)
    return {
        "id": case_id,
        "sources": sources,
        "prefer": prefer,
        "assets": assets,
        "config": plain,
        **environment(config.device),
    }


def store_case(folder: Path, case: Case, config: SynthesisConfig, *, stamp: dict[str, Any]) -> None:
    """Write a case with what `draw_recipe` and `render` work out from it; complete or not at all.

    Args:
        folder: Where; replaced if it exists.
        case: With its healthy volume.
        config: Of the run.
        stamp: See `stamp_of`; `stored_stamp` gives it back.

    Raises:
        OutputError: There is no space, or the folder may not be written.
    """
    lesions, places = lesions_of(case, config.max_event_mm3), placements_of(case, config)
    if config.painter == "copypaste":
        shapes_for(config.painter, case, lesions, read_bank())  # no case without a lesion to copy
    arrays = {name: getattr(case, name) for name in _ARRAYS}
    arrays |= {"labels": lesions.labels, "volumes_mm3": lesions.volumes_mm3, "mutable": lesions.mutable}
    arrays["profiles"] = profiles_of(case, config.max_event_mm3)
    arrays |= {"allowed": allowed_of(case, config.margin), "voxels": places.voxels, "cumulative": places.cumulative}
    plain = {
        "id": case.id,
        "affine": case.affine.tolist(),
        "scan_mean": case.scan_mean,
        "scan_sd": case.scan_sd,
        "sources": case.sources,
        "bounds": [side.tolist() for side in bounds_of(case)],
        "histogram": [part.tolist() for part in histogram_of(case)],
        "boxes": [[[s.start, s.stop] for s in box] for box in lesions.boxes],
        "stamp": stamp,
    }
    own = f"{os.getpid()}-{secrets.token_hex(4)}"  # another process may be storing the same case
    unfinished = folder.with_name(f"{folder.name}-{own}.unfinished")
    try:
        unfinished.mkdir(parents=True)
        for name, array in arrays.items():
            with _synced(unfinished / f"{name}.npy") as file:
                np.save(file, np.ascontiguousarray(array), allow_pickle=False)
        with _synced(unfinished / "case.json") as file:
            file.write(json.dumps(plain).encode())
        _put(unfinished, folder, stamp)
    except OSError as error:
        problem = f"a prepared case cannot be written ({error.strerror or 'no space left, or a limit on file sizes'})"
        raise OutputError(folder, problem, "free some space or a quota, or name another folder") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _put(unfinished: Path, folder: Path, stamp: dict[str, Any]) -> None:
    try:
        unfinished.rename(folder)
    except OSError:
        if stored_stamp(folder) == stamp:  # another was faster, and may have readers already
            return
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)


@contextmanager
def _synced(path: Path) -> Iterator[BinaryIO]:
    """Open a file to write that is on the disk when the block ends."""
    with path.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def stored_stamp(folder: Path) -> dict[str, Any] | None:
    """Return the stamp of a stored case, None if there is none."""
    try:
        return json.loads((folder / "case.json").read_text())["stamp"]
    except (OSError, ValueError, KeyError):
        return None


def open_case(folder: Path, config: SynthesisConfig) -> Case:
    """Open a stored case; its arrays are read from the disk as they are used."""
    plain = json.loads((folder / "case.json").read_text())

    def array(name: str) -> Any:
        return np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)

    lesions = LesionMap(
        labels=array("labels"),
        volumes_mm3=np.array(array("volumes_mm3")),
        boxes=tuple(tuple(slice(a, b) for a, b in box) for box in plain["boxes"]),
        mutable=np.array(array("mutable")),
    )
    case = Case(
        id=plain["id"],
        affine=np.array(plain["affine"]),
        scan_mean=plain["scan_mean"],
        scan_sd=plain["scan_sd"],
        sources=plain["sources"],
        **{name: array(name) for name in _ARRAYS},
    )
    first, last = plain["bounds"]
    case.derived["bounds"] = (np.array(first), np.array(last))
    grays, share = plain["histogram"]
    case.derived["histogram"] = np.array(grays, np.float32), np.array(share)
    case.derived["lesions", float(config.max_event_mm3)] = lesions
    case.derived["profiles", float(config.max_event_mm3)] = np.array(array("profiles"))
    case.derived["allowed", config.margin] = array("allowed")
    key = ("placements", config.prior, config.gray_matter, config.margin)
    case.derived[key] = PlacementMap(array("voxels"), array("cumulative"))
    return case
