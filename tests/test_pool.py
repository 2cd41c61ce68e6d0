import os
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from synthlong.pool import LocalPool, Lost, count


def square(n):
    count(n)
    return n * n


def threads(_):
    return torch.get_num_threads(), signal.getsignal(signal.SIGINT) == signal.SIG_IGN, os.getpid()


def die_the_first_times(task):
    """Leave a file at each call; die while there are fewer than `times`."""
    folder, name, times = task
    calls = len(list(Path(folder).glob(f"{name}-*")))
    (Path(folder) / f"{name}-{calls}").touch()
    count(calls + 1)
    if calls < times:
        os.kill(os.getpid(), signal.SIGKILL)
    return name


def fail(text):
    raise FileNotFoundError(2, text)


def sleep(seconds):
    time.sleep(seconds)


def test_results_come_as_they_are_done_and_are_counted():
    seen = []
    with LocalPool(2, tasks=10) as pool:
        assert sorted(pool.run(square, range(6), seen.append)) == [0, 1, 4, 9, 16, 25]
        assert seen[-1] == 15
        assert list(pool.run(square, [3], seen.append)) == [9]  # counts of its own
        assert seen[-1] == 3
        pids = set()
        for n, ignores_interrupts, pid in pool.run(threads, range(3)):
            assert (n, ignores_interrupts) == (1, True)
            pids.add(pid)
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_counts_of_tasks_that_have_ended_are_asked_for_once(monkeypatch):
    asked, seen = Counter(), []
    honest = LocalPool.count
    monkeypatch.setattr(LocalPool, "count", lambda pool, slot: asked.update([slot]) or honest(pool, slot))
    with LocalPool(1, tasks=200) as pool:
        assert list(pool.run(square, [1] * 200, seen.append)) == [1] * 200
    assert seen == sorted(seen)
    assert seen[-1] == 200
    assert asked.total() < 10 * 200


def test_a_death_costs_its_task_only(tmp_path):
    """One task survives its second attempt, one its third, one never; the others do not notice."""
    tasks = [(tmp_path, name, times) for name, times in (("a", 0), ("b", 1), ("c", 2), ("d", 9), ("e", 0))]
    seen = []
    with LocalPool(2, tasks=len(tasks)) as pool:
        results = list(pool.run(die_the_first_times, tasks, seen.append))
    lost = [r for r in results if isinstance(r, Lost)]
    assert sorted(r for r in results if isinstance(r, str)) == ["a", "b", "c", "e"]
    assert [(r.task[1], r.counted) for r in lost] == [("d", 3)]
    assert len(list(tmp_path.glob("d-*"))) == 3
    assert seen[-1] == 1 + 2 + 3 + 3 + 1  # what dead workers counted is forgotten


def test_what_a_task_counted_stays_while_it_waits_for_another_chance(tmp_path):
    tasks = [(tmp_path, "a", 1), *((tmp_path, f"b{n}", 0) for n in range(12))]
    seen = []
    with LocalPool(1, tasks=len(tasks)) as pool:
        list(pool.run(die_the_first_times, tasks, seen.append))
    assert seen == sorted(seen)
    assert seen[-1] == 2 + 12


def test_workers_that_die_at_rest_are_replaced():
    with LocalPool(2, tasks=8) as pool:
        pids = {pid for _, _, pid in pool.run(threads, range(4))}
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        assert sorted(pool.run(square, range(4))) == [0, 1, 4, 9]


def test_an_error_ends_the_run_and_the_workers():
    with pytest.raises(FileNotFoundError, match="which"), LocalPool(1, tasks=3) as pool:
        list(pool.run(fail, ["which", "not this", "nor this"]))


def test_stopping_does_not_wait_for_tasks():
    started = time.monotonic()
    with LocalPool(2, tasks=4) as pool:
        next(pool.run(sleep, [0, 100, 100, 100]))
    assert time.monotonic() - started < 60
