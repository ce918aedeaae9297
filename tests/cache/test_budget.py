"""How large a cache becomes: the defaults, what an eviction spares, and what it costs at the start of a run."""

from __future__ import annotations

import os
import shutil
import time
from collections import namedtuple
from pathlib import Path

import pytest

from s2v_flow.cache.budget import NO_LIMIT, Budget, default_limit, default_reserve, free_bytes, parse_size
from s2v_flow.cache.housekeeping import live_run, objects_size, pin
from s2v_flow.cache.store import Store
from s2v_flow.errors import S2VFlowError

GB = 10**9
OLD = time.time() - 5 * 3600
Usage = namedtuple("Usage", "total used free")


@pytest.fixture(autouse=True)
def _quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def disk(monkeypatch: pytest.MonkeyPatch, total: int, free: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(total, total - free, free))


def key(number: int) -> str:
    return f"{number:064x}"


def put(store: Store, number: int, size: int = 1000, seconds: float = 1.0, *, is_spare: bool = False) -> None:
    """Store a result of so many bytes that took so long, hours ago; the higher its number, the later."""
    payload = number.to_bytes(4, "big") * (size // 4)
    facts = {"seconds": seconds, "node": f"n{number}", **({"is_spare": True} if is_spare else {})}
    entry = store.publish(key(number), {"kind": "toy"}, {"out": payload}, facts)
    for item in entry.outputs.values():
        os.utime(store.root / "objects" / item.sha256[:2] / item.file_name, (OLD, OLD))
    os.utime(store.root / "entries" / key(number)[:2] / f"{key(number)}.json", (OLD + number, OLD + number))


def stored(store: Store) -> set[int]:
    return {int(path.stem, 16) for path in store.root.glob("entries/??/*.json") if store.lookup(path.stem)}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Ten results of 1000 bytes that took a second each."""
    store = Store(tmp_path / "cache")
    for number in range(10):
        put(store, number)
    return store


@pytest.mark.parametrize(
    ("total", "limit", "reserve"),
    [
        (10 * GB, 2 * GB, 1 * GB),
        (60 * GB, 12 * GB, 5 * GB),
        (500 * GB, 50 * GB, 25 * GB),
        (8000 * GB, 50 * GB, 50 * GB),
    ],
)
def test_the_defaults_fit_small_and_large_disks(
    total: int, limit: int, reserve: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fifth and at most 50 GB for the cache; 5 GB or 5 % free, at most a tenth and 50 GB."""
    disk(monkeypatch, total, total)
    assert (default_limit(tmp_path / "no"), default_reserve(tmp_path / "no")) == (limit, reserve)


def test_sizes_are_read() -> None:
    assert [parse_size(text) for text in ("20G", "1.5 GB", "500000", "0", "none")] == [
        20 * GB, 1_500_000_000, 500_000, 0, NO_LIMIT
    ]  # fmt: skip
    for text in ("", "G", "-1", "nan", "inf", "1e400", "20X"):
        with pytest.raises(S2VFlowError, match="is no size"):
            parse_size(text)


@pytest.mark.parametrize("text", ["12", "20 ", "16000"])
def test_a_few_bytes_are_a_unit_left_out(text: str) -> None:
    """A cache held to 20 bytes would lose everything."""
    with pytest.raises(S2VFlowError, match="would be bytes") as caught:
        parse_size(text, "--cache-limit")
    assert caught.value.fix == f"write the unit: {text.strip()}G, or {text.strip()}GiB"


def test_nothing_goes_within_the_limit(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    disk(monkeypatch, 100_000, 90_000)
    said: list[str] = []
    Budget(store.root, 10_000, said.append).begin()
    assert (len(stored(store)), said) == (10, [])


def test_the_least_worth_and_then_the_least_used_go_down_to_four_fifths(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And it is said, in one line."""
    disk(monkeypatch, 100_000, 90_000)
    said: list[str] = []
    put(store, 20, 1000, seconds=0.1)
    store.touch(key(0))
    budget = Budget(store.root, 10_000, said.append)
    budget.begin()
    assert stored(store) == {0, 3, 4, 5, 6, 7, 8, 9}
    assert said == [
        "removed 3 stored results to keep the cache within its limit (3.0 kB of 11.0 kB); --cache-limit sets it"
    ]


def test_what_is_spare_goes_first_however_young_and_results_stay_once_the_limit_is_kept(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With four fifths as the goal, results would go that fitted if nothing spare were there."""
    disk(monkeypatch, 100_000, 90_000)
    put(store, 20, 1000, seconds=1e6, is_spare=True)
    with live_run(store.root, [key(20)]):
        os.utime(store.root / "entries" / key(20)[:2] / f"{key(20)}.json", (time.time() - 1,) * 2)
        Budget(store.root, 10_500, lambda text: None).begin()
    assert stored(store) == set(range(10))


def test_spare_room_is_what_nothing_else_needs(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is spare makes room for what is spare; pinned it stays; a disk's reserve counts, without a limit too."""
    disk(monkeypatch, 100_000, 90_000)
    put(store, 20, 1000, is_spare=True)
    put(store, 21, 1000, is_spare=True)
    pin(store.root, [key(20)])
    budget = Budget(store.root, 14_000, lambda text: None)
    budget.begin()
    assert (budget.room(2_000), stored(store)) == (2_000, {*range(10), 20, 21})
    assert (budget.room(3_500), stored(store)) == (3_000, {*range(10), 20})
    disk(monkeypatch, 100_000, 10_500)
    assert Budget(store.root, NO_LIMIT, pytest.fail).room(1_000) == 500
    assert len(stored(store)) == 11


def test_what_a_run_adds_is_counted_and_young_results_stay(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    disk(monkeypatch, 100_000, 90_000)
    said: list[str] = []
    budget = Budget(store.root, 12_000, said.append)
    budget.begin()
    for number in range(20, 23):
        store.publish(key(number), {"kind": "toy"}, {"out": bytes([number]) * 1000}, {"seconds": 0.0})
        budget.added(1000)
    assert len(said) == 1
    assert stored(store) >= {20, 21, 22}
    assert objects_size(store.root) == 9000


def test_the_reserve_is_kept_free(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a disk of 100 kB, 10; 7.5 are free."""
    disk(monkeypatch, 100_000, 7_500)
    Budget(store.root, None, lambda text: None).begin()
    assert len(stored(store)) == 7


def test_no_limit_means_that_nothing_goes(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the disk has left."""
    disk(monkeypatch, 100_000, 0)
    budget = Budget(store.root, NO_LIMIT, pytest.fail)
    budget.begin()
    budget.added(10**9)
    assert not budget.make_room(10)
    assert len(stored(store)) == 10


def test_where_all_is_held_it_is_not_tried_again_with_each_result(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But after another twentieth of the limit."""
    disk(monkeypatch, 100_000, 90_000)
    pin(store.root, [key(number) for number in range(10)])
    looks: list[int] = []
    budget = Budget(store.root, 5_000, pytest.fail)
    original = Budget._shrink
    monkeypatch.setattr(Budget, "_shrink", lambda self, goal: (looks.append(goal), original(self, goal))[1])
    budget.begin()
    for _ in range(10):
        budget.added(100)
    assert len(looks) == 1 + 3


def test_a_full_disk_lets_something_go_for_what_is_to_be_stored(store: Store) -> None:
    assert Budget(store.root, 10**9, lambda text: None).make_room(2500)
    assert len(stored(store)) == 7
    pin(store.root, [key(number) for number in range(10)])
    assert not Budget(store.root, 10**9, lambda text: None).make_room(10**6)


def test_what_a_live_run_has_used_since_its_start_stays(store: Store) -> None:
    """It did not know the fingerprint when it began: using it touches it."""
    with live_run(store.root, [key(1)]):
        before = os.stat(next(store.root.glob("live/*.json"))).st_mtime
        store.touch(key(2))
        Budget(store.root, 0, lambda text: None).begin()
        assert stored(store) == {1, 2}
        for path in store.root.glob("entries/??/*.json"):
            os.utime(path, (before - 7200, before - 7200))
        for path in store.root.glob("live/*.json"):
            os.utime(path, (before - 7201, before - 7201))
        Budget(store.root, 0, lambda text: None).begin()
        assert stored(store) == {1, 2}, "older than an hour, but younger than the run"
    for path in store.root.glob("objects/??/*"):
        os.utime(path, (OLD, OLD))
    Budget(store.root, 0, lambda text: None).begin()
    assert stored(store) == set()


def test_what_is_touched_or_pinned_during_an_eviction_stays(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the inventory and the removal; the object that a new result uses, too."""
    from s2v_flow.cache import housekeeping

    seen = housekeeping.inventory

    def inventory(root: Path) -> list[housekeeping.Kept]:
        found = seen(root)
        store.touch(key(1))
        pin(root, [key(2)])
        payload = (3).to_bytes(4, "big") * 250
        store.publish(key(77), {"kind": "toy"}, {"out": payload}, {"seconds": 0.0})
        return found

    monkeypatch.setattr(housekeeping, "inventory", inventory)
    Budget(store.root, 0, lambda text: None).begin()
    assert stored(store) == {1, 2, 77}


def test_a_run_that_begins_lists_every_folder_once_and_reads_no_entry(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As long as the cache is small enough: how long that takes is in python -m benchmarks."""
    from s2v_flow.cache import housekeeping

    listed: list[str] = []
    seen = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: listed.append(str(path)) or seen(path))
    monkeypatch.setattr(housekeeping, "read_entry", lambda path: pytest.fail("an entry was read"))
    Budget(store.root, 10**9, lambda text: None, reserve=0).begin()
    assert len(listed) == len(set(listed)) == 1 + len(list((store.root / "objects").iterdir()))


def test_an_unknown_disk_has_no_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(folder: Path) -> None:
        raise OSError

    monkeypatch.setattr(shutil, "disk_usage", unknown)
    assert (default_limit(tmp_path), default_reserve(tmp_path), free_bytes(tmp_path)) == (50 * GB, 0, 0)
