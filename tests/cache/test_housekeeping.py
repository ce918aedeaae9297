"""Looking after a cache: what goes, what must stay, and what dead processes leave."""

from __future__ import annotations

import io
import json
import os
import stat
import subprocess
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from faults_for_tests import forked, needs_small_disks, small_disk

from s2v_flow.cache.budget import parse_size
from s2v_flow.cache.bundle import export_bundle, import_bundle
from s2v_flow.cache.housekeeping import collect, inventory, is_running, live_run, pin, remove, stats, tidy, verify
from s2v_flow.cache.resume_point import ResumePoints
from s2v_flow.cache.store import Store
from s2v_flow.errors import MissingError, RefusedError, S2VFlowError
from s2v_flow.files import atomic
from s2v_flow.files.atomic import CannotWriteError
from s2v_flow.files.lock import held
from s2v_flow.history.find import forget_runs

OLD = time.time() - 5 * 3600


@pytest.fixture(autouse=True)
def _quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def key(number: int) -> str:
    return f"{number:064x}"


def put(store: Store, number: int, size: int, seconds: float, *, payload: bytes | None = None) -> None:
    """Store a result of so many bytes that took so long, hours ago."""
    content = bytes([number]) * size if payload is None else payload
    entry = store.publish(key(number), {"kind": "toy"}, {"out": content}, {"seconds": seconds, "node": f"n{number}"})
    os.utime(store.root / "entries" / key(number)[:2] / f"{key(number)}.json", (OLD, OLD))
    for item in entry.outputs.values():
        os.utime(store.root / "objects" / item.sha256[:2] / item.file_name, (OLD, OLD))


def stored(store: Store) -> set[int]:
    """The numbers of the results that can be read."""
    found = set()
    for path in (store.root / "entries").glob("??/*.json"):
        entry = store.lookup(path.stem)
        if entry is not None and all(store.read(item) for item in entry.outputs.values()):
            found.add(int(path.stem, 16))
    return found


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Three results of 1000 bytes: 1 took 1 s, 2 took 2 s, 3 took 3 s."""
    store = Store(tmp_path / "cache")
    for number in (3, 1, 2):
        put(store, number, 1000, float(number))
    return store


def test_a_new_cache_is_its_owners_alone_and_one_that_is_there_keeps_its_modes(tmp_path: Path) -> None:
    before = os.umask(0o002)
    try:
        put(Store(tmp_path / "new"), 1, 10, 1.0)
        (tmp_path / "team").mkdir(mode=0o775)
        put(Store(tmp_path / "team"), 1, 10, 1.0)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "team").stat().st_mode) == 0o775


def test_what_is_cheapest_for_its_size_goes_first(store: Store) -> None:
    """Until the limit holds; a dry run says the same and removes nothing."""
    put(store, 4, 100, 1.5)
    dry = collect(store.root, 2200, is_dry=True)
    assert stored(store) == {1, 2, 3, 4}
    assert [item["node"] for item in dry["removed"]] == ["n1"]
    found = collect(store.root, 2200)
    assert {**found, "dry_run": True} == dry
    assert found["bytes_after"] == 2100 == sum(path.stat().st_size for path in store.root.glob("objects/*/*"))
    assert stored(store) == {2, 3, 4}
    assert collect(store.root, 0)["within_limit"]
    assert stored(store) == set()


def test_pinned_young_and_needed_results_stay(store: Store) -> None:
    """Whatever the limit."""
    pin(store.root, [key(1)])
    entry = store.publish(key(9), {"kind": "toy"}, {"out": b"young"}, {"seconds": 0.0, "node": "n9"})
    assert entry
    with live_run(store.root, [key(2)]):
        found = collect(store.root, 0)
        assert stored(store) == {1, 2, 9}
        assert not found["within_limit"]
    collect(store.root, 0)
    assert stored(store) == {1, 9}
    pin(store.root, [key(1)], is_pinned=False)
    collect(store.root, 0)
    assert stored(store) == {9}


def test_an_object_goes_with_its_last_entry(store: Store) -> None:
    """Two entries with equal bytes share one."""
    put(store, 5, 1000, 0.1, payload=bytes([3]) * 1000)
    assert collect(store.root, 2999)["bytes_after"] == 2000
    assert stored(store) == {2, 3}, "5 freed nothing, so 1 had to go too"


def test_orphans_go_once_they_are_old(store: Store) -> None:
    """A young one may be waiting for its entry."""
    folder = store.root / "objects" / "aa"
    folder.mkdir()
    old, young = (f"{letter * 64}.safetensors" for letter in "ab")
    for name, when in ((old, OLD), (young, time.time())):
        (folder / name).write_bytes(b"x")
        os.utime(folder / name, (when, when))
    collect(store.root, 10**9)
    assert [path.name for path in folder.iterdir()] == [young]
    assert stored(store) == {1, 2, 3}


def test_a_users_own_files_in_the_cache_folder_stay(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody says `--cache-dir .` in a folder that has folders of these names, with files of years ago."""
    names = ["live/config.json", "locks/poetry.lock", "quarantine/mail.eml", "checkpoints/sd/sdxl.safetensors"]
    names += ["objects/chair/mesh.obj", "entries/24/may.json", "pins/map.txt", "tmp/draft.txt", "runs/sweep/a.jpg"]
    names += ["runs/sweep/manifest.json"]
    for name in names:
        path = store.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
        os.utime(path, (OLD, OLD))
    before = stats(store.root)
    monkeypatch.setattr(time, "time", lambda: OLD + 3 * 365 * 86400)
    with live_run(store.root, []):
        pass
    assert [item["fingerprint"] for item in collect(store.root, 0)["removed"]] == [key(1), key(2), key(3)]
    assert verify(store.root, is_repair=True)["damaged"] == []
    assert forget_runs(store.root / "runs", 0) == []
    assert (before["bytes"], before["quarantined"], before["checkpoints"]) == (3000, 0, 0)
    assert [name for name in names if not (store.root / name).is_file()] == []


def test_removing_by_name_and_figures(store: Store) -> None:
    assert stats(store.root)["bytes"] == 3000
    assert [item.entry.facts["node"] for item in remove(store.root, [key(2)], is_dry=True)] == ["n2"]
    assert stored(store) == {1, 2, 3}
    remove(store.root, [key(2)])
    assert stored(store) == {1, 3}
    assert (stats(store.root)["entries"], stats(store.root)["bytes"]) == (2, 2000)


def test_verify_names_what_is_damaged_and_repairs_on_request(store: Store) -> None:
    """Without --repair nothing is moved; with it, damaged results count as not there."""
    (first, second, third) = inventory(store.root)
    (item,) = first.entry.outputs.values()
    path = store.root / "objects" / item.sha256[:2] / item.file_name
    path.chmod(0o644)
    path.write_bytes(bytes(1000))
    second.path.chmod(0o644)
    second.path.write_bytes(b"{}")
    found = verify(store.root)
    assert (found["sound"], [damage["fingerprint"] for damage in found["damaged"]]) == (1, [key(1), key(2)])
    assert path.exists()
    assert second.path.exists()
    verify(store.root, is_repair=True)
    assert verify(store.root) == {"sound": 1, "damaged": [], "repaired": False}
    assert stored(store) == {3}
    assert third.path.exists()
    put(store, 1, 1000, 1.0)
    assert stored(store) == {1, 3}


def test_what_is_evicted_while_verify_reads_is_not_damaged(store: Store) -> None:
    """The first entry is a pipe: verify waits there until the others are gone."""
    pipe = store.root / "entries" / "00" / f"{key(0)}.json"
    os.mkfifo(pipe)
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(verify, store.root)
        with pipe.open("wb"):  # opens once verify does
            pipe.unlink()
            for path in store.root.glob("entries/??/*.json"):
                path.unlink()
        assert found.result() == {"sound": 0, "damaged": [], "repaired": False}


def dead_pid() -> int:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    return process.pid


def test_what_dead_processes_left_is_removed_at_the_next_start(store: Store) -> None:
    """Files and folders of dead processes here; of others only what nobody touched for a day; nothing of the living."""
    tmp = store.root / "tmp"
    here = atomic.machine_id()
    names = {
        f".s2vflow-{here}-{dead_pid()}-a.json": (OLD, False),
        f".s2vflow-{here}-{os.getpid()}-b.json": (0.0, True),
        ".s2vflow-00000000-1-c.json": (OLD, True),
        ".s2vflow-00000000-1-d.json": (OLD - 86400, False),
        ".s2vflow-nobody": (OLD - 86400, False),
        "something-else": (OLD - 86400, True),
    }
    for name, (when, _) in names.items():
        (tmp / name).write_bytes(b"x")
        os.utime(tmp / name, (when, when))
    folder = tmp / f".s2vflow-{here}-{dead_pid()}-e"
    folder.mkdir()
    (folder / "video.mp4").write_bytes(b"half")
    with live_run(store.root, []):
        assert {path.name for path in tmp.iterdir()} == {name for name, (_, stays) in names.items() if stays}
    assert not list(store.root.glob("live/*"))


def test_markers_of_dead_runs_and_checkpoints_of_stored_results_go(store: Store) -> None:
    live = store.root / "live"
    live.mkdir()
    marker = live / f"{atomic.machine_id()}-{dead_pid()}-1.json"
    marker.write_text(json.dumps([key(1)]))
    resume_points = ResumePoints(store.root)
    payload = len(b"{}").to_bytes(8, "little") + b"{}"
    for number in (1, 7):
        resume_points.write(key(number), {"step": "3"}, payload)
    assert tidy(store.root) == 2
    assert not marker.exists()
    assert resume_points.peek(key(1)) is None
    assert (resume_points.peek(key(7)) or {})["step"] == "3"


def test_a_clock_that_was_ahead_costs_no_resume_point(store: Store) -> None:
    """It was hours ahead when the run was stopped, and is right again."""
    resume_points = ResumePoints(store.root)
    resume_points.write(key(7), {"step": "3"}, len(b"{}").to_bytes(8, "little") + b"{}")
    ahead = time.time() + 5 * 3600
    os.utime(resume_points.path(key(7)), (ahead, ahead))
    with live_run(store.root, [key(7)]):
        assert (resume_points.peek(key(7)) or {})["step"] == "3"


def test_a_run_is_known_to_live_by_its_lock(store: Store) -> None:
    """On this machine and on another; an old marker stays as long as it is locked."""
    with live_run(store.root, [], "a-run"):
        assert is_running(store.root, "a-run")
        assert not any(is_running(store.root, name) for name in ("another", "run", "*", "a**b", "../a-run", ""))
    assert not is_running(store.root, "a-run")
    marker = store.root / "live" / "00000000-1-elsewhere.json"
    marker.write_text("[]")
    os.utime(marker, (OLD - 86400, OLD - 86400))
    with held(marker):
        assert is_running(store.root, "elsewhere")
        assert (tidy(store.root), marker.exists()) == (0, True)
    assert not is_running(store.root, "elsewhere")
    assert (tidy(store.root), marker.exists()) == (1, False)


def test_a_bundle_brings_results_into_another_cache(store: Store, tmp_path: Path) -> None:
    """Byte for byte, and equal results make equal bundles; a second import brings nothing."""
    store.publish(key(8), {"kind": "toy"}, {"a": b"same", "b": b"same"}, {"node": "n8"})
    kept = inventory(store.root)
    for name in ("one.tar", "two.tar"):
        export_bundle(store.root, kept, tmp_path / name)
    assert (tmp_path / "one.tar").read_bytes() == (tmp_path / "two.tar").read_bytes()
    other = Store(tmp_path / "other")
    assert import_bundle(other.root, tmp_path / "one.tar", is_dry=True)
    assert stored(other) == set()
    assert len(import_bundle(other.root, tmp_path / "one.tar")) == 4
    assert stored(other) == stored(store) == {1, 2, 3, 8}
    assert other.lookup(key(8)) == store.lookup(key(8))
    assert import_bundle(other.root, tmp_path / "one.tar") == []
    assert list((other.root / "tmp").iterdir()) == []


def test_an_export_replaces_an_earlier_one_and_no_other_file(store: Store, tmp_path: Path) -> None:
    mine = tmp_path / "recipe.yaml"
    for content in (b"s2vflow: 1\n", b""):
        mine.write_bytes(content)
        with pytest.raises(RefusedError, match="another file is there, and stays"):
            export_bundle(store.root, inventory(store.root), mine)
        assert mine.read_bytes() == content
    for count in (3, 2, 0, 1):
        export_bundle(store.root, inventory(store.root)[:count], tmp_path / "some.tar")
        assert len(import_bundle(tmp_path / f"from {count}", tmp_path / "some.tar")) == count


@needs_small_disks()
def test_an_import_into_a_full_disk_ends_with_6(store: Store, tmp_path: Path) -> None:
    """Nothing is taken in, and nothing of it stays there."""
    put(store, 4, 90_000, 1.0)
    export_bundle(store.root, inventory(store.root), tmp_path / "some.tar")
    (tmp_path / "small").mkdir()

    def act() -> None:
        small_disk(tmp_path / "small")
        with pytest.raises(CannotWriteError) as caught:
            import_bundle(tmp_path / "small", tmp_path / "some.tar")
        assert caught.value.exit_code == 6
        assert stats(tmp_path / "small")["entries"] == 0
        assert list((tmp_path / "small" / "tmp").iterdir()) == []

    forked(act)


def test_bundles_of_strangers_are_refused(store: Store, tmp_path: Path) -> None:
    """Names that lead outside, links, flipped bytes, cut files: nothing is taken in, nothing written elsewhere."""
    path, bad = tmp_path / "good.tar", tmp_path / "bad.tar"
    export_bundle(store.root, inventory(store.root), path)
    good = path.read_bytes()
    other = tmp_path / "other"

    def refused(payload: bytes) -> None:
        bad.write_bytes(payload)
        with pytest.raises(RefusedError):
            import_bundle(other, bad)
        assert stored(Store(other)) == set()

    for name, kind in (("../evil", tarfile.REGTYPE), ("/etc/evil", tarfile.REGTYPE), ("entries/00/x.json", b"2")):
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, "/etc/passwd"
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            tar.addfile(info)
        refused(buffer.getvalue())
    refused(good[:512] + bytes([good[512] ^ 1]) + good[513:])
    refused(good[:700])
    refused(b"not a tar" * 100)
    assert not (tmp_path / "evil").exists()
    with pytest.raises(MissingError):
        import_bundle(other, tmp_path / "none.tar")
    with pytest.raises(MissingError, match="Is a directory"):
        import_bundle(other, tmp_path)


@pytest.mark.parametrize(("text", "size"), [("20G", 20 * 10**9), ("1.5 GB", 15 * 10**8), ("0", 0), ("7k", 7000)])
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "much", "-1G", "nan", "inf", "1e400", "1\n2"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(S2VFlowError, match="is no size"):
        parse_size(text)
