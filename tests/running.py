"""Runs as the shell starts them: a process group of their own, signals, and what is left on disk."""

import os
import signal
import subprocess
import sys
import time
import warnings
from contextlib import contextmanager, suppress

import pytest

from synthlong.dataset.making import forget
from synthlong.dataset.run import generate
from synthlong.errors import InputWarning
from synthlong.networks import one_thread


class Here:
    """A pool that works in this process: nothing is started, and what a test patches is seen."""

    def __init__(self, *_, **__):
        self.counted = 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        forget()

    def count(self, n=1):
        self.counted += n

    def run(self, work, tasks, report=None):
        for task in tasks:
            with one_thread():
                result = work(task)
            yield result
            if report:
                report(self.counted)


def work_here(monkeypatch, module):
    """Let a module that makes a pool use this process."""
    pool = Here()
    monkeypatch.setattr(module, "LocalPool", lambda *_, **__: pool)
    monkeypatch.setattr(module, "count", pool.count)


def bytes_of(out):
    """Every file of a folder, by its relative path."""
    return {p.relative_to(out).as_posix(): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}


def put(out, files):
    """Write files by their relative path, as `bytes_of` returns them."""
    for name, data in files.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(data)


def made(manifest, name, **options):
    """The files of a run left alone; it lies beside the manifest, as do those of the tests, so `source` is the same."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InputWarning)
        generate(manifest, manifest.parent / name, **options)
    return bytes_of(manifest.parent / name)


class Terminated(BaseException):
    """What SIGTERM raises, as in the command line."""


def asking_to_stop(asked, *, at):
    """Return a progress callback that sends a signal at a step."""

    def progress(done, *_):
        if done == at:
            signal.raise_signal(asked)

    return progress


@contextmanager
def stopped(asked):
    """Expect that the block ends by what the signal's handler raises, with the handlers back in place."""

    def terminate(*_):
        raise Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt if asked == signal.SIGINT else Terminated):
            yield
        assert signal.getsignal(signal.SIGTERM) is terminate
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGINT, interrupt)


@contextmanager
def started(*arguments, **options):
    """`synthlong ARGUMENTS` in a session of its own; killed when the block ends, if it still runs."""
    process = subprocess.Popen(
        [sys.executable, "-m", "synthlong_cli.main", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored where tests run in the background
        **options,
    )
    try:
        yield process
    finally:
        kill_group(process.pid)
        process.communicate()


def kill_group(group):
    """SIGKILL, to all of them."""
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def wait_for(condition, process=None, *, within_s=240):
    """Poll until `condition()` is true; fail if the process ends before."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert process is None or process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def workers_of(process):
    """Process ids of a run's spawned workers."""
    children = []
    for entry in os.listdir("/proc"):
        if not entry.isdecimal():
            continue
        try:
            with open(f"/proc/{entry}/stat") as file:
                parent = int(file.read().rsplit(")", 1)[1].split()[1])
            with open(f"/proc/{entry}/cmdline") as file:
                spawned = "spawn_main" in file.read()
        except OSError:
            continue
        if parent == process.pid and spawned:
            children.append(int(entry))
    return children


def group_is_gone(group, *, within_s):
    """Workers are gone when the parent is; multiprocessing's own helper follows when its pipe closes."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False
