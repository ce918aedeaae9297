"""A disk that refuses, as far as Python can show it: calls below one folder fail with an error number."""

from __future__ import annotations

import builtins
import ctypes
import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

OPERATIONS = ("open", "mkdir", "replace", "link", "fsync", "chmod")


class Refusal:
    """Counts the calls of one kind below a folder, and refuses them from one on, until another."""

    def __init__(self, folder: Path, number: int, first: int = 0, last: int | None = None) -> None:
        self.folder, self.number, self.first, self.last = str(folder), number, first, last
        self.calls = 0
        self.refused = 0

    def wraps(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def called(where: Any, *args: Any, **named: Any) -> Any:
            self.ask([os.readlink(f"/proc/self/fd/{where}") if isinstance(where, int) else where, *args])
            return original(where, *args, **named)

        return called

    def ask(self, args: list[Any]) -> None:
        if not any(isinstance(part, (str, os.PathLike)) and str(part).startswith(self.folder) for part in args[:2]):
            return
        self.calls += 1
        if self.calls > self.first and (self.last is None or self.calls <= self.last):
            self.refused += 1
            raise OSError(self.number, os.strerror(self.number), str(args[0]))


def refuse(
    monkeypatch: pytest.MonkeyPatch, operation: str, folder: Path, number: int, first: int = 0, last: int | None = None
) -> Refusal:
    """Refuse an operation below a folder, after `first` calls and up to the `last`; "open" means for writing."""
    refusal = Refusal(folder, number, first, last)
    if operation != "open":
        monkeypatch.setattr(os, operation, refusal.wraps(getattr(os, operation)))
        return refusal
    os_open, io_open = os.open, io.open

    def opened_os(path: Any, flags: int, *args: Any, **named: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            refusal.ask([path])
        return os_open(path, flags, *args, **named)

    def opened_io(path: Any, mode: str = "r", *args: Any, **named: Any) -> Any:
        if set(mode) & set("wax+") and not isinstance(path, int):
            refusal.ask([path])
        return io_open(path, mode, *args, **named)

    monkeypatch.setattr(os, "open", opened_os)
    monkeypatch.setattr(io, "open", opened_io)
    monkeypatch.setattr(builtins, "open", opened_io)
    return refusal


def forked(action: Callable[[], None]) -> None:
    """Do something in a process of its own, which has to end well."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            action()
            code = 0
        except BaseException as error:  # noqa: BLE001
            sys.stderr.write(f"in the child: {type(error).__name__}: {error}\n")
            sys.stderr.flush()
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0


def as_a_user(action: Callable[[], None], folder: Path) -> None:
    """Do something in a process for which file modes count: root's child becomes somebody else, who owns `folder`."""
    is_root = os.geteuid() == 0
    if is_root:
        os.chown(folder, 65534, 65534)

    def act() -> None:
        if is_root:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
        action()

    forked(act)


def _checked(result: int) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _mount_for_us_alone(folder: Path, size: int) -> None:
    """Mount a disk that this process and its children see, and nobody else; it is gone with them.

    Raises:
        OSError: The system grants nobody but root mounts of their own.
    """
    new_mounts, new_user, private = 0x20000, 0x10000000, 0x44000
    system = ctypes.CDLL(None, use_errno=True)
    uid, gid = os.geteuid(), os.getegid()
    _checked(system.unshare(new_mounts | (0 if uid == 0 else new_user)))
    if uid != 0:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
        Path("/proc/self/gid_map").write_text(f"0 {gid} 1")
    _checked(system.mount(b"none", b"/", None, private, None))
    _checked(system.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 0, f"size={size},mode=0777".encode()))


def small_disk(folder: Path, free: int = 100_000) -> None:
    """Put a disk of 400 kB with so many bytes free at a folder, for this process and its children alone.

    Raises:
        OSError: The system grants nobody but root mounts of their own.
    """
    size = 400 << 10
    _mount_for_us_alone(folder, size)
    (folder / "filler").write_bytes(bytes(size - free))


@contextmanager
def own_disk(folder: Path, size: int) -> Iterator[bool]:
    """Put a disk of so many bytes at a folder inside this block; False: none can be mounted by who runs the tests.

    Killed tests leave no mount: nobody else has it.
    """
    is_mounted = False
    if os.geteuid() == 0:  # whoever else would become another user for good
        with suppress(OSError):
            _mount_for_us_alone(folder, size)
            is_mounted = True
    try:
        yield is_mounted
    finally:
        if is_mounted:
            _checked(ctypes.CDLL(None, use_errno=True).umount2(os.fsencode(folder), 2))  # even where it is in use


def needs_small_disks() -> pytest.MarkDecorator:
    """Skip a test where the system grants no mounts; what stands beside it shows the same with a limit on files."""
    pid = os.fork()
    if pid == 0:
        try:
            small_disk(Path("/mnt"), 0)
        except OSError:
            os._exit(1)
        os._exit(0)
    return pytest.mark.skipif(os.waitpid(pid, 0)[1] != 0, reason="the system lets nobody mount a disk of 400 kB")
