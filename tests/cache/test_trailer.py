"""Bytes behind a delivered object: the file is up to date only with exactly these."""

from __future__ import annotations

from pathlib import Path

import pytest

from s2v_flow.cache.store import DamagedObjectError, Store, StoredObject


@pytest.fixture
def stored(tmp_path: Path) -> tuple[Store, StoredObject]:
    store = Store(tmp_path / "cache")
    return store, store.publish("ab" * 32, {"kind": "toy"}, {"out": b"film" * 1000}, {}).outputs["out"]


def test_a_trailer_stands_behind_the_object(stored: tuple[Store, StoredObject], tmp_path: Path) -> None:
    store, item = stored
    assert store.copy_to(item, tmp_path / "out.bin", b"note") is True
    assert (tmp_path / "out.bin").read_bytes() == b"film" * 1000 + b"note"
    assert store.copy_to(item, tmp_path / "out.bin", b"note") is False


@pytest.mark.parametrize("other", [b"", b"NOTE", b"note2", b"no", b"notenote"])
def test_another_trailer_makes_another_file(stored: tuple[Store, StoredObject], tmp_path: Path, other: bytes) -> None:
    store, item = stored
    store.copy_to(item, tmp_path / "out.bin", b"note")
    assert store.copy_to(item, tmp_path / "out.bin", other) is True
    assert (tmp_path / "out.bin").read_bytes() == b"film" * 1000 + other


def test_a_trailer_that_belongs_to_another_object_does_not_count(
    stored: tuple[Store, StoredObject], tmp_path: Path
) -> None:
    """The same length altogether, another boundary."""
    store, item = stored
    (tmp_path / "out.bin").write_bytes(b"film" * 999 + b"filX" + b"note")
    assert store.copy_to(item, tmp_path / "out.bin", b"note") is True


def test_a_damaged_object_leaves_the_file_as_it_was(stored: tuple[Store, StoredObject], tmp_path: Path) -> None:
    store, item = stored
    (tmp_path / "out.bin").write_bytes(b"before")
    (path,) = (tmp_path / "cache" / "objects").glob("??/*")
    path.chmod(0o644)
    path.write_bytes(b"flim" * 1000)
    with pytest.raises(DamagedObjectError):
        store.copy_to(item, tmp_path / "out.bin", b"note")
    assert (tmp_path / "out.bin").read_bytes() == b"before"
