"""A run's events as text for programs: one JSON object a line, the first one says which version this is."""

from __future__ import annotations

import json
import os
import re
import sys
import typing
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TextIO

from pydantic import TypeAdapter

from s2v_flow.errors import S2VFlowError, UsageError
from s2v_flow.files.lock import held
from s2v_flow.graph.events import Event, Listener, Noted
from s2v_flow.version import __version__

VERSION = 1  # raised when a type or a field goes away or changes its meaning; new ones may come at any time
_TIME = {"type": "string", "format": "date-time", "description": "UTC, ISO 8601."}
_RUN = {"type": "string", "description": "The run's id, under which its manifest is kept."}
_HEAD = b'{"type": "version", '
_WORD = re.compile(r"(?<=[a-z])(?=[A-Z])")


@contextmanager
def open_events(target: str | None, tell: Listener, run: str) -> Iterator[tuple[Listener, ...]]:
    """Give the listener that writes events to a file, or to stdout for "-"; none where no target is given.

    `tell`: called once where the file can no longer be written: the run goes on without it.

    Raises:
        S2VFlowError: The file cannot be opened, or stdout cannot be written.
    """
    if target is None:
        yield ()
    elif target == "-":
        yield (EventStream(sys.stdout, run),)
    else:
        with ExitStack() as stack:
            try:
                with suppress(FileExistsError):
                    open(target, "x").close()
                is_ours = not os.path.isfile(target) or stack.enter_context(held(Path(target), waits=False))
                if not is_ours or not _may_be_written(target):
                    what = "another file is there, and stays" if is_ours else "another run writes to it"
                    fix = "name a new one, or remove it" if is_ours else "name another one"
                    raise UsageError(f"--events {target}: {what}", fix)
                file = open(target, "w", encoding="utf-8")  # noqa: SIM115
            except OSError as error:
                text, fix = f"{target}: cannot be written: {error.strerror}", "name another file with --events"
                raise UsageError(text, fix) from error
            try:
                yield (EventStream(file, run, tell),)
            finally:
                with suppress(OSError):  # what was still to be written: it has been told
                    file.close()


def _may_be_written(target: str) -> bool:
    """Tell whether no file of the user's is lost: it is empty, a device, or holds a run's events."""
    if not os.path.isfile(target):
        return True
    with suppress(OSError), open(target, "rb") as file:
        return file.read(len(_HEAD)) in (b"", _HEAD)
    return True  # opening it says why not


def to_all(*listeners: Listener) -> Listener:
    """Return a listener that passes every event to all of these."""

    def listen(event: Event) -> None:
        for listener in listeners:
            listener(event)

    return listen


class EventStream:
    """Writes every event to a text stream as it comes, with the time and the run's id.

    Where that fails it tells `tell`, and writes no more; without `tell` it raises an S2VFlowError.
    """

    def __init__(self, stream: TextIO, run: str, tell: Listener | None = None) -> None:
        self._stream, self._run, self._tell = stream, run, tell
        self._is_lost = False
        self._put("version", {"events": VERSION, "s2vflow": __version__})

    def __call__(self, event: Event) -> None:
        """Write an event."""
        self._put(type_name(type(event)), asdict(event))

    def _put(self, kind: str, record: Mapping[str, Any]) -> None:
        if self._is_lost:
            return
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        try:
            self._stream.write(json.dumps({"type": kind, "time": now, "run": self._run, **record}) + "\n")
            self._stream.flush()
        except OSError as error:
            text = f"the events cannot be written: {error.strerror}"
            if self._tell is None:
                raise S2VFlowError(text) from error
            self._is_lost = True
            self._tell(Noted("", f"{text}; the run goes on without them", is_warning=True))


def type_name(kind: type) -> str:
    """Return an event's type as the stream calls it: NodeStarted is node_started."""
    return _WORD.sub("_", kind.__name__).lower()


def events_schema() -> dict[str, Any]:
    """Return the JSON Schema of one line."""
    version = {"events": {"const": VERSION}, "s2vflow": {"type": "string"}}
    lines = [_line("version", version, "The first line: the version of this format, and of the program.")]
    for kind in typing.get_args(Event):
        schema = TypeAdapter(kind).json_schema(mode="serialization")
        text = " ".join((kind.__doc__ or "").split())
        lines.append(_line(type_name(kind), schema["properties"], text))
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "s2vflow event",
        "description": "One line of `s2vflow run --events`.",
        "oneOf": lines,
    }


def _line(name: str, properties: Mapping[str, Any], text: str) -> dict[str, Any]:
    head = {"time": _TIME, "run": _RUN}
    fields = head | {
        key: {part: value for part, value in field.items() if part != "title"} for key, field in properties.items()
    }
    return {
        "title": name,
        "description": text,
        "type": "object",
        "properties": {"type": {"const": name}, **fields},
        "required": ["type", *fields],
        "additionalProperties": False,
    }
