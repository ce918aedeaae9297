"""Files spoilt byte by byte, and the checksums that are mended so that a spoilt file is read further."""

from __future__ import annotations

import random
import struct
import zlib

_NUMBERS = (0, 1, 2, 3, 4, 7, 8, 16, 255, 256, 0x7FFF, 0x8000, 0xFFFF, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF)
_LONG = (*_NUMBERS, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 1_000_000, 48_000)
_OGG_POLYNOMIAL = 0x04C1_1DB7


def spoilt(data: bytes, others: list[bytes], chance: random.Random) -> bytes:
    """Return a file with one to many things changed, mostly near its start, where headers stand."""
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 3, 8, 30))):
        if not changed:
            break
        kind = chance.randrange(12)
        near = chance.random() < 0.6
        at = chance.randrange(min(len(changed), 256) if near else len(changed))
        length = chance.choice((1, 2, 4, 8, 32, 512, 4096))
        if kind <= 2:
            changed[at] ^= 1 << chance.randrange(8)
        elif kind == 3:
            changed[at] = chance.choice((0, 0xFF, 0x7F, 0x80, chance.randrange(256)))
        elif kind <= 6:
            size, order = chance.choice((2, 4, 4, 8)), chance.choice("<>")
            number = chance.choice(_LONG) % (1 << (8 * size))
            changed[at : at + size] = struct.pack(order + {2: "H", 4: "I", 8: "Q"}[size], number)
        elif kind == 7:
            del changed[at:]
        elif kind == 8:
            del changed[at : at + length]
        elif kind == 9:
            changed[at:at] = changed[at : at + length] * chance.choice((1, 1, 10))
        elif kind == 10:
            changed[at : at + length] = bytes(len(changed[at : at + length]))
        else:
            other = chance.choice(others)
            start = chance.randrange(len(other))
            changed[at : at + length] = other[start : start + length]
    return bytes(changed[: 4 * len(data) + 10_000])


def mended(data: bytes) -> bytes:
    """Return a file with the checksums of PNG chunks and Ogg pages set right."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return _mended_png(data)
    return _mended_ogg(data) if data.startswith(b"OggS") else data


def _mended_png(data: bytes) -> bytes:
    changed, at = bytearray(data), 8
    while at + 12 <= len(changed):
        (size,) = struct.unpack_from(">I", changed, at)
        end = at + 8 + size
        if end + 4 > len(changed):
            break
        struct.pack_into(">I", changed, end, zlib.crc32(changed[at + 4 : end]))
        at = end + 4
    return bytes(changed)


def _mended_ogg(data: bytes) -> bytes:
    changed, at = bytearray(data), 0
    while changed[at : at + 4] == b"OggS" and at + 27 <= len(changed):
        segments = changed[at + 27 : at + 27 + changed[at + 26]]
        end = at + 27 + len(segments) + sum(segments)
        if end > len(changed):
            break
        changed[at + 22 : at + 26] = bytes(4)
        struct.pack_into("<I", changed, at + 22, _ogg_sum(changed[at:end]))
        at = end
    return bytes(changed)


def _ogg_sum(page: bytes) -> int:
    register = 0
    for byte in page:
        register = ((register << 8) & 0xFFFF_FFFF) ^ _OGG_TABLE[(register >> 24) ^ byte]
    return register


def _ogg_table() -> tuple[int, ...]:
    table = []
    for byte in range(256):
        register = byte << 24
        for _ in range(8):
            register = ((register << 1) ^ (_OGG_POLYNOMIAL if register & 0x8000_0000 else 0)) & 0xFFFF_FFFF
        table.append(register)
    return tuple(table)


_OGG_TABLE = _ogg_table()
