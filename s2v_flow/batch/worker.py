"""A worker: a process that runs jobs as they arrive, with its models kept in between; and those of this machine."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Protocol

from s2v_flow.api.session import Session
from s2v_flow.batch.plan import asked_of
from s2v_flow.batch.record import Job
from s2v_flow.errors import ExitCode, RecipeError, S2VFlowError
from s2v_flow.graph.events import Event, Noted
from s2v_flow.graph.interrupt import StoppedError, StopRequest
from s2v_flow.machine import free_memory_bytes
from s2v_flow.options import Options

_GOODBYE_SECONDS = 10.0
_OTHER = "the recipe, or a file that it extends, is another one than when the batch was planned"


class Report(Protocol):
    """Writes what a job does to stderr, which is the job's log."""

    def __call__(self, event: Event) -> None:
        """Take an event."""

    def error(self, error: S2VFlowError) -> None:
        """Take what a job failed with."""

    def close(self) -> None:
        """End."""


@dataclass(frozen=True)
class Setup:
    """What a worker is given at its start.

    `num_workers` share the memory and the processors of this machine; `report` makes a job's `Report`: a
    class or function of a module, because processes are spawned.
    """

    options: Options
    folder: Path
    num_workers: int
    report: Callable[[str], Report]


@dataclass(frozen=True)
class Outcome:
    """How a job ended: an exit code, an error's first words, and what was written."""

    code: int
    message: str = ""
    outputs: tuple[str, ...] = ()


def outcome_of(exitcode: int) -> Outcome:
    """Return how a job ended whose worker left without an answer."""
    if exitcode < 0:
        with suppress(ValueError):
            return Outcome(ExitCode.FAILED, f"its process was killed by {signal.Signals(-exitcode).name}")
    if exitcode in (ExitCode.CHECKPOINTED, ExitCode.TERMINATED, ExitCode.INTERRUPTED):
        return Outcome(exitcode, "stopped; a resume point is kept")
    return Outcome(ExitCode.INTERNAL, f"its process left with exit code {exitcode}; the log says more")


def work(pipe: Connection, setup: Setup) -> None:
    """Run jobs until the pipe is closed; leave with 143 or 75 where SIGTERM or SIGUSR1 asks for a stop.

    Each message is a job and its log's path, each answer an `Outcome`.
    """
    stop = StopRequest(_tell)
    stop.install()
    try:
        _serve(pipe, setup, stop)
    except StoppedError as stopped:
        sys.exit(stopped.exit_code)


def _serve(pipe: Connection, setup: Setup, stop: StopRequest) -> None:
    os.chdir(setup.folder)
    if setup.num_workers > 1:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // setup.num_workers)))
    options, free = replace(setup.options, should_stop=stop), free_memory_bytes("cpu")
    is_shared = setup.num_workers > 1 and options.device == "cpu" and free is not None
    memory = (free or 0) * 3 // 4 // setup.num_workers if is_shared else None
    session = Session(options, memory=memory)
    while True:
        try:
            job, log = pipe.recv()
        except EOFError:
            return
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        for number in (1, 2):  # what libraries print goes into the log, too
            os.dup2(descriptor, number)
        os.close(descriptor)
        outcome = _run(session, job, setup.report)
        if outcome.code == ExitCode.OUT_OF_MEMORY:
            session.close()
            session = Session(options, memory=memory)
        pipe.send(outcome)


def _run(session: Session, job: Job, report: Callable[[str], Report]) -> Outcome:
    told = report(job.name)
    given = job.options(session.options)
    fields: dict[str, Any] = {"overrides": given.overrides, "axes": given.axes}
    try:
        planned = session.plan(job.recipe, **fields)
        is_other = job.asked not in ("", asked_of(planned))
        if is_other:
            told(Noted("", _OTHER, is_warning=True))
        result = session.run(planned, told, **fields)
    except S2VFlowError as error:
        told.error(error)
        message = str(error) if isinstance(error, RecipeError) else error.message
        return Outcome(error.exit_code, message)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and type(error).__name__ != "OutOfMemoryError":
            raise
        failed = S2VFlowError(f"out of memory: {error}", exit_code=ExitCode.OUT_OF_MEMORY)
        told.error(failed)
        return Outcome(failed.exit_code, failed.message)
    finally:
        told.close()
    outputs = tuple(str(path) for paths in result.outputs.values() for path in paths)
    if result.failures:
        return Outcome(ExitCode.FAILED, "; ".join(f"{name}: {why}" for name, why in result.failures.items()), outputs)
    return Outcome(ExitCode.OK, _OTHER if is_other else "", outputs)


def _tell(text: str) -> None:
    os.write(2, text.encode())


class ProcessWorker:
    """A worker in a process of its own; other engines' workers start one of these where they run."""

    def __init__(self, setup: Setup) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(theirs, setup), daemon=True)
        signals = {signal.SIGINT, signal.SIGHUP}  # the terminal's are for us: that they are blocked is inherited
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        self.process.start()
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        theirs.close()

    @property
    def pid(self) -> int:
        """The process's number."""
        return self.process.pid or 0

    def send(self, job: Job, log: Path) -> None:
        """Give it a job; one that has died meanwhile is told by `gone`."""
        with suppress(OSError):
            self.pipe.send((job, log))

    def answer(self) -> Outcome | None:
        """Return how the job ended, if that is known by now."""
        with suppress(EOFError, OSError):
            if self.pipe.poll():
                outcome: Outcome = self.pipe.recv()
                return outcome
        return None

    def gone(self) -> Outcome | None:
        """Return how the process left, None if it is there."""
        return None if self.process.is_alive() else outcome_of(self.process.exitcode or 0)

    def signal(self, number: int) -> None:
        """Ask it to stop at the end of a step: SIGTERM, or SIGUSR1 for exit code 75."""
        with suppress(OSError):
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End it now."""
        self.process.kill()

    def close(self, *, at_once: bool = False) -> None:
        """Let it end once it is idle; or ask it to stop now, where it works."""
        self.pipe.close()
        if at_once:
            self.process.terminate()

    def join(self) -> None:
        """Wait for its end, not for ever."""
        self.process.join(_GOODBYE_SECONDS)
        self.process.kill()


class LocalEngine:
    """A process for each setup."""

    def __init__(self, setups: Sequence[Setup]) -> None:
        self.setups = setups

    def start(self, index: int) -> ProcessWorker:
        """Start a setup's worker."""
        return ProcessWorker(self.setups[index])

    def wait(self, workers: Sequence[ProcessWorker], seconds: float) -> None:
        """Return once a worker has answered or left, or after so many seconds."""
        wait([item for worker in workers for item in (worker.pipe, worker.process.sentinel)], seconds)

    def close(self) -> None:
        """Nothing is left once the workers are closed."""
