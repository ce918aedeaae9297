"""Resume points: one file per fingerprint, a safetensors file that carries its own digest in its header.

A resume point is half-finished work and belongs to one fingerprint: a changed recipe does not use it. Where it is
damaged or does not fit, the node starts anew.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from s2v_flow.files.atomic import flush_folder, write_whole, writing

SCHEMA = "s2vflow/checkpoint/1"
_MAX_HEADER_BYTES = 64 << 10
_LENGTH_BYTES = 8


class ResumePoints:
    """The resume points inside a cache folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, fingerprint: str) -> Path:
        """Return where a node's resume point stands."""
        return self.root / "checkpoints" / fingerprint[:2] / f"{fingerprint}.safetensors"

    def write(self, fingerprint: str, facts: Mapping[str, str], payload: bytes) -> None:
        """Put a resume point, a safetensors file's bytes, in the place of the one before it, whole or not at all.

        Raises:
            S2VFlowError: It cannot be written; the one before it stands.
        """
        path = self.path(fingerprint)
        sealed = seal(payload, {**facts, "schema": SCHEMA, "fingerprint": fingerprint})
        with writing(self.root):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, sealed, self.root / "tmp")
            flush_folder(path.parent)

    def peek(self, fingerprint: str) -> dict[str, str] | None:
        """Return a resume point's facts, from its header alone: enough to talk about it, not to go on from it."""
        try:
            with self.path(fingerprint).open("rb") as file:
                header = _header(file.read(_LENGTH_BYTES + _MAX_HEADER_BYTES))
        except (OSError, ValueError, RecursionError):
            return None
        facts = _facts(header)
        return facts if facts.get("fingerprint") == fingerprint and facts.get("schema") == SCHEMA else None

    def read(self, fingerprint: str) -> tuple[dict[str, str], bytes] | None:
        """Return a resume point's facts and bytes, verified; None where there is none.

        Raises:
            ValueError: There is one that is damaged, or that cannot be read; it is out of the way now.
        """
        path = self.path(fingerprint)
        try:
            sealed = path.read_bytes()
        except OSError as error:
            if not os.path.lexists(path):  # nor may be, where the cache folder is a file or is forbidden
                return None
            quarantine(self.root, path)
            raise ValueError(f"it cannot be read: {error.strerror}") from error
        try:
            facts = unseal(sealed)
            if facts.get("schema") != SCHEMA or facts.get("fingerprint") != fingerprint:
                raise ValueError("it belongs to something else")
        except (ValueError, RecursionError) as error:
            quarantine(self.root, path)
            raise ValueError(f"it is damaged: {error}") from error
        return facts, sealed

    def forget(self, fingerprint: str) -> None:
        """Remove a resume point, if there is one."""
        with suppress(OSError):
            self.path(fingerprint).unlink()


def quarantine(root: Path, path: Path) -> bool:
    """Move a file to the cache's quarantine; return whether its place is free now."""
    with suppress(OSError):
        (root / "quarantine").mkdir(parents=True, exist_ok=True)
        os.replace(path, root / "quarantine" / path.name)
    return not os.path.lexists(path)


def seal(payload: bytes, facts: Mapping[str, str]) -> bytes:
    """Return a safetensors file with facts in its header, and a digest of all that stands in it.

    Raises:
        ValueError: The payload is no safetensors file.
    """
    header, tensors = _header(payload), payload[_tensors_at(payload) :]
    header.pop("__metadata__", None)
    digest = _digest(header, facts, tensors)
    text = json.dumps({"__metadata__": {**facts, "sha256": digest}, **header}).encode()
    text += b" " * (-len(text) % _LENGTH_BYTES)  # safetensors aligns its tensors
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text + tensors


def unseal(sealed: bytes) -> dict[str, str]:
    """Return the facts of a file that `seal` made, if it is as it was.

    Raises:
        ValueError: It is not.
    """
    header, tensors = _header(sealed), sealed[_tensors_at(sealed) :]
    facts = _facts(header)
    header.pop("__metadata__", None)
    found = facts.pop("sha256", None)
    if found != _digest(header, facts, tensors):
        raise ValueError("its bytes have changed")
    return facts


def _digest(header: Mapping[str, object], facts: Mapping[str, str], tensors: bytes) -> str:
    described = json.dumps([dict(facts), dict(header)], sort_keys=True).encode()
    return hashlib.sha256(hashlib.sha256(described).digest() + tensors).hexdigest()


def _tensors_at(payload: bytes) -> int:
    return _LENGTH_BYTES + int.from_bytes(payload[:_LENGTH_BYTES], "little")


def _header(payload: bytes) -> dict[str, object]:
    end = _tensors_at(payload)
    if len(payload) < _LENGTH_BYTES or not _LENGTH_BYTES < end <= min(len(payload), _LENGTH_BYTES + _MAX_HEADER_BYTES):
        raise ValueError("its header is cut or too long")
    header = json.loads(payload[_LENGTH_BYTES:end])
    if not isinstance(header, dict):
        raise ValueError("its header is no object")
    return header


def _facts(header: Mapping[str, object]) -> dict[str, str]:
    facts = header.get("__metadata__", {})
    if not isinstance(facts, dict) or not all(isinstance(value, str) for value in facts.values()):
        return {}
    return dict(facts)
