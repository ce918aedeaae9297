"""The queue: one run at a time, each a process of its own, in a file that survives a restart."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import signal
import sys
import time
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, FiniteFloat

import s2v_flow
from s2v_flow.errors import ExitCode, MissingError, UsageError
from s2v_flow.files.atomic import write_whole

_MAX_LINE_BYTES = 1 << 26  # of an event: a plan of thousands of nodes is one line
_LOG_LINES = 500
_KEPT = 100  # jobs that are over
_STOPPED = (ExitCode.INTERRUPTED, ExitCode.TERMINATED, ExitCode.CHECKPOINTED, -signal.SIGINT)
_OVER = ("finished", "failed", "stopped")


@dataclass
class Job:
    """A run that was asked for. status: waiting, running, stopping, and then finished, failed or stopped."""

    id: Annotated[int, Field(ge=1, lt=2**53)]  # a browser's whole numbers
    recipe: str
    command: str
    status: Literal["waiting", "running", "stopping", "finished", "failed", "stopped"] = "waiting"
    run: str = ""
    error: str = ""
    seconds: FiniteFloat | None = None


@dataclass
class Live:
    """How far the running job is: `done` of `total` seconds or nodes, the steps of the node that runs, the preview."""

    job: int
    began: float = field(default_factory=time.monotonic)
    done: float = 0.0
    total: float = 0.0
    node: str = ""
    step: str = ""
    part: float = 0.0
    preview: str = ""
    costs: Mapping[str, float] = field(default_factory=dict)

    def take(self, event: Mapping[str, Any]) -> None:
        """Take an event of the run."""
        kind, node = event["type"], event.get("node", "")
        if kind == "run_started":
            self.costs = {name: self.costs.get(name, 1.0) for name in event["nodes"]}
            self.total = sum(self.costs.values())
        elif kind == "node_started":
            self.node, self.step, self.part = node, "", 0.0
        elif kind == "stage_started":
            self.step = event["stage"]
        elif kind == "step_done" and node == self.node:
            self.step = f"{event['unit']} {event['step']} of {event['total']}"
            self.part = self.costs.get(node, 0.0) * event["step"] / max(event["total"], 1)
        elif kind in ("node_finished", "node_cached"):
            self.done, self.part = self.done + self.costs.get(node, 0.0), 0.0
        elif kind == "preview":
            self.preview = event["path"]

    def to_json(self) -> dict[str, Any]:
        """Return what the page shows."""
        share = min(1.0, (self.done + self.part) / self.total) if self.total else 0.0
        told = {key: getattr(self, key) for key in ("job", "node", "step", "preview")}
        return {**told, "share": round(share, 4), "seconds": round(time.monotonic() - self.began, 1)}


class _File(BaseModel):
    queue: Literal[1]  # the version
    jobs: list[Job]


class Queue:
    """Jobs in their order, kept in a file; `work` runs those that wait, with `words` as options of every run.

    What was running when the program ended waits again: it goes on.

    Raises:
        MissingError: The file is there and cannot be read.
    """

    def __init__(self, path: Path, words: Sequence[str] = ()) -> None:
        self._path, self._words = path, tuple(words)
        self.jobs = _read(path)
        self.live: Live | None = None
        self.log: deque[tuple[int, str]] = deque(maxlen=_LOG_LINES)  # numbered, the newest last
        self.changes = 0  # grows with everything that happens
        self._process: Process | None = None
        self._wake = asyncio.Event()
        self._lines = 0
        self._costs: dict[int, Mapping[str, float]] = {}

    def add(self, recipe: Path, costs: Mapping[str, float]) -> Job:
        """Put a recipe at the end; `costs` are the seconds that its nodes are likely to take, as far as known."""
        number = max((job.id for job in self.jobs), default=0) + 1
        self._costs[number] = costs
        self.jobs.append(Job(number, str(recipe), command_text(recipe, self._words)))
        self._changed()
        return self.jobs[-1]

    def change(self, number: int, what: str) -> None:
        """Change the job with the id `number`.

        stop: with a resume point, as Ctrl-C does; again: at once; one that waits never starts. resume: let one that is
        over wait again, before all others. remove: forget one that does not run.

        Raises:
            MissingError: There is no such job.
            S2VFlowError: It is in no state for that.
        """
        job = next((job for job in self.jobs if job.id == number), None)
        if job is None:
            raise MissingError(f"there is no job {number}")
        is_running = job.status in ("running", "stopping")
        if what == "stop" and is_running:
            job.status = "stopping"
            self._interrupt()
        elif what == "stop" and job.status == "waiting":
            job.status = "stopped"
        elif what == "resume" and job.status in _OVER:
            job.status, job.error = "waiting", ""
            self.jobs.remove(job)
            first = next((index for index, other in enumerate(self.jobs) if other.status == "waiting"), len(self.jobs))
            self.jobs.insert(first, job)
        elif what == "remove" and not is_running:
            self.jobs.remove(job)
        else:
            raise UsageError(f"job {number} is {job.status}: no {what!r} now", "a job takes stop, resume and remove")
        self._changed()

    async def work(self) -> None:
        """Run what waits, for ever."""
        while True:
            job = next((job for job in self.jobs if job.status == "waiting"), None)
            if job is not None:
                await self._run(job)
            else:
                self._wake.clear()
                await self._wake.wait()

    async def close(self) -> None:
        """Interrupt what runs and wait for its resume point; when the program starts again, it goes on."""
        if self._process is not None:
            self._interrupt()
            await self._process.wait()

    async def _run(self, job: Job) -> None:
        job.status, job.error, self.live = "running", "", Live(job.id, costs=self._costs.get(job.id, {}))
        self.log.clear()
        self._tell(f"$ {job.command}")
        self._changed()
        code: int | None = None
        try:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "s2v_flow", "run", job.recipe, "--events", "-", *self._words),
                env=child_environment(),
                stdin=DEVNULL, stdout=PIPE, stderr=PIPE, limit=_MAX_LINE_BYTES, start_new_session=True,
            )  # fmt: skip
            await asyncio.gather(self._follow_events(self._process, job), self._follow_log(self._process))
            code = await self._process.wait()
        except (OSError, ValueError) as error:
            job.error = str(error)
        job.seconds = round(time.monotonic() - self.live.began, 1)
        job.status = "finished" if code in (0, ExitCode.UNMET) else "stopped" if code in _STOPPED else "failed"
        if job.status == "failed" and not job.error:
            job.error = next((text for _, text in self.log if "error" in text), f"it left with {code}")
        self._process = self.live = None
        self._changed()

    async def _follow_events(self, process: Process, job: Job) -> None:
        assert process.stdout is not None
        assert self.live is not None
        async for line in process.stdout:
            with suppress(ValueError, TypeError, KeyError):  # printed by something else
                event = json.loads(line)
                job.run = event["run"]
                self.live.take(event)
                if event["type"] == "run_finished" and event["error"]:
                    job.error = event["error"]
            self.changes += 1

    async def _follow_log(self, process: Process) -> None:
        assert process.stderr is not None
        async for line in process.stderr:
            self._tell(line.decode(errors="replace").rstrip())

    def _tell(self, text: str) -> None:
        self._lines += 1
        self.log.append((self._lines, text))
        self.changes += 1

    def _interrupt(self) -> None:
        if self._process is not None:
            with suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGINT)

    def _changed(self) -> None:
        """Tell and write what is new; that it cannot be written stops no run."""
        over = [job for job in self.jobs if job.status in _OVER]
        self.jobs = [job for job in self.jobs if job not in over[:-_KEPT]]
        text = json.dumps({"queue": 1, "jobs": [asdict(job) for job in self.jobs]}, indent=1)
        try:
            write_whole(self._path, text.encode())
        except OSError as error:
            self._tell(f"warning: the queue cannot be kept: {error.strerror}")
        self.changes += 1
        self._wake.set()


def child_environment() -> dict[str, str]:
    """Return what a run of this package needs, and no module of the user's folder that has the name of another."""
    paths = [str(Path(s2v_flow.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONSAFEPATH": "1"}


def command_text(recipe: Path, words: Sequence[str]) -> str:
    """Return the command that runs a recipe, as a shell takes it."""
    return shlex.join(["s2vflow", "run", recipe.as_posix(), *words])


def _read(path: Path) -> list[Job]:
    if not path.exists():
        return []
    try:
        jobs = _File.model_validate(json.loads(path.read_bytes())).jobs
    except (OSError, ValueError, RecursionError) as error:
        fix = "move it away: the page begins with an empty queue then"
        why = f": {error.strerror}" if isinstance(error, OSError) else ", or of another version"
        raise MissingError(f"{path}: is no queue{why}", fix) from error
    for job in jobs:
        if job.status in ("running", "stopping"):
            job.status = "waiting" if job.status == "running" else "stopped"
    return jobs
