"""One computation of a thing at a time, among processes: locks that save work, and never decide what is right.

The kernel drops a lock when its process ends, however it ends, so that none has to be removed by hand. Where locks do
not work (some network file systems grant them to everybody, or to nobody) things may be computed twice; the store lets
the first result count.
"""

from __future__ import annotations

import errno
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import ModuleType

_FCNTL: ModuleType | None = None
if sys.platform != "win32":
    import fcntl  # here, not on first use: a process may have no file left to open by then

    _FCNTL = fcntl

POLL_SECONDS = 0.2
_MAX_NOTE_BYTES = 4096


@contextmanager
def turn(
    path: Path,
    about: str,
    on_wait: Callable[[str], None],
    between: Callable[[], None],
    on_failure: Callable[[str], None] = lambda reason: None,
) -> Iterator[None]:
    """Wait until nobody else holds the lock, then hold it inside this block.

    Args:
        path: The lock's file, removed afterwards.
        about: What it is held for, for the message of those who wait.
        on_wait: Called once with the holder, if there is one to wait for.
        between: Called every 0.2 s while waiting; what it raises ends the waiting.
        on_failure: Called with the reason where nothing can be locked; the block is entered all the same.
    """
    try:
        descriptor = _take(path, on_wait, between)
    except OSError as error:
        on_failure(error.strerror or str(error))
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


@contextmanager
def held(path: Path, *, waits: bool = True) -> Iterator[bool]:
    """Lock a file that is there inside this block, for `is_held`; where nothing can be locked, do nothing.

    Gives False where it is not to wait and another process has it.
    """
    is_ours = True
    with ExitStack() as stack:
        try:
            file = stack.enter_context(path.open("r+b"))
            if _FCNTL is not None:
                _FCNTL.flock(file, _FCNTL.LOCK_EX if waits else _FCNTL.LOCK_EX | _FCNTL.LOCK_NB)
        except OSError as error:
            is_ours = not isinstance(error, BlockingIOError)
        yield is_ours


def is_held(path: Path) -> bool | None:
    """Tell whether a process has locked a file, without changing anything; None where that cannot be told."""
    if _FCNTL is None:
        return None
    try:
        with path.open("rb") as file:
            _FCNTL.flock(file, _FCNTL.LOCK_SH | _FCNTL.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    return False


def gpu_lock_path(device: str) -> Path:
    """Return the lock of a GPU, for this user on this machine."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    index = int(device.partition(":")[2] or 0)
    ids = [item.strip() for item in visible.split(",")] if visible else []
    name = ids[index] if index < len(ids) else str(index)
    user = os.getuid() if hasattr(os, "getuid") else 0
    safe = "".join(letter if letter.isalnum() else "-" for letter in name)
    return Path(tempfile.gettempdir()) / f"s2vflow-{user}" / f"gpu-{safe}.lock"


def remove_unused(paths: Iterable[Path]) -> int:
    """Remove those of some locks that killed processes left; return how many."""
    removed = 0
    for path in paths:
        with suppress(OSError):
            if path.is_file() and (descriptor := try_lock(path)) is not None:
                try:
                    path.unlink()
                    removed += 1
                finally:
                    os.close(descriptor)
    return removed


def _take(path: Path, on_wait: Callable[[str], None], between: Callable[[], None]) -> int:
    """Return the descriptor of the lock once it is ours; OSErrors are those of `try_lock`."""
    is_told = False
    while True:
        found = try_lock(path)
        if found is not None:
            return found
        if not is_told and (holder := _holder(path)):
            is_told = True
            on_wait(holder)
        between()
        time.sleep(POLL_SECONDS)


def try_lock(path: Path, mode: int = 0o600) -> int | None:
    """Try to lock a file, made with this mode: a descriptor to write by, or None where another process has it.

    Raises:
        OSError: Locks do not work here, or their folder cannot be written.
    """
    if _FCNTL is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    try:
        _FCNTL.flock(descriptor, _FCNTL.LOCK_EX | _FCNTL.LOCK_NB)
        if os.fstat(descriptor).st_ino == os.stat(path).st_ino:
            return descriptor
    except (BlockingIOError, FileNotFoundError):  # the latter: its last holder has just removed it
        pass
    except OSError:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def _holder(path: Path) -> str:
    with suppress(OSError, ValueError, TypeError, KeyError):
        with path.open("rb") as file:
            note = json.loads(file.read(_MAX_NOTE_BYTES))
        return f"process {int(note['pid'])}, {note['about']}, since {note['since']}"
    return ""
