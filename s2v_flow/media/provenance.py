"""A note inside an mp4: a `uuid` box after the film, which players skip (ISO/IEC 14496-12, 4.2)."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from s2v_flow.errors import MediaError

BOX_ID = bytes.fromhex("733276666c6f772d70726f762d303031")  # "s2vflow-prov-001"
MAX_NOTE_BYTES = 4 << 20
_MAX_BOXES = 10_000


def note_box(note: bytes) -> bytes:
    """Return the box that holds a note, to be put at an mp4's end.

    Raises:
        ValueError: The note is longer than `MAX_NOTE_BYTES`.
    """
    if len(note) > MAX_NOTE_BYTES:
        raise ValueError(f"a note is at most {MAX_NOTE_BYTES} bytes, got {len(note)}")
    return struct.pack(">I4s16s", 24 + len(note), b"uuid", BOX_ID) + note


def read_note(path: str | os.PathLike[str]) -> bytes | None:
    """Return the note inside an mp4, or None where there is none.

    Raises:
        MediaError: The file cannot be read, or is no mp4.
    """
    try:
        with Path(path).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            for kind, start, end in _boxes(file, size, path):
                if kind == b"uuid" and end - start >= 16:
                    file.seek(start)
                    if file.read(16) == BOX_ID and end - start - 16 <= MAX_NOTE_BYTES:
                        return file.read(end - start - 16)
    except OSError as error:
        raise MediaError(f"{path} cannot be read: {error.strerror}") from error
    return None


def _boxes(file: BinaryIO, size: int, path: str | os.PathLike[str]) -> Iterator[tuple[bytes, int, int]]:
    """Yield the top-level boxes: type, where the content begins, where it ends."""
    position = 0
    for count in range(_MAX_BOXES):
        if position == size:
            return
        file.seek(position)
        header = file.read(16)
        if len(header) < 8:
            break
        length, kind = struct.unpack(">I4s", header[:8])
        begin = 8
        if length == 1 and len(header) == 16:
            (length,), begin = struct.unpack(">Q", header[8:]), 16
        elif length == 0:
            length = size - position
        if (count == 0 and kind != b"ftyp") or length < begin or position + length > size:
            break
        yield kind, position + begin, position + length
        position += length
    raise MediaError(f"{path} is not a whole mp4 file")
