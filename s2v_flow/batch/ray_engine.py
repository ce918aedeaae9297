"""Workers as actors of Ray (the extra `ray`): Ray finds them a place, each starts the same process there."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from s2v_flow.batch.record import Job
from s2v_flow.batch.worker import Outcome, ProcessWorker, Setup
from s2v_flow.errors import ExitCode, S2VFlowError

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


class RayWorker:
    """The driver's end of an actor."""

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
        """Give it a job."""
        self.reference = self._actor.run.remote(job, log)

    def answer(self) -> Outcome | None:
        """Return how the job ended, if that is known by now."""
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
        """Return how it left, None if it is there."""
        return self._left

    def signal(self, number: int) -> None:
        """Ask it to stop at the end of a step."""
        self._actor.signal.remote(number)

    def kill(self) -> None:
        """End it now."""
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
            fix = "pip install 's2vflow[ray]'"
            raise S2VFlowError("--engine ray: Ray is not installed", fix, exit_code=ExitCode.USAGE) from error
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

    def start(self, index: int) -> RayWorker:
        """Ask for an actor."""
        return RayWorker(self._ray, self.setups[index], self._resources)

    def wait(self, workers: Sequence[RayWorker], seconds: float) -> None:
        """Return once a worker has answered or is lost, or after so many seconds."""
        self._ray.wait([worker.reference for worker in workers if worker.reference is not None], timeout=seconds)

    def close(self) -> None:
        """End a Ray that was started here."""
        if self._is_ours:
            self._ray.shutdown()


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
