import errno
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from synthlong import lock
from synthlong.errors import InputWarning, OutputError, short
from synthlong.lock import LOCK, writer_lock

HOLD = """
import sys, time
from pathlib import Path
from synthlong.lock import writer_lock
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
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    (tmp_path / LOCK).write_text(json.dumps({"pid": ended.pid, "host": socket.gethostname(), "since": "then"}))
    with pytest.warns(InputWarning), pytest.raises(OutputError, match="--break-lock"), writer_lock(tmp_path):
        pass
    with pytest.warns(InputWarning), writer_lock(tmp_path, break_lock=True):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("forbidden", [False, True])
def test_without_flock_a_live_process_of_this_machine_keeps_its_lock(tmp_path, monkeypatch, forbidden):
    def kill(pid, number):
        assert (pid, number) == (os.getpid(), 0)
        if forbidden:
            raise PermissionError

    monkeypatch.setattr(lock.os, "kill", kill)
    without_flock(monkeypatch)
    live = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": "then"})
    (tmp_path / LOCK).write_text(live)
    refused = pytest.raises(OutputError, match=rf"locked by process {os.getpid()} on .*; stop it, or remove \.lock")
    with pytest.warns(InputWarning), refused, writer_lock(tmp_path, break_lock=True):
        pass
    assert (tmp_path / LOCK).read_text() == live


def test_of_two_that_break_a_lock_at_once_one_gets_it(tmp_path, monkeypatch):
    (tmp_path / LOCK).write_text(json.dumps({"pid": 7, "host": "node-9.example", "since": "then"}))
    honest, first = lock._holder, writer_lock(tmp_path, break_lock=True)

    def overtaken(descriptor):
        stale = honest(descriptor)
        monkeypatch.setattr(lock, "_holder", honest)
        first.__enter__()
        return stale

    monkeypatch.setattr(lock, "_holder", overtaken)
    with (
        pytest.raises(OutputError, match=f"locked by process {os.getpid()} "),
        writer_lock(tmp_path, break_lock=True),
    ):
        pass
    assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    first.__exit__(None, None, None)
    assert not (tmp_path / LOCK).exists()


def test_the_holder_is_on_the_disk_when_the_block_begins(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(lock.os, "fsync", lambda descriptor: synced.append(os.pread(descriptor, 4096, 0)))
    with writer_lock(tmp_path):
        assert synced == [(tmp_path / LOCK).read_bytes()]
        assert json.loads(synced[0])["pid"] == os.getpid()


def test_lock_file_of_something_else_is_refused(tmp_path):
    (tmp_path / LOCK).write_text('{"owner": "another program"}')
    with pytest.raises(OutputError, match=r"locked by process \? on \? since \?"), writer_lock(tmp_path):
        pass


def test_the_working_folder_has_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with writer_lock(Path()):
        with pytest.raises(OutputError) as caught, writer_lock(Path()):
            pass
        assert str(caught.value).startswith(f"{tmp_path.name}: locked by process ")
    assert short("/") == "/"


def test_only_ones_own_lock_file_is_removed(tmp_path):
    with writer_lock(tmp_path):
        (tmp_path / LOCK).unlink()
        (tmp_path / LOCK).write_text("of someone who broke it")
    assert (tmp_path / LOCK).read_text() == "of someone who broke it"


@pytest.mark.parametrize("call", ["open", "pwrite", "fsync"])
def test_a_full_disk_is_said_and_leaves_no_lock(tmp_path, monkeypatch, call):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(lock.os, call, full)
    refused = pytest.raises(OutputError, match=r"cannot be written \(No space left on device\); free some space")
    with refused, writer_lock(tmp_path):
        pass
    monkeypatch.undo()
    assert not list(tmp_path.iterdir())


def test_folder_that_cannot_be_written(tmp_path):
    with pytest.raises(OutputError, match=r"cannot be written \("), writer_lock(tmp_path / "missing"):
        pass
