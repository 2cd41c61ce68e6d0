"""Files that are whole or not there: written beside their place, then renamed; and whether there is such a place."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile

from synthlong.errors import OutputError

__all__ = ["PROBE", "check_place", "is_full", "is_leftover", "make_place", "output_error", "publish"]

PROBE = ".probe-"
"""Begins the name of a file that is there for a moment only, to see whether others see it."""


def make_place(path: Path) -> None:
    """Make the folder of a file that is to be written; see `check_place`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    check_place(path)


def check_place(path: Path) -> None:
    """Raise an OutputError if a file cannot be written to `path`: before the work, not after."""
    if path.is_dir():
        raise OutputError(path, "is a folder", "choose the name of a file")
    if not path.parent.is_dir():
        raise OutputError(path, "its folder does not exist", "make the folder, or choose another one")
    try:
        with TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        problem = f"its folder cannot be written to ({error.strerror})"
        raise OutputError(path, problem, "choose a folder you may write to") from error


def publish(path: str | Path, data: bytes) -> None:
    """Write `data` to `path` so that the name shows all of it or what it showed before.

    Raises:
        OutputError: The file cannot be written; nothing of it is left behind.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name[:200]}.tmp-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            try:
                rest = memoryview(data)
                while rest:
                    rest = rest[os.write(descriptor, rest) :]
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)
    except OSError as error:
        raise output_error(path, error, len(data)) from error


def is_leftover(name: str) -> bool:
    """Whether a file is what a writer leaves that was killed."""
    return ".tmp-" in name or name.startswith(PROBE)


def is_full(error: OSError) -> bool:
    """Whether a disk, quota or limit has no room left."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def output_error(path: Path, error: OSError, size: int) -> OutputError:
    """Return what to say where `size` bytes cannot be written to a path."""
    if is_full(error):
        try:
            free = f"{shutil.disk_usage(path.parent).free / 1e6:.1f} MB"
        except OSError:
            free = "an unknown amount"
        problem = f"no space left ({error.strerror}): needs {size / 1e6:.1f} MB, {free} free"
        return OutputError(path, problem, "free some space or a quota, then run the same command again")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return OutputError(path, f"cannot be written ({error.strerror})", "choose a folder you may write to")
    return OutputError(path, f"cannot be written ({error.strerror})", "check the folder, its permissions and the disk")


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems without it have nothing to sync
            raise
    finally:
        os.close(descriptor)
