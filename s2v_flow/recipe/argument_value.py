"""The value of a change, read as its place in the schema takes it, never guessed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from s2v_flow.recipe.argument import Argument, FaultyOverrideError, faulty
from s2v_flow.recipe.fields import Accepts
from s2v_flow.recipe.problems import Problems, StopReadingError
from s2v_flow.recipe.reader import FORBIDDEN, MAX_DEPTH, MAX_EVENTS, read_yaml
from s2v_flow.recipe.scalars import read_scalar
from s2v_flow.recipe.tree import Entry, ListValue, MapValue, Scalar, ScalarValue, Tree, plain
from s2v_flow.wording import nearest, shortened, shown

_JSON_TEXT = re.compile(r'"(?:[^"\\]|\\.)*"')


def read_value(argument: Argument, takes: Sequence[Accepts], problems: Problems) -> Tree:
    """Return the value that a change gives to its place.

    Args:
        argument: The change; any but "unset".
        takes: What the place takes: the value must fit all of them.
        problems: Takes what is wrong.

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
    """Read what stands behind --set."""
    if _is_reference(text):
        return Scalar(text, argument.value_origin)  # as in a recipe; the field is checked once it is resolved
    if text.startswith("[") and all(use.has_list for use in takes):
        return _read_list(argument, text, problems)
    for value in _readings(text):
        if all(use.takes(value) for use in takes):
            return Scalar(value, argument.value_origin, is_quoted=True)
    if any(use.is_input for use in takes):
        return Scalar(text, argument.value_origin)
    raise _unfit(argument, text, takes, problems)


def _is_reference(text: str) -> bool:
    return "$params." in text or "${" in text


def _readings(text: str) -> Iterator[ScalarValue]:
    """Yield what a text can be read as: the number, truth value or null that YAML makes of it, then the text itself."""
    try:
        value = read_scalar(text)
    except ValueError:
        value = text
    if not isinstance(value, str):
        yield value
    yield text


def _read_list(argument: Argument, text: str, problems: Problems) -> Tree:
    assert argument.source is not None, "text comes from the command line"
    found = Problems()
    try:
        tree = read_yaml(text.encode(), replace(argument.source, column=argument.column + 1), found)
    except StopReadingError as error:
        raise FaultyOverrideError from error
    finally:
        problems.extend(found)
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
    is_text = isinstance(value, str)
    match = nearest(value, dict.fromkeys(word for use in takes for word in use.words)) if is_text else None
    fix = f"did you mean {match}?" if match else None
    if is_text and any(use.has_list for use in takes):
        fix = "write a list in brackets: [1, 2]"
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
    return _tree(value, argument, _Count(), problems)


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


class _Count:
    """How many values there are so far."""

    def __init__(self) -> None:
        self.values = 0


def _tree(value: Any, argument: Argument, count: _Count, problems: Problems) -> Tree:
    """Return JSON's values as a tree; all of it was written where the argument's value was."""
    origin = argument.value_origin
    count.values += 1
    if count.values > MAX_EVENTS:
        raise faulty(problems, "R004", f"a recipe may have {MAX_EVENTS} values, here are more", origin)
    if isinstance(value, dict):
        entries = {key: Entry(origin, _tree(item, argument, count, problems)) for key, item in value.items()}
        return MapValue(entries, origin)
    if isinstance(value, list):
        return ListValue(tuple(_tree(item, argument, count, problems) for item in value), origin)
    found = FORBIDDEN.search(value) if isinstance(value, str) else None
    if found is not None:
        message = f"the character U+{ord(found[0]):04X} may not stand in a recipe, nor be written as an escape"
        raise faulty(problems, "R003", message, origin)
    return Scalar(value, origin, is_quoted=True)
