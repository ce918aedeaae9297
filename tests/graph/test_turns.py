"""Several runs at once: one computes, the others wait and take its result; without locks they are right too."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
from toy import Save, Word, Workshop

from s2v_flow.files.lock import gpu_lock_path, remove_unused, turn
from s2v_flow.graph.events import Event, NodeCached, Noted
from s2v_flow.graph.interrupt import StoppedError, gpu_turn, node_turn
from s2v_flow.graph.node import Node
from s2v_flow.graph.ports import Ref


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr("s2v_flow.files.lock.POLL_SECONDS", 0.005)


class Slow(Node):
    """Computes until enough others wait for it, or all compute at once; each time to other bytes."""

    kind: ClassVar[str] = "slow"
    outputs: ClassVar = {"text": "conditioning"}
    is_stored: ClassVar[bool] = True
    count: ClassVar[list[int]] = []
    may_end: ClassVar[threading.Event] = threading.Event()

    def run(self, context: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
        self.count.append(1)
        assert self.may_end.wait(30)
        return {"text": b"result %d" % len(self.count)}


def race(folder: Path, runs: int, enough: int) -> tuple[list[Workshop], int]:
    """Run the same recipe in threads, and let the computation end once `enough` of them compute or wait."""
    Slow.count.clear()
    Slow.may_end.clear()
    ready = threading.Semaphore(0)
    shops = []
    for number in range(runs):
        shop = Workshop(folder)
        shop.events = Events(ready)
        nodes = {"slow": Slow(), "save": Save(a=Ref.parse("$slow"), file=f"out{number}.txt")}
        shops.append((shop, threading.Thread(target=shop.run, args=(nodes,))))
    for _, thread in shops:
        thread.start()
    for _ in range(enough):
        assert ready.acquire(timeout=30)
    Slow.may_end.set()
    for _, thread in shops:
        thread.join(30)
    return [shop for shop, _ in shops], len(Slow.count)


class Events(list[Event]):
    """A run's events; says when a run computes, or waits."""

    def __init__(self, ready: threading.Semaphore) -> None:
        super().__init__()
        self._ready = ready

    def append(self, event: Event) -> None:
        super().append(event)
        if getattr(event, "node", None) == "slow" and not isinstance(event, NodeCached):
            self._ready.release()


def test_one_of_four_runs_computes_and_the_others_say_whom_they_wait_for(tmp_path: Path) -> None:
    """Then they take its result; no lock is left."""
    shops, computed = race(tmp_path, 4, enough=4)
    assert computed == 1
    events = [event for shop in shops for event in shop.events]
    notes = [event.text for event in events if isinstance(event, Noted) and event.node == "slow"]
    assert len(notes) == 3
    assert all(f"waits for another run that computes the same (process {os.getpid()}, node slow" in n for n in notes)
    assert {(tmp_path / f"out{number}.txt").read_bytes() for number in range(4)} == {b"result 1"}
    assert list((tmp_path / "cache/locks").iterdir()) == []


def test_where_locks_do_nothing_the_results_agree_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All four compute, to different bytes; the first that is stored counts for everybody."""
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    _, computed = race(tmp_path, 4, enough=4)
    assert computed > 1
    assert len({(tmp_path / f"out{number}.txt").read_bytes() for number in range(4)}) == 1


@pytest.mark.parametrize("number", [38, 95, 37])
def test_where_locks_are_refused_the_run_goes_on(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ENOSYS, EOPNOTSUPP, ENOLCK."""

    def refuse(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with node_turn(tmp_path, "ab", "talk", print, lambda: False):
        pass


def test_locks_that_cannot_be_written_are_told_once(tmp_path: Path) -> None:
    """A file in their folder's place: the results are stored all the same."""
    shop = Workshop(tmp_path)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/locks").write_text("in the way")
    nodes = {"word": Word(text="w"), "save": Save(a=Ref.parse("$word"), file="out.txt")}
    assert shop.run(nodes).not_kept == ()
    (said,) = [event.text for event in shop.events if isinstance(event, Noted) and event.is_warning]
    assert said.startswith(f"nothing can be locked under {tmp_path / 'cache/locks'} (File exists): another run may")


def test_a_gpu_that_cannot_be_locked_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", "/dev/null/temporary")
    notes: list[Event] = []
    with gpu_turn("cuda:0", notes.append, lambda: False, is_needed=True):
        (said,) = notes
    assert isinstance(said, Noted)
    assert said.is_warning
    assert said.text.startswith("cuda:0 cannot be locked (/dev/null/temporary/s2vflow-")


def test_a_killed_process_holds_nothing_up(tmp_path: Path) -> None:
    """Its lock's file is taken over, and where nobody wants it, removed."""
    code = (
        "import sys, time; from pathlib import Path; from s2v_flow.files.lock import turn\n"
        "with turn(Path(sys.argv[1]), 'node x', print, lambda: None):\n print('held', flush=True); time.sleep(60)"
    )
    path = tmp_path / "locks" / "ab"
    with subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        assert remove_unused(path.parent.glob("*")) == 0
        process.kill()
    assert path.exists()
    with turn(path, "node y", pytest.fail, lambda: None):
        pass
    path.touch()
    assert remove_unused(path.parent.glob("*")) == 1
    assert list(path.parent.iterdir()) == []


def test_whoever_waits_can_be_stopped(tmp_path: Path) -> None:
    with (
        node_turn(tmp_path, "ab", "talk", print, lambda: False),
        pytest.raises(StoppedError, match="waiting for talk"),
        node_turn(tmp_path, "ab", "talk", lambda event: None, lambda: True),
    ):
        pytest.fail("the lock is held")


def test_one_run_per_gpu_unless_told_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another GPU, the CPU, a shared GPU and a run without work wait for nobody."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    notes: list[Event] = []

    def enter(device: str, *, is_needed: bool = True) -> None:
        with gpu_turn(device, notes.append, lambda: True, is_needed=is_needed):
            pass

    with gpu_turn("cuda:0", notes.append, lambda: False, is_needed=True):
        with pytest.raises(StoppedError, match="waiting for cuda:0"):
            enter("cuda:0")
        assert isinstance(notes[0], Noted)
        assert "--share-gpu" in notes[0].text
        enter("cuda:1")
        enter("cpu")
        enter("cuda:0", is_needed=False)
    enter("cuda:0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-7f")
    assert [gpu_lock_path(device).name for device in ("cuda:0", "cuda:1")] == ["gpu-3.lock", "gpu-GPU-7f.lock"]
