"""kill -9 at random times, and damaged files: no wrong read, nothing to repair.

The quick tier is part of the default tests. `make soak` runs more and prints figures; the environment sets how many:
S2VFLOW_SOAK_KILLS, S2VFLOW_SOAK_CORRUPTIONS.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
from storing_for_tests import KEYS, assert_sound, content, key, publish_all

from s2v_flow.cache.housekeeping import tidy, verify
from s2v_flow.cache.store import DamagedObjectError, Store
from s2v_flow.files.atomic import is_alive


def kill_at_random(root: Path, kills: int, seed: int) -> tuple[int, int]:
    """Kill forked writers at random times; return how many were killed at work, and how many results came through."""
    chance, killed, survived = random.Random(seed), 0, 0
    started = time.monotonic()
    publish_all(Store(root))
    took = time.monotonic() - started
    for _ in range(kills):
        shutil.rmtree(root, ignore_errors=True)
        pid = os.fork()
        if pid == 0:
            publish_all(Store(root))
            os._exit(0)
        time.sleep(chance.uniform(0, took))
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


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
def test_a_writer_killed_at_random_times_leaves_a_sound_store(tmp_path: Path) -> None:
    """40 times: what is there is right, what is half made is tidied up, and the next writer finishes."""
    killed, _ = kill_at_random(tmp_path / "cache", 40, seed=4)
    assert killed > 0, "some were killed at work"


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


@pytest.mark.slow
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
