"""One writer at a time, in a run's folder (`OUT/.lock`) or of a file (`.NAME.lock` beside it).

The kernel holds the lock where it can, and frees it when its holder dies: a dead writer on this machine never needs
clearing up. Elsewhere the file's existence is the lock. What the kernel cannot tell is whether a writer on another
machine lives, on file systems that do not share locks: a run's lock file that names another host is refused until the
user breaks it. It is synced at once, for other hosts to read.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from synthlong.errors import InputWarning, OutputError, short
from synthlong.publishing import is_full

try:
    import fcntl
except ImportError:  # not POSIX: the file's existence is the lock
    fcntl = None  # type: ignore[assignment]

__all__ = ["LOCK", "file_lock", "writer_lock"]

LOCK = ".lock"
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)
_TRIES = 10


@contextmanager
def writer_lock(out: Path, *, break_lock: bool = False) -> Iterator[None]:
    """Hold the lock of a folder for the length of a block, or refuse at once.

    Args:
        out: The folder; it exists.
        break_lock: Take the lock from a holder that the kernel does not know: on another machine, or on a file
            system without `flock`. Never from a live process of this machine.

    Raises:
        OutputError: Another process holds it, or the folder cannot be written to.
    """
    with _held(out / LOCK, out, break_lock):
        yield


@contextmanager
def file_lock(file: Path) -> Iterator[None]:
    """Hold the lock of a file to be written, `.NAME.lock` beside it, from whoever the kernel does not know.

    Raises:
        OutputError: Another process holds it, or the folder cannot be written to.
    """
    with _held(file.with_name(f".{file.name}{LOCK}"), file, break_lock=True):
        yield


@contextmanager
def _held(path: Path, what: Path, break_lock: bool) -> Iterator[None]:
    try:
        descriptor = _taken(path, what, break_lock)
    except OSError as error:
        space = "free some space or a quota, then run it again"
        way_out = space if is_full(error) else "choose a folder you may write to"
        raise OutputError(what, f"cannot be written ({error.strerror})", way_out) from error
    try:
        yield
    finally:
        with suppress(OSError):
            if _is_file(descriptor, path):  # and not that of whoever broke the lock
                path.unlink()
        os.close(descriptor)


def _taken(path: Path, what: Path, break_lock: bool) -> int:
    """Return a descriptor of the lock file, which is now ours."""
    for _ in range(_TRIES):
        try:
            descriptor, created = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666), True
        except FileExistsError:
            try:
                descriptor, created = os.open(path, os.O_RDWR | os.O_CLOEXEC), False
            except FileNotFoundError:  # its holder has just ended
                continue
        try:
            if _locked(path, what, descriptor, created, break_lock):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
    raise OutputError(what, "its lock changes hands all the time", "let the other writer end first")


def _locked(path: Path, what: Path, descriptor: int, created: bool, break_lock: bool) -> bool:
    """Lock the open file and write who holds it; False if the file has gone meanwhile."""
    holder = {} if created else _holder(descriptor)
    try:
        if fcntl is None:
            raise OSError(errno.ENOSYS, "no flock")
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        known_dead = holder.get("host") == socket.gethostname() or not holder
    except BlockingIOError:
        raise _refusal(what, holder, "wait until it has ended, or stop it") from None
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        text = f"{short(what)}: this file system has no flock; two writers are told apart by {path.name} alone"
        warnings.warn(text, InputWarning, stacklevel=4)
        known_dead = created
    if not known_dead:
        if not break_lock:
            raise _refusal(what, holder, "if that process is gone, add --break-lock")
        if _lives_here(holder):
            raise _refusal(what, holder, f"stop it, or remove {path.name} if that process is another program")
        if _is_file(descriptor, path):  # and not that of another who broke it first
            path.unlink(missing_ok=True)
        return False
    if not _is_file(descriptor, path):
        return False
    mine = {"pid": os.getpid(), "host": socket.gethostname(), "since": datetime.now(UTC).isoformat(timespec="seconds")}
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(mine).encode(), 0)
        os.fsync(descriptor)
    except OSError:
        with suppress(OSError):
            path.unlink()
        raise
    return True


def _holder(descriptor: int) -> dict[str, Any]:
    try:
        holder = json.loads(os.pread(descriptor, 4096, 0))
    except ValueError:  # taken this instant, or by something else
        return {}
    return holder if isinstance(holder, dict) else {}


def _lives_here(holder: dict[str, Any]) -> bool:
    """Return whether there is a process of the holder's number on this machine, if that is its host."""
    pid = holder.get("pid")
    if holder.get("host") != socket.gethostname() or not isinstance(pid, int):
        return False
    try:
        os.kill(pid, 0)
    except PermissionError:  # another user's
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return True


def _refusal(what: Path, holder: dict[str, Any], way_out: str) -> OutputError:
    pid, host, since = (holder.get(key, "?") for key in ("pid", "host", "since"))
    who = f"process {pid} on {host} since {since}" if holder else "another process"
    return OutputError(what, f"locked by {who}", way_out)


def _is_file(descriptor: int, path: Path) -> bool:
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    return os.path.samestat(there, os.fstat(descriptor))
