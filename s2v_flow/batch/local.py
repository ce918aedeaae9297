"""Workers on this machine: one spawned process for each device."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import wait
from pathlib import Path

from s2v_flow.batch.job import Job
from s2v_flow.batch.worker import Outcome, Setup, outcome_of, work

_GOODBYE_SECONDS = 10.0


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
