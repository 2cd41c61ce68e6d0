import errno
import json
import os
import signal
import socket
import subprocess
import sys

import pytest

from synthlong.dataset import lock
from synthlong.dataset.lock import LOCK, writer_lock
from synthlong.errors import InputWarning, OutputError

HOLD = """
import sys, time
from pathlib import Path
from synthlong.dataset.lock import writer_lock
with writer_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of `tmp_path`."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def without_flock(monkeypatch, error=errno.ENOLCK):
    def flock(descriptor, operation):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(lock.fcntl, "flock", flock)


def test_second_writer_is_refused_at_once_and_told_by_whom(tmp_path, holder):
    for break_lock in (False, True):  # a live process of this machine keeps it
        with (
            pytest.raises(OutputError, match=f"locked by process {holder.pid} on {socket.gethostname()} since 20"),
            writer_lock(tmp_path, break_lock=break_lock),
        ):
            pass
    assert holder.poll() is None


def test_lock_is_gone_afterwards_and_after_an_error(tmp_path):
    with writer_lock(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    with pytest.raises(KeyError), writer_lock(tmp_path):
        raise KeyError
    assert not list(tmp_path.iterdir())


def test_killed_holder_leaves_no_lock(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / LOCK).exists()
    with writer_lock(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()


def test_lock_of_another_host_is_the_users_to_break(tmp_path):
    other = {"pid": 7, "host": "node-9.example", "since": "2026-11-22T10:00:00+00:00"}
    (tmp_path / LOCK).write_text(json.dumps(other))
    with (
        pytest.raises(OutputError, match=r"process 7 on node-9\.example since 2026.*--break-lock"),
        writer_lock(tmp_path),
    ):
        pass
    assert json.loads((tmp_path / LOCK).read_text()) == other
    with writer_lock(tmp_path, break_lock=True):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    assert not (tmp_path / LOCK).exists()


def test_empty_lock_file_of_a_writer_killed_at_birth_is_taken(tmp_path):
    (tmp_path / LOCK).touch()
    with writer_lock(tmp_path):
        pass


@pytest.mark.parametrize("error", [errno.ENOLCK, errno.ENOSYS])
def test_without_flock_the_file_itself_is_the_lock(tmp_path, monkeypatch, error):
    without_flock(monkeypatch, error)
    first = writer_lock(tmp_path)
    with pytest.warns(InputWarning, match="no flock"):
        first.__enter__()
    with pytest.warns(InputWarning), pytest.raises(OutputError, match="locked by process"), writer_lock(tmp_path):
        pass
    assert (tmp_path / LOCK).exists()
    first.__exit__(None, None, None)
    assert not (tmp_path / LOCK).exists()


def test_without_flock_a_stale_file_is_the_users_to_break(tmp_path, monkeypatch):
    without_flock(monkeypatch)
    (tmp_path / LOCK).write_text(json.dumps({"pid": 1, "host": socket.gethostname(), "since": "then"}))
    with pytest.warns(InputWarning), pytest.raises(OutputError, match="--break-lock"), writer_lock(tmp_path):
        pass
    with pytest.warns(InputWarning), writer_lock(tmp_path, break_lock=True):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()


def test_only_ones_own_lock_file_is_removed(tmp_path):
    with writer_lock(tmp_path):
        (tmp_path / LOCK).unlink()
        (tmp_path / LOCK).write_text("of someone who broke it")
    assert (tmp_path / LOCK).read_text() == "of someone who broke it"


def test_folder_that_cannot_be_written(tmp_path):
    with pytest.raises(OutputError, match=r"cannot be written \("), writer_lock(tmp_path / "missing"):
        pass
