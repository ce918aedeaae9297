"""Identity: a fingerprint is the sha256 of a tagged, typed, canonical structure.

Types are told apart (1, 1.0 and true differ), lengths are written before contents, keys are sorted: equal structures
have equal bytes and no two different ones do.
Source: insitro/redun, hashing.py (tagged pre-images with self-delimiting encoding).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

SCHEMA = "s2vflow/fingerprint/1"


def fingerprint(preimage: Mapping[str, Any]) -> str:
    """Return the sha256 (hex) of a structure of None, bool, int, finite float, str, lists and maps with text keys.

    Raises:
        TypeError: Something else is in it.
        ValueError: A float is NaN or infinite.
    """
    digest = hashlib.sha256(SCHEMA.encode() + b"\n")
    for piece in _encode(preimage):
        digest.update(piece)
    return digest.hexdigest()


def as_made(key: str, image: Mapping[str, Any], facts: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """Return what a result is: one that was made with less than was asked for is another result."""
    if not facts.get("degraded"):
        return key, image
    image = {**image, "degraded": facts["degraded"]}
    return fingerprint(image), image


def _encode(value: object) -> Iterator[bytes]:
    if value is None:
        yield b"n;"
    elif isinstance(value, bool):
        yield b"b1;" if value else b"b0;"
    elif isinstance(value, int):
        yield b"i%d;" % value
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"a fingerprint holds finite numbers only, got {value}")
        yield b"f" + (value + 0.0).hex().encode() + b";"  # -0.0 + 0.0 is 0.0
    elif isinstance(value, str):
        text = value.encode()
        yield b"s%d:" % len(text) + text
    elif isinstance(value, Mapping):
        yield b"m%d{" % len(value)
        for key in sorted(value):
            if not isinstance(key, str):
                raise TypeError(f"keys are text, got {key!r}")
            yield from _encode(key)
            yield from _encode(value[key])
        yield b"}"
    elif isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray)):
        yield b"l%d[" % len(value)
        for item in value:
            yield from _encode(item)
        yield b"]"
    else:
        raise TypeError(f"a fingerprint cannot hold {type(value).__name__}")
