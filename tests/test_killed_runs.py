"""Whole runs that are killed or stopped at random times: the same command goes on, to the same bytes.

A server process imports everything once and forks a child for every run. The quick tier is part of the default tests;
`make soak` runs more and prints figures: S2VFLOW_SOAK_RUN_KILLS says how many.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from recipes_for_tests import call, tiny
from runs_for_tests import Place, copied, place

from s2v_flow.cache.housekeeping import verify
from s2v_flow.cache.store import DamagedObjectError, Store, read_entry
from s2v_flow.cli import main
from s2v_flow.graph.interrupt import StoppedError

CHANGES = tiny(first={"steps": 6, "cfg": 2.0}, talk={"chunks": 2}, video={"preset": "ultrafast"})
STOPS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGUSR1: 75}
LIMIT_SECONDS = 60
WHOLE, KILLED = 0, -signal.SIGKILL

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")


@dataclass(frozen=True)
class Ended:
    """How a run ended: its exit code, or minus the signal that ended it; what it said; what it took."""

    code: int
    said: str
    seconds: float
    changes: int  # how often it opened a file in its folder for writing, renamed, removed, ...


class Server:
    """A process that forks a child for every run."""

    def __init__(self, folder: Path) -> None:
        program = "import sys; sys.path[:0] = sys.argv[1:]; from test_killed_runs import serve; serve()"
        self.log = folder / "log.txt"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", program, str(Path(__file__).parent)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )

    def run(self, scene: Place, *signals: tuple[float, int], interval: float = 60.0, last_change: int = 0) -> Ended:
        """Run a scene's recipe.

        Args:
            scene: Where it is.
            signals: What to send it, each so many seconds after the one before.
            interval: Seconds between checkpoints.
            last_change: If positive: kill it when it is about to change its folder for this time.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        arguments = ["run", str(scene.recipe), *scene.where]
        order = {"arguments": arguments, "signals": signals, "interval": interval, "log": str(self.log)}
        order |= {"last_change": last_change, "folder": str(scene.folder)}
        print(json.dumps(order), file=self.process.stdin, flush=True)
        answer = json.loads(self.process.stdout.readline())
        said = self.log.read_text(encoding="utf-8", errors="replace")
        return Ended(answer["code"], said, answer["seconds"], answer["changes"])

    def close(self) -> None:
        self.process.communicate()


def serve() -> None:
    """Read orders from stdin, a line each; fork a child for each, and say how it ended."""
    import torch

    import s2v_flow
    from s2v_flow.nodes import denoising

    torch.set_num_threads(1)
    is_warm = False
    for line in sys.stdin:
        order = json.loads(line)
        denoising.INTERVAL_SECONDS = order["interval"]
        if not is_warm:  # once in this process, so that every import is done
            is_warm = True
            assert s2v_flow.run(order["arguments"][1], **_folders(order["arguments"])).computed
            shutil.rmtree(Path(order["arguments"][1]).parent / "cache")
        tasks = Path("/proc/self/task")
        assert threading.active_count() == 1
        assert not tasks.exists() or len(list(tasks.iterdir())) == 1, "a fork copies one thread only"
        started = time.monotonic()
        ready, told = os.pipe()
        pid = os.fork()
        if pid == 0:
            _run(order, told)
        os.close(told)
        assert os.read(ready, 1)
        code = _ended(pid, order["signals"])
        answer = {"code": code, "seconds": time.monotonic() - started, "changes": len(os.read(ready, 1 << 16))}
        os.close(ready)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def _folders(arguments: list[str]) -> dict[str, Any]:
    given = dict(zip(arguments[2::2], arguments[3::2], strict=True))
    return {
        "models_dirs": [given["--models-dir"]],
        "cache_dir": given["--cache-dir"],
        "device": given["--device"],
    }


def _run(order: dict[str, Any], told: int) -> None:
    """Be the program, in a forked child; what leaves `main` is treated as the interpreter treats it."""
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.argv = ["s2vflow", *order["arguments"]]
    code = 1
    os.write(told, b"r")
    _count_changes(order["folder"], order["last_change"], told)
    try:
        main.main()
    except SystemExit as left:
        code = int(left.code or 0)
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def _count_changes(folder: str, last: int, told: int) -> None:
    """Tell of every change in a folder just before it happens; at the last one, if there is one, be killed."""
    count = 0
    names = {"os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate"}

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        is_change = event in names or (event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITES)
        if is_change and str(arguments[0]).startswith(folder):
            count += 1
            os.write(told, b".")
            if count == last:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def _ended(pid: int, signals: list[tuple[float, int]]) -> int:
    """Send a child its signals, wait for its end, and return its exit code or minus its signal."""
    for delay, number in signals:
        code = _wait(pid, delay)
        if code is not None:
            return code
        os.kill(pid, number)
    code = _wait(pid, LIMIT_SECONDS)
    if code is None:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise AssertionError(f"the run did not end within {LIMIT_SECONDS} s")
    return code


def _wait(pid: int, seconds: float) -> int | None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.0005)
    return None


@dataclass(frozen=True)
class Scene:
    """A recipe that has not run, and what a run of it that nobody disturbs makes."""

    server: Server
    original: Place
    outputs: dict[str, Any]
    video: str
    seconds: float
    changes: int

    def fresh(self, folder: Path) -> Place:
        shutil.rmtree(folder, ignore_errors=True)
        return copied(self.original, folder)

    def check(self, scene: Place, *, is_finished: bool) -> None:
        """Hold what a disturbed run left against the undisturbed one's."""
        known = entries(scene.cache)
        assert known.items() <= self.outputs.items(), "a stored result differs"
        assert verify(scene.cache)["damaged"] == []
        assert not (scene.cache / "quarantine").exists(), "something wrong was read"
        assert not scene.video.exists() or digest(scene.video) == self.video, "the video is there in part"
        if is_finished:
            assert known == self.outputs
            assert digest(scene.video) == self.video
            assert [path.name for path in scene.video.parent.iterdir()] == [scene.video.name]
            assert left_over(scene.folder) == []


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory, tiny_models: Path) -> Iterator[Scene]:
    """Return a recipe of three chunks of six steps, and a server for it."""
    folder = tmp_path_factory.mktemp("killed")
    server = Server(folder)
    try:
        (folder / "original").mkdir()
        original = place(folder / "original", tiny_models, CHANGES)
        whole = copied(original, folder / "whole")
        ended = server.run(whole)
        assert ended.code == WHOLE, ended.said
        yield Scene(server, original, entries(whole.cache), digest(whole.video), ended.seconds, ended.changes)
    finally:
        server.close()


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def entries(cache: Path) -> dict[str, Any]:
    """Return the digests of every stored result by fingerprint, each of them read."""
    store, found = Store(cache), {}
    for path in cache.glob("entries/??/*.json"):
        entry = read_entry(path)
        assert entry is not None, "an entry is there in part"
        try:
            read = {port: store.read(item) for port, item in entry.outputs.items()}
        except DamagedObjectError as error:
            raise AssertionError(str(error)) from error
        found[path.stem] = {port: hashlib.sha256(content).hexdigest() for port, content in read.items()}
    return found


def left_over(folder: Path) -> list[str]:
    """Return the temporary files, and the checkpoints of what is finished."""
    patterns = ("**/.s2vflow-*", "**/*.partial", "cache/facts.json?*", "cache/digests.json?*", "cache/checkpoints/*/*")
    patterns += ("cache/tmp/*", "cache/live/*", "cache/locks/*", "**/tmp*")
    found = {path for pattern in patterns for path in folder.glob(pattern) if path.name != "tmp"}
    return sorted(str(path.relative_to(folder)) for path in found)


def kill_at_random(scene: Scene, folder: Path, kills: int, seed: int, *, is_timed: bool) -> dict[str, int]:
    """Kill runs at random times or changes, each again until it comes through, until so many were killed at work."""
    chance, figures = random.Random(seed), {"ended": 0, "recipes": 0, "resumed": 0}
    while figures["ended"] < kills:
        here, interval = scene.fresh(folder), chance.choice([0.0, 60.0])
        figures["recipes"] += 1
        while True:
            at = chance.uniform(0, scene.seconds)
            if is_timed:
                ended = scene.server.run(here, (at, signal.SIGKILL), interval=interval)
            else:
                ended = scene.server.run(here, interval=interval, last_change=chance.randint(1, scene.changes))
            assert ended.code in (WHOLE, KILLED), ended.said
            assert "Traceback" not in ended.said
            figures["ended"] += ended.code == KILLED
            figures["resumed"] += "goes on from the resume point" in ended.said
            scene.check(here, is_finished=ended.code == WHOLE)
            if ended.code == WHOLE:
                break
    return figures


def stop_at_random(scene: Scene, folder: Path, stops: int, seed: int) -> dict[str, int]:
    """Send runs one or two signals at random times, each again until it comes through."""
    chance, figures = random.Random(seed), {"ended": 0, "recipes": 0, "resumed": 0}
    while figures["ended"] < stops:
        here = scene.fresh(folder)
        figures["recipes"] += 1
        while True:
            number = chance.choice(list(STOPS))
            signals = [(chance.uniform(0.001, scene.seconds), number)]
            if chance.random() < 0.4:
                signals.append((chance.choice([0.0, chance.uniform(0, 0.01), chance.uniform(0, 0.3)]), signal.SIGINT))
            ended = scene.server.run(here, *signals)
            codes = {WHOLE, *(STOPS[signal.Signals(number)] for _, number in signals)}
            assert ended.code in codes, f"{ended.code}: {ended.said}"
            assert "Traceback" not in ended.said, ended.said
            figures["ended"] += ended.code != WHOLE
            figures["resumed"] += "goes on from the resume point" in ended.said
            scene.check(here, is_finished=ended.code == WHOLE)
            if ended.code == WHOLE:
                break
    return figures


@pytest.mark.slow
def test_a_run_killed_at_random_times_makes_the_same_bytes(scene: Scene, tmp_path: Path) -> None:
    """Twice: nothing wrong is stored or shown, and the same command finishes; nothing is left behind."""
    assert kill_at_random(scene, tmp_path / "run", 2, seed=7, is_timed=True)["ended"] >= 2


@pytest.mark.slow
def test_a_run_killed_before_random_changes_of_its_folder_makes_the_same_bytes(scene: Scene, tmp_path: Path) -> None:
    """Four times: before it writes, renames or removes something."""
    assert kill_at_random(scene, tmp_path / "run", 4, seed=7, is_timed=False)["ended"] >= 4


@pytest.mark.slow
def test_a_run_killed_before_each_change_of_its_end_leaves_nothing_behind(scene: Scene, tmp_path: Path) -> None:
    """Everything is stored already: what is left is the delivery and the manifest. Each change in turn, then again."""
    stored = scene.fresh(tmp_path / "stored")
    assert scene.server.run(stored).code == WHOLE
    stored.video.unlink()
    code, change = KILLED, 0
    while code == KILLED:
        change += 1
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        here = copied(stored, tmp_path / "run")
        code = scene.server.run(here, last_change=change).code
        scene.check(here, is_finished=code == WHOLE)
        assert scene.server.run(here).code == WHOLE
        scene.check(here, is_finished=True)
    assert (code, change > 8) == (WHOLE, True)


@pytest.mark.slow
def test_a_run_stopped_at_random_times_makes_the_same_bytes(scene: Scene, tmp_path: Path) -> None:
    """Four times, by one signal or two: the exit code is the signal's, without a traceback."""
    assert stop_at_random(scene, tmp_path / "run", 4, seed=7)["ended"] >= 4


def test_a_signal_on_the_way_out_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """An impatient second Ctrl-C arrives while the first one's message is printed: its exit code, and no traceback."""

    def leave(text: str, code: int) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("the signal is handled before this")

    def stop(*_: object, **__: object) -> None:
        raise StoppedError

    monkeypatch.setattr(main, "cli", stop)
    monkeypatch.setattr(main, "_leave", leave)
    assert call("run", "recipe.yaml") == (130, "", "")


@pytest.mark.soak
def test_soak_run_kills(scene: Scene, tmp_path: Path) -> None:
    """S2VFLOW_SOAK_RUN_KILLS kills at random times, half as many before changes, a third as many stops (60)."""
    kills, seed = int(os.environ.get("S2VFLOW_SOAK_RUN_KILLS", "60")), int(time.time())
    timed = kill_at_random(scene, tmp_path / "run", kills, seed, is_timed=True)
    at_changes = kill_at_random(scene, tmp_path / "run", kills // 2, seed, is_timed=False)
    stopped = stop_at_random(scene, tmp_path / "run", kills // 3, seed)
    told = "; ".join(
        f"{found['ended']} {what}, {found['recipes']} recipes, {found['resumed']} resumed from a resume point"
        for what, found in (
            ("kills at random times", timed),
            (f"kills before one of {scene.changes} changes of the folder", at_changes),
            ("stops by SIGINT, SIGTERM, SIGUSR1, alone or with a second one", stopped),
        )
    )
    sys.stdout.write(f"\nseed {seed}: {told}; 0 wrong reads, 0 repairs by hand, every result equal\n")
