"""Telling somebody that a batch has ended."""

from __future__ import annotations

import shlex
import subprocess

_MAX_SECONDS = 30.0


def notify_end(command: str, text: str) -> str:
    """Run a command with a line of text as its last argument; no shell sees either.

    Args:
        command: A program and arguments, quoted as for a shell.
        text: What has become of the batch.

    Returns:
        Why that failed, "" if it did not: a batch does not fail for it.
    """
    try:
        words = [*shlex.split(command), text]
        done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, timeout=_MAX_SECONDS, check=False)
    except (OSError, ValueError) as error:
        return f"--notify {command}: {error}"
    except subprocess.TimeoutExpired:
        return f"--notify {command}: took longer than {_MAX_SECONDS:g} s"
    if done.returncode:
        said = done.stderr.decode("utf-8", "replace").strip().rpartition("\n")[2]
        return f"--notify {command}: exit code {done.returncode}{f': {said}' if said else ''}"
    return ""
