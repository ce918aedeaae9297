"""Digests of files: right, and remembered only while that is safe."""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path

import pytest

from s2v_flow.errors import MissingError
from s2v_flow.files import facts
from s2v_flow.files.facts import file_digest, known_digest

LATER_NS = 10 * 10**9


def rested() -> int:
    return time.time_ns() + LATER_NS


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"weights")
    return path


def test_digest_is_the_sha256_of_all_bytes(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts, "BLOCK_BYTES", 3)
    assert file_digest(file) == hashlib.sha256(b"weights").hexdigest()


def test_a_remembered_file_is_not_read_again(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = tmp_path / "cache" / "digests.json"
    assert known_digest(file, memory) is None
    first = file_digest(file, memory, clock_ns=rested)
    assert known_digest(file, memory) == first
    monkeypatch.setattr(facts.hashlib, "sha256", lambda: pytest.fail("read again"))
    assert file_digest(file, memory) == first


def test_a_link_is_the_file_it_points_at(file: Path, tmp_path: Path) -> None:
    memory, link = tmp_path / "digests.json", tmp_path / "link"
    link.symlink_to(file)
    assert file_digest(link, memory, clock_ns=rested) == known_digest(file, memory) == known_digest(link, memory)


def test_a_file_younger_than_two_seconds_is_not_remembered(file: Path, tmp_path: Path) -> None:
    memory = tmp_path / "digests.json"
    file_digest(file, memory, clock_ns=lambda: os.stat(file).st_ctime_ns + facts.REST_NS - 1)
    assert known_digest(file, memory) is None
    file_digest(file, memory, clock_ns=lambda: os.stat(file).st_ctime_ns + facts.REST_NS)
    assert known_digest(file, memory) is not None


def test_a_file_from_a_clock_that_was_ahead_is_remembered(file: Path, tmp_path: Path) -> None:
    """Copied with its times from a camera, or written before this machine's clock was put right."""
    memory = tmp_path / "digests.json"
    os.utime(file, (time.time() + 86400, time.time() + 86400))
    assert file_digest(file, memory, clock_ns=rested) == known_digest(file, memory)
    file.write_bytes(b"WEIGHTS")
    assert known_digest(file, memory) is None
    file_digest(file, memory, clock_ns=lambda: time.time_ns() - 3600 * 10**9)
    assert known_digest(file, memory) == hashlib.sha256(b"WEIGHTS").hexdigest()


def test_a_changed_file_is_read_again_even_with_its_old_time_and_size(file: Path, tmp_path: Path) -> None:
    memory = tmp_path / "digests.json"
    before = os.stat(file)
    file_digest(file, memory, clock_ns=rested)
    file.write_bytes(b"WEIGHTS")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert known_digest(file, memory) is None
    assert file_digest(file, memory) == hashlib.sha256(b"WEIGHTS").hexdigest()


def test_several_files_are_remembered_side_by_side(file: Path, tmp_path: Path) -> None:
    memory, other = tmp_path / "digests.json", tmp_path / "other"
    other.write_bytes(b"other")
    digests = [file_digest(path, memory, clock_ns=rested) for path in (file, other)]
    assert [known_digest(path, memory) for path in (file, other)] == digests
    assert sorted(path.name for path in tmp_path.iterdir()) == ["digests.json", "model.safetensors", "other", "tmp"]
    assert not list((tmp_path / "tmp").iterdir())


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"schema": 2, "files": {}}', b'{"schema": 1, "files": 3}', b"\xff"]
)
def test_a_damaged_table_is_as_good_as_none(file: Path, tmp_path: Path, content: bytes) -> None:
    memory = tmp_path / "digests.json"
    memory.write_bytes(content)
    assert known_digest(file, memory) is None
    assert file_digest(file, memory, clock_ns=rested) == known_digest(file, memory)


@pytest.mark.parametrize("sha256", [None, 3, "ab"])
def test_a_damaged_entry_is_as_good_as_none(file: Path, tmp_path: Path, sha256: object) -> None:
    memory = tmp_path / "digests.json"
    file_digest(file, memory, clock_ns=rested)
    table = json.loads(memory.read_text())
    next(iter(table["files"].values()))["sha256"] = sha256
    memory.write_text(json.dumps(table))
    assert known_digest(file, memory) is None


def test_a_table_that_cannot_be_written_is_no_error(file: Path, tmp_path: Path) -> None:
    (tmp_path / "blocked").write_bytes(b"")
    assert file_digest(file, tmp_path / "blocked" / "digests.json", clock_ns=rested) == file_digest(file)


def test_a_failed_write_leaves_the_old_table_and_nothing_else(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = tmp_path / "digests.json"
    memory.write_text("old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(facts.os, "replace", fail)
    file_digest(file, memory, clock_ns=rested)
    assert memory.read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["digests.json", "model.safetensors", "tmp"]
    assert not list((tmp_path / "tmp").iterdir())


def test_a_file_that_changes_while_it_is_read_is_an_error(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = hashlib.sha256

    def sha256() -> object:
        file.write_bytes(b"longer than before")
        return real()

    monkeypatch.setattr(facts.hashlib, "sha256", sha256)
    with pytest.raises(MissingError, match="changed while it was read"):
        file_digest(file)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    for ask in (file_digest, known_digest):
        with pytest.raises(MissingError, match=r"none: cannot be read: No such file"):
            ask(tmp_path / "none", None)
