"""A note inside an mp4: in boxes after the film, which players skip (ISO/IEC 14496-12, 4.2).

A `uuid` box holds it byte for byte. In a `udta` box it stands as the comment tag too, which FFmpeg reads and a remux
keeps. ComfyUI's tags (workflow, prompt) stand in one of their own: ComfyUI looks for named keys in the first `udta` of
a file. FFmpeg reads them too, where the film's own header has no named keys; a remux keeps them in Matroska, and in mp4
with `-movflags use_metadata_tags`.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from s2v_flow.errors import MediaError

BOX_ID = bytes.fromhex("733276666c6f772d70726f762d303031")  # "s2vflow-prov-001"
MAX_NOTE_BYTES = 4 << 20
_BEGINNING = '{"essence":'
_MAX_BOXES = 10_000
_UTF8 = struct.pack(">II", 1, 0)  # the type of a tag's value, and its locale


def note_box(note: bytes) -> bytes:
    """Return the boxes that hold a note, UTF-8 text, to be put at an mp4's end.

    Raises:
        ValueError: The note is longer than `MAX_NOTE_BYTES`.
    """
    if len(note) > MAX_NOTE_BYTES:
        raise ValueError(f"a note is at most {MAX_NOTE_BYTES} bytes, got {len(note)}")
    comment = _box(b"ilst", _box(b"\xa9cmt", _box(b"data", _UTF8, note)))
    return _meta(b"mdir", b"appl", comment) + _box(b"uuid", BOX_ID, note)


def tags_box(tags: Mapping[str, bytes]) -> bytes:
    """Return the box of UTF-8 texts under names of one's own, to be put between the film and the note."""
    keys = (_box(b"mdta", name.encode()) for name in tags)
    values = (_box(struct.pack(">I", key), _box(b"data", _UTF8, text)) for key, text in enumerate(tags.values(), 1))
    named = _box(b"keys", struct.pack(">II", 0, len(tags)), *keys), _box(b"ilst", *values)
    return _meta(b"mdta", bytes(4), *named) if tags else b""


def _box(kind: bytes, *content: bytes) -> bytes:
    return struct.pack(">I4s", 8 + sum(map(len, content)), kind) + b"".join(content)


def _meta(handler: bytes, maker: bytes, *content: bytes) -> bytes:
    return _box(b"udta", _box(b"meta", bytes(4), _box(b"hdlr", bytes(8), handler, maker, bytes(9)), *content))


def read_note(path: str | os.PathLike[str]) -> bytes | None:
    """Return the note inside an mp4, or in the comment tag of an mp4 or Matroska file; None where there is none.

    Raises:
        MediaError: The file cannot be read, or is no such file.
    """
    try:
        with Path(path).open("rb") as file:
            if file.read(4) == b"\x1aE\xdf\xa3":
                return _comment(file, "matroska", path)
            size = os.fstat(file.fileno()).st_size
            for kind, start, end in _boxes(file, size, path):
                if kind == b"uuid" and end - start >= 16:
                    file.seek(start)
                    if file.read(16) == BOX_ID and end - start - 16 <= MAX_NOTE_BYTES:
                        return file.read(end - start - 16)
            return _comment(file, "mov", path) if size else None
    except OSError as error:
        raise MediaError(f"{path} cannot be read: {error.strerror}", "check the name and its permissions") from error


def _comment(file: BinaryIO, form: str, path: str | os.PathLike[str]) -> bytes | None:
    """Return a container's comment if it is a note, as a remux has left it."""
    from s2v_flow.media.source import open_container, tags_of

    file.seek(0)
    try:
        with open_container(file, form, path) as container:
            texts = [text for name, text in tags_of(container) if name.lower() == "comment"]
    except MediaError:
        return None
    notes = (text.encode() for text in texts if text.startswith(_BEGINNING) and len(text) <= MAX_NOTE_BYTES)
    return next(notes, None)


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
    raise MediaError(f"{path} is not a whole mp4 file", "copy or download it again")
