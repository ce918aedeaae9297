"""`-m PATH=VALUES`: an axis of a matrix from the command line. VALUES are `1..8`, or `1.0,4.5`, or both mixed.

A comma inside brackets or double quotes divides nothing: `-m nodes.dit.loras=[],[{id: a, file: a.safetensors}]`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from s2v_flow.recipe.argument import Argument, FaultyOverrideError, check_characters, faulty, parse_path
from s2v_flow.recipe.matrix import MAX_CELLS, Axis
from s2v_flow.recipe.problems import Problems, StopReadingError
from s2v_flow.recipe.reader import Source, read_yaml
from s2v_flow.recipe.scalars import read_scalar
from s2v_flow.recipe.tree import Origin, Scalar, Tree
from s2v_flow.wording import shortened

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
