"""Runs on a Dask cluster: the bytes of a local run, and what happens when a worker is lost or unfit."""

import logging
import os
import shutil
import signal
import sys
import warnings
from dataclasses import replace

import pytest
from running import bytes_of, made, started, wait_for

from synthlong import SynthesisConfig
from synthlong.bank import LesionBank
from synthlong.dataset import cluster as module
from synthlong.dataset.cluster import DaskPool
from synthlong.dataset.run import generate
from synthlong.environment import environment
from synthlong.errors import ConfigError, OutputError

distributed = pytest.importorskip("distributed")
dask_jobqueue = pytest.importorskip("dask_jobqueue")

OPTIONS = {"pairs": 12, "seed": 5, "shard_size": 2, "config": SynthesisConfig(box=32, new_mean=4.0)}

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # of Dask and tornado on their way out
    pytest.mark.xdist_group("cluster"),
]


@pytest.fixture(scope="module")
def cluster():
    with (
        warnings.catch_warnings(action="ignore"),
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, dashboard_address=None, silence_logs=logging.CRITICAL
        ) as found,
    ):
        yield found


@pytest.fixture(scope="module")
def whole(manifest):
    return made(manifest, "local", workers=1, **OPTIONS)


@pytest.fixture
def out(manifest, request):
    folder = manifest.parent / f"dask-{abs(hash(request.node.nodeid))}"
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def test_the_bytes_are_those_of_a_local_run(manifest, whole, out, cluster):
    seen = []
    outcome = generate(
        manifest, out, scheduler=cluster.scheduler_address, progress=lambda *a: seen.append(a), **OPTIONS
    )
    assert (outcome.made, outcome.lost) == (12, {})
    assert seen[-1] == ("pairs", 12, 12)
    assert bytes_of(out) == whole


def test_workers_that_started_in_another_folder(manifest, whole, out, cluster, tmp_path, monkeypatch):
    """Names of cases, run and assets are relative to where the command is given."""
    with distributed.Client(cluster, set_as_default=False) as client:
        client.run(os.chdir, tmp_path)
        monkeypatch.chdir(manifest.parent)
        shutil.copy(LesionBank.default_path(), "bank.npz")
        options = OPTIONS | {"config": replace(OPTIONS["config"], lesion_bank="bank.npz")}
        try:
            generate(manifest.name, out.name, scheduler=cluster.scheduler_address, **options)
        finally:
            (manifest.parent / "bank.npz").unlink()
            client.run(os.chdir, os.getcwd())
    assert bytes_of(out) == whole
    assert not list(tmp_path.iterdir())


def test_killed_worker_costs_nothing(manifest, whole, out, cluster):
    with distributed.Client(cluster, set_as_default=False) as client:
        alive, killed = list(client.run(os.getpid).values()), []

    def kill_one(stage, done, _total):
        if stage == "pairs" and done and not killed:
            killed.append(alive.pop())
            os.kill(killed[0], signal.SIGKILL)

    outcome = generate(manifest, out, scheduler=cluster.scheduler_address, progress=kill_one, **OPTIONS)
    assert killed
    assert outcome.lost == {}
    assert bytes_of(out) == whole


def test_ctrl_c_stops_the_workers_too(manifest, out, cluster, tmp_path):
    (tmp_path / "c.toml").write_text("box = 32\nnew_mean = 4.0\n")
    numbers = ["--pairs", 2000, "--seed", 5, "--shard-size", 50, "--config", tmp_path / "c.toml"]
    with started("generate", manifest, "-o", out, *numbers, "--scheduler", cluster.scheduler_address) as process:
        wait_for(lambda: (out / "run.json").exists(), process)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(timeout=30) in (130, -signal.SIGINT)
        said = process.stderr.read()
    assert "Traceback" not in said
    assert len(said.splitlines()) <= 3, said
    with distributed.Client(cluster, set_as_default=False) as client:
        wait_for(lambda: not any(client.processing().values()), within_s=30)
    assert not list(out.rglob(".probe-*"))
    assert not list(out.rglob("*.tmp-*"))


def test_workers_that_differ_are_refused(tmp_path, cluster):
    other = environment("cpu")
    other["machine"]["cpu"] = "AVX9"
    with pytest.raises(OutputError, match=r"has cpu .*, the run AVX9; start workers that are all alike"):
        DaskPool(cluster.scheduler_address, folder=tmp_path, environment=other)
    assert not list(tmp_path.iterdir())


def test_folder_must_be_shared(tmp_path, cluster):
    demand = module._Demand(tmp_path / "nowhere", "token", environment("cpu"), "stop")
    with distributed.Client(cluster, set_as_default=False) as client:
        future = client.submit(module._check, demand)
        with pytest.raises(OutputError, match="does not see this folder; put it on a file system that all workers"):
            future.result()


def test_workers_with_several_threads_are_refused(tmp_path):
    options = {"n_workers": 1, "threads_per_worker": 2, "processes": False, "dashboard_address": None}
    refused = pytest.raises(OutputError, match="has 2 threads; start workers with --nthreads 1")
    with distributed.LocalCluster(**options) as two, refused:
        DaskPool(two.scheduler_address, folder=tmp_path, environment=environment("cpu"))


def test_nobody_answers(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_PATIENCE_S", 1.0)
    with pytest.raises(OutputError, match="no scheduler with workers answers there") as failure:
        DaskPool("tcp://127.0.0.1:9", folder=tmp_path, environment=environment("cpu"))
    assert failure.value.exit_code == 3


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "cannot be read"),
        ("[cray]\njobs = 1\n", "must hold one table, of slurm, pbs"),
        ("[slurm]\nqueue = 'short'\n", "with `jobs = N` in it"),
        ("[local]\njobs = 1\nmemry = '1GB'\n", "is not understood"),
        ("jobs = 1", "must hold one table"),
    ],
)
def test_toml_that_is_not_understood(tmp_path, text, said):
    if text is not None:
        (tmp_path / "c.toml").write_text(text)
    with pytest.raises(ConfigError, match=said):
        DaskPool(str(tmp_path / "c.toml"), folder=tmp_path, environment=environment("cpu"))


def test_neither_address_nor_file(tmp_path):
    with pytest.raises(ConfigError, match=r"give an address such as tcp://host:8786, or a TOML file"):
        DaskPool("slurm", folder=tmp_path, environment=environment("cpu"))


def test_without_dask_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(ConfigError, match=r'pip install "synthlong\[dask\]"'):
        DaskPool("tcp://here:1", folder=tmp_path, environment=environment("cpu"))


def test_jobs_of_a_batch_system(manifest, whole, out, tmp_path):
    """`[local]` starts each job as a process; the other systems submit the same script."""
    (tmp_path / "jobs.toml").write_text("[local]\njobs = 1\nmemory = '4GB'\n")
    generate(manifest, out, scheduler=str(tmp_path / "jobs.toml"), **OPTIONS)
    assert bytes_of(out) == whole


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo 'sbatch: error: invalid partition specified: cpu' >&2; exit 1", "invalid partition specified: cpu"),
        (None, "No such file or directory: 'sbatch'"),
    ],
)
def test_jobs_that_are_refused_are_not_waited_for(tmp_path, monkeypatch, script, said):
    kept = []  # Dask looks at the jobs that are not collected yet: all

    def start(job, *arguments, **options):
        kept.append(job)
        return submit(job, *arguments, **options)

    submit = dask_jobqueue.core.Job._submit_job
    monkeypatch.setattr(dask_jobqueue.core.Job, "_submit_job", start)
    monkeypatch.setenv("PATH", str(tmp_path))
    if script is not None:
        (tmp_path / "sbatch").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "sbatch").chmod(0o755)
    (tmp_path / "jobs.toml").write_text("[slurm]\njobs = 2\nmemory = '4GB'\nqueue = 'cpu'\n")
    with pytest.raises(OutputError, match=rf"jobs.toml: no job can be submitted \(.*{said}\)"):
        DaskPool(str(tmp_path / "jobs.toml"), folder=tmp_path, environment=environment("cpu"))
