"""A matrix of runs: axes of values, `include` and `exclude` as in GitHub's workflows, and `-m PATH=VALUES`.

The cells are all combinations of the axes' values, the first axis slowest. `exclude` takes away the cells that have all
values of one of its items. An item of `include` is added to every cell whose own values it does not change; where there
is no such cell, it is a cell by itself.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from s2v_flow.errors import Origin
from s2v_flow.recipe.argument import Argument, FaultyOverrideError, check_characters, faulty, parse_path
from s2v_flow.recipe.emit import scalar_text
from s2v_flow.recipe.problems import Problems, StopReadingError
from s2v_flow.recipe.reader import Source, read_yaml
from s2v_flow.recipe.tree import Entry, ListValue, MapValue, Scalar, Tree, plain, read_scalar
from s2v_flow.wording import did_you_mean, shortened, shown

_RANGE = re.compile(r"(-?[0-9]{1,20})\.\.(-?[0-9]{1,20})")
_FIX = "write PATH=VALUES, like seed=1..8 or cfg=1.0,4.5"


def parse_axes(texts: Sequence[str], base_dir: Path, problems: Problems) -> list[tuple[str, Axis]]:
    """Take the `-m` arguments apart: the key of each path, and its values. Faulty ones are collected and left out."""
    axes = []
    for number, text in enumerate(texts, start=1):
        source = Source("-m", base_dir, tuple(text.splitlines()) or ("",), line=number)
        try:
            arguments = _parse(text, source, problems)
        except FaultyOverrideError:
            continue
        axes.append((arguments[0].key, Axis(arguments[0].path_origin, tuple(arguments))))
    return axes


def _parse(text: str, source: Source, problems: Problems) -> list[Argument]:
    check_characters(text, source, problems)
    path, equals, values = text.partition("=")
    if not equals:
        raise faulty(problems, "R050", f"'{shortened(text)}' has no = in it", source.origin(0, 0, len(text)), _FIX)
    origin = source.origin(0, 0, len(path))
    steps = parse_path(path, origin, problems)
    arguments: list[Argument] = []
    for start, written in _split(values):
        column = len(path) + 1 + start
        there = source.origin(0, column, len(written))
        if not written:
            raise faulty(problems, "R050", f"{shortened(path)}: a value is missing here", there, _FIX)
        for value in _expand(written, len(arguments), there, problems):
            text_value, reading = _read(value, source)
            arguments.append(Argument("set", path, steps, origin, text_value, there, source, column, reading=reading))
    return arguments


def _expand(text: str, count: int, origin: Origin, problems: Problems) -> Iterator[str]:
    """Yield the numbers of a range, both ends included, or the text itself."""
    match = _RANGE.fullmatch(text)
    if match is None:
        yield text
        return
    first, last = int(match[1]), int(match[2])
    step = 1 if first <= last else -1
    if abs(last - first) + 1 + count > MAX_CELLS:
        message = f"a matrix may have {MAX_CELLS} cells, {text} alone makes more"
        raise faulty(problems, "R061", message, origin, "vary less at once")
    for number in range(first, last + step, step):
        yield str(number)


def _split(text: str) -> Iterator[tuple[int, str]]:
    """Yield the values between commas, each with where it starts; blanks around them do not count."""
    start = depth = 0
    is_quoted = False
    for position, character in enumerate(f"{text},"):
        if character == '"' and (position == 0 or text[position - 1] != "\\"):
            is_quoted = not is_quoted
        elif not is_quoted:
            depth += (character in "[{") - (character in "]}")
        if position == len(text) or (character == "," and depth <= 0 and not is_quoted):
            part = text[start:position]
            yield start + len(part) - len(part.lstrip()), part.strip()
            start = position + 1


def _read(text: str, source: Source) -> tuple[str, Tree | None]:
    """Return a value's text without its quotes, and what YAML makes of it, to compare it with other values by."""
    try:
        if not text.startswith(("[", "{", '"')):
            return text, Scalar(read_scalar(text), source.start())
        tree = read_yaml(text.encode(), source, Problems())
    except (StopReadingError, ValueError):  # whether the text will do, its place decides
        return text, None
    is_text = text.startswith('"') and isinstance(tree, Scalar) and isinstance(tree.value, str)
    return str(tree.value) if is_text and isinstance(tree, Scalar) else text, tree


MAX_CELLS = 1_000
_MAX_SHOWN = 24  # characters of a value in a label
_RESERVED = ("include", "exclude")


@dataclass(frozen=True)
class Axis:
    """Something that varies: where it is written, and one change for each of its values."""

    origin: Origin
    arguments: tuple[Argument, ...]


@dataclass(frozen=True)
class Matrix:
    """What varies, by the key of the path (`steps` for `params.steps`), and which cells come and go besides."""

    origin: Origin | None = None
    axes: Mapping[str, Axis] = field(default_factory=dict)
    include: tuple[Mapping[str, Argument], ...] = ()
    exclude: tuple[Mapping[str, Argument], ...] = ()

    def arguments(self) -> Iterator[Argument]:
        """Yield every change that is named, also those that exclude leaves out."""
        for axis in self.axes.values():
            yield from axis.arguments
        for item in self.include:
            yield from item.values()
        for item in self.exclude:
            yield from (argument for key, argument in item.items() if key in self.axes)


@dataclass(frozen=True)
class Cell:
    """One combination: a short name that no other cell has, its values by path, and the changes that make it.

    By path, too: `parts` are those of the label ("seed=1"), `ranks` the values' places on their axes, from 0; what only
    `include` has comes behind.
    """

    label: str
    values: Mapping[str, Any]
    arguments: tuple[Argument, ...]
    parts: Mapping[str, str]
    ranks: Mapping[str, int]


def read_matrix(tree: MapValue, problems: Problems) -> Matrix:
    """Take a recipe's `matrix:` apart; what is wrong is collected and left out."""
    axes: dict[str, Axis] = {}
    for path, entry in tree.entries.items():
        if path in _RESERVED:
            continue
        if not isinstance(entry.value, ListValue) or not entry.value.items:
            message = f"matrix: {shortened(path)} varies over a list of values, got {_seen(entry)}"
            problems.add("R060", message, entry.value.origin, fix=f"write {shortened(path)}: [1, 2]")
            continue
        try:
            changes = [_change(path, Entry(entry.key_origin, item), problems) for item in entry.value.items]
        except FaultyOverrideError:
            continue
        if changes[0].key in axes:
            message = f"matrix: {shortened(changes[0].key)} is given twice"
            problems.add("R063", message, entry.key_origin, fix="remove one of the two")
            continue
        axes[changes[0].key] = Axis(entry.key_origin, _distinct(changes, problems))
    include = _read_items(tree.entries.get("include"), "include", problems)
    exclude = _read_items(tree.entries.get("exclude"), "exclude", problems)
    for item in exclude:
        for key, argument in item.items():
            if key not in axes:
                message = f"matrix: exclude names {shortened(key)}, which does not vary"
                fix = did_you_mean(key, axes, "axes") or "the matrix has no axes"
                problems.add("R062", message, argument.path_origin, fix=fix)
    return Matrix(tree.origin if tree.entries else None, axes, include, exclude)


def with_axes(matrix: Matrix, axes: Sequence[tuple[str, Axis]], problems: Problems) -> Matrix:
    """Return the matrix with the command line's axes, which replace its own of the same paths."""
    together = dict(matrix.axes)
    given: set[str] = set()
    for key, axis in axes:
        if key in given:
            problems.add("R063", f"{shortened(key)} is given twice", axis.origin, fix="give all its values in one -m")
        given.add(key)
        together[key] = Axis(axis.origin, _distinct(axis.arguments, problems))
    origin = matrix.origin or next((axis.origin for _, axis in axes), None)
    return Matrix(origin, together, matrix.include, matrix.exclude)


def expand(matrix: Matrix, problems: Problems) -> tuple[Cell, ...]:
    """Return the cells of a matrix; none where it has nothing in it, or too much, which is collected."""
    if matrix.origin is None or not (matrix.axes or matrix.include):
        return ()
    count = math.prod(len(axis.arguments) for axis in matrix.axes.values())
    originals: list[dict[str, Argument]] = []
    if matrix.axes and count <= MAX_CELLS:
        for values in itertools.product(*(axis.arguments for axis in matrix.axes.values())):
            combination = dict(zip(matrix.axes, values, strict=True))
            agree = (
                all(key in combination and _same(value, combination[key]) for key, value in item.items())
                for item in matrix.exclude
            )
            if not any(agree):
                originals.append(combination)
    cells = _included(originals, matrix.include)
    if (count := max(count, len(cells))) > MAX_CELLS:
        message = f"a matrix may have {MAX_CELLS} cells, this one has {count}"
        problems.add("R061", message, matrix.origin, fix="vary less at once")
        return ()
    if not cells:
        problems.add("R061", "matrix: exclude leaves no cell", matrix.origin, fix="exclude less")
    return _labelled(cells, matrix.axes)


def _included(
    originals: Sequence[Mapping[str, Argument]], include: Iterable[Mapping[str, Argument]]
) -> list[dict[str, Argument]]:
    cells = [dict(original) for original in originals]
    alone: list[dict[str, Argument]] = []
    for item in include:
        is_added = False
        for original, cell in zip(originals, cells, strict=True):
            if all(key not in original or _same(argument, original[key]) for key, argument in item.items()):
                cell.update({key: argument for key, argument in item.items() if key not in original})
                is_added = True
        if not is_added:
            alone.append(dict(item))
    return cells + alone


def _same(first: Argument, second: Argument) -> bool:
    return _identity(_plain(first)) == _identity(_plain(second))


def _plain(argument: Argument) -> Any:
    assert argument.value is not None
    if not isinstance(argument.value, str):
        return plain(argument.value)
    return plain(argument.reading) if argument.reading is not None else argument.value


def _identity(value: Any) -> Hashable:
    """Return something equal for equal values: 1 is 1.0, but neither true nor '1'."""
    if isinstance(value, dict):
        return ("map", frozenset((key, _identity(item)) for key, item in value.items()))
    if isinstance(value, list):
        return ("list", tuple(map(_identity, value)))
    return ("truth" if isinstance(value, bool) else "text" if isinstance(value, str) else "number", value)


def _distinct(arguments: Sequence[Argument], problems: Problems) -> tuple[Argument, ...]:
    """Return the values of an axis, and say which come twice: their cells would be the same."""
    seen: dict[Hashable, Argument] = {}
    for argument in arguments:
        identity = _identity(_plain(argument))
        if identity in seen:
            message = f"{shortened(argument.path)}: the value {_shown(_plain(argument))} is given twice"
            problems.add("R063", message, argument.value_origin, fix="remove one of the two")
        seen.setdefault(identity, argument)
    return tuple(seen.values())


def _change(path: str, entry: Entry, problems: Problems) -> Argument:
    origin = entry.key_origin.around(path)
    steps = parse_path(path, origin, problems)
    return Argument("matrix", path, steps, origin, entry.value, entry.value.origin)


def _read_items(entry: Entry | None, key: str, problems: Problems) -> tuple[Mapping[str, Argument], ...]:
    if entry is None:
        return ()
    if not isinstance(entry.value, ListValue):
        message = f"matrix: {key} is a list of maps, got {_seen(entry)}"
        problems.add("R060", message, entry.value.origin, fix=f"write {key}: [{{seed: 1}}]")
        return ()
    items: list[Mapping[str, Argument]] = []
    for item in entry.value.items:
        if not isinstance(item, MapValue) or not item.entries:
            message = f"matrix: an item of {key} is a map of paths and values, got {_seen(Entry(item.origin, item))}"
            problems.add("R060", message, item.origin, fix=f"write {key}: [{{seed: 1}}]")
            continue
        changes: dict[str, Argument] = {}
        for path, value in item.entries.items():
            try:
                change = _change(path, value, problems)
            except FaultyOverrideError:
                continue
            if change.key in changes:
                message = f"matrix: {shortened(change.key)} is given twice"
                problems.add("R063", message, value.key_origin, fix="remove one of the two")
            changes[change.key] = change
        items.append(changes)
    return tuple(items)


def _seen(entry: Entry) -> str:
    value = plain(entry.value)
    return f"an empty {'list' if value == [] else 'map'}" if value in ([], {}) else shown(value)


def _labelled(cells: Sequence[Mapping[str, Argument]], axes: Mapping[str, Axis]) -> tuple[Cell, ...]:
    keys = list(dict.fromkeys(key for cell in cells for key in cell))
    last = {key: key.rpartition(".")[2] for key in keys}  # a short name, unless two would have the same
    names = {key: name if list(last.values()).count(name) == 1 else key for key, name in last.items()}
    taken: dict[str, int] = {}
    seen = {
        key: {_identity(_plain(argument)): rank for rank, argument in enumerate(axis.arguments)}
        for key, axis in axes.items()
    }
    labelled = []
    for cell in cells:
        values = {key: _plain(argument) for key, argument in cell.items()}
        parts = {key: f"{names[key]}={_shown(value)}" for key, value in values.items()}
        places = {key: seen.setdefault(key, {}) for key in values}
        ranks = {key: places[key].setdefault(_identity(value), len(places[key])) for key, value in values.items()}
        label = ",".join(parts.values())
        taken[label] = taken.get(label, 0) + 1
        label += f" ({taken[label]})" if taken[label] > 1 else ""
        labelled.append(Cell(label, values, tuple(cell.values()), parts, ranks))
    return tuple(labelled)


def _shown(value: Any) -> str:
    """Return a value as a label has it: lists of things with ids by their ids."""
    if isinstance(value, list) and value and all(isinstance(item, dict) and "id" in item for item in value):
        text = "+".join(str(item["id"]) for item in value)
    elif isinstance(value, (list, dict)):
        text = json.dumps(value, ensure_ascii=False)
    else:
        text = value if isinstance(value, str) else scalar_text(value)
    return shortened(" ".join(text.split()), _MAX_SHOWN)
