"""Small facts about files' contents, such as a sound's length, remembered by the content's sha256."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from s2v_flow.cache.atomic import make_root, temporary

_MAX_FACTS = 2000


def remembered(memory_path: Path, key: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return a fact from memory, or compute it and remember it.

    Args:
        memory_path: The JSON table; a damaged one is as good as none, and one that cannot be written is not an error.
        key: What the fact is and of which content ("audio:<sha256>").
        compute: Finds the fact out: small JSON values.
    """
    facts = _recall(memory_path)
    known = facts.get(key)
    if isinstance(known, dict):
        return known
    fact = compute()
    kept = dict(list(facts.items())[-_MAX_FACTS:])
    _write(memory_path, {**kept, key: fact})
    return fact


def _recall(memory_path: Path) -> dict[str, Any]:
    try:
        facts = json.loads(memory_path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return facts if isinstance(facts, dict) else {}


def _write(memory_path: Path, facts: dict[str, Any]) -> None:
    with suppress(OSError):
        make_root(memory_path.parent)
        with temporary(memory_path.parent / "tmp", memory_path.suffix) as (file, name):
            file.write(json.dumps(facts).encode())
            file.close()
            os.replace(name, memory_path)
