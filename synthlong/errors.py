"""What can go wrong, as types: each message names the file, the problem and the way out."""

from __future__ import annotations

import re
from pathlib import Path

__all__ = [
    "ConfigError",
    "FileError",
    "InputError",
    "InputWarning",
    "OutputError",
    "ShardCorruptError",
    "SynthlongError",
    "name_of",
    "short",
]

_LAST_LINE = re.compile(r"^[\w.]+Error: (.+?): (.+); (.+)$", re.MULTILINE)


def short(path: str | Path) -> str:
    """Return `directory/name`, the form in which messages name files (no absolute path leaks)."""
    path = Path(path)
    if len(path.parts) > 1 and path.parts[-2] != "/":
        return "/".join(path.parts[-2:])
    return name_of(path)


def name_of(path: Path) -> str:
    """Return the name of a file or folder, that of the working directory for "."."""
    return path.name or path.resolve().name or str(path)


class SynthlongError(Exception):
    """Base of all errors that are the user's to act on; `exit_code` is the command line's."""

    exit_code = 1


class FileError(SynthlongError):
    """A file and what is wrong with it: the base of what is said of inputs and outputs.

    Args:
        path: The file, folder or manifest. Where `problem` is None, a worker's traceback instead: torch rebuilds a
            worker's exception from its text alone, so the fields are read back from its last line.
        problem: What is wrong with it, in a few words.
        way_out: What the user can do about it.
    """

    def __init__(self, path: str | Path, problem: str | None = None, way_out: str = "") -> None:
        if problem is None:
            self.add_note(str(path))
            path, problem, way_out = _LAST_LINE.findall(str(path))[-1]
        super().__init__(path, problem, way_out)
        self.path, self.problem, self.way_out = Path(path), problem, way_out

    def __str__(self) -> str:
        return f"{short(self.path)}: {self.problem}; {self.way_out}"


class InputError(FileError):
    """A file that cannot be used."""


class InputWarning(UserWarning):
    """A file that can be used but deserves a look."""


class ConfigError(SynthlongError):
    """An option or configuration value outside its range."""

    exit_code = 2


class OutputError(FileError):
    """A place that cannot be written to: permission, space, or held by another run."""

    exit_code = 3


class ShardCorruptError(InputError):
    """A shard whose bytes are not those that were written."""

    def __init__(self, path: str | Path, sample: int | None, problem: str) -> None:
        where = problem if sample is None else f"sample {sample}: {problem}"
        super().__init__(path, where, "copy the shard again, or delete it and run `synthlong generate` again")
        self.sample = sample
        self.args = (path, sample, problem)  # what pickling calls the class with
