"""The store: whole or not at all, verified on reading, and nothing to repair by hand."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import shutil
import stat
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from s2v_flow.cache.store import DamagedObjectError, Entry, Store, StoredObject, entry_text, parse_entry
from s2v_flow.errors import ExitCode, S2VFlowError

KEY = "ab" + "0" * 62
OTHER = "ab" + "1" * 62
PREIMAGE = {"kind": "toy", "fields": {"a": [1, 1.5, None, "ü"]}}
FACTS = {"seconds": 0.1}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "cache")


def publish(store: Store, payload: bytes | Path = b"payload", key: str = KEY) -> Entry:
    return store.publish(key, PREIMAGE, {"out": payload}, FACTS)


def object_path(store: Store, item: StoredObject) -> Path:
    (path,) = (store.root / "objects").glob(f"*/{item.sha256}{item.suffix}")
    return path


def overwrite(path: Path, payload: bytes) -> None:
    path.chmod(0o644)
    path.write_bytes(payload)


def files(store: Store) -> list[str]:
    return sorted(str(path.relative_to(store.root)) for path in store.root.rglob("*") if path.is_file())


def test_what_is_published_is_found_and_read(store: Store) -> None:
    """By anybody who opens the folder; the pre-image and the facts are there for people."""
    made = publish(store)
    found = Store(store.root).lookup(KEY)
    assert found == made == Entry(KEY, PREIMAGE, made.outputs, FACTS)
    digest = hashlib.sha256(b"payload").hexdigest()
    assert made.outputs == {"out": StoredObject(digest, 7, ".safetensors")}
    assert store.read(made.outputs["out"]) == b"payload"
    assert store.lookup(OTHER) is None


def test_the_layout_is_entries_that_point_at_objects(store: Store) -> None:
    """Two levels, named by digests; a tag tells backup programs to stay away; nothing else."""
    digest = publish(store).outputs["out"].sha256
    entry = f"entries/ab/{KEY}.json"
    assert files(store) == ["CACHEDIR.TAG", entry, f"objects/{digest[:2]}/{digest}.safetensors"]
    assert (store.root / "CACHEDIR.TAG").read_text().startswith("Signature: 8a477f597d28d172789f06886806bc55")
    record = json.loads((store.root / entry).read_bytes())
    assert record["entry"]["preimage"] == PREIMAGE


def test_looking_makes_no_folder(store: Store) -> None:
    """A plan leaves no trace."""
    assert store.lookup(KEY) is None
    assert not store.root.exists()


def test_equal_results_are_one_object(store: Store) -> None:
    """Of two nodes, and of two ports."""
    publish(store)
    made = store.publish(OTHER, PREIMAGE, {"a": b"payload", "b": b"payload"}, FACTS)
    assert made.outputs["a"] == made.outputs["b"]
    assert sum("objects/" in name for name in files(store)) == 1


def test_a_finished_file_is_moved_into_the_store_with_its_suffix(store: Store) -> None:
    """Nothing is copied, and the scratch folder is gone afterwards."""
    with store.scratch() as scratch:
        path = scratch / "video.mp4"
        path.write_bytes(b"film")
        inode = path.stat().st_ino
        item = publish(store, path).outputs["out"]
        assert not path.exists()
    assert not scratch.exists()
    assert item.suffix == ".mp4"
    assert object_path(store, item).stat().st_ino == inode
    assert store.read(item) == b"film"


def test_the_scratch_folder_goes_also_after_a_failure(store: Store) -> None:
    """With what was half made."""

    def fail() -> None:
        with store.scratch() as scratch:
            (scratch / "half.mp4").write_bytes(b"fi")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list((store.root / "tmp").iterdir()) == []


def test_objects_are_read_only_and_everything_is_readable_by_others(store: Store, tmp_path: Path) -> None:
    """Whatever the process's mask: a shared cache works, and nobody edits an object by accident."""
    before = os.umask(0o077)
    try:
        with store.scratch() as scratch:
            (scratch / "a.mp4").write_bytes(b"film")
            moved = publish(store, scratch / "a.mp4", OTHER).outputs["out"]
        item = publish(store).outputs["out"]
        store.copy_to(item, tmp_path / "out.bin")
    finally:
        os.umask(before)
    modes = [stat.S_IMODE(object_path(store, each).stat().st_mode) for each in (item, moved)]
    assert modes == [0o444, 0o444]
    assert stat.S_IMODE((store.root / f"entries/ab/{KEY}.json").stat().st_mode) == 0o644
    assert stat.S_IMODE((tmp_path / "out.bin").stat().st_mode) == 0o644


def test_a_crash_between_object_and_entry_is_a_miss(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The object stays; publishing again uses it and ends well."""

    class PowerCutError(BaseException):
        pass

    def cut(body: object) -> bytes:
        raise PowerCutError

    monkeypatch.setattr("s2v_flow.cache.store.entry_text", cut)
    with pytest.raises(PowerCutError):
        publish(store)
    assert store.lookup(KEY) is None
    monkeypatch.undo()
    assert store.read(publish(store).outputs["out"]) == b"payload"
    assert store.lookup(KEY) is not None


@pytest.mark.parametrize("operation", ["fsync", "replace", "link", "chmod", "mkdir"])
@pytest.mark.parametrize(
    ("number", "code"),
    [(errno.ENOSPC, ExitCode.DISK_FULL), (errno.EDQUOT, ExitCode.DISK_FULL), (errno.EROFS, ExitCode.FAILED)],
)
def test_a_refusing_disk_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str, number: int, code: ExitCode
) -> None:
    """Whichever call is refused, from whenever on: an error for people, or it was not needed; never a wrong entry."""
    errors = []
    for allowed in range(12):
        store = Store(tmp_path / str(allowed))
        publish(store, b"old", OTHER)
        calls = _refuse(monkeypatch, operation, number, allowed)
        error = _error_of(lambda store=store: publish(store))
        monkeypatch.undo()
        errors += [error] if error else []
        assert [name for name in files(store) if name.startswith("tmp/")] == []
        found = store.lookup(KEY)
        assert found is not None or error is not None
        assert found is None or store.read(found.outputs["out"]) == b"payload"
        assert (old := store.lookup(OTHER)) is not None
        assert store.read(old.outputs["out"]) == b"old"
        if len(calls) <= allowed:
            break
    assert len(calls) <= allowed, "even the last round was refused something"
    assert bool(errors) == (operation != "link"), "entries can do without links"
    assert {error.exit_code for error in errors} <= {code}
    assert all(error.kept and "--cache-dir" in (error.fix or "") for error in errors)


def test_a_full_disk_while_making_the_scratch_folder_is_told(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the node computes anything."""
    _refuse(monkeypatch, "mkdir", errno.ENOSPC, 0)
    with pytest.raises(S2VFlowError, match="no space left") as caught, store.scratch():
        pytest.fail("there is no folder")
    assert caught.value.exit_code == ExitCode.DISK_FULL


@pytest.mark.parametrize("payload", [b"paylOad", b"payloa", b"payload+", b"", bytes(7)])
def test_damaged_objects_are_never_given_out(store: Store, tmp_path: Path, payload: bytes) -> None:
    """Neither read nor copied; they go to quarantine, and a new one takes their place."""
    for use in (store.read, lambda item: store.copy_to(item, tmp_path / "out.bin")):
        item = publish(store).outputs["out"]
        overwrite(object_path(store, item), payload)
        found = store.lookup(KEY)
        assert (found is None) == (len(payload) != 7), "the size alone tells a miss"
        with pytest.raises(DamagedObjectError, match="its bytes have changed"):
            use(item)
        assert [path.read_bytes() for path in store.root.glob("quarantine/*")] == [payload]
        assert list((store.root / "objects").glob("*/*")) == []
        assert list(tmp_path.glob("*out*")) + list(tmp_path.glob(".s2v*")) == []
        assert store.lookup(KEY) is None
    assert store.read(publish(store).outputs["out"]) == b"payload"
    assert store.lookup(KEY) is not None


def test_an_object_that_is_gone_is_a_miss(store: Store, tmp_path: Path) -> None:
    """Also between looking and reading."""
    item = publish(store).outputs["out"]
    object_path(store, item).unlink()
    assert store.lookup(KEY) is None
    for use in (store.read, lambda item: store.copy_to(item, tmp_path / "out.bin")):
        with pytest.raises(DamagedObjectError, match="No such file"):
            use(item)


def test_an_object_that_cannot_be_read_makes_room_for_a_new_one(store: Store) -> None:
    """A folder in its place, say, or a bad sector: it is put aside."""
    item = publish(store).outputs["out"]
    path = object_path(store, item)
    path.unlink()
    path.mkdir()
    with pytest.raises(DamagedObjectError):
        store.read(item)
    assert store.read(publish(store).outputs["out"]) == b"payload"


def test_every_flipped_bit_of_an_entry_is_a_miss(store: Store) -> None:
    """It goes to quarantine, and publishing puts a sound one there."""
    publish(store)
    path = store.root / f"entries/ab/{KEY}.json"
    sound = path.read_bytes()
    for position in range(len(sound)):
        changed = sound[:position] + bytes([sound[position] ^ 4]) + sound[position + 1 :]
        path.write_bytes(changed)
        found = store.lookup(KEY)
        if found is None:
            assert not path.exists()
            continue
        assert found == Store(store.root).lookup(KEY)
        assert (found.fingerprint, dict(found.preimage)) == (KEY, PREIMAGE)  # white space only
    publish(store)
    assert path.read_bytes() == sound


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"sha256": 1, "entry": {}}',
        b'{"entry": {}}',
        b"\xff\xfe",
        b"[" * 100_000,
        b"9" * 5000,
    ],
)
def test_an_entry_that_is_no_entry_is_a_miss(store: Store, text: bytes) -> None:
    """Whatever stands in the file."""
    publish(store)
    path = store.root / f"entries/ab/{KEY}.json"
    overwrite(path, text)
    assert store.lookup(KEY) is None
    assert publish(store) == store.lookup(KEY)


def test_an_entry_is_sound_only_under_its_own_name(store: Store) -> None:
    """A copied entry is not another node's result."""
    publish(store)
    shutil.copy(store.root / f"entries/ab/{KEY}.json", store.root / f"entries/ab/{OTHER}.json")
    assert store.lookup(OTHER) is None


def test_the_first_of_two_results_counts(store: Store) -> None:
    """Whoever comes later gets the first one's entry, and goes on from there."""
    first = publish(store, b"first")
    second = publish(store, b"second")
    assert second == first == store.lookup(KEY)


def test_publishers_at_the_same_time_agree(store: Store) -> None:
    """Eight of them, each with other bytes: one result for all, and no temporary files."""
    barrier = threading.Barrier(8)
    entries: list[Entry] = []

    def work(number: int) -> None:
        barrier.wait()
        entries.append(publish(Store(store.root), b"result %d" % number))

    for _ in range(5):
        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(entries) == 8
        assert all(entry == entries[0] == store.lookup(KEY) for entry in entries)
        assert list((store.root / "tmp").iterdir()) == []
        (store.root / f"entries/ab/{KEY}.json").unlink()
        entries.clear()


def test_a_file_system_without_links_works(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Entries are renamed there instead; the first one still counts."""
    _refuse(monkeypatch, "link", errno.EPERM, 0)
    first = publish(store, b"first")
    assert publish(store, b"second") == first == store.lookup(KEY)


def test_a_result_that_replaces_a_damaged_one_counts(store: Store) -> None:
    """Where computing again gives other bytes, the entry that has lost its object is replaced."""
    item = publish(store, b"first").outputs["out"]
    object_path(store, item).unlink()
    second = publish(store, b"second")
    assert store.lookup(KEY) == second
    assert store.read(second.outputs["out"]) == b"second"


def test_a_result_that_is_meant_to_replace_another_does(store: Store) -> None:
    """Where somebody asked for it to be computed again."""
    publish(store, b"first")
    second = store.publish(KEY, PREIMAGE, {"out": b"second"}, FACTS, replaces=True)
    assert store.lookup(KEY) == second
    assert store.read(second.outputs["out"]) == b"second"


def test_recent_entries_come_newest_first_and_damaged_ones_not_at_all(store: Store) -> None:
    """Also those whose objects are gone."""
    assert store.recent(5) == []
    for time, key in enumerate((KEY, OTHER, "cd" + KEY[2:]), 1):
        object_path(store, publish(store, key.encode(), key).outputs["out"]).unlink()
        os.utime(store.root / f"entries/{key[:2]}/{key}.json", (time, time))
    assert [entry.fingerprint for entry in store.recent(2)] == ["cd" + KEY[2:], OTHER]
    overwrite(store.root / f"entries/ab/{OTHER}.json", b"{")
    assert [entry.fingerprint for entry in store.recent(5)] == ["cd" + KEY[2:], KEY]


def test_copying_tells_whether_the_file_changed(store: Store, tmp_path: Path) -> None:
    """An equal file keeps its time; another one is replaced whole, folders are made."""
    item = publish(store).outputs["out"]
    target = tmp_path / "a/b/out.bin"
    assert store.copy_to(item, target) is True
    os.utime(target, (1, 1))
    assert store.copy_to(item, target) is False
    assert target.stat().st_mtime == 1
    for other in (b"paylOad", b"x"):
        target.write_bytes(other)
        assert store.copy_to(item, target) is True
        assert target.read_bytes() == b"payload"
    assert [path.name for path in target.parent.iterdir()] == ["out.bin"]


def test_editing_a_delivered_file_does_not_reach_the_store(store: Store, tmp_path: Path) -> None:
    """It is a copy, not a link."""
    item = publish(store).outputs["out"]
    store.copy_to(item, tmp_path / "out.bin")
    (tmp_path / "out.bin").write_bytes(b"edited")
    assert store.read(item) == b"payload"


def test_a_file_that_cannot_be_read_is_replaced(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it is equal does not matter."""

    def unreadable(path: Path) -> str:
        raise PermissionError(errno.EACCES, "Permission denied")

    item = publish(store).outputs["out"]
    (tmp_path / "out.bin").write_bytes(b"payl0ad")
    monkeypatch.setattr("s2v_flow.cache.store.file_sha256", unreadable)
    assert store.copy_to(item, tmp_path / "out.bin") is True
    assert (tmp_path / "out.bin").read_bytes() == b"payload"


@pytest.mark.parametrize("operation", ["fsync", "replace", "mkstemp"])
def test_a_full_disk_where_the_result_goes_is_no_damage_to_the_store(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    """Exit code 6; the old file stands, the object stays, nothing temporary is left."""
    item = publish(store).outputs["out"]
    target = tmp_path / "out/out.bin"
    target.parent.mkdir()
    target.write_bytes(b"old")
    _refuse(monkeypatch, operation, errno.ENOSPC, 0)
    with pytest.raises(S2VFlowError, match="no space left") as caught:
        store.copy_to(item, target)
    monkeypatch.undo()
    assert caught.value.exit_code == ExitCode.DISK_FULL
    assert [(path.name, path.read_bytes()) for path in target.parent.iterdir()] == [("out.bin", b"old")]
    assert store.read(item) == b"payload"


def test_a_disk_that_fills_up_while_copying_is_no_damage_either(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The write itself is refused: the object is not blamed for it, and is not computed again."""

    class FullFile(io.FileIO):
        def write(self, payload: Any) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    item = publish(store).outputs["out"]
    monkeypatch.setattr(os, "fdopen", FullFile)
    with pytest.raises(S2VFlowError, match="no space left") as caught:
        store.copy_to(item, tmp_path / "out/out.bin")
    monkeypatch.undo()
    assert not isinstance(caught.value, DamagedObjectError)
    assert caught.value.exit_code == ExitCode.DISK_FULL
    assert list((tmp_path / "out").iterdir()) == []
    assert store.read(item) == b"payload"


def test_a_folder_in_the_results_place_is_told(store: Store, tmp_path: Path) -> None:
    """And left alone."""
    (tmp_path / "out.bin").mkdir()
    with pytest.raises(S2VFlowError, match=r"cannot write under .*out\.bin"):
        store.copy_to(publish(store).outputs["out"], tmp_path / "out.bin")
    assert (tmp_path / "out.bin").is_dir()


def test_a_store_that_is_a_file_is_told(tmp_path: Path) -> None:
    """With what to do."""
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(S2VFlowError, match="cannot write under") as caught:
        publish(Store(tmp_path / "cache"))
    assert "--cache-dir" in (caught.value.fix or "")


def _error_of(action: Callable[[], object]) -> S2VFlowError | None:
    try:
        action()
    except S2VFlowError as error:
        return error
    return None


def _refuse(monkeypatch: pytest.MonkeyPatch, operation: str, number: int, allowed: int) -> list[object]:
    """Let the system refuse an operation after so many calls; return the list that counts them."""
    module: Any = tempfile if operation == "mkstemp" else os
    original: Callable[..., Any] = getattr(module, operation)
    calls: list[object] = []

    def refusing(*args: Any, **named: Any) -> Any:
        calls.append(args)
        if len(calls) > allowed:
            raise OSError(number, os.strerror(number))
        return original(*args, **named)

    monkeypatch.setattr(module, operation, refusing)
    return calls


@pytest.mark.parametrize("value", ["text", ["x"], {"x": 1}, float("inf"), 10**400, [[]]])
@pytest.mark.parametrize("name", ["seconds", "frames", "flops", "node", "degraded", "fields", "size"])
def test_an_entry_that_cannot_be_counted_with_is_none(name: str, value: Any) -> None:
    """Its digest is right: whoever wrote it, in a bundle or a shared store, meant it."""
    kept = Entry(KEY, {"kind": "toy"}, {"out": StoredObject("a" * 64, 4, "")}, {"seconds": 1, "flops": [1, 2.5]})
    assert parse_entry(entry_text(kept), KEY) == kept
    facts, outputs, is_kind = dict(kept.facts), {"out": {**vars(kept.outputs["out"])}}, type(value) is dict
    if name == "size":
        outputs["out"]["size"] = value
    elif name != "fields":
        facts[name] = value
    image = {"kind": "toy", "fields": value if name == "fields" else {}}
    body = {"schema": 1, "fingerprint": KEY, "preimage": image, "outputs": outputs, "facts": facts}
    text = json.dumps(body, sort_keys=True, ensure_ascii=False)
    signed = f'{{"sha256": "{hashlib.sha256(text.encode()).hexdigest()}", "entry": {text}}}'
    is_sound = (name == "node" and value == "text") or (name in ("degraded", "fields") and is_kind)
    assert (parse_entry(signed.encode(), KEY) is not None) == is_sound
