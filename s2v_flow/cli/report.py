"""Text for people and for programs: the only module that prints. Results go to stdout, everything else to stderr.

Lines for a terminal are coloured by ANSI codes and wrapped at words; as they are everywhere else.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from shutil import get_terminal_size
from typing import TYPE_CHECKING, Any, TextIO

from s2v_flow.errors import RecipeError, S2VFlowError
from s2v_flow.wording import WARNING, counted, duration_text, mistakes_text, size_text, visible

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live

    from s2v_flow.api import Planned
    from s2v_flow.graph.estimate import Estimate
    from s2v_flow.graph.node import PlanNode


LINE_EVERY_SECONDS = 5.0
_MANY_ROWS = 40  # of a plan: from there on like nodes share one


def print_result(text: str) -> None:
    """Print a result to stdout."""
    print(text, file=sys.stdout, flush=True)


def print_json(value: object) -> None:
    """Print one JSON object to stdout, in ASCII: it is the same on every terminal."""
    print(json.dumps(value, indent=2), flush=True)


def print_table(text: str) -> None:
    """Print a result for people to stdout: in a terminal with colours, and wrapped at words."""
    print(for_people(text, sys.stdout), file=sys.stdout, flush=True)


def print_message(text: str, stream: TextIO | None = None) -> None:
    """Print a line for people to stderr, or to another stream."""
    stream = stream or sys.stderr
    print(for_people(text, stream), file=stream, flush=True)


def print_error(error: S2VFlowError) -> None:
    """Print an error: every mistake of a recipe, or what, why, what is kept and what to do."""
    if isinstance(error, RecipeError) and error.diagnostics:
        print_message(mistakes_text(error))
        return
    at = f"{error.place}: " if error.place else ""
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
    from s2v_flow.library.needs import help_lines

    lines = [f"plan of {planned.recipe.path} on {planned.device}", *_rows(planned)]
    counts = [status.status for status in planned.statuses.values()]
    to_run = counts.count("RUN") + counts.count("RESUME")
    lines.append(f"{counts.count('HIT')} stored, {to_run} to run; {length_text(planned)}")
    lines += [_cost(planned), _memory(planned)] if planned.has_work else []
    for lora in planned.loras:
        if lora["total"] is not None:
            count = f"{lora['matched']} of {lora['total']} tensors have a home in the model"
            lines.append(visible(f"lora {lora['id']}: {count}"))
    lines += [visible(noted(note)) for note in planned.notes]
    for item in planned.plan.missing:
        lines.append(f"missing: {visible(item.file)} ({item.kind}), looked for in {', '.join(item.looked_in)}")
        texts = help_lines(item.file, item.kind, item.homes, item.looked_in)
        lines += [f"  {visible(text)}" for text in texts]
    print_table("\n".join(lines))


def _rows(planned: Planned) -> Iterator[str]:
    """Yield a line for every node; of many, one for all of a kind with the same status and reason but for numbers."""
    nodes = planned.plan.nodes
    alike: dict[object, list[PlanNode]] = {}
    for node in nodes:
        status = planned.statuses[node.name]
        reason = status.reason.replace(node.name.rpartition("/")[0], "")
        key = status.status, node.kind, re.sub(r"\d+", "", reason)
        alike.setdefault(key if len(nodes) > _MANY_ROWS else node.name, []).append(node)
    groups = list(alike.values())
    names = [f"{group[0].name} to {group[-1].name}" if len(group) > 1 else group[0].name for group in groups]
    width, kinds = max(map(len, names), default=0), max((len(node.kind) for node in nodes), default=0)
    column = max((len(status.status) for status in planned.statuses.values()), default=4)
    for name, group in zip(names, groups, strict=True):
        status = planned.statuses[group[0].name]
        facts = [f"x {len(group)}"] if len(group) > 1 else _facts(group[0].facts)
        reason = f"{status.reason}" + (f"  [{', '.join(facts)}]" if facts else "")
        yield f"  {status.status:<{column}}  {name:<{width}}  {group[0].kind:<{kinds}}  {visible(reason)}"


def _cost(planned: Planned) -> str:
    cost = planned.estimate
    reads = f"{counted(cost.num_files, 'file')} to read, {size_text(cost.bytes_to_read)}"
    if cost.seconds is None:
        sizes = f"{size_text(cost.known_disk_bytes)} or more to be stored"
        hint = "" if planned.plan.missing else " (plan --calibrate measures this machine, in two seconds)"
        return f"{reads}; {sizes}; {duration(cost)}{hint}"
    return f"{reads}; {size_text(cost.disk_bytes or 0)} to be stored; {duration(cost)}"


def whole_text(planned: Planned) -> str:
    """Say in a line how long a video is, and how long it will take to make."""
    time_left = duration(planned.estimate) if planned.has_work else "all of it is stored"
    return f"the whole: {length_text(planned)}; {time_left}"


def duration(cost: Estimate) -> str:
    """Say how long a run will take, and how that is known: "about 12 min 4 s (scaled from 192x256, 4 steps)"."""
    basis = cost.basis
    if cost.seconds is None:
        return f"no estimate of time: {', '.join(cost.unknown)} never ran here"
    how = "from past runs on this machine"
    if basis is not None and basis.source != "measured":
        scaled = f"scaled from {basis.scaled_from or 'another size'}"
        how = scaled if basis.source == "scaled" else "from a calibration of this machine, not measured"
    return f"about {duration_text(cost.seconds or 0)} ({how})"


def _memory(planned: Planned) -> str:
    largest = planned.estimate.largest
    unknown = [name for name, memory in planned.estimate.memory.items() if memory.peak_bytes is None]
    missing = f"; unknown for {counted(len(unknown), 'node')}, whose files are missing" if unknown else ""
    if largest is None:
        return f"no estimate of memory{missing}"
    name, memory = largest
    how = "computed, not measured yet" if memory.source == "computed" else "measured in past runs"
    size = size_text(memory.peak_bytes or 0, is_memory=True)
    return f"memory: at most about {size} on {planned.device}, in {name} ({how}){missing}"


def length_text(planned: Planned) -> str:
    """Return how much is made: "3 chunks, 224 frames, 14.00 s"; in a matrix "6 cells: 12 chunks; ..."."""
    chunks, frames, seconds = planned.num_chunks, planned.num_frames, planned.seconds
    parts = [] if frames is None else [f"{frames} frames"]
    parts += [] if seconds is None else [f"{seconds:.2f} s"]
    silent = planned.silent_seconds
    parts += [] if not silent else [f"padded with {silent:.2f} s of silence, which is cut"]
    text = "chunks unknown" if chunks is None else counted(chunks, "chunk")
    if not planned.labels:
        return ", ".join([text, *parts])
    return f"{len(planned.labels)} cells: {text}{'; the longest ' if parts else ''}{', '.join(parts)}"


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
        elif done < total and now - self._last_line < LINE_EVERY_SECONDS:
            return
        self._last_line = now
        started, before = self._started
        speed = (done - before) / max(now - started, 1e-3)
        pace = (
            f", {size_text(int(speed))}/s, {duration_text((total - done) / speed)} left"
            if speed and done < total
            else ""
        )
        print_message(f"{visible(file)}: {size_text(done)} of {size_text(total)}{pace}")


class Lines:
    """Lines for people on a stream, stderr unless given; in a terminal above a table, once one is shown."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stderr
        self.is_terminal = is_terminal(self.stream)
        self.live: Live | None = None

    def show(self, table: Callable[[Console], Any]) -> None:
        """Begin to draw what `table` returns, again and again."""
        if self.live is None:
            from rich.console import Console
            from rich.live import Live

            console = Console(file=self.stream, highlight=False)  # which obeys NO_COLOR
            self.live = Live(console=console, get_renderable=lambda: table(console), redirect_stdout=False)
            self.live.start()

    def say(self, text: str) -> None:
        """Write a line."""
        if self.live is None:
            print_message(text, self.stream)
            return
        from rich.text import Text

        self.live.console.print(Text.from_ansi(for_people(text, self.stream)), soft_wrap=True)

    def close(self) -> None:
        """Leave the terminal as it was, with the table's last state."""
        if self.live is not None:
            self.live.refresh()
            self.live.stop()
            self.live = None


_CODES = {"bold red": "1;31", "red": "31", "green": "32", "yellow": "33", "cyan": "36", "dim": "2"}
_GROUPS = (  # what is coloured in a line: group 1
    ("green", r"^ *(HIT|ok|found|identical)(?=  )"),
    ("yellow", r"^ *(RUN|RESUME|warning)(?=  )"),
    ("cyan", r"^ *(LOAD)(?=  )"),
    ("dim", r"^( *SKIP  .*)$"),
    ("red", r"^ *(problem|missing)(?=  )"),
    ("bold red", r"^(?:.*?:\d+:\d+: )?(error(?:\[\w+\])?:|missing:)"),
    ("yellow", r"^ *(warning(?:\[\w+\])?:)"),
    ("cyan", r"^ *(note:|changed:)"),
    ("green", r"^  (fix:|kept:)"),
    ("red", r"^ +\| +(\^+)$"),
    ("green", r"(?:  |, )(finished|no mistakes)(?=  |$)"),
    ("red", r"  (failed|killed|interrupted)(?=  |$)"),
    ("yellow", r"(?<= )(->)(?= )"),
)
_UNWRAPPED = re.compile(r" *\d* \| |again: ")  # excerpts, and a command that is to be copied


def has_colour(stream: TextIO) -> bool:
    """Whether a stream shows colours: a terminal that is not dumb; NO_COLOR and FORCE_COLOR say otherwise."""
    if os.environ.get("NO_COLOR"):
        return False
    forced = os.environ.get("FORCE_COLOR")
    return forced != "0" if forced else is_terminal(stream)


def is_terminal(stream: TextIO) -> bool:
    """Whether a stream is a terminal that obeys escape sequences."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def for_people(text: str, stream: TextIO) -> str:
    """Return lines as a stream shows them best: a terminal's are wrapped at words, indented below their last column."""
    lines = text.split("\n")
    if stream.isatty():
        lines = [part for line in lines for part in _wrapped(line, get_terminal_size().columns)]
    return "\n".join(map(_coloured, lines) if has_colour(stream) else lines)


def _wrapped(line: str, width: int) -> list[str]:
    if len(line) <= width or _UNWRAPPED.match(line):
        return [line]
    import textwrap

    indent = len(line) - len(line.lstrip())
    columns = [found.end() for found in re.finditer(r"(?<=\S)  +(?=\S)", line) if found.end() <= 0.65 * width]
    hang = " " * (columns[-1] if columns else indent + 2)
    return textwrap.wrap(line, width, subsequent_indent=hang, break_long_words=False, break_on_hyphens=False)


def _coloured(line: str) -> str:
    for style, pattern in _GROUPS:
        found = re.search(pattern, line)
        if found:
            line = f"{line[: found.start(1)]}\x1b[{_CODES[style]}m{found[1]}\x1b[0m{line[found.end(1) :]}"
    return line
