"""A run on a Dask cluster: one that is there (`tcp://...`), or one that a batch system starts (`slurm.toml`).

The plan is the local one, and so are the bytes. Workers need the run's folder and the cases on a file system that all
of them share, the run's versions and type of processor, and one thread each; every worker is asked before its first
task.
"""

from __future__ import annotations

import logging
import secrets
import time
import tomllib
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from synthlong import pool
from synthlong.environment import environment
from synthlong.errors import ConfigError, OutputError
from synthlong.pool import Pool, call
from synthlong.publishing import PROBE

__all__ = ["DaskPool"]

_PATIENCE_S = 30.0
_STOP_S = 4.0
_ASK_S = 1.0
_SYSTEMS = {
    "slurm": "SLURMCluster",
    "pbs": "PBSCluster",
    "sge": "SGECluster",
    "lsf": "LSFCluster",
    "oar": "OARCluster",
    "htcondor": "HTCondorCluster",
    "local": "LocalCluster",
}


@dataclass(frozen=True)
class _Demand:
    """What a worker must have: the run's folder, known by a token in it, and environment; and who tells it to stop."""

    folder: Path
    token: str
    environment: dict[str, Any]
    stop: str


class DaskPool(Pool):
    """Workers of a Dask cluster.

    Args:
        where: Address of a scheduler, or a TOML file: one table named after the batch system (slurm, pbs, sge, lsf,
            oar, htcondor, local), whose keys are those of `dask_jobqueue`'s cluster, and `jobs`, how many to start.
        folder: The run's folder.
        environment: What `environment` gives here.

    Raises:
        ConfigError: `where` is neither.
        OutputError: No scheduler or no worker answers, or a worker lacks what it needs.
    """

    chances = 1  # Dask itself tries a task again, `distributed.scheduler.allowed-failures` times

    def __init__(self, where: str, *, folder: Path, environment: dict[str, Any]) -> None:
        try:
            import dask
            import distributed
        except ImportError as error:
            raise ConfigError('--scheduler needs Dask: pip install "synthlong[dask]"') from error
        dask.config.set({"distributed.scheduler.allowed-failures": 2})
        for name in ("distributed", "tornado.application", "asyncio"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # no walls of text on Ctrl-C
        self._where, self._cluster = where, None
        refused: list[str] = []
        if where.endswith(".toml"):
            self._cluster = _cluster(Path(where), refused)
        elif "://" not in where:
            raise ConfigError(f"--scheduler {where}: give an address such as tcp://host:8786, or a TOML file")
        try:
            self._client = distributed.Client(self._cluster or where, timeout=_PATIENCE_S, set_as_default=False)
            if self._cluster is None:
                self._client.wait_for_workers(1, timeout=_PATIENCE_S)
            else:
                self._wait_in_queue(refused)
        except (OSError, TimeoutError) as error:
            self._close_cluster()
            way = "start it with `dask scheduler` and `dask worker --nthreads 1`"
            raise OutputError(where, "no scheduler with workers answers there", way) from error
        self.deaths = (distributed.KilledWorker,)
        self._counts: dict[int, int] = {}
        self._open: set[Future[Any]] = set()
        self._executor = self._client.get_executor(pure=False, retries=0)
        self._stop = distributed.Event(f"synthlong-stop-{secrets.token_hex(8)}", client=self._client)
        self._probe = folder / f"{PROBE}{secrets.token_hex(8)}"
        token = secrets.token_hex(16)
        try:
            self._probe.write_text(token)
            self._demand = _Demand(self._probe.resolve(), token, environment, self._stop.name)
            workers = self._client.scheduler_info(n_workers=-1)["workers"]
            for asked in [self._executor.submit(_check, self._demand, workers=[w]) for w in workers]:
                asked.result(timeout=_PATIENCE_S)
        except TimeoutError as error:
            self.stop()
            raise OutputError(where, "a worker does not answer", "restart the workers") from error
        except BaseException:
            self.stop()
            raise

    def _wait_in_queue(self, refused: list[str]) -> None:
        """Wait for the first job, however long the queue is, unless the batch system refuses the jobs."""
        while not refused:
            with suppress(TimeoutError):
                return self._client.wait_for_workers(1, timeout=_ASK_S)
        self._client.close()
        self._close_cluster()
        raise OutputError(self._where, f"no job can be submitted ({refused[0]})", "correct it, then try again")

    @property
    def size(self) -> int:  # type: ignore[override]
        """The number of workers now."""
        return max(1, len(self._client.scheduler_info(n_workers=-1)["workers"]))

    def submit(self, slot: int, work: Callable[[Any], Any], task: Any) -> Future[Any]:  # noqa: D102
        result: Future[Any] = Future()
        remote = self._executor.submit(_work, self._demand, work, task)
        self._open.add(remote)
        remote.add_done_callback(partial(self._hand_on, result, slot))
        return result

    def count(self, slot: int) -> int:  # noqa: D102
        return self._counts.get(slot, 0)

    def stop(self) -> None:  # noqa: D102
        try:
            if self._open:
                self._stop.set()  # cancelling does not end a task at work
                wait(self._open, timeout=_STOP_S)
            self._executor.shutdown(wait=False)
        except (OSError, TimeoutError):  # the scheduler has gone
            pass
        finally:
            self._probe.unlink(missing_ok=True)
            self._client.close()
            self._close_cluster()

    def _hand_on(self, result: Future[Any], slot: int, remote: Future[Any]) -> None:
        self._open.discard(remote)
        if remote.cancelled():
            way = "start it again, then run the same command again"
            result.set_exception(OutputError(self._where, "the scheduler has lost the run's tasks", way))
        elif error := remote.exception():
            result.set_exception(error)
        else:
            self._counts[slot], value = remote.result()
            result.set_result(value)

    def _close_cluster(self) -> None:
        if self._cluster is not None:
            self._cluster.close()


def _cluster(path: Path, refused: list[str]) -> Any:
    """Submit the jobs that a TOML file asks for; `refused` gets what the batch system says against it."""
    import dask_jobqueue
    from dask_jobqueue.local import LocalCluster
    from distributed.deploy.spec import ProcessInterface

    try:
        (system, options), *more = tomllib.loads(path.read_text()).items()
        kind = LocalCluster if system == "local" else getattr(dask_jobqueue, _SYSTEMS[system])
        jobs = options.pop("jobs")
        if more or not isinstance(jobs, int) or jobs < 1:
            raise ValueError
    except OSError as error:
        raise ConfigError(f"{path.name}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, AttributeError) as error:
        systems = ", ".join(_SYSTEMS)
        raise ConfigError(f"{path.name}: must hold one table, of {systems}, with `jobs = N` in it") from error

    class Job(kind.job_cls):  # type: ignore[name-defined]
        """A job whose submission is watched: `dask_jobqueue` itself waits for ever."""

        async def _submit_job(self, script: str) -> Any:
            try:
                return await super()._submit_job(script)
            except (OSError, RuntimeError) as error:
                said = str(error).partition("stderr:\n")[2].strip() or str(error)
                refused.append(said.splitlines()[0])
                raise

        async def close(self) -> None:
            """End the job and say so: `dask_jobqueue` does not, and Dask may ask when it closes the cluster."""
            await super().close()
            await ProcessInterface.close(self)

    try:
        cluster = kind(**{"processes": 1, "cores": 1, "job_cls": Job, **options})
        cluster.scale(jobs=jobs)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{path.name}: [{system}] is not understood ({error})") from error
    return cluster


# On a worker

_demand: _Demand | None = None


def _work(demand: _Demand, work: Callable[[Any], Any], task: Any) -> tuple[int, Any]:
    """Do a task on a worker; return what it counted, and its result."""
    _check(demand)
    torch.set_num_threads(1)  # of this thread
    counts = [0]
    pool.begin(counts, _told_by(demand.stop))
    result = call(0, work, task)
    return counts[0], result


def _check(demand: _Demand) -> None:
    """Raise unless this worker can make the run's bytes."""
    import distributed

    from synthlong.dataset import making

    global _demand
    if demand == _demand:
        return
    worker = distributed.get_worker()
    if worker.state.nthreads != 1:
        raise OutputError(worker.address, f"has {worker.state.nthreads} threads", "start workers with --nthreads 1")
    try:
        seen = demand.folder.read_text() == demand.token
    except OSError:
        seen = False
    if not seen:
        way = "put it on a file system that all workers share"
        raise OutputError(demand.folder.parent, f"worker {worker.address} does not see this folder", way)
    here = environment(demand.environment["machine"]["device"])
    for key, values in demand.environment.items():
        for name, value in values.items():
            if here[key].get(name) != value:
                problem = f"has {name} {here[key].get(name)}, the run {value}"
                raise OutputError(worker.address, problem, "start workers that are all alike")
    making.forget()  # this worker may have served another run
    _demand = demand


def _told_by(name: str) -> Callable[[], bool]:
    """Return a function that asks the scheduler, at most once a second, whether to stop."""
    import distributed

    event = distributed.Event(name)
    asked = time.monotonic()

    def told() -> bool:
        nonlocal asked
        if time.monotonic() - asked < _ASK_S:
            return False
        asked = time.monotonic()
        return bool(event.is_set())

    return told
