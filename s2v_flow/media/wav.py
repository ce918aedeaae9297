"""The length of a wav file's sound, whatever its header says: what writes into a pipe cannot go back to fill it in.

Such headers say 0, all ones, or some large number; the sound then goes on to the end of the file.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator, Mapping
from io import FileIO

from s2v_flow.media.source import truncated

_MAX_CHUNKS = 1000  # before the sound
_PLACEHOLDERS = (2**31, 2**32, 2**63, 2**64)  # and what is a header's length or a block less than these
_NEAR = 2**16
_HUGE_BYTES, _HUGE_RATIO = 10**9, 8


class Patched:
    """A file some of whose bytes read otherwise."""

    def __init__(self, file: FileIO, patches: Mapping[int, bytes]) -> None:
        self._file, self._patches = file, patches
        self.seek, self.tell = file.seek, file.tell

    def read(self, count: int = -1) -> bytes:
        """Return up to `count` bytes."""
        start = self._file.tell()
        data = bytearray(self._file.read(count))
        for at, patch in self._patches.items():
            first, last = max(at, start), min(at + len(patch), start + len(data))
            if first < last:
                data[first - start : last - start] = patch[first - at : last - at]
        return bytes(data)


def with_real_length(file: FileIO, path: str | os.PathLike[str], note: Callable[[str], None]) -> FileIO | Patched:
    """Return a wav file (RIFF, RIFX, RF64) as one whose header tells how long the sound in it is.

    A promised length is a placeholder if it is 0 with something behind it that is no other chunk, if it is about a
    limit of the format, or if it is over 10**9 bytes and 8 times what is there.

    Raises:
        MediaError: less is there than a length promises that is no placeholder.
    """
    magic = file.read(4)
    order = ">" if magic == b"RIFX" else "<"
    size = file.seek(0, os.SEEK_END)
    wide = None  # where a length of 64 bits stands
    data = None
    for name, start, length in _chunks(file, order, 12, size):
        if name == b"ds64" and magic == b"RF64":
            wide = start + 8
        if name == b"data":
            data = start, length
            break
    if data is None:
        file.seek(0)
        return file  # not a whole header: libsndfile says so
    start, promised = data
    if wide is not None:
        file.seek(wide)
        (promised,) = struct.unpack("<Q", file.read(8))
    present = size - start
    is_empty = promised == 0 and _is_chunk_list(file, order, start, size)
    file.seek(0)
    if is_empty or 0 < promised <= present:
        return file
    if promised and not any(limit - _NEAR <= promised <= limit for limit in _PLACEHOLDERS):
        if promised < _HUGE_BYTES or promised < _HUGE_RATIO * present:
            raise truncated(path, f"{promised} bytes were promised, {present} are there")
        note(f"its header promises {promised} bytes of sound, {present} are there: taken as streamed, and complete")
    patches = {start - 4: struct.pack(f"{order}I", min(present, 2**32 - 1))}
    if wide is not None:
        patches[wide - 8] = struct.pack("<QQ", size - 8, present)
    return Patched(file, patches)


def _chunks(file: FileIO, order: str, at: int, size: int) -> Iterator[tuple[bytes, int, int]]:
    """Yield each chunk's name, where its content starts, and how long it claims to be."""
    for _ in range(_MAX_CHUNKS):
        file.seek(at)
        head = file.read(8)
        if len(head) < 8 or at >= size:
            return
        name, length = struct.unpack(f"{order}4sI", head)
        yield name, at + 8, length
        at += 8 + length + length % 2


def _is_chunk_list(file: FileIO, order: str, at: int, size: int) -> bool:
    """Tell whether chunks with readable names fill the rest of the file exactly, or nothing is left."""
    end = at
    for name, start, length in _chunks(file, order, at, size):
        if not all(0x20 <= byte < 0x7F for byte in name):
            return False
        end = start + length + length % 2
    return end in (size, size + 1)
