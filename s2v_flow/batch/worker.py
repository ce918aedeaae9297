"""A worker: a process that runs jobs as they arrive, and keeps its models loaded in between."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

from s2v_flow.api.session import Session
from s2v_flow.batch.job import Job
from s2v_flow.batch.plan import asked_of
from s2v_flow.errors import ExitCode, RecipeError, S2VFlowError
from s2v_flow.graph.events import Event, Noted
from s2v_flow.graph.interrupt import StoppedError, StopRequest
from s2v_flow.machine import free_memory_bytes
from s2v_flow.options import Options

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

    `num_workers` share the memory and the processors of this machine; `report` makes a job's `Report`.
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
