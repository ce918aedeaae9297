"""Nested data as YAML text that people like to read, and that every reader of YAML, 1.1 or 1.2, reads back the same.

Short maps and lists stand on one line, long text is folded, and any value may carry a comment.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from s2v_flow.graph.ports import FieldPath
from s2v_flow.wording import visible

_Data = object  # None, bool, int, float, str, lists and maps of these

_INDENT = 2
_MIN_FOLDED = 40  # columns that folded text gets, however deep it stands
# Words that YAML 1.1 reads as truth values or null; what begins with a letter is no number in either version.
_WORDS = frozenset(("y", "n", "yes", "no", "on", "off", "true", "false", "null"))
_FIRST = re.compile(r"[^\W\d]|[$/(]")
_NOT_IN_FLOW = frozenset(",[]{}?")  # PyYAML wants quotes around a ? there, too
_FOLD = re.compile(r"(?<=[^ \t]) (?=[^ \t])")  # where a line may end: one blank between what is none
_ESCAPES = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\t": "\\t", "\r": "\\r"}


@dataclass(frozen=True)
class _Style:
    comments: Mapping[FieldPath, str]
    above: Mapping[FieldPath, str]
    flow_depth: int
    width: int
    folds: bool

    @cached_property
    def paths_with_comments_inside(self) -> frozenset[FieldPath]:
        """The maps and lists that hold a comment and so need lines of their own."""
        commented = (*self.comments, *self.above)
        return frozenset(path[:end] for path in commented for end in range(len(path)))


def to_yaml(
    data: Mapping[str, _Data],
    *,
    comments: Mapping[FieldPath, str] | None = None,
    above: Mapping[FieldPath, str] | None = None,
    flow_depth: int = 2,
    width: int = 120,
    folds: bool = True,
) -> str:
    """Return a map as YAML text, with a newline at the end.

    Characters that no recipe may hold come out as escapes, which the recipe's reader refuses at their place.

    Args:
        data: The map: nested dicts, lists, texts, numbers, truth values and None.
        comments: Path of a value -> what to say behind it, without the `#`.
        above: Path of a value -> what to say on lines of its own before it; `()` is the top of the text.
        flow_depth: Maps and lists so deep or deeper (1: the values of the top's keys) are written on one line where
            they fit and hold no comment. Above that depth, lists of scalars alone are.
        width: How many columns a line should have at most.
        folds: Fold long text at blanks; else it stays on its line.

    Raises:
        ValueError: A number is infinite or not a number.
        TypeError: A value is of a type that YAML has no words for.
    """
    style = _Style(comments or {}, above or {}, flow_depth, width, folds)
    lines = _above(style, (), 0)
    was_section = None
    for key, value in data.items():
        block = _entry(style, _text(key) + ":", value, (key,), 0)
        is_section = len(block) > 1 and not isinstance(value, str)
        if was_section or (is_section and was_section is not None):
            lines.append("")
        lines += block
        was_section = is_section
    return "\n".join(lines if data else [*lines, "{}"]) + "\n"


def scalar_text(value: _Data, *, in_flow: bool = False) -> str:
    """Return a scalar as it stands on one line: `0.6`, `true`, `null`, `plain text`, `'a: b'`.

    `in_flow`: whether it stands inside `[]` or `{}`, where commas and brackets end a text.

    Raises:
        ValueError: A number is infinite or not a number.
        TypeError: It is no scalar.
    """
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{value} is no number that a recipe can hold")
        mantissa, e, exponent = repr(value).partition("e")
        return mantissa + ("" if "." in mantissa else ".0") + e + exponent  # YAML 1.1 takes 1e-05 for text
    if isinstance(value, str):
        return _text(value, in_flow=in_flow)
    raise TypeError(f"YAML has no words for a {type(value).__name__}")


def _text(text: str, *, in_flow: bool = False) -> str:
    if not text.isprintable():
        return '"' + "".join(map(_escaped, text)) + '"'
    if _is_plain(text, in_flow):
        return text
    if "'" not in text:
        return f"'{text}'"
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _is_plain(text: str, in_flow: bool) -> bool:
    if _FIRST.match(text) is None or text.lower() in _WORDS or text.endswith((" ", ":")):
        return False
    if in_flow and not _NOT_IN_FLOW.isdisjoint(text):
        return False
    return ": " not in text and " #" not in text


def _escaped(character: str) -> str:
    if character in _ESCAPES:
        return _ESCAPES[character]
    if character.isprintable():
        return character
    number = ord(character)
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"


def _entry(style: _Style, head: str, value: _Data, path: FieldPath, indent: int) -> list[str]:
    """Return the lines of one entry: what stands above it, its head (`key:` or `-`) and its value."""
    margin = " " * indent
    lines = _above(style, path, indent)
    comment = _comment(style, path)
    one_line = _one_line(style, value, path, indent + len(head) + 1)
    if one_line is not None:
        return [*lines, f"{margin}{head} {one_line}{comment}"]
    if isinstance(value, str):
        marker, *rest = _block_text(value, max(style.width - indent - _INDENT, _MIN_FOLDED))
        inner = margin + " " * _INDENT
        return [*lines, f"{margin}{head} {marker}{comment}", *(f"{inner}{line}" if line else "" for line in rest)]
    block: list[str] = []
    if isinstance(value, Mapping):
        for key, item in value.items():
            block += _entry(style, _text(key) + ":", item, (*path, key), indent + _INDENT)
    else:
        assert isinstance(value, Sequence), "a scalar stands on one line"
        for index, item in enumerate(value):
            block += _entry(style, "-", item, (*path, index), indent + _INDENT)
    joins = head == "-" and not comment and not block[0].lstrip().startswith("#")
    if joins:  # `- id: a`: the item's first line stands beside its dash
        return [*lines, f"{margin}- {block[0][indent + _INDENT :]}", *block[1:]]
    return [*lines, f"{margin}{head}{comment}", *block]


def _one_line(style: _Style, value: _Data, path: FieldPath, column: int) -> str | None:
    """Return a value as it stands behind its key, or None where it needs lines of its own."""
    if isinstance(value, str):
        text = _text(value)
        is_long = style.folds and column + len(text) > style.width and _FOLD.search(value) is not None
        return None if _can_be_block(value) and ("\n" in value or is_long) else text
    if not isinstance(value, (Mapping, list, tuple)):
        return scalar_text(value)
    if not value:
        return "{}" if isinstance(value, Mapping) else "[]"
    is_simple = not isinstance(value, Mapping) and not any(isinstance(item, (Mapping, list, tuple)) for item in value)
    if (len(path) < style.flow_depth and not is_simple) or path in style.paths_with_comments_inside:
        return None
    text = flow_text(value)
    return text if column + len(text) <= style.width else None


def flow_text(value: _Data) -> str:
    """Return a value on one line, maps and lists in braces and brackets."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_text(key, in_flow=True)}: {flow_text(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(flow_text, value)) + "]"
    return scalar_text(value, in_flow=True)


def _can_be_block(text: str) -> bool:
    """Return whether a text can be written as a block: nothing to escape, and no edge that a block would lose."""
    is_printable = all(line.isprintable() for line in text.split("\n"))
    last = text.removesuffix("\n").rpartition("\n")[2]
    return is_printable and not text.startswith((" ", "\n")) and bool(last.strip())


def _block_text(text: str, width: int) -> list[str]:
    """Return the block's marker and its lines: folded (`>-`) where it has no line breaks of its own, else literal."""
    if "\n" in text:
        return ["|", *text[:-1].split("\n")] if text.endswith("\n") else ["|-", *text.split("\n")]
    lines = [""]
    for piece in _FOLD.split(text):
        if lines[-1] and len(lines[-1]) + 1 + len(piece) > width:
            lines.append(piece)
        else:
            lines[-1] += f" {piece}" if lines[-1] else piece
    return [">-", *lines]


def _comment(style: _Style, path: FieldPath) -> str:
    text = style.comments.get(path)
    return "" if text is None else f"  # {visible(' '.join(text.split()))}"


def _above(style: _Style, path: FieldPath, indent: int) -> list[str]:
    text = style.above.get(path)
    return [] if text is None else [f"{' ' * indent}# {visible(line)}".rstrip() for line in text.splitlines()]
