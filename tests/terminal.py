"""A terminal for tests: a real pseudo-terminal, and a screen that obeys what `rich` and this program write."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import termios
from collections.abc import Sequence

_PART = re.compile(r"\x1b\[([?0-9;]*)([A-Za-z])|(.)", re.DOTALL)


class Screen:
    """What stands on the screen, scrolled-off lines included; `ever` is all text that was written, without codes."""

    def __init__(self, raw: str) -> None:
        self.raw = raw
        self.ever = re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", raw)
        self._lines = [""]
        row = column = 0
        for numbers, code, character in _PART.findall(raw):
            if code == "A":
                row -= int(numbers or 1)
            elif code == "K":
                self._lines[row] = ""
            elif character == "\r":
                column = 0
            elif character == "\n":
                row += 1
                self._lines += [""] * (row + 1 - len(self._lines))
            elif character:
                line = self._lines[row].ljust(column)
                self._lines[row] = line[:column] + character + line[column + 1 :]
                column += 1

    def __str__(self) -> str:
        return "\n".join(line.rstrip() for line in self._lines)


def run_in_terminal(command: Sequence[str], columns: int) -> tuple[Screen, str, int]:
    """Run a command whose stderr is a terminal: return its screen, stdout (a pipe) and exit code."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    kept = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
    environment = {**kept, "TERM": "xterm-256color", "COLUMNS": str(columns), "PYTHONIOENCODING": "utf-8"}
    with subprocess.Popen(command, stdin=theirs, stdout=subprocess.PIPE, stderr=theirs, env=environment) as process:
        os.close(theirs)
        raw = b""
        try:
            while part := os.read(ours, 65536):
                raw += part
        except OSError:  # Linux: nobody has it open any more
            pass
        finally:
            os.close(ours)
        assert process.stdout is not None
        out = process.stdout.read().decode()
    return Screen(raw.decode(errors="replace")), out, process.returncode
