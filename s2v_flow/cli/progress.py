"""What a person sees of a run: a live table in a terminal, else lines with a clock; and its closing line."""

from __future__ import annotations

import threading
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO

from s2v_flow.cli.report import LINE_EVERY_SECONDS, Lines, length_text, noted, print_error
from s2v_flow.graph import events
from s2v_flow.wording import counted, duration_text, listed, reused_text, size_text, visible

if TYPE_CHECKING:
    from s2v_flow.api import Planned
    from s2v_flow.errors import S2VFlowError
    from s2v_flow.graph.run import RunResult

Level = Literal["quiet", "normal", "verbose"]
_WINDOW = 12  # steps of which the pace is taken
_ROWS = 8  # that are shown of what is done
_SIZES = ("steps", "width", "height", "latent_frames", "frames", "num_samples")  # facts that make nodes alike
_DOING = {
    "encode_text": "encoding the prompt",
    "encode_audio": "encoding the voice",
    "encode_image": "encoding the portrait",
    "encode_motion": "encoding the motion clip",
    "encode_control": "encoding the pose video",
    "sample": "sampling",
    "extend": "sampling",
    "decode_chunk": "decoding a chunk",
    "decode": "decoding frames",
    "save_video": "decoding and writing frames",
    "save_images": "decoding and writing frames",
    "save_latent": "writing the latent",
}


@dataclass
class _Row:
    """What goes on, or is done: a plan node, or work before any."""

    words: str
    started: float = field(default_factory=time.monotonic)
    stage: str = ""
    total: int = 0
    unit: str = ""
    marks: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=_WINDOW))  # when which step was done
    seconds: float | None = None  # once it is done
    memory: str = ""

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.started if self.seconds is None else self.seconds

    def pace(self) -> float | None:
        """Return the seconds per step of the last steps; None before two are done, for the first waits for loading."""
        if len(self.marks) < 2:
            return None
        (start, first), (end, last) = self.marks[0], self.marks[-1]
        return (end - start) / (last - first)

    def left(self) -> float | None:
        pace = self.pace()
        if pace is None:
            return None
        return max(pace * (self.total - self.marks[-1][1]) - (time.monotonic() - self.marks[-1][0]), 0.0)

    def text(self) -> str:
        """Return "step 3/20, 1.20 s/step, 20 s left", or what keeps it from taking steps."""
        if self.stage or not self.marks:
            return self.stage
        pace, left, parts = self.pace(), self.left(), [f"{self.unit} {self.marks[-1][1]}/{self.total}"]
        if pace is not None and left is not None:
            parts.append(f"{pace:.2f} s/{self.unit}" if pace >= 0.1 else f"{1 / max(pace, 1e-9):.0f} {self.unit}s/s")
            parts.append(left_text(left).removeprefix("about "))
        return ", ".join(parts)


class _Forecast:
    """How long plan nodes take: what a like one took in this run, else the plan's estimate, corrected by this run."""

    def __init__(self, planned: Planned | None) -> None:
        nodes = planned.plan.nodes if planned else ()
        self._alike = {node.name: (node.kind, *map(node.facts.get, _SIZES)) for node in nodes}
        self._estimates = {name: cost.seconds for name, cost in planned.estimate.nodes.items()} if planned else {}
        self._took: dict[object, float] = {}
        self._sums = [0.0, 0.0]  # of nodes with an estimate: what they took, what was estimated

    def done(self, node: str, seconds: float) -> None:
        self._took[self._alike.get(node, node)] = seconds
        if self._estimates.get(node):
            self._sums = [self._sums[0] + seconds, self._sums[1] + self._estimates[node]]

    def of(self, node: str) -> float | None:
        """Return the seconds that a node will take; None: unknown."""
        took, estimate = self._took.get(self._alike.get(node, node)), self._estimates.get(node)
        if took is not None or estimate is None:
            return took
        return estimate * (self._sums[0] / self._sums[1] if self._sums[1] else 1.0)


class Progress:
    """Listens to a run.

    In a terminal it shows a live table; elsewhere a line at the run's begin and end, at every node's, and every few
    seconds in between, each with the time of day and the recipe's name; with a plan also chunks' numbers and the time
    that is left. `level` quiet: nothing; verbose: also what is stored already, every file, every detail.
    """

    def __init__(
        self, name: str = "", planned: Planned | None = None, level: Level = "normal", stream: TextIO | None = None
    ) -> None:
        self._name, self._planned, self._level = visible(name), planned, level
        self._lines = Lines(stream)
        self._started = time.monotonic()
        self._rows: dict[str, _Row] = {}  # by plan node; "" is work before any
        self._to_run: tuple[str, ...] = ()
        self._forecast = _Forecast(planned)
        self._told: set[str] = set()
        self._pictured: set[str] = set()  # plan nodes
        self._ticker: threading.Thread | None = None
        self._closed = threading.Event()
        self._lock = threading.RLock()
        self._last_line = 0.0
        chunks = [node.name for node in planned.plan.nodes if "chunk" in node.facts] if planned else []
        self._chunks = {node: f" chunk {number} of {len(chunks)}" for number, node in enumerate(chunks, 1)}

    def close(self) -> None:
        """Leave the terminal as it was, with the table's last state."""
        self._closed.set()
        if self._ticker is not None:
            self._ticker.join()
        self._lines.close()

    def error(self, error: S2VFlowError) -> None:
        """Write an error as the command line prints it."""
        print_error(error)

    def end(self, planned: Planned, result: RunResult, again: str) -> None:
        """Say what has come out, and what to do next."""
        text = _closing(planned, result, time.monotonic() - self._started)
        separator = " · " if len(again) < 40 else "\n"
        text += f"\nagain: {again}{separator}look closer: s2vflow show last" if self._lines.is_terminal else ""
        try:
            text.encode(getattr(self._lines.stream, "encoding", None) or "utf-8")
        except UnicodeError:
            text = text.replace(" · ", ", ")
        if self._lines.is_terminal and self._level != "quiet":
            self._lines.say(text)
        elif self._level != "quiet":
            self._say(f"end: {text}")

    def __call__(self, event: events.Event) -> None:
        """Show an event."""
        if self._level == "quiet":
            return
        if isinstance(event, events.RunStarted):
            self._begin(event)
        elif isinstance(event, events.NodeStarted):
            words = _DOING.get(event.kind, event.kind.replace("_", " ")) + self._chunks.get(event.node, "")
            self._rows[event.node] = _Row(words)
            self._say(f"{event.node}: {words}", is_in_table=True)
        elif isinstance(event, events.StageStarted):
            self._stage(event.stage)
        elif isinstance(event, events.StepDone):
            self._step(event)
        elif isinstance(event, events.Preview):
            self._show(event)
        elif isinstance(event, events.NodeFinished):
            row, peak = self._rows[event.node], event.peak_device_bytes or event.peak_bytes
            row.seconds, row.memory = event.seconds, size_text(peak, is_memory=True) if peak else ""
            self._forecast.done(event.node, event.seconds)
            peak_text = f", peak {row.memory}" if row.memory else ""
            self._say(f"{event.node}: done, {duration_text(event.seconds)}{peak_text}", is_in_table=True)
        elif isinstance(event, events.NodeCached):
            self._to_run = tuple(name for name in self._to_run if name != event.node)
            self._say(f"{event.node}: stored already", is_detail=True)
        elif isinstance(event, events.Noted):
            name = event.node.rpartition("/")[2]  # without the cell of a matrix: it is told once
            text = f"{name}: {event.text}" if name else event.text
            self.note(f"warning: {text}" if event.is_warning else text, is_detail=event.is_detail)
        elif isinstance(event, events.Delivered):
            state = "written" if event.changed else "up to date"
            self._say(f"{event.node}: {event.path} is {state}", is_detail=event.changed)
        elif isinstance(event, events.RunFinished) and event.status != "finished":
            self._say(f"end: {event.status} after {duration_text(time.monotonic() - self._started)}", is_in_table=True)

    def note(self, text: str, *, is_detail: bool = False) -> None:
        """Show a note or a warning, once."""
        if self._level != "quiet" and text not in self._told:
            self._told.add(text)
            self._say(noted(text), is_detail=is_detail, is_note=True)

    def _show(self, event: events.Preview) -> None:
        """Show a picture of each chunk above the table, once half of its steps are done."""
        if self._lines.live is not None and 2 * event.step >= event.total and event.node not in self._pictured:
            from s2v_flow.cli.picture import show_picture

            self._pictured.add(event.node)
            with suppress(OSError, UnicodeError):  # it is gone, or the terminal lacks the character
                show_picture(Path(event.path), self._lines.live.console)

    def _say(self, text: str, *, is_in_table: bool = False, is_detail: bool = False, is_note: bool = False) -> None:
        """Write a line; in a terminal unless the table shows the same, details only where they are asked for.

        Elsewhere it begins with the clock and the recipe's name, but for notes and warnings: scripts look for these by
        their first word.
        """
        if (is_in_table and self._lines.is_terminal) or (is_detail and self._level != "verbose"):
            return
        text = visible(text)
        if self._lines.is_terminal:
            self._lines.say(text)
            return
        with self._lock:
            self._last_line = time.monotonic()
            name = f"{self._name}: " if self._name else ""
            self._lines.say(text if is_note else f"{time.strftime('%H:%M:%S')} {name}{text}")

    def _begin(self, event: events.RunStarted) -> None:
        self._to_run = event.nodes
        if event.nodes:
            self._watch()
        left, length = self._left(), f"; {length_text(self._planned)}" if self._planned else ""
        text = f"begin: {len(event.nodes)} of {event.total} nodes to compute{length}"
        self._say(f"{text}; {left_text(left)}" if left else text, is_in_table=True)
        for name, status in self._planned.statuses.items() if self._planned else ():
            if status.status == "HIT":
                self._say(f"{name}: stored already", is_detail=True)

    def _watch(self) -> None:
        """Begin to show that time passes: by a table that is drawn again and again, or by lines."""
        if self._lines.is_terminal:
            self._lines.show(self._table)
        elif self._ticker is None:
            self._ticker = threading.Thread(target=self._tick, daemon=True)
            self._ticker.start()

    def _tick(self) -> None:
        while not self._closed.wait(0.5):
            name, row = self._running()
            if row is not None and time.monotonic() - self._last_line >= LINE_EVERY_SECONDS:
                what = f"{name}: {row.stage or row.words}" if name else row.words
                self._say(f"{what}: still running, {duration_text(row.elapsed)}")

    def _running(self) -> tuple[str, _Row | None]:
        """Return what was begun last of all that is not done."""
        return next(
            ((name, row) for name, row in reversed(list(self._rows.items())) if row.seconds is None), ("", None)
        )

    def _stage(self, stage: str) -> None:
        """Show a stage in the row of the node that waits for it, or in one of its own."""
        name, row = self._running()
        if row is not None and name:
            row.stage = visible(stage)
        elif stage:
            self._rows[""] = _Row(visible(stage))
            self._watch()
        else:
            self._rows.pop("", None)
        if stage:
            self._say(stage, is_in_table=True, is_detail=True)

    def _step(self, event: events.StepDone) -> None:
        row = self._rows.setdefault(event.node, _Row(""))
        if row.marks and event.step <= row.marks[-1][1]:  # begun anew, with less memory
            row.marks.clear()
        row.marks.append((time.monotonic(), event.step))
        row.total, row.unit = event.total, event.unit
        if time.monotonic() - self._last_line >= LINE_EVERY_SECONDS:
            self._say(f"{event.node}: {row.text()}", is_in_table=True)

    def _left(self) -> float | None:
        """Return the seconds until the end; None where something was neither measured nor estimated."""
        total = 0.0
        for name in self._to_run:
            row, expected = self._rows.get(name), self._forecast.of(name)
            left = expected if row is None else row.left() if row.seconds is None else 0.0
            if left is None and (row is None or expected is None):
                return None
            total += max((expected or 0.0) - row.elapsed, 0.0) if left is None and row else left or 0.0
        return total

    def _table(self, console: Any) -> Any:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        rows, elapsed, left = list(self._rows.items()), time.monotonic() - self._started, self._left()
        waiting = sum(name not in self._rows for name in self._to_run)
        done = sum(
            1.0 if row.seconds is not None else row.marks[-1][1] / row.total
            for _, row in rows
            if row.marks or row.seconds is not None
        )
        share = done / max(len(self._to_run), 1) if left is None else elapsed / max(elapsed + left, 1e-9)
        figures = f"{share:4.0%}  {duration_text(elapsed)}"
        figures += f", {left_text(left)}" if left is not None and (waiting or self._running()[1]) else ""
        head = Table.grid(padding=(0, 2))
        width = max(10, min(40, console.width - len(figures) - len(self._name) - 6))
        head.add_row(Text(self._name), ProgressBar(total=1.0, completed=min(share, 1.0), width=width), Text(figures))
        table = Table.grid(padding=(0, 2, 0, 0))
        table.add_column(no_wrap=True)
        table.add_column(no_wrap=True, max_width=24)
        table.add_column(min_width=30)
        table.add_column(no_wrap=True, justify="right", min_width=9)
        table.add_column(no_wrap=True, justify="right", min_width=9)
        if len(rows) > _ROWS:
            table.add_row(Text("done", "green"), Text(f"{len(rows) - _ROWS} more", "dim"))
        for name, row in rows[-_ROWS:]:
            more = "" if row.seconds is not None else row.text()
            what = f"{row.words}{', ' if console.width >= 110 else chr(10)}{more}" if more else row.words
            status = Text("running", "yellow") if row.seconds is None else Text("done", "green")
            table.add_row(status, Text(visible(name)), Text(what), Text(duration_text(row.elapsed)), Text(row.memory))
        if waiting:
            table.add_row(Text("waiting", "dim"), Text(f"{waiting} more", "dim"))
        return Group(head, table)


def _closing(planned: Planned, result: RunResult, seconds: float) -> str:
    """Return "talk.mp4  14.0 s · 576x704 · 3 chunks · 8 computed, 2 stored · 3 min 9 s · seed 20"."""
    paths = [path for paths in result.outputs.values() for path in paths]
    head = "nothing written" if not paths else paths[0].name if len(paths) == 1 else f"{len(paths)} files"
    facts = planned.plan.node(next(iter(result.outputs))).facts if result.outputs else {}
    parts = [f"{facts['seconds']:.1f} s"] if facts.get("seconds") else []
    parts += [f"{facts['width']}x{facts['height']}"] if facts.get("width") else []
    parts += [counted(planned.num_chunks, "chunk")] if planned.num_chunks else []
    parts += [f"{len(result.computed)} computed, {len(result.cached)} stored", duration_text(seconds)]
    parts += filter(None, [reused_text(entry.facts.get("step_cache") for entry in result.entries.values())])
    seeds = dict.fromkeys(str(node.facts["seed"]) for node in planned.plan.nodes if node.facts.get("chunk") == 1)
    parts += [f"{'seed' if len(seeds) == 1 else 'seeds'} {listed(seeds, 6)}"] if seeds else []
    return f"{visible(head)}  {' · '.join(parts)}"


def left_text(seconds: float) -> str:
    """Return "about 20 s left", in whole seconds."""
    return f"about {duration_text(seconds) if seconds >= 9.5 else f'{max(round(seconds), 1)} s'} left"
