"""Plain scalars by the core schema of YAML 1.2, as editors read them (in 1.1, `no` is false and `1e-4` is text)."""

from __future__ import annotations

import math
import re

from s2v_flow.recipe.tree import ScalarValue

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
