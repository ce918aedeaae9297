"""stdout and stderr that never end a command: of any encoding, closed, full, or a pipe without a reader."""

from __future__ import annotations

import errno
import io
import os
import sys
from contextlib import suppress
from typing import Any

from s2v_flow.errors import ExitCode, S2VFlowError


class _Sink(io.FileIO):
    """A file descriptor that takes everything; the first error is remembered, and nothing is written from then on."""

    error: OSError | None = None

    def write(self, data: Any, /) -> int:
        if self.error is None:
            try:
                return super().write(data)
            except OSError as error:
                self.error = error
        return len(data)


class Streams:
    """This process's stdout and stderr, exchanged for some that never fail; tests that have their own keep them."""

    def __init__(self) -> None:
        self._stdout: _Sink | None = None
        if sys.stdout is sys.__stdout__ and sys.stderr is sys.__stderr__:
            _open_closed()
            self._stdout = _Sink(1, "w", closefd=False)
            is_terminal = self._stdout.isatty()
            # what goes into a file or a pipe is read again, by this program too, which reads UTF-8
            sys.stdout = _text(self._stdout, getattr(sys.stdout, "encoding", None) if is_terminal else "utf-8")
            sys.stderr = _text(_Sink(2, "w", closefd=False), getattr(sys.stderr, "encoding", None))

    def check(self) -> None:
        """Do nothing if all that was printed has arrived, or if nobody wanted more of it.

        Raises:
            S2VFlowError: A result could not be written to stdout.
        """
        if self._stdout is None:
            return
        with suppress(ValueError):  # it is closed
            sys.stdout.flush()
        error = self._stdout.error
        if error is not None and error.errno != errno.EPIPE:
            is_full = error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", None))
            code = ExitCode.DISK_FULL if is_full else ExitCode.FAILED
            fix = "free some space, or send it elsewhere"
            raise S2VFlowError(f"stdout cannot be written: {error.strerror}", fix, exit_code=code)


def _open_closed() -> None:
    """Open what is closed of stdin, stdout and stderr on the null device: else a video would get the number 1 or 2."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # it gets the lowest number that is free


def _text(sink: _Sink, encoding: str | None) -> io.TextIOWrapper:
    buffer = io.BufferedWriter(sink)
    return io.TextIOWrapper(buffer, encoding or "utf-8", errors="backslashreplace", line_buffering=sink.isatty())
