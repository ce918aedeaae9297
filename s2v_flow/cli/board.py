"""What a person sees of a batch: a live table of its workers in a terminal, else lines with a clock."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any, TextIO

from s2v_flow.cli.progress import left_text
from s2v_flow.cli.report import Lines
from s2v_flow.wording import counted, duration_text, visible

if TYPE_CHECKING:
    from s2v_flow.batch.dispatch import Told
    from s2v_flow.batch.record import Batch, Job

_LOG_LINES = 5  # of a failed job that are shown
_LOG_BYTES = 4000
_WORDS = {"again": "failed, will be tried again"}


class Board:
    """Takes what happens in a batch; a line for each begin and end, in a terminal for each end, above the table."""

    def __init__(self, made: Batch, num_workers: int, stream: TextIO | None = None) -> None:
        self._made, self._num_workers, self._lines = made, num_workers, Lines(stream)
        self._states: dict[int, dict[str, Any]] = {
            job.number: {"state": "done" if job.is_done else "waiting"} for job in made.jobs
        }
        self._busy: dict[int, tuple[Told, float]] = {}
        self._began = time.monotonic()

    def __call__(self, told: Told) -> None:
        """Show it."""
        state, where = told.state, f"machine {told.device}"
        if told.worker:
            where = f"worker {told.worker} ({told.device}, process {told.pid})"
        text = f"{time.strftime('%H:%M:%S')} {where}: {told.job.name} "
        self._busy.pop(told.worker, None)
        if state == "begins":
            self._busy[told.worker] = told, time.monotonic()
            self._states[told.job.number] = {"state": "running"}
            if self._lines.is_terminal:
                self._lines.show(self._table)
            else:
                self._say(f"{text}begins")
            return
        took = {"seconds": told.seconds} if told.worker else {}
        self._states[told.job.number] = {"state": "waiting" if state == "again" else state, **took}
        text += _WORDS.get(state, state) + (f" after {duration_text(told.seconds)}" if told.worker else "")
        first = told.outcome.message.split("\n")[0]
        text += f": {first}" if first else "".join(f" {path}" for path in told.outcome.outputs[:3])
        self._say(text if self._lines.live else f"{text}; {standing(self._made, self._states, self._num_workers)}")
        for line in tail(self._made, told.job) if state == "failed" else ():
            self._say(f"    {line}")

    def close(self) -> None:
        """Leave the terminal as it was, with the table's last state."""
        self._lines.close()

    def _say(self, text: str) -> None:
        self._lines.say(visible(text))

    def _table(self, console: Any) -> Any:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        rows = Table.grid(padding=(0, 2, 0, 0))
        for _ in range(4):
            rows.add_column(no_wrap=True, overflow="ellipsis")
        for number, (told, began) in sorted(self._busy.items()):
            log = [line.partition(f"{told.job.name}: ")[2] or line for line in tail(self._made, told.job, 1)]
            where, took = f"worker {number} ({told.device})", duration_text(time.monotonic() - began)
            rows.add_row(Text(where), Text(visible(told.job.name)), Text(took), Text(visible("".join(log)), "dim"))
        took = duration_text(time.monotonic() - self._began)
        head = f"{standing(self._made, self._states, self._num_workers)}; {took} so far"
        return Group(Text(head, no_wrap=True, overflow="ellipsis"), rows)


def standing(made: Batch, states: Mapping[int, Mapping[str, Any]], num_workers: int) -> str:
    """Return "70 of 200 jobs done, 2 failed, 2 running, about 6 min left"; the rest is taken from what the others took.

    states: By job's number, as `Batch.states` has them.
    """
    counts = Counter(entry["state"] for entry in states.values())
    parts = [f"{counts['done']} of {counted(len(states), 'job')} done"]
    parts += [f"{counts[state]} {state}" for state in ("failed", "stopped", "running") if counts[state]]
    sizes = {job.number: job.seconds or job.frames or 1 for job in made.jobs}
    took = {number: entry["seconds"] for number, entry in states.items() if entry.get("seconds") and number in sizes}
    left = sum(sizes[number] for number, entry in states.items() if entry["state"] in ("waiting", "running"))
    if took and left:
        pace = sum(took.values()) / sum(sizes[number] for number in took)
        parts.append(left_text(pace * left / max(min(num_workers, counts["waiting"] + counts["running"]), 1)))
    return ", ".join(parts)


def status_lines(made: Batch) -> list[str]:
    """Return a line for each job, below those that failed the last lines of their logs, and at the end the standing."""
    states, lines = made.states(), []
    for job in sorted(made.jobs, key=lambda job: job.number):
        entry = states[job.number]
        seconds = entry.get("seconds")
        if entry["state"] == "running":
            seconds = (datetime.now().astimezone() - datetime.fromisoformat(entry["time"])).total_seconds()
        worker = f"  worker {entry['worker']}" if entry["state"] == "running" else ""
        took = "" if seconds is None else f"  {duration_text(seconds)}"
        why = f"  {entry['message']}" if entry.get("message") else ""
        lines.append(visible(f"{entry['state']:<8}  {job.name}{worker}{took}{why}"))
        lines += [visible(f"    {line}") for line in tail(made, job)] if entry["state"] == "failed" else []
    running = sum(entry["state"] == "running" for entry in states.values())
    return [*lines, standing(made, states, running)]


def tail(made: Batch, job: Job, count: int = _LOG_LINES) -> list[str]:
    """Return the last lines of a job's log."""
    try:
        with made.log(job).open("rb") as file:
            file.seek(max(0, made.log(job).stat().st_size - _LOG_BYTES))
            return file.read().decode("utf-8", "replace").splitlines()[-count:]
    except OSError:
        return []
