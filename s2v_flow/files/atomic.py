"""Files that appear whole or not at all, under names that are free, and what becomes of those left half made."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from itertools import chain, count
from pathlib import Path
from typing import BinaryIO

from s2v_flow.errors import ExitCode, S2VFlowError

STALE_SECONDS = 24 * 3600.0
_PREFIX = ".s2vflow-"
_FULL = {errno.ENOSPC: "no space left", errno.EDQUOT: "the quota is used up"}
_ADVICE = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space or ask for more",
    errno.EMFILE: "let a process open more files (`ulimit -n 4096`)",
    errno.ENFILE: "end programs that hold many files open",
    errno.EFBIG: "let a process write larger files (`ulimit -f unlimited`)",
    errno.EIO: "check the disk",
    errno.EISDIR: "name a file, not a folder",
    errno.ENOTDIR: "name another place: a part of this path is a file",
    errno.ENAMETOOLONG: "give it a shorter name",
    errno.ESTALE: "mount the network folder again",
}
_NAME = re.compile(r"\.s2vflow-(?P<machine>[0-9a-f]{8})-(?P<pid>[0-9]+)-")


def finish(file: BinaryIO) -> None:
    """Bring a file to the disk and close it: Windows renames no open files."""
    file.flush()
    os.fsync(file.fileno())
    file.close()


def flush_folder(folder: Path) -> None:
    """Bring a folder's names to the disk."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def make_root(root: Path) -> None:
    """Make a cache folder, for its owner alone; one that is there keeps its modes, so that a team can share it."""
    if not root.is_dir():
        root.mkdir(mode=0o700, parents=True, exist_ok=True)


def temporary_prefix() -> str:
    """Return how this process's temporary names begin: which machine, which process."""
    return f"{_PREFIX}{machine_id()}-{os.getpid()}-"


@cache
def machine_id() -> str:
    """Return 8 hexadecimal digits that two processes share only if they can see each other's process ids.

    They stand for the host's name, its boot and the process's name space: containers with one name differ.
    """
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii"))
    with suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:8]


def is_alive(pid: int) -> bool:
    """Tell whether a process of this machine lives; where that cannot be told, it does."""
    if os.name != "posix":
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


@contextmanager
def temporary(folder: Path, suffix: str) -> Iterator[tuple[BinaryIO, str]]:
    """Open a new file in `folder`; whatever still has its temporary name afterwards is removed."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=folder, prefix=temporary_prefix(), suffix=suffix)
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.chmod(name, 0o644)
            yield file, name
    finally:
        with suppress(OSError):  # renamed by now; or left for `reap`, where not even removing works
            os.unlink(name)


def write_whole(path: Path, payload: bytes, folder: Path | None = None, *, is_flushed: bool = True) -> None:
    """Write a file, which replaces one that is there; half written, it stands in `folder`, else beside its place.

    Raises:
        OSError: It cannot be written; what was there stays.
    """
    with temporary(folder or path.parent, path.suffix) as (file, name):
        file.write(payload)
        finish(file) if is_flushed else file.close()
        os.replace(name, path)


@dataclass(eq=False)
class CannotWriteError(S2VFlowError):
    """The operating system refuses to write under `path`; `reason` says why in a few words, `number` is its errno."""

    path: Path | None = field(default=None, kw_only=True)
    reason: str = field(default="", kw_only=True)
    number: int | None = field(default=None, kw_only=True)

    @property
    def is_full(self) -> bool:
        """Whether there is no space left, or no quota."""
        return self.number in _FULL


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the operating system's refusals into errors that say what to do.

    Raises:
        CannotWriteError: Something in the block could not be written.
    """
    try:
        yield
    except OSError as error:
        raise cannot_write(path, error) from error


def cannot_write(path: Path, error: OSError) -> CannotWriteError:
    """Return the error for people that an operating system's refusal under `path` means."""
    is_full, other = error.errno in _FULL, "or name another folder with --cache-dir or --output-dir"
    reason = _FULL.get(error.errno or 0) or error.strerror or str(error)
    return CannotWriteError(
        f"{reason} while writing under {path}" if is_full else f"cannot write under {path}: {reason}",
        fix=f"{_ADVICE.get(error.errno or 0, 'check the permissions of the folder')}, {other}",
        kept="everything that was stored before stays usable",
        exit_code=ExitCode.DISK_FULL if is_full else ExitCode.FAILED,
        path=path,
        reason=reason,
        number=error.errno,
    )


def stale(folder: Path) -> list[Path]:
    """List the temporary files and folders in `folder` whose makers are gone.

    On this machine: the process is dead. Another machine's, and names of unknown form: nothing in them was touched for
    24 hours.
    """
    found = []
    with suppress(OSError):
        for path in sorted(folder.glob(f"{_PREFIX}*")):
            match = _NAME.match(path.name)
            if match is not None and match["machine"] == machine_id():
                is_stale = not is_alive(int(match["pid"]))
            else:
                is_stale = time.time() - _last_touched(path) > STALE_SECONDS
            found += [path] if is_stale else []
    return found


def reap(folder: Path) -> int:
    """Remove what `stale` lists; return how many are gone. What cannot be removed is left for another time."""
    removed = 0
    for path in stale(folder):
        with suppress(OSError):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()
            removed += not path.exists()
    return removed


def _last_touched(path: Path) -> float:
    newest = 0.0
    with suppress(OSError):
        newest = path.lstat().st_mtime
        for inside in path.rglob("*") if path.is_dir() else ():
            newest = max(newest, inside.lstat().st_mtime)
    return newest


class TakenError(Exception):
    """Another file has the name already."""


def free_name(path: Path, fits: Callable[[Path], bool]) -> Path:
    """Return the wanted name where it fits, else a number that is in use and fits, else a new one: talk.2.mp4.

    `fits`: tells of a name whether it is free, or is the result's already.
    """
    if fits(path):
        return path
    pattern = re.compile(rf"{re.escape(path.stem)}\.([2-9]|[1-9][0-9]+)(?:_[0-9]+)?{re.escape(path.suffix)}")
    names: list[str] = []
    with suppress(OSError):
        names = os.listdir(path.parent)
    found = sorted({int(match[1]) for name in names if (match := pattern.fullmatch(name))})
    numbers = chain(found, count(max(found, default=1) + 1))
    others = (path.with_name(f"{path.stem}.{number}{path.suffix}") for number in numbers)
    return next(name for name in others if fits(name))


def is_file_there(path: Path) -> bool:
    """Tell whether a name is in use, by anything but a folder: that is an error when it is written to."""
    return os.path.lexists(path) and not os.path.isdir(path)


def put_new(made: str | Path, path: Path) -> None:
    """Give a finished file a name in the same file system that is free; its old name may stay.

    Raises:
        TakenError: It is taken.
        OSError: The name cannot be given.
    """
    try:
        os.link(made, path)
    except FileExistsError as error:
        if os.path.isdir(path):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path)) from error
        raise TakenError(path) from None
    except OSError:  # a file system without links
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
        except FileExistsError:
            raise TakenError(path) from None
        os.replace(made, path)
