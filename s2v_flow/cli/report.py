"""Text for people and for programs: the only module that prints. Results go to stdout, everything else to stderr."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TextIO

from s2v_flow.errors import RecipeError, S2VFlowError
from s2v_flow.graph.events import (
    Delivered,
    Event,
    NodeCached,
    NodeFinished,
    NodeStarted,
    Noted,
    RunStarted,
    StepDone,
)
from s2v_flow.library.needs import near_files
from s2v_flow.wording import MAX_DIAGNOSTICS, WARNING, count_text, format_diagnostic, size_text, visible

if TYPE_CHECKING:
    from rich.live import Live

    from s2v_flow.api import Planned

_LINE_EVERY_SECONDS = 5.0


def print_result(text: str) -> None:
    """Print a result to stdout."""
    print(text, file=sys.stdout, flush=True)


def print_json(value: object) -> None:
    """Print one JSON object to stdout, in ASCII: it is the same on every terminal."""
    print(json.dumps(value, indent=2), flush=True)


def print_message(text: str) -> None:
    """Print a line for people to stderr."""
    print(text, file=sys.stderr, flush=True)


def print_error(error: S2VFlowError) -> None:
    """Print an error: every mistake of a recipe, or what, why, what is kept and what to do."""
    if isinstance(error, RecipeError) and error.diagnostics:
        shown = [format_diagnostic(item) for item in error.diagnostics[:MAX_DIAGNOSTICS]]
        print_message("\n\n".join([*shown, f"{count_text(error)}; nothing was run"]))
        return
    at = f"{error.place.file}:{error.place.line}:{error.place.column}: " if error.place else ""
    print_message(visible(f"{at}error: {error.message}"))
    if error.inside:
        print_message(f"  in:  {visible(error.inside)}")
    if error.kept:
        print_message(f"  kept: {visible(error.kept)}")
    if error.fix:
        print_message(f"  fix: {visible(error.fix)}")


def noted(text: str) -> str:
    """Return a note as its line begins: `note:`, unless it says `warning:` itself."""
    return text if text.startswith(WARNING) else f"note: {text}"


def print_plan(planned: Planned) -> None:
    """Print a plan as a table for people, to stdout."""
    nodes = planned.plan.nodes
    width = max((len(node.name) for node in nodes), default=0)
    column = max((len(status.status) for status in planned.statuses.values()), default=4)
    kinds = max((len(node.kind) for node in nodes), default=0)
    print_result(f"plan of {planned.recipe.path} on {planned.device}")
    for node in nodes:
        status = planned.statuses[node.name]
        facts = ", ".join(_facts(node.facts))
        reason = f"{status.reason}" + (f"  [{facts}]" if facts else "")
        print_result(f"  {status.status:<{column}}  {node.name:<{width}}  {node.kind:<{kinds}}  {visible(reason)}")
    counts = [status.status for status in planned.statuses.values()]
    to_run = counts.count("RUN") + counts.count("RESUME")
    print_result(f"{counts.count('HIT')} stored, {to_run} to run; {_length(planned)}")
    if planned.has_work:
        print_result(_cost(planned))
        print_result(_memory(planned))
    for note in planned.notes:
        print_result(visible(noted(note)))
    for item in planned.plan.missing:
        print_result(f"missing: {visible(item.file)} ({item.kind}), looked for in {', '.join(item.looked_in)}")
        for near in near_files(item.file, item.kind, item.looked_in):
            print_result(f"  near: {visible(str(near))}")
        for home in item.homes:
            print_result(f"  can be had at {home}")


def _cost(planned: Planned) -> str:
    cost = planned.estimate
    reads = f"{cost.num_files} files to read, {size_text(cost.bytes_to_read)}"
    if cost.seconds is None:
        sizes = f"{size_text(cost.known_disk_bytes)} or more to be stored"
        return f"{reads}; {sizes}; no estimate of time: {', '.join(cost.unknown)} never ran here in this size"
    sizes = f"{size_text(cost.disk_bytes or 0)} to be stored"
    return f"{reads}; about {cost.seconds:.0f} s, {sizes}, from past runs on this machine"


def _memory(planned: Planned) -> str:
    largest = planned.estimate.largest
    unknown = [name for name, memory in planned.estimate.memory.items() if memory.peak_bytes is None]
    missing = f"; unknown for {len(unknown)} nodes, whose files are missing" if unknown else ""
    if largest is None:
        return f"no estimate of memory{missing}"
    name, memory = largest
    how = "computed, not measured yet" if memory.source == "computed" else "measured in past runs"
    size = size_text(memory.peak_bytes or 0, is_memory=True)
    return f"memory: at most about {size} on {planned.device}, in {name} ({how}){missing}"


def _length(planned: Planned) -> str:
    chunks, frames, seconds = planned.num_chunks, planned.num_frames, planned.seconds
    parts = ["chunks unknown" if chunks is None else f"{chunks} {'chunk' if chunks == 1 else 'chunks'}"]
    parts += [] if frames is None else [f"{frames} frames"]
    parts += [] if seconds is None else [f"{seconds:.2f} s"]
    silent = planned.silent_seconds
    parts += [] if not silent else [f"padded with {silent:.2f} s of silence, which is cut"]
    return ", ".join(parts)


def _facts(facts: Mapping[str, Any]) -> list[str]:
    shown = []
    if facts.get("chunk") is not None:
        since = f", timeline from {facts['since']:g} s" if "since" in facts else ""
        shown.append(f"chunk {facts['chunk']}, seed {facts['seed']}, {facts['steps']} steps{since}")
    if facts.get("frames") is not None:
        shown.append(f"{facts['frames']} frames")
    if facts.get("seconds") is not None:
        shown.append(f"{facts['seconds']:.2f} s")
    return shown


@dataclass
class _Row:
    kind: str
    status: str = "running"
    step: int = 0
    before: int = 0  # steps of an earlier run, which a resume point brought along
    total: int = 0
    unit: str = ""
    started: float = field(default_factory=time.monotonic)
    seconds: float = 0.0
    peak_bytes: int = 0

    def per_step(self) -> float:
        return (time.monotonic() - self.started) / (self.step - self.before) if self.step else 0.0

    def text(self) -> str:
        """Return "step 3/20, 1.20 s/step, 20 s left"."""
        if self.status == "done":
            return f"{self.seconds:.1f} s, peak {size_text(self.peak_bytes, is_memory=True)}"
        if not self.step:
            return ""
        pace = self.per_step()
        speed = f"{pace:.2f} s/{self.unit}" if pace >= 0.1 else f"{1 / max(pace, 1e-9):.0f} {self.unit}s/s"
        return f"{self.unit} {self.step}/{self.total}, {speed}, {pace * (self.total - self.step):.0f} s left"


class Progress:
    """Listens to a run: a live table in a terminal, else a line at every start, end and every few seconds."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._rows: dict[str, _Row] = {}
        self._last_line = 0.0
        self._to_run: tuple[str, ...] = ()
        self._live: Live | None = None
        if self._stream.isatty() and os.environ.get("TERM") != "dumb":
            from rich.console import Console
            from rich.live import Live

            console = Console(file=self._stream, highlight=False)  # which obeys NO_COLOR
            self._live = Live(console=console, get_renderable=self._table, refresh_per_second=4)
            self._live.start()

    def close(self) -> None:
        """Leave the terminal as it was, with the table's last state."""
        if self._live is not None:
            self._live.refresh()
            self._live.stop()
            self._live = None

    def __call__(self, event: Event) -> None:
        """Show an event."""
        if isinstance(event, RunStarted):
            self._to_run = event.nodes
        elif isinstance(event, NodeStarted):
            self._rows[event.node] = _Row(event.kind)
            self._line(f"{event.node}: started ({event.kind})")
        elif isinstance(event, StepDone):
            self._step(event)
        elif isinstance(event, NodeFinished):
            row = self._rows[event.node]
            row.status, row.seconds, row.peak_bytes = "done", event.seconds, event.peak_bytes
            self._line(f"{event.node}: done, {row.text()}")
        elif isinstance(event, NodeCached):
            self._rows[event.node] = _Row("", status="stored")
            self._line(f"{event.node}: stored already")
        elif isinstance(event, Noted):
            self._note(event)
        elif isinstance(event, Delivered) and not event.changed:
            self._line(f"{event.node}: {event.path} is up to date")

    def _step(self, event: StepDone) -> None:
        row = self._rows.setdefault(event.node, _Row(""))
        row.before = row.before if row.step else event.step - 1
        row.step, row.total, row.unit = event.step, event.total, event.unit
        if self._live is None and time.monotonic() - self._last_line >= _LINE_EVERY_SECONDS:
            self._line(f"{event.node}: {row.text()}")

    def _note(self, event: Noted) -> None:
        text = f"{event.node}: {event.text}" if event.node else event.text
        text = visible(f"warning: {text}" if event.is_warning else f"note: {text}")
        if self._live is not None:
            self._live.console.print(text, markup=False)
        else:
            self._line(text)

    def _line(self, text: str) -> None:
        if self._live is None:
            self._last_line = time.monotonic()
            print(visible(text), file=self._stream, flush=True)

    def _table(self) -> Any:
        from rich.table import Table

        table = Table(box=None, pad_edge=False, show_header=False)
        for name, row in list(self._rows.items())[-12:]:
            table.add_row(visible(name), row.kind, row.status, row.text())
        waiting = [name for name in self._to_run if name not in self._rows]
        if waiting:
            table.add_row(f"{len(waiting)} more", "", "waiting", "")
        return table


class DownloadProgress:
    """Prints how far downloads are: a line at a file's start and end, and every few seconds."""

    def __init__(self) -> None:
        self._file = ""
        self._last_line = 0.0
        self._started = (0.0, 0)  # when this command's part began, and what was there then

    def __call__(self, file: str, done: int, total: int) -> None:
        """Show that `done` of a file's `total` bytes are there."""
        now = time.monotonic()
        if file != self._file:
            self._file, self._started = file, (now, done)
        elif done < total and now - self._last_line < _LINE_EVERY_SECONDS:
            return
        self._last_line = now
        started, before = self._started
        speed = (done - before) / max(now - started, 1e-3)
        pace = f", {size_text(int(speed))}/s, {(total - done) / speed:.0f} s left" if speed and done < total else ""
        print_message(f"{visible(file)}: {size_text(done)} of {size_text(total)}{pace}")
