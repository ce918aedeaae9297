"""Python's values as a recipe's tree: a recipe that is a dict, parameters as keywords, what JSON holds."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from typing import Any

from s2v_flow.errors import Origin
from s2v_flow.recipe.problems import Problems
from s2v_flow.recipe.reader import FORBIDDEN, MAX_BYTES, MAX_DEPTH, MAX_EVENTS, TOO_DEEP
from s2v_flow.recipe.tree import Entry, ListValue, MapValue, Scalar, ScalarValue, Tree

_MAX_WHOLE = 10**40  # the recipe's text takes 40 digits


def tree_of(value: Any, at: Callable[[str], Origin], problems: Problems) -> Tree:
    """Return dicts, lists, tuples, texts, numbers, truth values and None as a tree; paths and numpy's scalars, too.

    `at` gives the place of a value by its path: "nodes.first.steps", "" for the whole. For what no recipe can hold null
    stands, and `problems` says so.

    Raises:
        StopReadingError: There is more than a recipe may have; `problems` says so.
    """
    return _Reading(at, problems).read(value, "", 0)


class _Reading:
    def __init__(self, at: Callable[[str], Origin], problems: Problems) -> None:
        self._at = at
        self._problems = problems
        self._count = self._size = 0

    def read(self, value: Any, path: str, depth: int) -> Tree:
        origin = self._at(path)
        self._count += 1
        if self._count > MAX_EVENTS:
            raise self._problems.stop("R004", f"a recipe may have {MAX_EVENTS} values, here are more", origin)
        is_list = isinstance(value, (list, tuple))
        if (is_list or isinstance(value, Mapping)) and depth == MAX_DEPTH:
            raise self._problems.stop(*TOO_DEEP, origin)
        if is_list:
            items = (self.read(item, f"{path}[{index}]", depth + 1) for index, item in enumerate(value))
            return ListValue(tuple(items), origin)
        if isinstance(value, Mapping):
            entries = {}
            for key, item in value.items():
                inside = f"{path}.{key}" if path else f"{key}"
                if isinstance(self._scalar(key, self._at(inside)), str):
                    entries[key] = Entry(self._at(inside), self.read(item, inside, depth + 1))
                else:
                    self._problems.add("R007", "a key must be text", self._at(inside), fix="write a name")
            return MapValue(entries, origin)
        return Scalar(self._scalar(value, origin), origin, is_quoted=True)

    def _scalar(self, value: Any, origin: Origin) -> ScalarValue:
        if getattr(value, "ndim", None) == 0:  # numpy's scalars are no numbers of Python
            value = value.item()
        if isinstance(value, os.PathLike):
            value = os.fspath(value)
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, str):
            return self._text(str.__str__(value), origin)
        if isinstance(value, int) and abs(value) < _MAX_WHOLE:
            return int(value)
        if isinstance(value, float) and math.isfinite(value):
            return float(value)
        if isinstance(value, (int, float)):
            message = "infinity, NaN and numbers of over 40 digits are no numbers a recipe can use"
            self._problems.add("R008", message, origin)
        else:
            message = f"expected text, a number, true, false, None, a list or a dict, got {type(value).__name__}"
            self._problems.add("R012", message, origin)
        return None

    def _text(self, text: str, origin: Origin) -> str:
        self._size += len(text.encode("utf-8", "surrogatepass"))
        if self._size > MAX_BYTES:
            raise self._problems.stop("R004", f"a recipe may have {MAX_BYTES} bytes, this is more", origin)
        found = FORBIDDEN.search(text)
        if found is not None:
            message = f"the character U+{ord(found[0]):04X} may not stand in a recipe, nor be written as an escape"
            self._problems.add("R003", message, origin)
        return text
