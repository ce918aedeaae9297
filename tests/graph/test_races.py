"""Many processes on one cache: all agree, work is done once where locks work, and eviction beside runs harms none.

`make soak` runs more; the environment sets how much: S2VFLOW_SOAK_RACES, S2VFLOW_SOAK_MIXED_SECONDS.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import random
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from toy import Join, Save, Word, Workshop

from s2v_flow.cache import housekeeping
from s2v_flow.cache.housekeeping import collect, inventory, live_run, remove, verify
from s2v_flow.cache.store import Store
from s2v_flow.files import lock
from s2v_flow.graph.interrupt import node_turn
from s2v_flow.graph.node import Node
from s2v_flow.graph.ports import Ref

PROCESSES = 8
KEYS = [hashlib.sha256(b"race %d" % number).hexdigest() for number in range(3)]
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks processes")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr(lock, "POLL_SECONDS", 0.002)


def together(actions: list[Callable[[], object]], folder: Path) -> list[object]:
    """Do each in a process of its own, begun at the same moment; return what each says."""
    gate, open_gate = os.pipe()
    pids = []
    for number, action in enumerate(actions):
        pid = os.fork()
        if pid == 0:
            os.close(open_gate)
            os.read(gate, 1)  # ends when the parent closes its side
            try:
                said = {"said": action()}
            except BaseException:  # noqa: BLE001
                said = {"failed": traceback.format_exc()}
            (folder / f"said-{number}").write_text(json.dumps(said))
            os._exit(0)
        pids.append(pid)
    os.close(gate)
    os.close(open_gate)
    for pid in pids:
        assert os.waitpid(pid, 0)[1] == 0
    answers = [json.loads((folder / f"said-{number}").read_text()) for number in range(len(actions))]
    failed = [answer["failed"] for answer in answers if "failed" in answer]
    assert not failed, "\n".join(failed)
    return [answer["said"] for answer in answers]


def racer(root: Path, number: int) -> Callable[[], object]:
    """Return the work of one process: every result, its own bytes where it computes; what it ends up with."""

    def race() -> object:
        store, computed, found = Store(root), [], {}
        for key in random.Random(number).sample(KEYS, len(KEYS)):
            with node_turn(root, key, "toy", lambda event: None, lambda: False):
                entry = store.lookup(key)
                if entry is None:
                    computed.append(key)
                    payload = b"%d of %d" % (KEYS.index(key), number)
                    entry = store.publish(key, {"kind": "toy"}, {"out": payload}, {})
            found[key] = store.read(entry.outputs["out"]).decode()
        return [computed, found]

    return race


def race(folder: Path, rounds: int) -> int:
    """Race again and again; return how many results were computed. All processes agree on each."""
    computed = 0
    for _ in range(rounds):
        root = folder / "cache"
        shutil.rmtree(root, ignore_errors=True)
        answers = together([racer(root, number) for number in range(PROCESSES)], folder)
        assert len({json.dumps(found, sort_keys=True) for _, found in answers}) == 1  # type: ignore[misc]
        computed += sum(len(made) for made, _ in answers)  # type: ignore[misc]
        assert not list(root.glob("tmp/*"))
        assert verify(root)["sound"] == len(KEYS)
    return computed


@pytest.mark.slow
def test_eight_processes_compute_each_result_once(tmp_path: Path) -> None:
    assert race(tmp_path, 5) == 5 * len(KEYS)


@pytest.mark.slow
def test_without_locks_eight_processes_agree_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on network file systems that grant a lock to everybody."""
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    assert race(tmp_path, 5) >= 5 * len(KEYS)


@pytest.mark.soak
@pytest.mark.parametrize("has_locks", [True, False])
def test_soak_races(has_locks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """S2VFLOW_SOAK_RACES rounds (50 unless told otherwise) of 8 processes."""
    rounds = int(os.environ.get("S2VFLOW_SOAK_RACES", "50"))
    if not has_locks:
        monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    computed = race(tmp_path, rounds)
    assert computed == rounds * len(KEYS) or not has_locks
    kind = "locks" if has_locks else "locks that do nothing"
    sys.stdout.write(
        f"\n{rounds} races of {PROCESSES} processes, {kind}: {computed} results computed for {rounds * len(KEYS)}, "
        "all agree\n"
    )


@contextmanager
def beside(root: Path, seconds: float) -> Iterator[Callable[[], bool]]:
    ends = time.monotonic() + seconds
    yield lambda: time.monotonic() < ends


def runner(folder: Path, number: int, seconds: float) -> Callable[[], object]:
    """Return the work of one process: runs whose results it shares with the others, each looked at."""

    def run() -> object:
        chance, count = random.Random(number), 0
        with beside(folder, seconds) as goes_on:
            while goes_on():
                letter = chance.choice("abc")
                nodes: dict[str, Node] = {"word": Word(text=letter)}
                nodes |= {"one": Join(a=Ref.parse("$word"), suffix="1"), "two": Join(a=Ref.parse("$one"), suffix="2")}
                nodes["save"] = Save(a=Ref.parse("$two"), file=f"out-{number}.txt")
                shop = Workshop(folder)
                needed = [status.fingerprint for status in shop.assess(nodes).values() if status.fingerprint]
                with live_run(folder / "cache", needed):
                    shop.run(nodes)
                assert (folder / f"out-{number}.txt").read_text() == f"{letter}12"
                count += 1
        return count

    return run


def tidier(folder: Path, number: int, seconds: float) -> Callable[[], object]:
    """Return the work of one process: evict, verify or remove, over and over."""

    def work() -> object:
        chance, count, root = random.Random(number), 0, folder / "cache"
        with beside(folder, seconds) as goes_on:
            while goes_on():
                if number == 0:
                    count += len(collect(root, chance.choice([0, 3, 10]))["removed"])
                elif number == 1:
                    verify(root, is_repair=True)
                    count += 1
                else:
                    some = [item.entry.fingerprint for item in inventory(root)][:1]
                    count += len(remove(root, some))
                    time.sleep(0.05)
        return count

    return work


def mixed(folder: Path, seconds: float, monkeypatch: pytest.MonkeyPatch) -> tuple[int, list[int]]:
    """Run, evict, verify and remove side by side; return how many runs there were, and what the others did."""
    monkeypatch.setattr(housekeeping, "YOUNG_SECONDS", 0.05)
    actions = [runner(folder, number, seconds) for number in range(4)]
    actions += [tidier(folder, number, seconds) for number in range(3)]
    said = [int(str(answer)) for answer in together(actions, folder)]
    assert not list((folder / "cache").glob("tmp/*"))
    damaged = [item["reason"] for item in verify(folder / "cache")["damaged"]]
    assert all("No such file" in reason for reason in damaged), "an object may have gone; none may have changed"
    return sum(said[:4]), said[4:]


@pytest.mark.slow
def test_eviction_verification_and_removal_beside_runs_harm_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four processes run, three tidy, for a second: every run ends well with the right file."""
    runs, others = mixed(tmp_path, 1.0, monkeypatch)
    assert runs >= 4
    assert sum(others) > 0


@pytest.mark.soak
def test_soak_mixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """S2VFLOW_SOAK_MIXED_SECONDS (60 unless told otherwise)."""
    seconds = float(os.environ.get("S2VFLOW_SOAK_MIXED_SECONDS", "60"))
    runs, (evicted, verified, removed) = mixed(tmp_path, seconds, monkeypatch)
    sys.stdout.write(
        f"\n{seconds:.0f} s: {runs} runs beside {evicted} evictions, {verified} verifications, {removed} removals, "
        "0 wrong files\n"
    )
