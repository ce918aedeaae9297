"""Running a batch: jobs given out one by one to an engine's workers, retries, limits of time, stops, and the end."""

from __future__ import annotations

import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from s2v_flow.batch.record import NEVER_AGAIN, Batch, Claims, Job
from s2v_flow.batch.worker import LocalEngine, Outcome, Report, Setup
from s2v_flow.errors import ExitCode, S2VFlowError
from s2v_flow.graph.interrupt import StoppedError, exit_code_of, never, patience

GRACE_SECONDS = 60.0  # between SIGTERM, which waits for the end of a step, and SIGKILL
_POLL_SECONDS = 0.25
_NOTIFY_SECONDS = 30.0
_OK = Outcome(ExitCode.OK)


@dataclass(frozen=True)
class Policy:
    """How often a job is tried again after a failure, how long it may take, whether one failure stops the rest."""

    retries: int = 1
    timeout_seconds: float | None = None
    fails_fast: bool = False


@dataclass(frozen=True)
class Told:
    """What the board is told: state is begins, done, failed, again, or stopped.

    `worker` counts from 1; 0: the job has ended on another machine, whose name is `device`.
    """

    job: Job
    state: str
    worker: int
    pid: int
    device: str
    seconds: float = 0.0
    outcome: Outcome = _OK


class Worker(Protocol):
    """What runs jobs one after another, wherever it is."""

    @property
    def pid(self) -> int:
        """The process that runs them, 0 where it is not known."""

    def send(self, job: Job, log: Path) -> None:
        """Give it a job."""

    def answer(self) -> Outcome | None:
        """Return how the job ended, if that is known by now."""

    def gone(self) -> Outcome | None:
        """Return how it left, None if it is there, or is expected to come."""

    def signal(self, number: int) -> None:
        """Ask it to stop at the end of a step: SIGTERM, or SIGUSR1 for exit code 75."""

    def kill(self) -> None:
        """End it now."""

    def close(self, *, at_once: bool = False) -> None:
        """Let it end once it is idle; or ask it to stop now, where it works."""

    def join(self) -> None:
        """Wait for its end, not for ever."""


class Engine(Protocol):
    """Where workers come from."""

    setups: Sequence[Setup]

    def start(self, index: int) -> Any:
        """Start a setup's worker."""

    def wait(self, workers: Sequence[Any], seconds: float) -> None:
        """Return once a worker may have answered or left, after so many seconds at most."""

    def close(self) -> None:
        """Let go of what is left once the workers are closed."""


@dataclass
class _Slot:
    number: int
    device: str
    worker: Worker
    job: Job | None = None
    group: str = ""
    began: float = 0.0
    kill_at: float | None = None  # once it was asked to stop
    is_late: bool = False


def setups_of(batch: Batch, devices: Sequence[str], report: Callable[[str], Report]) -> list[Setup]:
    """Return what a batch's workers are given, a process for each device: ["cuda:0", "cuda:1"], ["cpu", "cpu"]."""
    share = len(devices) if len(set(devices)) < len(devices) or "cpu" in devices else 1
    options = replace(batch.options, should_stop=never)
    return [Setup(replace(options, device=device), batch.folder, share, report) for device in devices]


def open_engine(
    name: str, setups: Sequence[Setup], batch: Batch, address: str | None, slurm: Mapping[str, Any]
) -> Engine:
    """Return an engine: "local", "ray" on the cluster at `address`, or "slurm" with these parameters of submitit.

    Raises:
        S2VFlowError: What it needs is not installed, or not here.
    """
    if name == "local":
        return LocalEngine(setups)
    from s2v_flow.batch.engines import RayEngine, SlurmEngine

    return RayEngine(setups, address) if name == "ray" else SlurmEngine(setups, batch.logs, slurm)


class BatchRun:
    """The run of a batch's jobs that are not done.

    The batch's options' `should_stop` is asked; `tell` hears of everything that happens.
    """

    def __init__(self, batch: Batch, engine: Engine, policy: Policy, tell: Callable[[Told], None]) -> None:
        self._batch, self._engine, self._policy, self._tell = batch, engine, policy, tell
        self._states = {job.number: "done" if job.is_done else "waiting" for job in batch.jobs}
        self._queue = [job for job in batch.jobs if not job.is_done]
        self._attempts: dict[int, int] = {}
        self._should_stop = batch.options.should_stop
        self._slots: dict[int, _Slot] = {}
        self._stop_signal = 0
        self._claims = Claims(batch.logs)

    def run(self) -> dict[int, str]:
        """Run, note what becomes of each job, and return it by number: done, failed, or (`fails_fast`) stopped.

        Raises:
            StoppedError: As asked; every job that ran has left a resume point.
        """
        try:
            with patience(self._should_stop):
                while self._queue or any(slot.job for slot in self._slots.values()):
                    if self._should_stop() and not self._stop_signal:
                        code = exit_code_of(self._should_stop)
                        self._stop(signal.SIGUSR1 if code == ExitCode.CHECKPOINTED else signal.SIGTERM)
                    if not self._stop_signal:
                        self._give_out()
                    self._listen()
                    self._hear()
                    self._watch_time()
        finally:
            self._close()
        if self._should_stop():
            done = sum(state == "done" for state in self._states.values())
            raise StoppedError(f"{done} of {len(self._states)} jobs are done", exit_code_of(self._should_stop))
        return self._states

    def _give_out(self) -> None:
        for index in range(len(self._engine.setups)):
            slot = self._slots.get(index)
            if slot is not None and slot.job is None and not self._queue:
                self._slots.pop(index).worker.close()  # its place is free for another one's
            if not self._queue or (slot is not None and slot.job is not None):
                continue
            job = self._choose(slot)
            if job is None:
                continue
            slot = slot or self._start(index)
            slot.job, slot.group, slot.began = job, job.group, time.monotonic()
            self._queue.remove(job)
            self._attempts[job.number] = self._attempts.get(job.number, 0) + 1
            self._say(slot, "begins")
            slot.worker.send(job, self._batch.log(job).absolute())

    def _choose(self, slot: _Slot | None) -> Job | None:
        """Return a job with the worker's models, else one whose models nobody has, else the first, if there is one."""
        others = {other.group for other in self._slots.values() if other is not slot}
        taken = self._claims.elsewhere()
        free = [job for job in self._queue if job.key not in taken]
        free.sort(key=lambda job: (slot is None or job.group != slot.group, job.group in others))
        return next((job for job in free if self._claims.take(job.key)), None)

    def _hear(self) -> None:
        """Take note of jobs that others have ended meanwhile."""
        ended = {key: told for key, told in self._claims.elsewhere().items() if told[0] != "running"}
        for job in [job for job in self._queue if job.key in ended]:
            state, message, host = ended[job.key]
            self._queue.remove(job)
            self._states[job.number] = state
            self._tell(Told(job, state, 0, 0, host, 0.0, Outcome(ExitCode.OK, message, job.outputs)))

    def _start(self, index: int) -> _Slot:
        device = self._engine.setups[index].options.device
        try:
            self._slots[index] = _Slot(index + 1, device, self._engine.start(index))
        except OSError as error:
            text = f"worker {index + 1} ({device}) cannot be started: {error.strerror}"
            fix = "take fewer workers, or let a user have more processes and open files (`ulimit -u`, `ulimit -n`)"
            raise S2VFlowError(text, fix, "what was stored before") from error
        return self._slots[index]

    def _listen(self) -> None:
        """Take the answers and ends that are there, or come within a moment."""
        self._engine.wait([slot.worker for slot in self._slots.values()], _POLL_SECONDS)
        for index, slot in list(self._slots.items()):
            gone = slot.worker.gone()
            answer = slot.worker.answer()
            if answer is not None:
                self._ended(slot, answer)
            if gone is not None:
                del self._slots[index]
                slot.worker.close()
                self._ended(slot, gone, is_gone=True)

    def _ended(self, slot: _Slot, outcome: Outcome, *, is_gone: bool = False) -> None:
        job = slot.job
        if job is None:
            return
        if slot.is_late and outcome.code != ExitCode.OK:
            limit = self._policy.timeout_seconds or 0
            outcome = Outcome(ExitCode.FAILED, f"took longer than {limit:g} s (--timeout)", outcome.outputs)
        elif outcome.code == ExitCode.CHECKPOINTED:
            self._attempts[job.number] -= 1
        if outcome.code == ExitCode.OK:
            state = "done"
        elif self._stop_signal and is_gone and not slot.is_late:
            state = "stopped"
        else:
            state = "again" if self._may_again(job, outcome.code) else "failed"
        self._say(slot, state, outcome)
        slot.job, slot.kill_at, slot.is_late = None, None, False
        self._states[job.number] = "waiting" if state == "again" else state
        self._claims.note(job.key, state if state in ("done", "failed") else "", outcome.message)
        if state == "again":
            self._queue.append(job)
        if state == "failed" and self._policy.fails_fast:
            self._stop(signal.SIGTERM)

    def _may_again(self, job: Job, code: int) -> bool:
        if code in NEVER_AGAIN or self._stop_signal:
            return False
        limit = min(self._policy.retries, 1) if code == ExitCode.OUT_OF_MEMORY else self._policy.retries
        return self._attempts[job.number] <= limit

    def _say(self, slot: _Slot, state: str, outcome: Outcome | None = None) -> None:
        assert slot.job is not None
        seconds, pid = time.monotonic() - slot.began, slot.worker.pid
        facts: dict[str, Any] = {"attempt": self._attempts[slot.job.number], "worker": slot.number, "pid": pid}
        if state != "begins":
            facts |= {"seconds": round(seconds, 3), **vars(outcome or _OK)}
        noted = {"begins": "running", "again": "waiting"}.get(state, state)
        self._batch.note(slot.job, noted, **facts)
        self._tell(Told(slot.job, state, slot.number, pid, slot.device, seconds, outcome or _OK))

    def _watch_time(self) -> None:
        now, limit = time.monotonic(), self._policy.timeout_seconds
        for slot in self._slots.values():
            if slot.job is None:
                continue
            if not slot.worker.pid:
                slot.began = now  # it waits for a place
            if slot.kill_at is None and limit is not None and now - slot.began > limit:
                slot.is_late = True
                self._signal(slot, signal.SIGTERM)
            elif slot.kill_at is not None and now > slot.kill_at:
                slot.worker.kill()

    def _stop(self, number: int) -> None:
        """Give out nothing more, and ask those that work to stop at the end of a step."""
        self._stop_signal = number
        self._states |= {job.number: "stopped" for job in self._queue}
        self._queue.clear()
        for slot in self._slots.values():
            if slot.job is not None and slot.kill_at is None:
                self._signal(slot, number)

    def _signal(self, slot: _Slot, number: int) -> None:
        slot.kill_at = time.monotonic() + GRACE_SECONDS
        slot.worker.signal(number)

    def _close(self) -> None:
        """End the workers: idle ones by closing them, others (at a second Ctrl-C) at once."""
        for slot in self._slots.values():
            slot.worker.close(at_once=slot.job is not None)
        for slot in self._slots.values():
            slot.worker.join()
        self._engine.close()
        self._claims.close()


def notify_end(command: str, text: str) -> str:
    """Run a command, quoted as for a shell, with a line of text as its last argument; no shell sees either.

    Returns why that failed, "" if it did not: a batch does not fail for it.
    """
    try:
        words = [*shlex.split(command), text]
        done = subprocess.run(
            words, stdin=subprocess.DEVNULL, capture_output=True, timeout=_NOTIFY_SECONDS, check=False
        )
    except (OSError, ValueError) as error:
        return f"--notify {command}: {error}"
    except subprocess.TimeoutExpired:
        return f"--notify {command}: took longer than {_NOTIFY_SECONDS:g} s"
    if done.returncode:
        said = done.stderr.decode("utf-8", "replace").strip().rpartition("\n")[2]
        return f"--notify {command}: exit code {done.returncode}{f': {said}' if said else ''}"
    return ""
