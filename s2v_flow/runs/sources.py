"""The digests of files, as planning and running need them."""

from __future__ import annotations

from pathlib import Path

from s2v_flow.files.facts import file_digest, known_digest

_HASHED_AT_ONCE_BYTES = 64 << 20


class FileDigests:
    """sha256 of files, remembered in a table on the disk."""

    def __init__(self, memory: Path) -> None:
        self._memory = memory
        self._made: dict[Path, str] = {}

    def __call__(self, file: Path) -> str:
        """Return a file's sha256, reading all of it where it is not remembered.

        Raises:
            MissingError: It cannot be read.
        """
        self._made[file] = file_digest(file, self._memory)
        return self._made[file]

    def known(self, file: Path) -> str | None:
        """Return a file's sha256 if that takes no time; None where it does, or the file is not there."""
        if not file.is_file():
            return None
        if file.stat().st_size <= _HASHED_AT_ONCE_BYTES:
            return file_digest(file, self._memory)
        return known_digest(file, self._memory) or self._made.get(file)
