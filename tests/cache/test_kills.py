"""kill -9 at random times and at every system call of a publish: no wrong read, nothing to repair.

The quick tier is part of the default tests. `make soak` runs more and prints figures; the environment sets how many:
S2VFLOW_SOAK_KILLS, S2VFLOW_SOAK_CORRUPTIONS.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from s2v_flow.cache.atomic import is_alive
from s2v_flow.cache.checkpoint import Checkpoints
from s2v_flow.cache.housekeeping import tidy, verify
from s2v_flow.cache.store import DamagedObjectError, Store

KEYS = 6
SIZE = 200_000
WRITER = """
import os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_kills import publish_all
from s2v_flow.cache.store import Store
publish_all(Store(Path(sys.argv[1])))
"""


def key(number: int) -> str:
    return hashlib.sha256(b"key %d" % number).hexdigest()


def content(number: int) -> bytes:
    """A result that its key decides: any other bytes are wrong."""
    return hashlib.shake_256(b"result %d" % number).digest(SIZE + number)


def publish_all(store: Store) -> None:
    """Publish every result as bytes and as a file, with a checkpoint before each."""
    checkpoints = Checkpoints(store.root)
    payload = len(b"{}").to_bytes(8, "little") + b"{}"
    for number in range(KEYS):
        checkpoints.write(key(number), {"step": str(number)}, payload)
        with store.scratch() as scratch:
            path = scratch / "film.mp4"
            path.write_bytes(content(number))
            store.publish(key(number), {"kind": "toy"}, {"a": content(number), "b": path}, {})
        checkpoints.forget(key(number))


def assert_sound(root: Path) -> int:
    """Read all that can be looked up; return how many results there are."""
    store, found = Store(root), 0
    for number in range(KEYS):
        entry = store.lookup(key(number))
        if entry is not None:
            assert [store.read(item) for item in entry.outputs.values()] == [content(number)] * 2
            found += 1
        facts = Checkpoints(root).peek(key(number))
        assert facts is None or Checkpoints(root).read(key(number)) is not None
    return found


def kill_at_random(root: Path, kills: int, seed: int) -> tuple[int, int]:
    """Kill forked writers at random times; return how many were killed at work, and how many results came through."""
    chance, killed, survived = random.Random(seed), 0, 0
    for _ in range(kills):
        shutil.rmtree(root, ignore_errors=True)
        pid = os.fork()
        if pid == 0:
            publish_all(Store(root))
            os._exit(0)
        time.sleep(chance.uniform(0, 0.03))
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        killed += os.WIFSIGNALED(status)
        assert not is_alive(pid)
        survived += assert_sound(root)
        tidy(root)
        assert list((root / "tmp").glob("*")) == []
        assert verify(root)["damaged"] == []
    publish_all(Store(root))
    assert assert_sound(root) == KEYS
    return killed, survived


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
def test_a_writer_killed_at_random_times_leaves_a_sound_store(tmp_path: Path) -> None:
    """40 times: what is there is right, what is half made is tidied up, and the next writer finishes."""
    killed, _ = kill_at_random(tmp_path / "cache", 40, seed=4)
    assert killed >= 10, "most were killed at work"


STRACE = shutil.which("strace")


def inject(root: Path, call: str, fault: str, when: int, log: Path) -> subprocess.CompletedProcess[str]:
    """Run a writer under strace with a fault at its nth call of a kind."""
    assert STRACE is not None
    command = [STRACE, "-f", "-qq", "-o", str(log), "-e", f"trace={call}", "-e", f"inject={call}:{fault}:when={when}"]
    command += [sys.executable, "-c", WRITER, str(root), str(Path(__file__).parent)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.soak
@pytest.mark.skipif(STRACE is None, reason="strace is not here: no faults at single system calls")
@pytest.mark.parametrize("call", ["fsync", "rename", "link", "mkdir", "unlink", "chmod", "rmdir"])
@pytest.mark.parametrize("fault", ["signal=SIGKILL", "error=ENOSPC", "error=EIO"])
def test_a_fault_at_every_system_call_leaves_a_sound_store(call: str, fault: str, tmp_path: Path) -> None:
    """Each call of a writer's in turn, until none is left to fail."""
    count = 0
    for when in range(1, 400):
        root = tmp_path / "cache"
        shutil.rmtree(root, ignore_errors=True)
        log = tmp_path / "log"
        inject(root, call, fault, when, log)
        if "INJECTED" not in log.read_text() and "SIGKILL" not in log.read_text():
            break
        count += 1
        assert_sound(root)
        tidy(root)
        assert verify(root)["damaged"] == []
        publish_all(Store(root))
        assert assert_sound(root) == KEYS
    sys.stdout.write(f"\n{call} {fault}: {count} faults, 0 wrong reads\n")
    assert count > 0 or call in ("mkdir", "chmod")


@pytest.mark.soak
def test_soak_kills(tmp_path: Path) -> None:
    """S2VFLOW_SOAK_KILLS random kills (500 unless told otherwise)."""
    kills = int(os.environ.get("S2VFLOW_SOAK_KILLS", "500"))
    killed, survived = kill_at_random(tmp_path / "cache", kills, seed=int(time.time()))
    sys.stdout.write(f"\n{kills} kills, {killed} at work, {survived} results had come through, 0 wrong reads\n")


def corrupt(path: Path, chance: random.Random) -> None:
    payload = bytearray(path.read_bytes())
    how = chance.randrange(5)
    at = chance.randrange(max(len(payload), 1))
    if how == 0 and payload:
        payload[at] ^= 1 << chance.randrange(8)
    elif how == 1:
        del payload[at:]
    elif how == 2:
        payload += bytes(chance.randrange(1, 100))
    elif how == 3:
        payload[at : at + 4096] = bytes(len(payload[at : at + 4096]))
    else:
        payload.clear()
    path.chmod(0o644)
    path.write_bytes(payload)


def corrupt_at_random(root: Path, times: int, seed: int) -> int:
    """Damage an object or an entry again and again; return how often that was noticed. Reads are right or refused."""
    chance, noticed = random.Random(seed), 0
    store = Store(root)
    for _ in range(times):
        number = chance.randrange(KEYS)
        store.publish(key(number), {"kind": "toy"}, {"a": content(number)}, {})
        files = [*root.glob("objects/*/*"), *root.glob("entries/*/*")]
        before = {path: path.read_bytes() for path in (chance.choice(files),)}
        ((path, sound),) = before.items()
        corrupt(path, chance)
        is_changed = path.read_bytes() != sound
        seen = False
        for each in range(KEYS):
            try:
                entry = store.lookup(key(each))
                assert entry is None or [store.read(item) for item in entry.outputs.values()] == [content(each)]
            except DamagedObjectError:
                seen = True
        seen = seen or not path.exists() or path.read_bytes() != sound
        noticed += seen and is_changed
        if path.exists():
            path.unlink()
        shutil.rmtree(root / "quarantine", ignore_errors=True)
    return noticed


def test_corrupted_files_are_never_read_as_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    assert corrupt_at_random(tmp_path, 200, seed=5) > 150


@pytest.mark.soak
def test_soak_corruptions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """S2VFLOW_SOAK_CORRUPTIONS damaged files (2,000 unless told otherwise)."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    times = int(os.environ.get("S2VFLOW_SOAK_CORRUPTIONS", "2000"))
    noticed = corrupt_at_random(tmp_path, times, seed=int(time.time()))
    sys.stdout.write(f"\n{times} corruptions, {noticed} changed something, 0 wrong reads\n")
