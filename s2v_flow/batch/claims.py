"""Who has which job, where several processes run one batch: on machines that share a folder, whose locks may not work.

Each process says so in a file of its own, whose beat counts up. Nobody waits for another's job: another one is taken.
Two that take a job at the same moment may both run it; the store lets the first result count.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from s2v_flow.files.atomic import is_alive, machine_id, write_whole

BEAT_SECONDS = 2.0
STALE_SECONDS = 30.0  # without a beat: its process, or its machine, is gone


class Claims:
    """The jobs that this process has taken, and those of others, in a folder that all of them see.

    A job's key is equal in two processes where both mean the same work: see `Job.key`.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / f"claims-{machine_id()}-{os.getpid()}.json"
        self._beat, self._written, self._looked = 0, 0.0, 0.0
        self._own: dict[str, list[str]] = {}
        self._seen: dict[Path, tuple[bytes, float, bool]] = {}  # what, since when, whether it has ever changed
        self._others: dict[str, list[str]] = {}

    def take(self, key: str) -> bool:
        """Take a job, unless another process has it, or has ended it."""
        if key in self._look():
            return False
        self.note(key, "running")
        if self._look(before=self._path).get(key) is None:
            return True
        self.note(key, "")
        return False

    def note(self, key: str, state: str, message: str = "") -> None:
        """Say that a job runs here, or how it ended: done, failed; "": that it may be taken."""
        self._own.pop(key, None)
        if state:
            self._own[key] = [state, message, platform.node()]
        self._write()

    def elsewhere(self) -> dict[str, list[str]]:
        """Give a sign of life, and return what others say of jobs by key: state, message, host. Quick to ask."""
        now = time.monotonic()
        if now - self._written > BEAT_SECONDS:
            self._write()
        if now - self._looked > BEAT_SECONDS / 2:
            self._look()
        return self._others

    def close(self) -> None:
        """Give everything back."""
        with suppress(OSError):
            self._path.unlink()

    def _write(self) -> None:
        self._beat, self._written = self._beat + 1, time.monotonic()
        with suppress(OSError):
            beat = {"pid": os.getpid(), "beat": self._beat, "jobs": self._own}
            write_whole(self._path, json.dumps(beat).encode(), is_flushed=False)

    def _look(self, before: Path | None = None) -> dict[str, list[str]]:
        """Read what others say; `before`: only those whose names come first."""
        self._looked = time.monotonic()
        found: dict[str, list[str]] = {}
        for path, jobs in self._files():
            if before is None or path < before:
                found |= jobs
        self._others = found if before is None else self._others
        return found

    def _files(self) -> Iterator[tuple[Path, dict[str, Any]]]:
        for path in self._path.parent.glob("claims-*.json"):
            with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
                text = path.read_bytes()
                told = json.loads(text)
                before = self._seen.get(path)
                if before is None or before[0] != text:
                    before = self._seen[path] = (text, self._looked, before is not None)
                is_here = path.name.startswith(f"claims-{machine_id()}-")
                is_gone = self._looked - before[1] > STALE_SECONDS or (is_here and not is_alive(told["pid"]))
                if is_gone and path != self._path:
                    path.unlink()
                elif path != self._path:
                    # what a process ended counts once it has been seen to live: its file may be an old one
                    jobs = told["jobs"].items()
                    yield path, {key: job for key, job in jobs if before[2] or job[0] == "running"}
