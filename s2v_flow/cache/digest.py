"""The sha256 of large files, computed once and remembered by what the file system says about the file.

A digest is remembered only once a file has rested for two seconds: a later change within the clock's granularity
would go unseen (the "racily clean" problem of version control).
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from s2v_flow.cache.atomic import make_root, temporary
from s2v_flow.errors import MissingError

BLOCK_BYTES = 16 * 2**20
REST_NS = 2 * 10**9
_SCHEMA = 1


def file_digest(path: Path, memory_path: Path | None = None, *, clock_ns: Callable[[], int] = time.time_ns) -> str:
    """Return a file's sha256, from memory if the file is unchanged, else by reading all of it.

    Args:
        path: The file; links are followed.
        memory_path: The JSON table that remembers; None: always read. A damaged table is as good as none, and one that
            cannot be written is not an error.
        clock_ns: The time, comparable with the file's times.

    Returns:
        64 hexadecimal digits.

    Raises:
        MissingError: The file is missing, unreadable, or changed while it was read.
    """
    known = known_digest(path, memory_path)
    if known is not None:
        return known
    try:
        with open(path, "rb") as file:
            before = _identity(os.fstat(file.fileno()))
            sha256 = hashlib.sha256()
            while block := file.read(BLOCK_BYTES):
                sha256.update(block)
            after = _identity(os.fstat(file.fileno()))
    except OSError as error:
        raise MissingError(f"{path}: cannot be read: {error.strerror}") from error
    if before != after:
        raise MissingError(f"{path}: changed while it was read", fix="wait until it is completely written")
    digest = sha256.hexdigest()
    is_at_rest = max(after["mtime_ns"], after["ctime_ns"]) <= clock_ns() - REST_NS
    if memory_path is not None and is_at_rest:
        _remember(memory_path, os.path.realpath(path), {**after, "sha256": digest})
    return digest


def known_digest(path: Path, memory_path: Path | None) -> str | None:
    """Return a file's remembered sha256, or None if it is not known or the file has changed since; nothing is hashed.

    Args:
        path: The file; links are followed.
        memory_path: The JSON table that remembers.

    Raises:
        MissingError: The file is missing.
    """
    try:
        identity = _identity(os.stat(path))
    except OSError as error:
        raise MissingError(f"{path}: cannot be read: {error.strerror}") from error
    if memory_path is None:
        return None
    entry = _recall(memory_path).get(os.path.realpath(path))
    if not isinstance(entry, dict) or any(entry.get(name) != value for name, value in identity.items()):
        return None
    digest = entry.get("sha256")
    return digest if isinstance(digest, str) and len(digest) == 64 else None


def _identity(status: os.stat_result) -> dict[str, int]:
    return {
        "dev": status.st_dev,
        "ino": status.st_ino,
        "size": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "ctime_ns": status.st_ctime_ns,
    }


def _recall(memory_path: Path) -> dict[str, Any]:
    try:
        table = json.loads(memory_path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(table, dict) or table.get("schema") != _SCHEMA or not isinstance(table.get("files"), dict):
        return {}
    files: dict[str, Any] = table["files"]
    return files


def _remember(memory_path: Path, real_path: str, entry: dict[str, int | str]) -> None:
    """Add one entry to the table, written whole or not at all; of two writers at once, one may be forgotten."""
    files = {**_recall(memory_path), real_path: entry}
    text = json.dumps({"schema": _SCHEMA, "files": files}, indent=1, sort_keys=True)
    with suppress(OSError):  # a full or read-only disk costs time, not the run
        make_root(memory_path.parent)
        with temporary(memory_path.parent / "tmp", memory_path.suffix) as (file, name):
            file.write(text.encode())
            file.close()
            os.replace(name, memory_path)
