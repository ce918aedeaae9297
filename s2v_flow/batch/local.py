"""Running a batch on this machine: one spawned process for each device, jobs given out one by one, retries, stops."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from s2v_flow.batch.job import NEVER_AGAIN, Job
from s2v_flow.batch.record import Batch
from s2v_flow.batch.worker import Outcome, Report, Setup, work
from s2v_flow.errors import ExitCode
from s2v_flow.graph.interrupt import StoppedError, StopRequest, exit_code_of, never

GRACE_SECONDS = 60.0  # between SIGTERM, which waits for the end of a step, and SIGKILL
_POLL_SECONDS = 0.25
_OK = Outcome(ExitCode.OK)


@dataclass(frozen=True)
class Policy:
    """How often a job is tried again after a failure, how long it may take, whether one failure stops the rest."""

    retries: int = 1
    timeout_seconds: float | None = None
    fails_fast: bool = False


@dataclass(frozen=True)
class Told:
    """What the board is told: state is begins, done, failed, again, or stopped. `worker` counts from 1."""

    job: Job
    state: str
    worker: int
    pid: int
    device: str
    seconds: float = 0.0
    outcome: Outcome = _OK


@dataclass
class _Worker:
    number: int
    device: str
    process: BaseProcess
    pipe: Connection
    job: Job | None = None
    group: str = ""
    began: float = 0.0
    kill_at: float | None = None  # once it was asked to stop
    is_late: bool = False


class LocalRun:
    """The run of a batch's jobs that are not done.

    Args:
        batch: What to run; its options' `should_stop` is asked.
        devices: One process each: ["cuda:0", "cuda:1"], ["cpu", "cpu"].
        report: See `Setup`; a class or function of a module, because processes are spawned.
        policy: See there.
        tell: Called with everything that happens.
    """

    def __init__(
        self,
        batch: Batch,
        devices: Sequence[str],
        report: Callable[[str], Report],
        policy: Policy,
        tell: Callable[[Told], None],
    ) -> None:
        self._batch, self._policy, self._tell = batch, policy, tell
        self._states = {job.number: "done" if job.is_done else "waiting" for job in batch.jobs}
        self._queue = [job for job in batch.jobs if not job.is_done]
        self._attempts: dict[int, int] = {}
        self._should_stop = batch.options.should_stop
        self._context = multiprocessing.get_context("spawn")
        share = len(devices) if len(set(devices)) < len(devices) or "cpu" in devices else 1
        options = replace(batch.options, should_stop=never)
        self._setups = [Setup(replace(options, device=device), batch.folder, share, report) for device in devices]
        self._workers: dict[int, _Worker] = {}
        self._stop_signal = 0

    def run(self) -> dict[int, str]:
        """Run, note what becomes of each job, and return it by number: done, failed, or (`fails_fast`) stopped.

        Raises:
            StoppedError: As asked; every job that ran has left a resume point.
        """
        patience = self._should_stop.patiently() if isinstance(self._should_stop, StopRequest) else nullcontext()
        try:
            with patience:
                while self._queue or any(worker.job for worker in self._workers.values()):
                    if self._should_stop() and not self._stop_signal:
                        code = exit_code_of(self._should_stop)
                        self._stop(signal.SIGUSR1 if code == ExitCode.CHECKPOINTED else signal.SIGTERM)
                    if not self._stop_signal:
                        self._give_out()
                    self._listen()
                    self._watch_time()
        finally:
            self._close()
        if self._should_stop():
            done = sum(state == "done" for state in self._states.values())
            raise StoppedError(f"{done} of {len(self._states)} jobs are done", exit_code_of(self._should_stop))
        return self._states

    def _give_out(self) -> None:
        for index in range(len(self._setups)):
            worker = self._workers.get(index)
            if not self._queue or (worker is not None and worker.job is not None):
                continue
            worker = worker or self._start(index)
            job = self._choose(worker)
            worker.job, worker.group, worker.began = job, job.group, time.monotonic()
            self._queue.remove(job)
            self._attempts[job.number] = self._attempts.get(job.number, 0) + 1
            self._say(worker, "begins")
            with suppress(OSError):  # it has died: told when its sentinel is read
                worker.pipe.send((job, self._batch.log(job).absolute()))

    def _choose(self, worker: _Worker) -> Job:
        """Return a job with the worker's models, else one whose models nobody else has, else the first."""
        others = {other.group for other in self._workers.values() if other is not worker}
        same = (job for job in self._queue if job.group == worker.group)
        free = (job for job in self._queue if job.group not in others)
        return next(same, None) or next(free, None) or self._queue[0]

    def _start(self, index: int) -> _Worker:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=work, args=(theirs, self._setups[index]), daemon=True)
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # inherited: a terminal's Ctrl-C is for us
        process.start()
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        theirs.close()
        self._workers[index] = _Worker(index + 1, self._setups[index].options.device, process, ours)
        return self._workers[index]

    def _listen(self) -> None:
        """Take the answers and ends that are there, or come within a moment."""
        found = wait(
            [item for worker in self._workers.values() for item in (worker.pipe, worker.process.sentinel)],
            _POLL_SECONDS,
        )
        for index, worker in list(self._workers.items()):
            if worker.pipe in found:
                with suppress(EOFError, OSError):
                    self._ended(worker, worker.pipe.recv())
            if worker.process.sentinel in found:
                worker.process.join()
                del self._workers[index]
                worker.pipe.close()
                self._ended(worker, _outcome_of(worker.process.exitcode or 0), is_gone=True)

    def _ended(self, worker: _Worker, outcome: Outcome, *, is_gone: bool = False) -> None:
        job = worker.job
        if job is None:
            return
        if worker.is_late and outcome.code != ExitCode.OK:
            limit = self._policy.timeout_seconds or 0
            outcome = Outcome(ExitCode.FAILED, f"took longer than {limit:g} s (--timeout)", outcome.outputs)
        elif outcome.code == ExitCode.CHECKPOINTED:
            self._attempts[job.number] -= 1
        if outcome.code == ExitCode.OK:
            state = "done"
        elif self._stop_signal and is_gone and not worker.is_late:
            state = "stopped"
        else:
            state = "again" if self._may_again(job, outcome.code) else "failed"
        self._say(worker, state, outcome)
        worker.job, worker.kill_at, worker.is_late = None, None, False
        self._states[job.number] = "waiting" if state == "again" else state
        if state == "again":
            self._queue.append(job)
        if state == "failed" and self._policy.fails_fast:
            self._stop(signal.SIGTERM)

    def _may_again(self, job: Job, code: int) -> bool:
        if code in NEVER_AGAIN or self._stop_signal:
            return False
        limit = min(self._policy.retries, 1) if code == ExitCode.OUT_OF_MEMORY else self._policy.retries
        return self._attempts[job.number] <= limit

    def _say(self, worker: _Worker, state: str, outcome: Outcome | None = None) -> None:
        assert worker.job is not None
        seconds, pid = time.monotonic() - worker.began, worker.process.pid or 0
        facts: dict[str, Any] = {"attempt": self._attempts[worker.job.number], "worker": worker.number, "pid": pid}
        if state != "begins":
            facts |= {"seconds": round(seconds, 3), **vars(outcome or _OK)}
        self._batch.note(
            worker.job, "running" if state == "begins" else "waiting" if state == "again" else state, **facts
        )
        self._tell(Told(worker.job, state, worker.number, pid, worker.device, seconds, outcome or _OK))

    def _watch_time(self) -> None:
        now, limit = time.monotonic(), self._policy.timeout_seconds
        for worker in self._workers.values():
            if worker.job is None:
                continue
            if worker.kill_at is None and limit is not None and now - worker.began > limit:
                worker.is_late = True
                self._signal(worker, signal.SIGTERM)
            elif worker.kill_at is not None and now > worker.kill_at:
                worker.process.kill()

    def _stop(self, number: int) -> None:
        """Give out nothing more, and ask those that work to stop at the end of a step."""
        self._stop_signal = number
        self._states |= {job.number: "stopped" for job in self._queue}
        self._queue.clear()
        for worker in self._workers.values():
            if worker.job is not None and worker.kill_at is None:
                self._signal(worker, number)

    def _signal(self, worker: _Worker, number: int) -> None:
        worker.kill_at = time.monotonic() + GRACE_SECONDS
        with suppress(OSError):
            os.kill(worker.process.pid or 0, number)

    def _close(self) -> None:
        """End the workers: idle ones by closing their pipes, others (at a second Ctrl-C) at once."""
        for worker in self._workers.values():
            worker.pipe.close()
            if worker.job is not None:
                worker.process.terminate()
        for worker in self._workers.values():
            worker.process.join(10.0)
            worker.process.kill()


def _outcome_of(exitcode: int) -> Outcome:
    """Return how a job ended whose worker left without an answer."""
    if exitcode < 0:
        with suppress(ValueError):
            return Outcome(ExitCode.FAILED, f"its process was killed by {signal.Signals(-exitcode).name}")
    if exitcode in (ExitCode.CHECKPOINTED, ExitCode.TERMINATED, ExitCode.INTERRUPTED):
        return Outcome(exitcode, "stopped; a resume point is kept")
    return Outcome(ExitCode.INTERNAL, f"its process left with exit code {exitcode}; the log says more")
