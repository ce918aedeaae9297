"""What a YAML file says, as frozen values that each know where they were written."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from s2v_flow.errors import Origin
from s2v_flow.graph.ports import FieldPath

_NULLS = frozenset({"", "~", "null", "Null", "NULL"})
_BOOLS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INTEGERS = {10: re.compile(r"[-+]?[0-9]+"), 8: re.compile(r"0o[0-7]+"), 16: re.compile(r"0x[0-9a-fA-F]+")}
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)")
_MAX_DIGITS = 40  # seeds have 20


def read_scalar(text: str) -> ScalarValue:
    """Return the value of an unquoted scalar.

    `017` is 17 and `0o17` is 15, as 1.2 says; `yes`, `off`, `1:30` and `2024-01-01` are text.

    Raises:
        ValueError: A number that is infinite, not a number at all, or too long.
    """
    if text in _NULLS:
        return None
    if text in _BOOLS:
        return _BOOLS[text]
    if text[0] not in "+-.0123456789":
        return text
    if _NOT_FINITE.fullmatch(text):
        raise ValueError("infinity and .nan are no numbers a recipe can use")
    base = next((base for base, pattern in _INTEGERS.items() if pattern.fullmatch(text)), None)
    if base is None and _FLOAT.fullmatch(text) is None:
        return text
    if len(text) > _MAX_DIGITS:
        raise ValueError(f"a number may have {_MAX_DIGITS} characters, this one has {len(text)}")
    if base is not None:
        return int(text if base == 10 else text[2:], base)
    if not math.isfinite(float(text)):
        raise ValueError("this number is too large")
    return float(text)


ScalarValue = str | int | float | bool | None


@dataclass(frozen=True)
class Scalar:
    """A text, a number, true, false or null; `is_quoted` where it was written in quotes or as a block."""

    value: ScalarValue
    origin: Origin
    is_quoted: bool = False


@dataclass(frozen=True)
class ListValue:
    """A YAML sequence."""

    items: tuple[Tree, ...]
    origin: Origin


@dataclass(frozen=True)
class MapValue:
    """A YAML mapping with text keys, in the order of the file."""

    entries: Mapping[str, Entry]
    origin: Origin

    def get(self, key: str) -> Tree | None:
        """Return the value of a key, or None where there is no such key."""
        entry = self.entries.get(key)
        return None if entry is None else entry.value

    def with_entry(self, key: str, entry: Entry) -> MapValue:
        """Return this map with one entry added, or exchanged in its place."""
        return replace(self, entries={**self.entries, key: entry})

    def without(self, key: str) -> MapValue:
        """Return this map with one entry left out."""
        return replace(self, entries={name: entry for name, entry in self.entries.items() if name != key})


@dataclass(frozen=True)
class Entry:
    """A value of a map, with the place of its key."""

    key_origin: Origin
    value: Tree


Tree = Scalar | ListValue | MapValue


def plain(tree: Tree) -> Any:
    """Return the tree as Python's own dicts, lists and scalars."""
    if isinstance(tree, Scalar):
        return tree.value
    if isinstance(tree, ListValue):
        return [plain(item) for item in tree.items]
    return {key: plain(entry.value) for key, entry in tree.entries.items()}


def children(tree: Tree) -> dict[str | int, Tree]:
    """Return what a map or a list holds, by key or index; a scalar holds nothing."""
    if isinstance(tree, MapValue):
        return {key: entry.value for key, entry in tree.entries.items()}
    return dict(enumerate(tree.items)) if isinstance(tree, ListValue) else {}


def tree_at(tree: Tree | None, path: FieldPath) -> Tree | None:
    """Return the value at a path, or None where there is none."""
    for part in path:
        tree = None if tree is None else children(tree).get(part)
    return tree


def kind_of(node: Tree | None) -> str:
    """Return the kind that a node's fields name; "" where they name none."""
    kind = tree_at(node, ("kind",))
    return str(kind.value) if isinstance(kind, Scalar) else ""


def origins_of(tree: Tree, path: FieldPath = ()) -> dict[FieldPath, Origin]:
    """Return where each value inside the tree was written: path -> origin."""
    origins = {path: tree.origin}
    for part, child in children(tree).items():
        origins.update(origins_of(child, (*path, part)))
    return origins


def path_text(tree: Tree | None, path: FieldPath) -> str:
    """Return a path as a person writes it: `loras[lightning].strength`; items go by their id where they have one."""
    text = ""
    for part in path:
        tree = tree_at(tree, (part,))
        if isinstance(part, int):
            name = tree.get("id") if isinstance(tree, MapValue) else None
            text += f"[{name.value if isinstance(name, Scalar) and isinstance(name.value, str) else part}]"
        else:
            text += f".{part}" if text else part
    return text


def absolute_dir(path: Path) -> Path:
    """Return the absolute directory of a file, symbolic links left as they are."""
    return Path(os.path.abspath(path)).parent
