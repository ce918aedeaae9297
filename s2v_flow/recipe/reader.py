"""Read YAML, with every limit checked on the parser's events, before anything is built or recursed into.

PyYAML only supplies events here. Its own tree builders take minutes for a few hundred bytes of merge keys, overflow the
stack on nested lists, let repeated keys win silently and read YAML 1.1; none of them is used.
"""

from __future__ import annotations

import os
import re
import stat
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import yaml

from s2v_flow.errors import Origin, Place
from s2v_flow.recipe.problems import Problems, StopReadingError
from s2v_flow.recipe.species import file_species, place_species, similar_file
from s2v_flow.recipe.tree import Entry, ListValue, MapValue, Scalar, Tree, absolute_dir, read_scalar
from s2v_flow.wording import shortened

MAX_BYTES = 1_000_000
MAX_DEPTH = 32
MAX_EVENTS = 20_000
TOO_DEEP = ("R004", f"maps and lists may nest {MAX_DEPTH} deep, here are more")
MAX_ALIASES = 16

# libyaml's parser where PyYAML was built with it: several times faster, the same events
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_LINE_BREAK = re.compile("\r\n|[\n\r\x85\u2028\u2029]")  # what PyYAML counts as lines
FORBIDDEN = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]")
_DIRECTIVE = re.compile(r"^%", re.MULTILINE)
_CONFLICT = re.compile(r"^(?:<<<<<<<|>>>>>>>) ", re.MULTILINE)
_BACKSLASH = "write it in single quotes, which take a backslash as it is, or a path with / instead"
_ADVICE = (
    ("mapping values are not allowed", "put text with a colon in quotes; give each key a line of its own and `: `"),
    ("tab character", "indent with spaces, not tabs"),
    ("cannot start any token", "put text that begins with @, ` or % in quotes"),
    ("unexpected end of stream", "close the quotes"),
    ("find expected ':'", "write `name: value`"),
    ("',' or ']'", "close the list with ]"),
    ("',' or '}'", "close the map with }"),
    ("escape", _BACKSLASH),
    ("hexadecimal", _BACKSLASH),
    ("alphabetic or numeric", "put text that begins with * or & in quotes"),
    ("comment or line break", "put text that begins with > or | in quotes"),
    ("block sequence", "put text that begins with - in quotes; begin a list's items on lines of their own"),
    ("mapping keys", "put text that begins with ? in quotes"),
    ("node content", "put text that begins with a comma or a bracket in quotes"),
    ("expected key", "check the indentation, and that quotes end where the text does; in '...' a ' is written ''"),
    ("'-' indicator", "check the indentation"),
    ("block end", "check the indentation"),
)


@dataclass(frozen=True)
class Source:
    """Some YAML text: whose it is and where it begins (an override's value begins inside its argument)."""

    file: str
    base_dir: Path
    lines: tuple[str, ...]
    line: int = 1
    column: int = 1

    def origin(self, line: int, column: int, width: int = 1) -> Origin:
        """Return the origin at a position in the text; `line` and `column` count from 0."""
        if line >= len(self.lines) > 0:  # the end, after a last line without a line break
            line, column = len(self.lines) - 1, len(self.lines[-1]) - (self.column - 1 if len(self.lines) == 1 else 0)
        excerpt = self.lines[line] if self.lines else ""
        place = Place(self.file, self.line + line, column + (self.column if line == 0 else 1))
        return Origin(place, excerpt, self.base_dir, max(1, min(width, len(excerpt) - place.column + 1)))

    def start(self) -> Origin:
        """Return the origin of the text as a whole."""
        return self.origin(0, 0)


def read_file(
    path: Path, name: str, problems: Problems, named_at: Origin | None = None, *, is_recipe: bool = False
) -> Tree:
    """Read a YAML file.

    Args:
        name: How messages call it: as the user did.
        named_at: What named the file, if not the command line.
        is_recipe: Report a file that is known to be no recipe.

    Raises:
        StopReadingError: The file cannot be read, or is no YAML within the limits; `problems` says why.
    """
    source = Source(name, absolute_dir(path), ())
    where = named_at or Origin(Place(name), "", source.base_dir)
    species = place_species(path, name)
    if species is not None:
        raise problems.stop("R002", f"cannot read {name}: this is {species.what}", where, fix=species.fix)
    data = _read_bytes(path, MAX_BYTES + 1, source, problems, where)
    species = file_species(path, name, data) if is_recipe else None
    if species is not None:
        raise problems.stop("R070", f"this is {species.what}", where, fix=species.fix)
    with suppress(StopReadingError):
        return _faultless(data, source)
    return read_yaml(data, source, problems)


@lru_cache(maxsize=16)
def _faultless(data: bytes, source: Source) -> Tree:
    """Return the tree of a text in which nothing is wrong, read once for all jobs of a batch; else StopReadingError."""
    tree = read_yaml(data, source, problems := Problems())
    if problems:
        raise StopReadingError
    return tree


def read_text(path: Path, name: str, problems: Problems, named_at: Origin, max_bytes: int) -> str:
    """Read a file whose text is a value: a prompt. Line breaks become those of Unix.

    Raises:
        StopReadingError: The file cannot be read, is larger, or is no text; `problems` says why.
    """
    source = Source(name, absolute_dir(path), ())
    data = _read_bytes(path, max_bytes + 1, source, problems, named_at)
    if len(data) > max_bytes:
        message = f"{shortened(name, 200)}: a text may have {max_bytes} bytes, this is more"
        raise problems.stop("R004", message, named_at)
    text = _decode(data, source, problems)
    source = replace(source, lines=tuple(_LINE_BREAK.split(text)))
    _check_characters(text, source, problems)
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _read_bytes(path: Path, count: int, source: Source, problems: Problems, where: Origin) -> bytes:
    try:
        if source.file == "-":
            return _all_of(sys.stdin.buffer, count)
        with open(path, "rb", opener=_open_regular) as file:
            return file.read(count)
    except (OSError, ValueError) as error:
        message = f"cannot read {shortened(source.file, 200)}: {getattr(error, 'strerror', None) or error}"
        raise problems.stop("R002", message, where, fix=similar_file(path)) from error


@lru_cache(maxsize=1)
def _all_of(stream: BinaryIO, count: int) -> bytes:
    with stream:  # read once, for `try` plans a recipe more than once
        return stream.read(count)


def read_yaml(data: bytes, source: Source, problems: Problems) -> Tree:
    """Read YAML text: 1.2 core, one document, within the limits of this module.

    Repeated keys, keys that are no text, tags, merge keys and impossible numbers are collected, all else stops.

    Raises:
        StopReadingError: The text is no YAML within the limits; `problems` says why.
    """
    if len(data) > MAX_BYTES:
        message = f"a recipe may have {MAX_BYTES} bytes, this is more"
        raise problems.stop("R004", message, source.start())
    text = _decode(data, source, problems)
    if not source.lines:
        source = replace(source, lines=tuple(_LINE_BREAK.split(text)))
    _check_characters(text, source, problems)
    directive = _DIRECTIVE.search(text)
    if directive is not None:  # libyaml takes seconds for a megabyte of them
        message = "a line may not begin with %: recipes have no YAML directives"
        raise problems.stop("R005", message, _origin_at(text, directive.start(), source), fix="remove the line")
    events = _events(text, source, problems)
    return _Builder(source, problems).build(events)


def _open_regular(path: str, flags: int) -> int:
    """Open without waiting on a pipe or touching a device."""
    descriptor = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError("it is not a regular file")
    return descriptor


def _decode(data: bytes, source: Source, problems: Problems) -> str:
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):  # as Windows' editors and shells write it
        try:
            return data.decode("utf-16")
        except UnicodeDecodeError as error:
            message = f"the file begins like UTF-16, and is not: {error.reason}"
            raise problems.stop("R003", message, source.start(), fix="save the file as UTF-8") from error
    data = data.removeprefix(b"\xef\xbb\xbf")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        lines = _LINE_BREAK.split(data[: error.start].decode("utf-8"))
        source = replace(source, lines=(*lines[:-1], lines[-1] + "\ufffd"))
        origin = source.origin(len(lines) - 1, len(lines[-1]))
        message = f"byte 0x{data[error.start]:02x} is not UTF-8"
        raise problems.stop("R003", message, origin, fix="save the file as UTF-8") from error


def _check_characters(text: str, source: Source, problems: Problems) -> None:
    found = FORBIDDEN.search(text)
    if found is not None:
        message = f"the character U+{ord(found[0]):04X} may not stand in a recipe"
        raise problems.stop("R003", message, _origin_at(text, found.start(), source))


def _origin_at(text: str, index: int, source: Source) -> Origin:
    before = _LINE_BREAK.split(text[:index])
    return source.origin(len(before) - 1, len(before[-1]))


def _events(text: str, source: Source, problems: Problems) -> list[Any]:
    """Return the events inside the one document; stop at the first limit, long before anything recurses."""
    guard = _Guard()
    events: list[Any] = []
    try:
        for event in yaml.parse(text.encode(), Loader=_LOADER):
            refusal = guard.refusal(event)
            if refusal is not None:
                mark: Any = event.start_mark
                raise problems.stop(*refusal, source.origin(mark.line, mark.column))
            events.append(event)
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # \UFFFFFFFF is a ValueError in PyYAML
        raise _syntax(error, text, source, problems) from error
    return events


class _Guard:
    """Counts what a document would grow to, event by event."""

    def __init__(self) -> None:
        self.events = self.documents = self.aliases = 0
        self.size = 0  # values so far, aliases expanded
        self.open: list[tuple[str | None, int]] = []  # of each open map or list: its anchor, and `size` at its start
        self.heights = [0]  # levels inside each of them, aliases expanded
        self.anchors: dict[str, tuple[int, int]] = {}  # size and height

    def refusal(self, event: Any) -> tuple[str, str] | None:
        """Return the code and the message of the limit that this event breaks, if any."""
        self.events += 1
        if self.events > MAX_EVENTS:
            return "R004", f"a recipe may have {MAX_EVENTS} keys, values and brackets, here are more"
        if type(event) is yaml.ScalarEvent:  # nearly all of them: nothing else can break a limit
            self.size += 1
            if event.anchor is not None:
                self.anchors[event.anchor] = (1, 0)
            return None
        if isinstance(event, yaml.DocumentStartEvent):
            self.documents += 1
            return None if self.documents == 1 else ("R005", "a recipe is one document, here a second one begins")
        if isinstance(event, yaml.CollectionEndEvent):
            self._close()
        elif isinstance(event, yaml.AliasEvent):
            self.aliases += 1
            self._add(*self.anchors.get(event.anchor or "", (1, 0)))
        elif isinstance(event, yaml.CollectionStartEvent):
            self.open.append((event.anchor, self.size))
            self.heights.append(0)
            self._add(1, 0)
        return self._limit()

    def _add(self, size: int, height: int) -> None:
        self.size += size
        self.heights[-1] = max(self.heights[-1], height)

    def _close(self) -> None:
        anchor, size = self.open.pop()
        height = self.heights.pop() + 1
        self.heights[-1] = max(self.heights[-1], height)
        if anchor is not None:
            self.anchors[anchor] = (self.size - size, height)

    def _limit(self) -> tuple[str, str] | None:
        if self.aliases > MAX_ALIASES:
            return "R004", f"a recipe may have {MAX_ALIASES} aliases, here are more"
        if len(self.open) + self.heights[-1] > MAX_DEPTH:
            return TOO_DEEP
        if self.size > MAX_EVENTS:
            return "R004", f"a recipe may have {MAX_EVENTS} values, here aliases make more of them"
        return None


def _syntax(error: Exception, text: str, source: Source, problems: Problems) -> StopReadingError:
    mark: Any = getattr(error, "problem_mark", None)
    problem = str(getattr(error, "problem", None) or error).splitlines()[0]
    if "maximum nesting depth" in problem:  # libyaml of PyYAML 6.0.4 scans ahead, with a limit of its own
        return problems.stop(*TOO_DEEP, source.origin(mark.line, mark.column))
    if conflict := _CONFLICT.search(text):
        origin = _origin_at(text, conflict.start(), source)
        return problems.stop("R001", "git left a merge conflict here", origin, fix="resolve it")
    context = getattr(error, "context", None)
    begun: Any = getattr(error, "context_mark", None)
    problem = problem.replace("expected hexdecimal", "a hexadecimal")  # libyaml's slip
    if begun is not None and "end of stream" in problem:
        mark = begun  # an unclosed quote is seen where it opens
    elif context and begun is not None and begun.line < min(mark.line, len(source.lines) - 1):
        problem += f", {context} that began on line {source.line + begun.line}"
    origin = source.origin(mark.line, mark.column) if mark is not None else source.start()
    if "cannot start" in problem and origin.excerpt[origin.place.column - 1 :].startswith("\t"):
        problem = "found a tab character where the indentation should be"
    fix = next((advice for symptom, advice in _ADVICE if symptom in problem), None)
    return problems.stop("R001", f"this is not YAML: {problem}", origin, fix=fix)


class _Builder:
    """Makes a tree of events; they nest no deeper than `MAX_DEPTH`, so that recursion is safe."""

    def __init__(self, source: Source, problems: Problems) -> None:
        self.source = source
        self.problems = problems
        self.events: Iterator[Any] = iter(())
        self.anchors: dict[str, Tree] = {}
        self.open: list[str | None] = []  # the anchors of the maps and lists around

    def build(self, events: list[Any]) -> Tree:
        values = [event for event in events if isinstance(event, (yaml.NodeEvent, yaml.CollectionEndEvent))]
        self.events = iter(values)
        return self._tree(next(self.events)) if values else Scalar(None, self.source.start())

    def _inside(self) -> Iterator[Any]:
        """Yield the events that begin what is in a map or a list, up to its end."""
        while not isinstance(event := next(self.events), yaml.CollectionEndEvent):
            yield event

    def _origin(self, event: Any) -> Origin:
        start, end = event.start_mark, event.end_mark
        if isinstance(event, yaml.CollectionStartEvent):
            return self.source.origin(start.line, start.column)
        width = end.column - start.column if start.line == end.line else MAX_BYTES  # to the end of the line
        return self.source.origin(start.line, start.column, width)

    def _tree(self, event: Any, *, is_key: bool = False) -> Tree:
        origin = self._origin(event)
        if isinstance(event, yaml.AliasEvent):
            return self._named(event.anchor, origin)
        if event.tag is not None:
            message = f"tags like {shortened(event.tag)} are not used in recipes"
            self.problems.add("R005", message, origin, fix="remove the tag; quotes make text of anything")
        tree: Tree
        if isinstance(event, yaml.ScalarEvent):
            tree = self._scalar(event, origin)
        else:
            self.open.append(event.anchor)
            is_map = isinstance(event, yaml.MappingStartEvent)
            tree = self._map(origin) if is_map else ListValue(tuple(map(self._tree, self._inside())), origin)
            self.open.pop()
        if event.anchor is not None and not is_key:
            self.anchors[event.anchor] = tree
        return tree

    def _scalar(self, event: Any, origin: Origin) -> Scalar:
        is_quoted = bool(event.style)  # None or empty, by which parser it is
        value: Any = event.value
        found = FORBIDDEN.search(value)  # an escape in quotes may have made what may not be written
        if found is not None:
            message = f"the character U+{ord(found[0]):04X} may not stand in a recipe, nor be written as an escape"
            self.problems.add("R003", message, origin)
            value = FORBIDDEN.sub("\ufffd", value)
        if not is_quoted:
            try:
                value = read_scalar(value)
            except ValueError as error:
                self.problems.add("R008", str(error), origin, fix="put it in quotes if it is text")
        return Scalar(value, origin, is_quoted)

    def _named(self, anchor: Any, origin: Origin) -> Tree:
        if anchor in self.anchors:
            return self.anchors[anchor]
        name = f"*{shortened(anchor)}"
        is_open = anchor in self.open
        message = f"{name} stands inside what it names" if is_open else f"there is no &{name[1:]} before {name}"
        raise self.problems.stop("R009", message, origin)

    def _map(self, origin: Origin) -> MapValue:
        entries: dict[str, Entry] = {}
        for event in self._inside():
            key_origin = self._origin(event)
            key = self._key(event, key_origin, entries)
            value = self._tree(next(self.events))
            if key is not None:
                entries[key] = Entry(key_origin, value)
        return MapValue(entries, origin)

    def _key(self, event: Any, origin: Origin, entries: Mapping[str, Entry]) -> str | None:
        """Return a key; None where it is refused, and what is under it left out."""
        written = None if isinstance(event, yaml.AliasEvent) else self._tree(event, is_key=True)
        key = written.value if isinstance(written, Scalar) else None
        if not isinstance(key, str):
            decimal = re.search(r"[0-9]+,[0-9]+$", origin.excerpt[: origin.place.column - 1 + origin.width])
            fix = "write a name, or put the key in quotes"
            fix = f"write {decimal[0].replace(',', '.')}: a decimal is written with a point" if decimal else fix
            self.problems.add("R007", "a key must be text", origin, fix=fix)
        elif key == "<<":
            fix = "write the fields out, or let a recipe extend another"
            self.problems.add("R005", "merge keys (<<) are not used in recipes", origin, fix=fix)
        elif key in entries:
            message = f"{shortened(key)} is given twice, first on line {entries[key].key_origin.place.line}"
            self.problems.add("R006", message, origin, fix="remove one of the two")
        else:
            return key
        return None
