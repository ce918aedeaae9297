"""How large a cache may be, and keeping it so while a run writes into it.

Unless told otherwise a cache takes 50 GB or a fifth of its disk, whichever is less, and leaves 5 GB or a twentieth of
the disk free, whichever is more; but never asks for more than a tenth of the disk or 50 GB to be free, so that small
disks can be used and large ones be filled.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from s2v_flow.cache.housekeeping import collect, objects_size
from s2v_flow.errors import UsageError
from s2v_flow.wording import size_text

NO_LIMIT = 2**63 - 1
MAX_BYTES = 50 * 10**9
MIN_RESERVE_BYTES = 5 * 10**9
LOW_WATER = 0.8  # of the limit: once something goes, so much goes that the next results fit
_WAIT = 0.05  # of the limit: what has to come before trying again where little could go
_LIMIT_SHARE, _RESERVE_SHARE, _MAX_RESERVE_SHARE = 0.2, 0.05, 0.1
_LEAST_BYTES = 100_000  # without a unit: below, another one was meant
_SIZE = re.compile(r"(.*?)\s*([KMGT]I?|)\s*B?", re.DOTALL)


def default_limit(root: Path) -> int:
    """Return how many bytes a cache may take unless told otherwise."""
    total, _ = _disk(root)
    return min(MAX_BYTES, int(total * _LIMIT_SHARE)) if total else MAX_BYTES


def default_reserve(root: Path) -> int:
    """Return how many bytes a cache leaves free on its disk."""
    total, _ = _disk(root)
    return int(min(max(MIN_RESERVE_BYTES, total * _RESERVE_SHARE), total * _MAX_RESERVE_SHARE, MAX_BYTES))


def free_bytes(root: Path) -> int:
    """Return how many bytes are free on a cache's disk."""
    return _disk(root)[1]


def _disk(root: Path) -> tuple[int, int]:
    """Return how large a cache's disk is and how much of it is free; zeros where that cannot be read."""
    for folder in (root, *root.absolute().parents):
        with suppress(OSError):  # it is not there yet, or hidden
            usage = shutil.disk_usage(folder)
            return usage.total, usage.free
    return 0, 0


def parse_size(text: str, option: str = "--limit") -> int:
    """Read "20G", "1.5 GB", "12GiB" or "500000" as bytes: powers of 1000, with an i of 1024. "none" is `NO_LIMIT`.

    Raises:
        S2VFlowError: It is no size.
    """
    if text.strip().upper() == "NONE":
        return NO_LIMIT
    match = _SIZE.fullmatch(text.strip().upper())
    assert match is not None
    try:
        size = int(float(match[1]) * (1024 if match[2].endswith("I") else 1000) ** " KMGT".index(match[2][:1] or " "))
    except (ValueError, OverflowError):
        size = -1
    if not 0 <= size < NO_LIMIT:
        raise UsageError(f"{option}: {text!r} is no size", "write it like 20G, or none")
    if 0 < size < _LEAST_BYTES and not match[2]:
        fix = f"write the unit: {text.strip()}G, or {text.strip()}GiB"
        raise UsageError(f"{option}: {text.strip()} would be bytes", fix)
    return size


class Budget:
    """Keeps one cache within its limit, and its disk's reserve free, as far as what may go allows.

    The size is counted once and added up from there. `limit`, `reserve`: bytes; None: the defaults; with `NO_LIMIT`
    nothing ever goes, whatever the disk has left. `tell` gets a line that says what was evicted.
    """

    def __init__(self, root: Path, limit: int | None, tell: Callable[[str], None], reserve: int | None = None) -> None:
        self._root = root
        self._is_off = limit == NO_LIMIT
        self._limit, self._reserve = limit, reserve
        self._tell = tell
        self._size = 0
        self._waits_for = 0  # the size from which it is worth trying again

    def begin(self) -> None:
        """Count the cache, and make it smaller where it is too large."""
        if self._is_off or not self._root.is_dir():
            return
        self._size = objects_size(self._root)
        self.keep()

    def added(self, size: int) -> None:
        """Take note of bytes that were stored."""
        self._size += size
        self.keep()

    def keep(self) -> None:
        """Make the cache smaller where it, or what it leaves free, is not as it should be."""
        if self._is_off or self._size < self._waits_for:
            return
        room = self._room()
        assert self._limit is not None
        goal = int(self._limit * LOW_WATER) if self._size > self._limit else self._size
        goal = min(goal, self._size + room)
        if goal < self._size:
            self._shrink(max(goal, 0))

    def room(self, expected: int) -> int:
        """Return how many bytes may be added before a result has to go; where it lacks, what is spare goes."""
        room = self._room()
        if room < expected and not self._is_off:
            self._shrink(self._size + room - expected, NO_LIMIT)
        return self._room()

    def _room(self) -> int:
        """Return how many bytes are left within the limit and before the reserve; below 0: how many are too much."""
        if self._limit is None or self._reserve is None:
            self._limit = default_limit(self._root) if self._limit is None else self._limit
            self._reserve = default_reserve(self._root) if self._reserve is None else self._reserve
        return min(self._limit - self._size, free_bytes(self._root) - self._reserve)

    def make_room(self, size: int) -> bool:
        """Let something go because the disk is full; tell whether so many bytes came free."""
        if self._is_off:
            return False
        before = objects_size(self._root)
        self._shrink(max(before - size, 0), 0)
        return self._size <= before - size

    def _shrink(self, goal: int, fits: int | None = None) -> None:
        """Shrink to `goal`; results only as long as there is more than `fits`, by default what there is room for."""
        assert not self._is_off
        fits = self._size + self._room() if fits is None else fits
        found = collect(self._root, goal, fits, is_tidy=True)
        self._size = found["bytes_after"]
        step = int((default_limit(self._root) if self._limit is None else self._limit) * _WAIT)
        self._waits_for = 0 if found["within_limit"] else self._size + max(step, 1)
        freed = found["bytes_before"] - self._size
        if freed:
            count = len(found["removed"])
            what = f"{count} stored {'result' if count == 1 else 'results'}" if count else "what nothing used any more"
            left = f"{size_text(freed)} of {size_text(found['bytes_before'])}"
            self._tell(f"removed {what} to keep the cache within its limit ({left}); --cache-limit sets it")
