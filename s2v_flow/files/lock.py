"""One computation of a thing at a time, among processes: locks that save work, and never decide what is right.

The kernel drops a lock when its process ends, however it ends, so that nobody has to remove one by hand. Where locks do
not work (some network file systems grant them to everybody, or to nobody) things may be computed twice; the store lets
the first result count.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType

_FCNTL: ModuleType | None = None
if sys.platform != "win32":
    import fcntl  # here, not on first use: a process may have no file left to open by then

    _FCNTL = fcntl

POLL_SECONDS = 0.2
_MAX_NOTE_BYTES = 4096
_HELD = -1


@contextmanager
def turn(path: Path, about: str, on_wait: Callable[[str], None], between: Callable[[], None]) -> Iterator[None]:
    """Wait until nobody else holds the lock, then hold it inside this block.

    Args:
        path: The lock's file, removed afterwards.
        about: What it is held for; told to those who wait.
        on_wait: Called once with who holds it, if there is somebody to wait for.
        between: Called every 0.2 s while waiting; what it raises ends the waiting.
    """
    descriptor = _take(path, on_wait, between)
    if descriptor is None:
        yield
        return
    try:
        note = {"pid": os.getpid(), "about": about, "since": time.strftime("%H:%M:%S")}
        with suppress(OSError):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(note).encode(), 0)
        yield
    finally:
        with suppress(OSError):
            path.unlink()  # while it is held: who waits for it sees that it is gone, and makes a new one
        os.close(descriptor)


def gpu_lock_path(device: str) -> Path:
    """Return the lock of a GPU, for this user on this machine."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    index = int(device.partition(":")[2] or 0)
    ids = [item.strip() for item in visible.split(",")] if visible else []
    name = ids[index] if index < len(ids) else str(index)
    user = os.getuid() if hasattr(os, "getuid") else 0
    safe = "".join(letter if letter.isalnum() else "-" for letter in name)
    return Path(tempfile.gettempdir()) / f"s2vflow-{user}" / f"gpu-{safe}.lock"


def remove_unused(folder: Path) -> int:
    """Remove the locks that killed processes left; return how many."""
    removed = 0
    for path in folder.glob("*"):
        descriptor = _try(path) if path.is_file() else None
        if descriptor is not None and descriptor != _HELD:
            with suppress(OSError):
                path.unlink()
                removed += 1
            os.close(descriptor)
    return removed


def _take(path: Path, on_wait: Callable[[str], None], between: Callable[[], None]) -> int | None:
    """Return the descriptor of the lock once it is ours, or None where locks do not work."""
    is_told = False
    while True:
        found = _try(path)
        if found != _HELD:
            return found
        if not is_told and (holder := _holder(path)):
            is_told = True
            on_wait(holder)
        between()
        time.sleep(POLL_SECONDS)


def _try(path: Path) -> int | None:
    """Try to lock: a descriptor, _HELD where somebody else has it, None where locks do not work."""
    if _FCNTL is None:
        return None
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError:
        return None
    try:
        _FCNTL.flock(descriptor, _FCNTL.LOCK_EX | _FCNTL.LOCK_NB)
        if os.fstat(descriptor).st_ino == os.stat(path).st_ino:
            return descriptor
        result: int | None = _HELD  # its last holder has just removed it: it locks nothing any more
    except (BlockingIOError, FileNotFoundError):
        result = _HELD
    except OSError:
        result = None
    os.close(descriptor)
    return result


def _holder(path: Path) -> str:
    with suppress(OSError, ValueError, TypeError, KeyError):
        with path.open("rb") as file:
            note = json.loads(file.read(_MAX_NOTE_BYTES))
        return f"process {int(note['pid'])}, {note['about']}, since {note['since']}"
    return ""
