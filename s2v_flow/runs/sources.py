"""The digests of files, as planning and running need them."""

from __future__ import annotations

from pathlib import Path

from s2v_flow.files.facts import file_digest, known_digest
from s2v_flow.graph.events import Listener, StageStarted
from s2v_flow.wording import size_text

_HASHED_AT_ONCE_BYTES = 64 << 20


class FileDigests:
    """sha256 of files, remembered in a table on the disk; `emit` is told where a large one has to be read."""

    def __init__(self, memory: Path, emit: Listener = lambda event: None) -> None:
        self._memory = memory
        self._emit = emit
        self._made: dict[Path, str] = {}

    def __call__(self, file: Path) -> str:
        """Return a file's sha256, reading all of it where it is not remembered.

        Raises:
            MissingError: It cannot be read.
        """
        is_long = file.is_file() and self.known(file) is None
        if is_long:
            self._emit(StageStarted("", f"hashing {file.name} ({size_text(file.stat().st_size)}), once"))
        self._made[file] = file_digest(file, self._memory)
        if is_long:
            self._emit(StageStarted("", ""))
        return self._made[file]

    def known(self, file: Path) -> str | None:
        """Return a file's sha256 if that takes no time; None where it does, or the file is not there."""
        if not file.is_file():
            return None
        if file.stat().st_size <= _HASHED_AT_ONCE_BYTES:
            return file_digest(file, self._memory)
        return known_digest(file, self._memory) or self._made.get(file)
