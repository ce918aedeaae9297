"""Workers elsewhere: tasks of a Slurm array (the extra `slurm`), or actors of Ray (the extra `ray`).

Each starts the same worker process as everywhere. Ray finds its actors a place, and passes on jobs and answers. Slurm's
tasks are submitted by submitit; what one is told lies in a folder of its own below the batch's logs, which all machines
have to see: `job-N.json`, `answer-N.json`, `signal.json` and `close`, each written whole.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from s2v_flow.batch.record import Job
from s2v_flow.batch.worker import Outcome, ProcessWorker, Setup
from s2v_flow.errors import ExitCode, S2VFlowError, UsageError
from s2v_flow.files.atomic import write_whole, writing

CHECKPOINT_SECONDS = 100.0  # of the 120 between Slurm's signal and its end
_POLL_SECONDS = 0.25
_GOODBYE_SECONDS = 10.0


@dataclass
class Task:
    """What a task of the array runs, called by submitit: takes jobs from a folder until it is told to close.

    At SIGUSR1 (Slurm's time or place runs out) submitit calls `checkpoint`, and queues again what that returns.
    """

    setup: Setup
    folder: Path
    worker: ProcessWorker | None = None

    def __call__(self) -> None:
        """Run jobs."""
        self.worker, signals = ProcessWorker(self.setup), self.folder / "signal.json"
        _write(self.folder / "pid.json", self.worker.pid)
        while not (self.folder / "close").exists():
            number = self._next()
            if number is None:
                time.sleep(_POLL_SECONDS)
                continue
            entry = _read(self.folder / f"job-{number}.json")
            self.worker.send(Job.from_json(entry["job"]), Path(entry["log"]))
            answer = gone = None
            while answer is None and gone is None:
                if signals.exists():
                    self.worker.signal(_read(signals))
                    signals.unlink()
                gone = self.worker.gone()
                answer = self.worker.answer()
                time.sleep(0.0 if answer or gone else _POLL_SECONDS)
            outcome = answer or gone
            assert outcome is not None
            _write(self.folder / f"answer-{number}.json", {**vars(outcome), "is_gone": answer is None})
            if answer is None:
                return
        self.worker.close()
        self.worker.join()

    def checkpoint(self) -> Any:
        """Let the worker leave a resume point and go, say so, and return what goes on."""
        from submitit.helpers import DelayedSubmission

        assert self.worker is not None
        self.worker.signal(signal.SIGUSR1)
        end = time.monotonic() + CHECKPOINT_SECONDS
        while self.worker.gone() is None and time.monotonic() < end:
            time.sleep(_POLL_SECONDS)
        number = self._next()
        if number is not None:
            outcome = self.worker.answer() or self.worker.gone() or Outcome(ExitCode.CHECKPOINTED, "stopped")
            _write(self.folder / f"answer-{number}.json", {**vars(outcome), "is_gone": False})
        return DelayedSubmission(Task(self.setup, self.folder))

    def _next(self) -> int | None:
        """Return the first job without an answer."""
        number = 1
        while (self.folder / f"answer-{number}.json").exists():
            number += 1
        return number if (self.folder / f"job-{number}.json").exists() else None


class _SlurmWorker:
    """The driver's end of a task: see `dispatch.Worker`."""

    def __init__(self, task: Any, folder: Path) -> None:
        self._task, self._folder = task, folder
        self._number = 0
        self._left: Outcome | None = None
        self._looked = 0.0

    @property
    def pid(self) -> int:
        """The process's number on its node, 0 until Slurm has started it."""
        with suppress(OSError, ValueError):
            return int(_read(self._folder / "pid.json"))
        return 0

    def send(self, job: Job, log: Path) -> None:
        self._number += 1
        _write(self._folder / f"job-{self._number}.json", {"job": job.to_json(), "log": str(log)})

    def answer(self) -> Outcome | None:
        path = self._folder / f"answer-{self._number}.json"
        if self._left is not None or not path.exists():
            return None
        found = _read(path)
        is_gone = found.pop("is_gone")
        outcome = Outcome(found["code"], found["message"], tuple(found["outputs"]))
        if is_gone:
            self._left = outcome
            return None
        return outcome

    def gone(self) -> Outcome | None:
        """Return how it left; None if it is there, or waits in Slurm's queue."""
        if self._left is None and time.monotonic() - self._looked > 1.0:
            is_done = _is_over(self._task)
            self._looked = time.monotonic()
            if is_done and not (self._folder / f"answer-{self._number}.json").exists():
                self._left = Outcome(ExitCode.FAILED, f"Slurm's task {self._task.job_id} ended without an answer")
        return self._left

    def signal(self, number: int) -> None:
        _write(self._folder / "signal.json", int(number))

    def kill(self) -> None:
        self._task.cancel(check=False)

    def close(self, *, at_once: bool = False) -> None:
        """Let it end once it is idle; or end it now, where it works or waits in the queue."""
        _write(self._folder / "close", 1)
        if at_once or not self.pid:
            self.kill()

    def join(self) -> None:
        """See `SlurmEngine.close`."""


class SlurmEngine:
    """An array of tasks, one for each setup; all machines see the folder `logs`.

    `parameters`: of submitit: {"slurm_partition": "gpu", "timeout_min": 600}; {"cluster": "local"} runs the tasks here.

    Raises:
        S2VFlowError: submitit is not installed, there is no Slurm here, or it does not know a parameter.
    """

    def __init__(self, setups: Sequence[Setup], logs: Path, parameters: Mapping[str, Any] | None = None) -> None:
        os.environ.setdefault("SUBMITIT_PREEMPT_SIGNAL", "USR1")
        try:
            import submitit
        except ImportError as error:
            raise UsageError("--engine slurm: submitit is not installed", "pip install 's2vflow[slurm]'") from error
        self.setups = setups
        self._logs = logs.absolute()
        self._tasks: list[Any] = []
        self._array: dict[int, _SlurmWorker] = {}
        on_gpus = {"gpus_per_node": 1} if setups[0].options.device.startswith("cuda") else {}
        try:
            given = {"cluster": "slurm", "name": "s2vflow", **on_gpus, **(parameters or {})}
            self._executor: Any = submitit.AutoExecutor(self._logs / "slurm", cluster=given.pop("cluster"))
            self._executor.update_parameters(**given)
        except (RuntimeError, NameError, ValueError, TypeError) as error:
            fix = "--engine slurm runs where sbatch and srun are; --slurm KEY=VALUE takes submitit's parameters"
            raise UsageError(f"Slurm cannot be used: {error}", fix) from error

    def start(self, index: int) -> _SlurmWorker:
        """Submit the array at the first call; a task alone where one has been lost.

        Raises:
            S2VFlowError: Slurm refuses it, or does not answer.
        """
        if not self._tasks:
            tasks = [self._task(setup) for setup in self.setups]
            pairs = zip(self._submit(tasks), tasks, strict=True)
            self._array = {place: _SlurmWorker(job, task.folder) for place, (job, task) in enumerate(pairs)}
        if index in self._array:
            return self._array.pop(index)
        task = self._task(self.setups[index])
        return _SlurmWorker(self._submit([task])[0], task.folder)

    def wait(self, workers: Sequence[_SlurmWorker], seconds: float) -> None:
        """Wait a moment: files tell nobody."""
        time.sleep(seconds)

    def close(self) -> None:
        """Give the tasks a moment to end."""
        end = time.monotonic() + _GOODBYE_SECONDS
        while not all(map(_is_over, self._tasks)) and time.monotonic() < end:
            time.sleep(_POLL_SECONDS)

    def _task(self, setup: Setup) -> Task:
        folder = self._logs / "slurm"
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            return Task(setup, Path(tempfile.mkdtemp(prefix=f"worker-{os.getpid()}-", dir=folder)))

    def _submit(self, tasks: Sequence[Task]) -> list[Any]:
        from submitit.core.utils import FailedJobError

        try:
            with self._executor.batch():
                jobs = [self._executor.submit(task) for task in tasks]
        except FailedJobError as error:
            said = "; ".join(str(error).split("\n")).strip("; ")
            fix = "check --slurm KEY=VALUE, and whether `sinfo` answers"
            raise S2VFlowError(f"Slurm takes no tasks: {said}", fix, "what was stored before") from error
        self._tasks += jobs
        return jobs


def _is_over(task: Any) -> bool:
    """Tell whether a task has left Slurm's queue; submitit asks the accounting, which not every cluster has."""
    if type(task).__name__ != "SlurmJob" or _has_accounting():
        return bool(task.done())
    asked = ["squeue", "--noheader", "--jobs", task.job_id]
    found = subprocess.run(asked, capture_output=True, text=True, check=False)
    return not found.stdout.strip() and (not found.returncode or "Invalid job id" in found.stderr)


@cache
def _has_accounting() -> bool:
    return subprocess.run(["sacct", "--noheader", "--jobs", "1"], capture_output=True, check=False).returncode == 0


def _write(path: Path, value: Any) -> None:
    with writing(path):
        write_whole(path, json.dumps(value).encode(), is_flushed=False)


def _read(path: Path) -> Any:
    return json.loads(path.read_bytes())


_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class _Actor:
    """What runs on a node of the cluster: one worker process, whose answers it passes on."""

    def __init__(self, setup: Setup) -> None:
        self._worker = ProcessWorker(setup)

    def pid(self) -> int:
        return self._worker.pid

    def run(self, job: Job, log: Path) -> tuple[Outcome, bool]:
        """Run a job; return how it ended, and whether the process is gone."""
        self._worker.send(job, log)
        wait([self._worker.pipe, self._worker.process.sentinel])
        answer = self._worker.answer()
        if answer is not None:
            return answer, False
        self._worker.process.join()
        gone = self._worker.gone()
        assert gone is not None
        return gone, True

    def signal(self, number: int) -> None:
        self._worker.signal(number)


class _RayWorker:
    """The driver's end of an actor: see `dispatch.Worker`."""

    def __init__(self, ray: Any, setup: Setup, resources: dict[str, float]) -> None:
        self._ray = ray
        # one thread for the job, one for signals; a lost one is started anew by the batch, which counts retries
        self._actor = ray.remote(_Actor).options(max_concurrency=2, max_restarts=0, **resources).remote(setup)
        self._asked = self._actor.pid.remote()
        self._pid = 0
        self._left: Outcome | None = None
        self.reference: Any = None

    @property
    def pid(self) -> int:
        """The process's number on its node, 0 until Ray has found a place for it."""
        if not self._pid and self._ray.wait([self._asked], timeout=0)[0]:
            with suppress(self._ray.exceptions.RayError):
                self._pid = self._ray.get(self._asked)
        return self._pid

    def send(self, job: Job, log: Path) -> None:
        self.reference = self._actor.run.remote(job, log)

    def answer(self) -> Outcome | None:
        if self.reference is None or not self._ray.wait([self.reference], timeout=0)[0]:
            return None
        reference, self.reference = self.reference, None
        try:
            outcome, is_gone = self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            outcome, is_gone = Outcome(ExitCode.FAILED, f"Ray lost its worker: {_first_line(error)}"), True
        if is_gone:
            self._left = outcome
            return None
        assert isinstance(outcome, Outcome)
        return outcome

    def gone(self) -> Outcome | None:
        return self._left

    def signal(self, number: int) -> None:
        self._actor.signal.remote(number)

    def kill(self) -> None:
        self._ray.kill(self._actor)

    def close(self, *, at_once: bool = False) -> None:
        """End it: its process sees its pipe closed, and ends once it is idle."""
        if at_once:
            with suppress(self._ray.exceptions.RayError):
                self._ray.get(self._actor.signal.remote(signal.SIGTERM), timeout=1.0)
        self._ray.kill(self._actor)

    def join(self) -> None:
        """Ray looks after that."""


class RayEngine:
    """Actors, one for each setup.

    `address`: a cluster's; unless given, RAY_ADDRESS, or a Ray that is started here and ends with the batch.

    Raises:
        S2VFlowError: Ray is not installed, or the cluster does not answer.
    """

    def __init__(self, setups: Sequence[Setup], address: str | None = None) -> None:
        try:
            import ray
        except ImportError as error:
            raise UsageError("--engine ray: Ray is not installed", "pip install 's2vflow[ray]'") from error
        self.setups = setups
        self._ray: Any = ray
        self._is_ours = not ray.is_initialized()
        if self._is_ours:
            before = {number: signal.getsignal(number) for number in _SIGNALS}
            try:
                ray.init(address=address, include_dashboard=None if address else False, log_to_driver=False)
            except (ConnectionError, RuntimeError, ValueError, OSError) as error:
                raise S2VFlowError(f"Ray cannot be used: {_first_line(error)}", fix="check --address") from error
            finally:
                for number, handler in before.items():  # Ray takes SIGTERM
                    signal.signal(number, handler)
        known = self._ray.cluster_resources()
        on_gpus = setups[0].options.device.startswith("cuda") or known.get("GPU", 0) > 0
        self._resources: dict[str, float] = {"num_gpus": 1} if on_gpus and setups[0].options.device != "cpu" else {}
        self._resources["num_cpus"] = max(1, int(known.get("CPU", 1)) // len(setups))

    def start(self, index: int) -> _RayWorker:
        """Ask for an actor."""
        return _RayWorker(self._ray, self.setups[index], self._resources)

    def wait(self, workers: Sequence[_RayWorker], seconds: float) -> None:
        """Return once a worker has answered or is lost, or after so many seconds."""
        self._ray.wait([worker.reference for worker in workers if worker.reference is not None], timeout=seconds)

    def close(self) -> None:
        """End a Ray that was started here."""
        if self._is_ours:
            self._ray.shutdown()


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
