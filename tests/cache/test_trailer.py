"""Bytes behind a delivered object: the file is up to date only with exactly these."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from s2v_flow.cache.store import DamagedObjectError, Store, StoredObject, holds


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


def test_another_film_of_any_size_is_told_apart_without_being_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind a film there are boxes of a note, or nothing; what stands at that place in a longer one is neither."""
    store = Store(tmp_path / "cache")
    (tmp_path / "a.mp4").write_bytes(b"film" * 1000)
    shutil.copy(tmp_path / "a.mp4", tmp_path / "b.mp4")
    item = store.publish("ab" * 32, {"kind": "toy"}, {"video": tmp_path / "b.mp4"}, {}).outputs["video"]
    (tmp_path / "ours.mp4").write_bytes(b"film" * 1000 + bytes(4) + b"uuidnote")
    (tmp_path / "other.mp4").write_bytes(b"FILM" * 1100)
    read = []
    monkeypatch.setattr("s2v_flow.cache.store._digest", lambda file, size: read.append(file.name) or item.sha256)
    assert [holds(tmp_path / name, item) for name in ("a.mp4", "ours.mp4", "other.mp4")] == [True, True, False]
    assert [Path(name).name for name in read] == ["a.mp4", "ours.mp4"]
