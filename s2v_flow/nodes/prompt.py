r"""ComfyUI's weights in prompts: `(words:1.3)`, `(words)` for 1.1 times, nested; `\(` and `\)` are brackets.

Source: ComfyUI, comfy/sd1_clip.py, token_weights (what it does; written anew).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import suppress
from itertools import accumulate

MAX_DEPTH = 50
_BRACKET_WEIGHT = 1.1
_OPEN, _CLOSE = "\x02", "\x03"  # stand for escaped brackets while others are looked for


def weighted_parts(text: str) -> list[tuple[str, float]]:
    """Take a prompt apart as ComfyUI does: the words with their weights, in order; none are empty.

    A number after the last colon in brackets is their weight, whatever stands around them; brackets without one
    multiply the weight around them by 1.1. Square brackets mean nothing. After a `)` too many, brackets are text.

    Raises:
        ValueError: Brackets are nested more than 50 deep, or a weight is not finite.
    """
    hidden = text.replace("\\(", _OPEN).replace("\\)", _CLOSE)
    if max(accumulate({"(": 1, ")": -1}.get(character, 0) for character in hidden), default=0) > MAX_DEPTH:
        raise ValueError(f"brackets in a prompt may be nested {MAX_DEPTH} deep, these are deeper")
    return [(part.replace(_OPEN, "(").replace(_CLOSE, ")"), weight) for part, weight in _parts(hidden, 1.0)]


def _parts(text: str, weight: float) -> Iterator[tuple[str, float]]:
    for part in _top_level(text):
        if not (len(part) > 1 and part[0] == "(" and part[-1] == ")"):
            yield part, weight
            continue
        inner, own = part[1:-1], weight * _BRACKET_WEIGHT
        words, _, number = inner.rpartition(":")
        if words:
            with suppress(ValueError):  # else the colon is text
                own, inner = float(number), words
        if not math.isfinite(own):
            raise ValueError(f"the weight {number.strip()} in a prompt is not finite")
        yield from _parts(inner, own)


def _top_level(text: str) -> Iterator[str]:
    """Split a text at its outermost brackets, which stay around what is in them."""
    level = start = 0
    for match in re.finditer(r"[()]", text):
        if match[0] == "(":
            if level == 0:
                yield from filter(None, [text[start : match.start()]])
                start = match.start()
            level += 1
        else:
            level -= 1
            if level == 0:
                yield text[start : match.end()]
                start = match.end()
    yield from filter(None, [text[start:]])
