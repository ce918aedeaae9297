"""What a batch promises, on every engine: here, on a real Ray, on a real Slurm, and by submitit's local executor."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from recipes_for_tests import call
from runs_for_tests import Place
from slurm_for_tests import slurm
from test_batch import batch, entries, program, running, seeded, until

from s2v_flow.cache.housekeeping import verify

LOCAL, RAY = ("--engine", "local"), ("--engine", "ray")
REAL_SLURM = ("--engine", "slurm", "--slurm", "timeout_min=20")
SLURM = (*REAL_SLURM, "--slurm", "cluster=local")

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _as_nice_as_the_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_worker_niceness", "0")  # Ray's own 15 takes minutes beside other work


@pytest.fixture(scope="session")
def real_slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Give the environment of a Slurm that runs on this machine for the tests."""
    with slurm(tmp_path_factory.mktemp("slurm") / "here") as environment:
        yield environment


@pytest.fixture(params=[LOCAL, RAY, SLURM, REAL_SLURM], ids=["local", "ray", "submitit", "slurm"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """Return the options of an engine that is installed."""
    if request.param == REAL_SLURM:
        for name, value in request.getfixturevalue("real_slurm").items():
            monkeypatch.setenv(name, value)
    chosen: tuple[str, ...] = request.param
    module = {"ray": "ray", "slurm": "submitit"}.get(chosen[1])
    if module is not None:
        pytest.importorskip(module, reason=f"the extra {chosen[1]} is not installed")
    return chosen


def worker_pids(batch_pid: int, logs: Path | None = None) -> list[int]:
    """Return the worker processes below a batch's: spawned ones, whatever stands in between; and those in Slurm's."""
    parents, spawned = {}, []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if b"spawn_main" in (folder / "cmdline").read_bytes():
                spawned.append(int(folder.name))

    def is_below(pid: int) -> bool:
        while pid in parents and pid != batch_pid:
            pid = parents[pid]
        return pid == batch_pid

    in_slurm = logs.glob(f"slurm/worker-{batch_pid}-*/pid.json") if logs is not None else ()
    return sorted({*filter(is_below, spawned), *(int(path.read_text(encoding="ascii")) for path in in_slurm)})


def until_gone(pids: list[int], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < end:
        time.sleep(0.1)
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def test_a_batch_survives_a_kill_and_a_cancel_and_delivers_every_job(
    tiny_models: Path, quick_run: Place, tmp_path: Path, engine: tuple[str, ...]
) -> None:
    """kill -9 costs a retry; cancelled, it leaves no worker; the same command delivers each video, nothing damaged."""
    made = seeded(tmp_path, tiny_models, rows="seed\n1\n2\n3\n", known=quick_run)
    process, before = program(made, "--workers", 2, *engine), entries(made)
    until(lambda: entries(made) - before, process, 300)
    logs = tmp_path / "out" / "batch"
    os.kill(worker_pids(process.pid, logs)[0], signal.SIGKILL)
    until(lambda: any(entry["state"] == "waiting" for entry in running(made)), process, 300)
    workers = worker_pids(process.pid, logs)
    assert call("batch", "cancel", tmp_path / "out")[0] == 0
    _, err = process.communicate(timeout=300)
    assert process.returncode == 143, err
    assert "failed, will be tried again" in err
    assert "Traceback" not in err
    until_gone(workers)
    code, _, err = batch(made, "--workers", 2, *engine)
    assert (code, "3 of 3 jobs done" in err) == (0, True), err
    assert all((tmp_path / "out" / f"talk_{seed}.mp4").is_file() for seed in (1, 2, 3))
    assert verify(made.cache)["damaged"] == []
    assert (tmp_path / "out" / "batch" / "job-00001.log").stat().st_size > 0


def test_mistakes_are_told_before_an_engine_starts(tiny_models: Path, tmp_path: Path, engine: tuple[str, ...]) -> None:
    """Exit code 3, whatever was to run it."""
    made = seeded(tmp_path, tiny_models, rows="seed,nodes.first.steps\n1,-3\n")
    assert batch(made, *engine)[0] == 3


@pytest.mark.parametrize("engine", [REAL_SLURM], ids=["slurm"], indirect=True)
def test_what_slurm_refuses_is_told_in_its_words(tiny_models: Path, tmp_path: Path, engine: tuple[str, ...]) -> None:
    """Such as a partition that is not there; nothing of it is a defect."""
    code, _, err = batch(seeded(tmp_path, tiny_models), *engine, "--slurm", "slurm_partition=nowhere")
    assert (code, "Slurm takes no tasks: sbatch: error: " in err, "nowhere" in err) == (1, True, True), err


@pytest.mark.parametrize("engine", [SLURM], ids=["submitit"], indirect=True)
def test_a_task_that_slurm_takes_away_is_queued_again_and_goes_on(
    tiny_models: Path, quick_run: Place, tmp_path: Path, engine: tuple[str, ...]
) -> None:
    """SIGUSR1, as Slurm sends it before its limit: the worker leaves with 75, the task comes back, no retry counts."""
    made = seeded(tmp_path, tiny_models, rows="seed\n1\n", known=quick_run)
    process, before = program(made, "--retries", 0, *engine), entries(made)
    until(lambda: entries(made) - before, process, 300)
    (worker,) = worker_pids(process.pid, tmp_path / "out" / "batch")
    task = int(Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(task, signal.SIGUSR1)
    _, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    assert [entry["attempt"] for entry in running(made)] == [1, 0, 1, 1]
    assert [entry.get("code") for entry in running(made)] == [None, 75, None, 0]


def test_an_exported_array_runs_on_slurm(
    tiny_models: Path, quick_run: Place, tmp_path: Path, real_slurm: dict[str, str]
) -> None:
    """A task a job, each one `s2vflow run`."""
    made = seeded(tmp_path, tiny_models, known=quick_run)
    arguments = (made.recipe, "--jobs", tmp_path / "jobs.csv", *made.where, "--format", "slurm", "-o", tmp_path)
    assert call("batch", "export", *arguments)[0] == 0
    command = tmp_path / "bin" / "s2vflow"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m s2v_flow "$@"\n', encoding="utf-8")
    command.chmod(0o755)
    path = os.pathsep.join(filter(None, sys.path))
    environment = {**os.environ, **real_slurm, "PYTHONPATH": path, "PATH": f"{command.parent}:{os.environ['PATH']}"}
    words = ["sbatch", "--wait", "--time=20", "jobs.sbatch"]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, (done.stderr, [log.read_text() for log in tmp_path.glob("slurm-*.out")])
    assert all((tmp_path / "out" / f"talk_{seed}.mp4").is_file() for seed in (1, 2))


def test_jobs_of_a_node_that_is_lost_run_on_another(tiny_models: Path, quick_run: Place, tmp_path: Path) -> None:
    """Two nodes of one processor each, one of which goes while both work."""
    pytest.importorskip("ray", reason="the extra ray is not installed")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        lost = cluster.add_node(num_cpus=1)
        made = seeded(tmp_path, tiny_models, rows="seed\n1\n2\n", known=quick_run)
        process = program(made, "--workers", 2, "--engine", "ray", "--address", cluster.address)
        before = entries(made)
        until(lambda: entries(made) - before, process, 300)
        cluster.remove_node(lost, allow_graceful=False)
        _, err = process.communicate(timeout=600)
    finally:
        cluster.shutdown()
    assert process.returncode == 0, err
    assert "Ray lost its worker" in err
    assert all((tmp_path / "out" / f"talk_{seed}.mp4").is_file() for seed in (1, 2))
