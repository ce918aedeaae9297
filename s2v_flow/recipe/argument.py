"""One change of a recipe from outside its layers, taken apart: PATH and VALUE, each with its place.

PATH is `nodes.NODE.FIELD`, with `[id]` or `[0]` for an item of a list and further fields after a dot; `params.NAME`; or
`NAME` alone for a parameter. The change comes from the command line, or from the recipe's matrix.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from s2v_flow.errors import Origin, Place
from s2v_flow.graph.ports import NAME
from s2v_flow.recipe.fields import Accepts
from s2v_flow.recipe.objects import tree_of
from s2v_flow.recipe.problems import Problems, StopReadingError
from s2v_flow.recipe.reader import FORBIDDEN, MAX_DEPTH, Source, read_text, read_yaml
from s2v_flow.recipe.tree import ListValue, Scalar, ScalarValue, Tree, plain, read_scalar
from s2v_flow.wording import shortened, shown

_DASHED = re.compile(r"(\d+) *- *(\d+)")
_JSON_TEXT = re.compile(r'"(?:[^"\\]|\\.)*"')


def read_value(argument: Argument, takes: Sequence[Accepts], problems: Problems) -> Tree:
    """Return the value that a change, any but "unset", gives to its place; it must fit all that the place takes.

    Raises:
        FaultyOverrideError: The place does not take it.
    """
    value = argument.value
    assert value is not None, "unset has no value"
    if not isinstance(value, str):
        return _checked(argument, value, takes, problems)
    if argument.kind == "set-json":
        return _checked(argument, _read_json(argument, value, problems), takes, problems)
    if argument.kind == "set-file":
        return _checked(argument, Scalar(value, argument.value_origin, is_quoted=True), takes, problems)
    return _read_text(argument, value, takes, problems)


def _read_text(argument: Argument, text: str, takes: Sequence[Accepts], problems: Problems) -> Tree:
    if _is_reference(text):
        return Scalar(text, argument.value_origin)  # as in a recipe; the field is checked once it is resolved
    if text.startswith("[") and all(use.has_list for use in takes):
        return _read_list(argument, text, problems)
    try:
        readings: tuple[ScalarValue, ...] = (read_scalar(text), text)
    except ValueError:
        readings = (text,)
    for value in readings:
        if all(use.takes(value) for use in takes):
            return Scalar(value, argument.value_origin, is_quoted=True)
    if any(use.is_input for use in takes):
        return Scalar(text, argument.value_origin)
    raise _unfit(argument, text, takes, problems)


def _is_reference(text: str) -> bool:
    return "$params." in text or "${" in text


def _read_list(argument: Argument, text: str, problems: Problems) -> Tree:
    assert argument.source is not None, "text comes from the command line"
    try:
        tree = read_yaml(text.encode(), replace(argument.source, column=argument.column + 1), problems)
    except StopReadingError as error:
        raise FaultyOverrideError from error
    if not isinstance(tree, ListValue):
        raise faulty(problems, "R052", "expected a list in brackets", argument.value_origin, "write [1, 2]")
    return tree


def _checked(argument: Argument, tree: Tree, takes: Sequence[Accepts], problems: Problems) -> Tree:
    """Return a value that has its type already, if the place takes that type; what is inside is checked later."""
    value = plain(tree)
    if isinstance(value, str) and (_is_reference(value) or any(use.is_input for use in takes)):
        return tree
    if all(use.takes(value) for use in takes):
        return tree
    raise _unfit(argument, value, takes, problems)


def _unfit(argument: Argument, value: Any, takes: Sequence[Accepts], problems: Problems) -> FaultyOverrideError:
    expected = " and ".join(dict.fromkeys(use.described() for use in takes))
    message = f"{shortened(argument.path)}: expected {expected}, got {shown(value)}"
    fixes = [use.advice(value) for use in takes] if isinstance(value, str) else []
    fixes += [f"write {int(value)}"] if isinstance(value, float) and value.is_integer() else []
    fix = next(filter(None, fixes), None)
    if fix is None and isinstance(value, str) and any(use.has_list for use in takes):
        fix = "write a list in brackets: [1, 2]"
    if isinstance(value, str) and (found := _DASHED.fullmatch(value)):
        fix = f"a range is written with two dots: -m {shortened(argument.path)}={found[1]}..{found[2]}"
    return faulty(problems, "R052", message, argument.value_origin, fix)


def _read_json(argument: Argument, text: str, problems: Problems) -> Tree:
    """Read JSON as its standard has it: no repeated keys, no NaN; within the limits of a recipe."""
    assert argument.source is not None, "text comes from the command line"
    origin = argument.value_origin
    if _depth(text) > MAX_DEPTH:
        raise faulty(problems, "R004", f"maps and lists may nest {MAX_DEPTH} deep, here are more", origin)
    try:
        value = json.loads(
            text, object_pairs_hook=_pairs, parse_int=_number, parse_float=_number, parse_constant=_number
        )
    except json.JSONDecodeError as error:
        before = (argument.path + "=" + text[: error.pos]).splitlines() or [""]
        there = argument.source.origin(len(before) - 1, len(before[-1]))
        message = f"{shortened(argument.path)}: from here on, this is not JSON"
        fix = 'JSON has text in double quotes: "text", [1, 2], {"id": "a"}, true, null'
        raise faulty(problems, "R052", message, there, fix) from error
    except ValueError as error:
        raise faulty(problems, "R052", f"{shortened(argument.path)}: {error}", origin) from error
    return _tree(value, lambda path: origin, problems)


def _depth(text: str) -> int:
    depth = deepest = 0
    for character in _JSON_TEXT.sub("", text):
        depth += (character in "[{") - (character in "]}")
        deepest = max(deepest, depth)
    return deepest


def _number(text: str) -> ScalarValue:
    """Read a number by the recipe's rules for numbers: finite, and not too long."""
    if text in ("NaN", "Infinity", "-Infinity"):
        raise ValueError(f"{text} is no number that a recipe can use")
    return read_scalar(text)


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {shown(key)} is given twice")
        found[key] = value
    return found


def _tree(value: Any, at: Callable[[str], Origin], problems: Problems) -> Tree:
    """Return values as a tree; where a recipe cannot hold them, the mistakes are collected."""
    found = Problems()
    try:
        tree = tree_of(value, at, found)
    except StopReadingError:
        tree = None
    problems.extend(found)
    if tree is None or found:
        raise FaultyOverrideError
    return tree


MAX_TEXT_FILE_BYTES = 64_000
_PART = re.compile(rf"(?P<name>{NAME})(?P<items>(?:\[[A-Za-z0-9_-]+\])*)(?P<dot>\.|$)")
_ITEM = re.compile(r"\[([A-Za-z0-9_-]+)\]")
_FIX_PATH = "a path is written like steps, params.steps, nodes.first.steps or nodes.dit.loras[lightning].strength"


@dataclass(frozen=True)
class Override:
    """One change as the command line gives it; changes apply in their order, later ones over earlier ones.

    kind "set": PATH=VALUE, read as the place in the schema takes it;
    kind "set-json": PATH=JSON, of a type that the place takes;
    kind "set-file": PATH=FILE, whose text is the value, without one line break at its end;
    kind "unset": PATH, which goes back to its default; a parameter goes back to what the recipe says;
    kind "seed": the value of the parameter seed; where there is none, of the seeds that sample nodes have;
    kind "param": a parameter's name, from Python, with its `value`.
    """

    kind: Literal["set", "set-json", "set-file", "unset", "seed", "param"]
    text: str
    value: Any = None

    def __str__(self) -> str:
        if self.kind == "param":
            return f"--set-json params.{self.text}={json.dumps(self.value, default=str)}"
        return f"--{self.kind} {self.text}"


@dataclass(frozen=True)
class Changes:
    """What is laid over a recipe, later over earlier: profiles, files of a recipe's shape, and then single overrides.

    Relative paths in the overrides start at `base_dir`, or at the current folder. `inside` is the recipe's text and the
    folder at which its relative paths start, where the recipe's file is a video that has it inside.
    """

    profiles: Sequence[str] = ()
    files: Sequence[Path] = ()
    overrides: Sequence[Override] = ()
    base_dir: Path | None = None
    inside: tuple[str, Path] | None = None

    def __bool__(self) -> bool:
        return any((self.profiles, self.files, self.overrides))

    @property
    def start(self) -> Path:
        """The absolute folder where relative paths in the overrides start."""
        return (self.base_dir or Path.cwd()).absolute()


NO_CHANGES = Changes()


class FaultyOverrideError(Exception):
    """A change cannot be applied; its mistake has been collected."""


@dataclass(frozen=True)
class Step:
    """One step of a path: a key, or an item of a list, and where it begins in the path."""

    text: str
    is_item: bool
    start: int


@dataclass(frozen=True)
class Argument:
    """A change taken apart. `value` is text that is still to be read, a tree that was written in a recipe, or nothing.

    `source` is the text that the value stands in and `column` where it begins there, for what the command line gives;
    `file` is the file that the value was read from; `reading` is what YAML alone would make of a text.
    """

    kind: Literal["set", "set-json", "set-file", "unset", "seed", "param", "matrix"]
    path: str
    steps: tuple[Step, ...]
    path_origin: Origin
    value: str | Tree | None
    value_origin: Origin
    source: Source | None = None
    column: int = 0
    file: str | None = None
    reading: Tree | None = None

    def at(self, step: Step) -> Origin:
        """Return the place of one step of the path."""
        place = self.path_origin.place
        if not self.path_origin.excerpt.startswith(self.path, place.column - 1):  # written with escapes
            return self.path_origin
        there = replace(place, column=place.column + step.start)
        return replace(self.path_origin, place=there, width=len(step.text))

    @property
    def key(self) -> str:
        """The path in the one form that all ways to write it share: `steps` for `params.steps`."""
        first, *rest = self.steps
        if first.text == "params" and rest and not rest[0].is_item and rest[0].text not in ("params", "nodes"):
            return self.path[rest[0].start :]
        return self.path


def parse_overrides(overrides: Iterable[Override], base_dir: Path, problems: Problems) -> list[Argument]:
    """Take the command line's changes apart. Faulty ones are collected and left out.

    `problems`: takes what is wrong, at places like `--set:2:7`: the second --set, column 7; `<params>:steps`.
    """
    numbers: dict[str, int] = {}
    arguments = []
    for override in overrides:
        numbers[override.kind] = number = numbers.get(override.kind, 0) + 1
        option = f"--{override.kind}"
        if override.kind == "seed":
            override = replace(override, text=f"seed={override.text}")
        source = Source(option, base_dir, tuple(override.text.splitlines()) or ("",), line=number)
        try:
            arguments.append(_parse_override(override, source, problems))
        except FaultyOverrideError:
            continue
    return arguments


def _parse_override(override: Override, source: Source, problems: Problems) -> Argument:
    if override.kind == "param":
        origin = Origin(Place(f"<params>:{override.text}", 0, 0), "", source.base_dir)
        to_param = (Step("params", False, 0), Step(override.text, False, len("params.")))
        tree = _tree(override.value, lambda path: origin, problems)
        return Argument("param", f"params.{override.text}", to_param, origin, tree, origin)
    check_characters(override.text, source, problems)
    path, equals, value = override.text.partition("=")
    example = "steps" if override.kind == "unset" else "steps=20 or nodes.first.cfg=6"
    if bool(equals) == (override.kind == "unset"):
        origin = source.origin(0, 0, len(override.text))
        is_unset = override.kind == "unset"
        message = f"'{shortened(override.text)}' has {'an' if is_unset else 'no'} = in it"
        fix = f"write {'PATH alone' if is_unset else 'PATH=VALUE'}, like {example}"
        raise faulty(problems, "R050", message, origin, fix)
    origin, column = source.origin(0, 0, len(path)), len(path) + 1
    steps, value_origin = parse_path(path, origin, problems), source.origin(0, column, len(value))
    argument = Argument(override.kind, path, steps, origin, value, value_origin, source, column)
    return _with_file(argument, value, problems) if override.kind == "set-file" else argument


def check_characters(text: str, source: Source, problems: Problems) -> None:
    """Refuse what no recipe may hold.

    Raises:
        FaultyOverrideError: There is such a character.
    """
    forbidden = FORBIDDEN.search(text)
    if forbidden is not None:
        message = f"the character U+{ord(forbidden[0]):04X} may not stand in a recipe"
        raise faulty(problems, "R003", message, source.origin(0, forbidden.start()))


def parse_path(path: str, origin: Origin, problems: Problems) -> tuple[Step, ...]:
    """Take a path apart.

    Raises:
        FaultyOverrideError: It is no path.
    """
    steps: list[Step] = []
    position = 0
    while position < len(path):
        match = _PART.match(path, position)
        if match is None or (match.end() == len(path) and match["dot"]):
            break
        steps.append(Step(match["name"], False, position))
        items = _ITEM.finditer(path, match.start("items"), match.end("items"))
        steps += [Step(item[1], True, item.start(1)) for item in items]
        position = match.end()
    if position == len(path) and steps:
        return tuple(steps)
    there = origin
    if origin.excerpt.startswith(path, origin.place.column - 1):
        place = replace(origin.place, column=origin.place.column + position)
        there = replace(origin, place=place, width=max(1, len(path) - position))
    raise faulty(problems, "R050", f"'{shortened(path)}' is no path", there, _FIX_PATH)


def faulty(problems: Problems, code: str, message: str, origin: Origin, fix: str | None = None) -> FaultyOverrideError:
    """Collect a mistake and return the exception that leaves the change out."""
    problems.add(code, message, origin, fix=fix)
    return FaultyOverrideError()


def _with_file(argument: Argument, value: str, problems: Problems) -> Argument:
    name = os.path.expanduser(value)
    path = argument.value_origin.base_dir / name
    try:
        text = read_text(path, name, problems, argument.value_origin, MAX_TEXT_FILE_BYTES)
    except StopReadingError as error:
        raise FaultyOverrideError from error
    first = text.partition("\n")[0]
    origin = Origin(Place(name), first, argument.value_origin.base_dir, max(1, len(first)))
    return replace(argument, value=text.removesuffix("\n"), value_origin=origin, file=name)
