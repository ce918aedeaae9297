"""What is remembered of files: the sha256 of large ones, and small facts about their content, such as a sound's length.

Both stand in JSON tables. A damaged table is as good as none, as is a fact that is not as it was written; one that
cannot be written is not an error, and of two writers at once one may be forgotten: then something is computed again.

A digest is remembered only once a file has rested for two seconds: a later change within the clock's granularity
would go unseen (the "racily clean" problem of version control). A time that lies ahead is another clock's: no write
gives it again.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache, wraps
from pathlib import Path
from typing import Any, TypeVar

from s2v_flow.errors import MissingError
from s2v_flow.files.atomic import make_root, write_whole

BLOCK_BYTES = 16 * 2**20  # between blocks a thread may wait 5 ms for the interpreter
REST_NS = 2 * 10**9
_SCHEMA = 1
_MAX_ENTRIES = 2000
_MAX_LIVE = 32
_SEAL = "sealed"
_ADDING = threading.Lock()  # of two threads at once none is forgotten
FoundT = TypeVar("FoundT")


def per_file(compute: Callable[..., FoundT]) -> Callable[..., FoundT]:
    """Let a function of a file and hashable arguments remember, in this process, what it found until the file changes.

    What it returns must not be changed; errors, and what is found of files that were written just now, are not kept.
    """

    @lru_cache(_MAX_LIVE)
    def known(identity: tuple[int, ...], path: Path, *arguments: Any, **named: Any) -> FoundT:
        return compute(path, *arguments, **named)

    @wraps(compute)
    def found(path: Path, *arguments: Any, **named: Any) -> FoundT:
        with suppress(OSError):
            identity = _identity(os.stat(path))
            if _is_at_rest(identity, time.time_ns()):
                return known(tuple(identity.values()), path, *arguments, **named)
        return compute(path, *arguments, **named)

    return found


def remembered(memory_path: Path, key: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return a fact, small JSON values, from memory, or compute it and remember it.

    `key`: what the fact is and of which content ("audio:<sha256>").
    """
    known = recalled(memory_path, key)
    if known is not None:
        return known
    fact = compute()
    with _ADDING:
        sealed = {**fact, _SEAL: _seal(key, fact)}
        _write_table(memory_path, _newest(_read_table(memory_path), key, sealed))
    return fact


def recalled(memory_path: Path, key: str) -> dict[str, Any] | None:
    """Return a fact from memory, None where it is not there, or not as it was written."""
    known = _read_table(memory_path).get(key)
    if not isinstance(known, dict):
        return None
    fact = {name: value for name, value in known.items() if name != _SEAL}
    with suppress(RecursionError):
        if known.get(_SEAL) == _seal(key, fact):
            return fact
    return None


def _seal(key: str, fact: dict[str, Any]) -> str:
    """Return a digest by which a change of a fact, or of what it is about, is noticed."""
    return hashlib.sha256(json.dumps([key, fact], sort_keys=True).encode()).hexdigest()


def file_digest(
    path: Path,
    memory_path: Path | None = None,
    *,
    clock_ns: Callable[[], int] = time.time_ns,
    should_stop: Callable[[], bool] = lambda: False,
) -> str:
    """Return a file's sha256, 64 hexadecimal digits, from memory if the file is unchanged, else by reading all of it.

    `memory_path`: the JSON table; None: always read. `clock_ns`: the time, comparable with the file's times;
    `should_stop`: asked after each block.

    Raises:
        MissingError: The file is missing, unreadable, or changed while it was read; or reading it was stopped.
    """
    known = known_digest(path, memory_path)
    if known is not None:
        return known
    try:
        with open(path, "rb", buffering=0) as file:
            before = _identity(os.fstat(file.fileno()))
            sha256, block = hashlib.sha256(), memoryview(bytearray(BLOCK_BYTES))
            while count := file.readinto(block):
                sha256.update(block[:count])
                if should_stop():
                    raise MissingError(f"{path}: not read to the end")
            after = _identity(os.fstat(file.fileno()))
    except OSError as error:
        raise MissingError(f"{path}: cannot be read: {error.strerror}", "check its permissions") from error
    if before != after:
        raise MissingError(f"{path}: changed while it was read", fix="wait until it is completely written")
    digest = sha256.hexdigest()
    if memory_path is not None and _is_at_rest(after, clock_ns()):
        with _ADDING:
            files = _newest(_digests(memory_path), os.path.realpath(path), {**after, "sha256": digest})
            _write_table(memory_path, {"schema": _SCHEMA, "files": files})
    return digest


def known_digest(path: Path, memory_path: Path | None) -> str | None:
    """Return a file's remembered sha256, or None if it is not known or the file has changed since; nothing is hashed.

    Raises:
        MissingError: The file is missing.
    """
    with suppress(LookupError):
        return _noted_digest(path, memory_path)
    return None


@per_file
def _noted_digest(path: Path, memory_path: Path | None) -> str:
    """Return a file's remembered sha256; raise LookupError where it is not known, or the file has changed since."""
    try:
        identity = _identity(os.stat(path))
    except OSError as error:
        raise MissingError(f"{path}: cannot be read: {error.strerror}", "check its permissions") from error
    entry = _digests(memory_path).get(os.path.realpath(path)) if memory_path is not None else None
    if not isinstance(entry, dict) or any(entry.get(name) != value for name, value in identity.items()):
        raise LookupError
    digest = entry.get("sha256")
    if not isinstance(digest, str) or len(digest) != 64:
        raise LookupError
    return digest


def _identity(status: os.stat_result) -> dict[str, int]:
    return {
        "dev": status.st_dev,
        "ino": status.st_ino,
        "size": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "ctime_ns": status.st_ctime_ns,
    }


def _is_at_rest(identity: dict[str, int], now_ns: int) -> bool:
    return min(abs(now_ns - identity[name]) for name in ("mtime_ns", "ctime_ns")) >= REST_NS


def _digests(memory_path: Path) -> dict[str, Any]:
    table = _read_table(memory_path)
    files = table.get("files") if table.get("schema") == _SCHEMA else None
    return files if isinstance(files, dict) else {}


def _newest(entries: dict[str, Any], key: str, entry: dict[str, Any]) -> dict[str, Any]:
    """Add an entry as the last, and forget the oldest beyond the limit."""
    others = [item for item in entries.items() if item[0] != key]
    return {**dict(others[1 - _MAX_ENTRIES :]), key: entry}


@per_file
def _read_table(path: Path) -> dict[str, Any]:
    try:
        table = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return table if isinstance(table, dict) else {}


def _write_table(path: Path, table: dict[str, Any]) -> None:
    """Replace a table, written whole or not at all; a full or read-only disk costs time, not the run."""
    with suppress(OSError):
        make_root(path.parent)
        write_whole(path, json.dumps(table, indent=1).encode(), path.parent / "tmp", is_flushed=False)
