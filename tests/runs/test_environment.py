"""Digests of large files, hashed beside other work."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from s2v_flow.errors import MissingError
from s2v_flow.runs.environment import FileDigests

LARGE = (64 << 20) + 1


@pytest.fixture
def digests(tmp_path: Path) -> FileDigests:
    return FileDigests(tmp_path / "digests.json")


def large(path: Path, size: int = LARGE) -> Path:
    path.touch()
    os.truncate(path, size)  # sparse: nothing is written
    return path


def test_large_files_are_hashed_in_the_background(tmp_path: Path, digests: FileDigests) -> None:
    """Small ones are known; the digests are those of the bytes."""
    files = [large(tmp_path / name) for name in ("one", "two")]
    small = tmp_path / "small"
    small.write_bytes(b"weights")
    with digests.hashing([small]) as is_hashing:
        assert not is_hashing
    with digests.hashing([*files, small, tmp_path / "missing"]) as is_hashing:
        assert is_hashing
        assert [digests(file) for file in files] == [hashlib.sha256(bytes(LARGE)).hexdigest()] * 2


def test_hashing_ends_with_the_work_beside_it(tmp_path: Path, digests: FileDigests) -> None:
    """Also where an error ends it: a terabyte is not read to its end."""
    files = [large(tmp_path / name, 1 << 40) for name in ("one", "two", "three")]
    with pytest.raises(KeyboardInterrupt), digests.hashing(files):
        raise KeyboardInterrupt
    assert digests.known(files[0]) is None


def test_a_file_that_changes_after_it_was_hashed_is_hashed_again(tmp_path: Path, digests: FileDigests) -> None:
    """What is told is the digest of the bytes that are there when it is asked for."""
    file = large(tmp_path / "one")
    with digests.hashing([file]):
        digests(file)
        with file.open("r+b") as changed:
            changed.write(b"other")
        assert digests(file) == hashlib.sha256(b"other" + bytes(LARGE - 5)).hexdigest()


def test_a_file_that_cannot_be_read_is_an_error_of_the_call_that_needs_it(tmp_path: Path, digests: FileDigests) -> None:
    """Not of the background, and not before."""
    file = large(tmp_path / "one")
    with digests.hashing([file]):
        file.unlink()
        with pytest.raises(MissingError, match="cannot be read: No such file"):
            digests(file)
