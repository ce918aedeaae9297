"""Workers and the batch's own process are killed at random times, the disk fills up, stored objects are cut: the same
command again and again ends with the bytes of one undisturbed run.

`make soak` does it for longer and prints figures: S2VFLOW_SOAK_BATCH_KILLS says how many kills.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from faults_for_tests import own_disk
from runs_for_tests import Place
from test_batch import batch, program, running, seeded
from test_engines import worker_pids
from test_two_machines import digests


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Return a folder on a disk of 48 MB that can be filled, where one can be mounted; else an ordinary one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    with own_disk(folder, 48 << 20):
        yield folder


def fill(folder: Path, chance: random.Random) -> None:
    """Leave no space on a disk for a moment."""
    with (folder / "filler").open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(1 << 20))
    time.sleep(chance.uniform(0.1, 0.6))
    (folder / "filler").unlink()


def cut(made: Place, chance: random.Random) -> bool:
    """Cut a stored object in half."""
    objects = sorted(made.cache.glob("objects/??/*"))
    if not objects:
        return False
    path = chance.choice(objects)
    with suppress(OSError):
        os.chmod(path, 0o644)
        os.truncate(path, path.stat().st_size // 2)
    return True


def storm(folder: Path, models: Path, known: Place, kills: int, jobs: int, seed: int, pause: float) -> Counter[str]:
    """Run batches, each until it has ended well, until there were so many kills; count what happened.

    Args:
        folder: On the disk that is filled, if it is one.
        models: The models folder.
        known: What the prompt and the voice are encoded to is taken from its cache.
        kills: How many.
        jobs: Of each batch.
        seed: Of what happens when.
        pause: The most seconds between two disturbances.
    """
    chance, happened = random.Random(seed), Counter[str]()
    can_fill, rows = os.path.ismount(folder), "seed\n" + "".join(f"{number}\n" for number in range(1, jobs + 1))
    clean = seeded(folder.parent / "clean", models, rows=rows, known=known)
    assert batch(clean)[0] == 0
    expected = digests(clean.folder / "out")
    assert len(expected) == jobs
    while happened["worker killed"] + happened["batch killed"] < kills:
        happened["rounds"] += 1
        place = folder / f"round{happened['rounds']}"
        place.mkdir()
        made = seeded(place, models, rows=rows, known=known)
        code = 1
        while code:
            assert happened["begun"] < 10 * kills + 20, happened
            happened["begun"] += 1
            process = program(made, "--workers", 2, "--retries", 5)
            while process.poll() is None:
                with suppress(subprocess.TimeoutExpired):
                    is_over = happened["worker killed"] + happened["batch killed"] >= kills
                    process.wait(300 if is_over else chance.uniform(0.2, pause))
                    break
                disturb(process, made, chance, happened, can_fill=can_fill)
            code = process.returncode
            happened[f"exit code {code}"] += 1
            _, err = process.communicate()
            assert "Traceback" not in err, err
            if code != -signal.SIGKILL:
                assert code in (0, 1, 6), err
        assert digests(made.folder / "out") == expected, happened
        done = Counter(entry["job"] for entry in running(made) if entry["state"] == "done")
        happened["ended twice"] += sum(count - 1 for count in done.values())
        shutil.rmtree(place)
    return happened


def disturb(
    process: subprocess.Popen[str], made: Place, chance: random.Random, happened: Counter[str], *, can_fill: bool
) -> None:
    what = chance.choices(("worker killed", "batch killed", "disk full", "object cut"), (6, 2, can_fill, 1))[0]
    workers = worker_pids(process.pid)
    if what == "batch killed":
        process.kill()
        if chance.random() < 0.5:  # else its workers finish what they do, beside the next batch's
            for pid in workers:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
    elif what == "worker killed":
        if not workers:
            return
        with suppress(ProcessLookupError):
            os.kill(chance.choice(workers), signal.SIGKILL)
    elif what == "disk full":
        fill(made.folder.parent, chance)
    elif not cut(made, chance):
        return
    happened[what] += 1


@pytest.mark.soak
def test_kills_and_a_full_disk_change_nothing(tiny_models: Path, quick_run: Place, small_disk: Path) -> None:
    """Every job's video is there once, with the bytes of an undisturbed run."""
    (small_disk.parent / "clean").mkdir()
    kills = int(os.environ.get("S2VFLOW_SOAK_BATCH_KILLS", "100"))
    happened = storm(small_disk, tiny_models, quick_run, kills, jobs=6, seed=2, pause=8.0)
    sys.stdout.write(f"\n{dict(happened)}\n")
