"""The process that opens a pickle: what it may do, and what becomes of one that does something else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from s2v_flow.errors import MissingError, RefusedError, S2VFlowError
from s2v_flow.models import pickled
from s2v_flow.models.pickled import Limits, Order, Outcome, convert_pickle

ROOM = Limits.for_size(1000)


def attempt(source: Path, limits: Limits = ROOM, order: Order | None = None) -> Outcome:
    with open(source.with_name("out"), "wb") as file:
        return convert_pickle(source, file, order or Order(), lambda done, total: None, limits)


def pretend(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Let another program stand in for the process, as if a pickle had taken it over."""
    monkeypatch.setattr(pickled, "_CODE", code)


def is_gone(pid: int) -> bool:
    try:
        return " Z " in Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_it_has_nothing_to_do_harm_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty environment and folder, no input, no files but those it was given, limits that it cannot raise."""
    monkeypatch.setenv("SECRET", "s")
    (tmp_path / "a.pth").write_bytes(b"x")
    tell = tmp_path / "told"
    code = f"""
import json, os, resource, socket, sys
sys.path.append(sys.argv.pop())
from s2v_flow.models import unpickle
job = json.loads(sys.argv[1])
is_offline = unpickle.shut_in()
unpickle.limit_all(job["limits"])
def reaches():
    try:
        with socket.socket() as s: return s.connect_ex(("127.0.0.1", 9)) not in (101,)
    except OSError: return False
fds = [f"/proc/self/fd/{{n}}" for n in os.listdir("/proc/self/fd") if int(n) > 2]
told = json.dumps(dict(
    env=[k for k in os.environ if k != "LC_CTYPE"], folder=os.listdir(), input=sys.stdin.read(),
    is_isolated=sys.flags.isolated,
    limits=[resource.getrlimit(getattr(resource, "RLIMIT_" + n)) for n in ("CORE", "CPU", "FSIZE", "NOFILE")],
    is_offline=is_offline, reaches=reaches(), files=sorted(os.readlink(fd) for fd in fds if os.path.exists(fd)),
    group=os.getpgid(0) == os.getpid()))
open({str(tell)!r}, "w").write(told)
os.write(1, b'{{"ok": {{"is_offline": true, "num_left_out": 0}}}}\\n')
"""
    pretend(monkeypatch, code)
    attempt(tmp_path / "a.pth")
    told = json.loads(tell.read_text())
    assert (told["env"], told["folder"], told["input"], told["is_isolated"], told["group"]) == ([], [], "", 1, True)
    assert told["limits"] == [[0, 0], [120, 125], [ROOM.file_bytes] * 2, [64, 64]]
    assert told["files"] == [str(tmp_path / "a.pth"), str(tmp_path / "out")]
    if told["is_offline"]:  # where the kernel allows it
        assert not told["reaches"]


TAKEN_OVER = {
    "silent": ("import sys", "made nothing of it: it left with 0"),
    "crash": ("import os; os.abort()", "crashed with signal 6"),
    "busy": ("import resource; resource.setrlimit(resource.RLIMIT_CPU, (0, 9))\nwhile True: pass", "its time was up"),
    "words": ("raise OSError('no torch here')", "made nothing of it: OSError: no torch here"),
    "no_json": ("print('hello', flush=True)", "said something odd"),
    "no_map": ("print('[1]', flush=True)", "said something odd"),
    "deep": ("print('[' * 60_000, flush=True)", "said something odd"),
    "endless_line": ("import os\nwhile True: os.write(1, b'x' * 9999)", "said something odd"),
    "odd_error": ("print('{\"error\": 3}', flush=True)", "said something odd"),
    "odd_code": (
        'print(\'{"error": {"message": "x", "fix": null, "exit_code": 77}}\', flush=True)',
        "said something odd",
    ),
}


@pytest.mark.parametrize("name", TAKEN_OVER)
def test_a_process_that_does_something_else_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    code, message = TAKEN_OVER[name]
    (tmp_path / "a.pth").write_bytes(b"x")
    pretend(monkeypatch, code)
    with pytest.raises(RefusedError) as caught:
        attempt(tmp_path / "a.pth")
    assert message in caught.value.message


def test_a_process_that_takes_too_long_is_ended_with_its_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though it says all the time that it works."""
    (tmp_path / "a.pth").write_bytes(b"x")
    pids = tmp_path / "pids"
    pretend(
        monkeypatch,
        "import os, time\n"
        "os.fork()\n"
        f"open({str(pids)!r}, 'a').write(f'{{os.getpid()}} ')\n"
        "while True:\n"
        '    os.write(1, b\'{"done": 1, "total": 2}\\n\')\n'
        "    time.sleep(0.05)",
    )
    with pytest.raises(RefusedError, match="takes longer than 2 s"):
        attempt(tmp_path / "a.pth", replace(ROOM, wall_seconds=2))
    first, second = map(int, pids.read_text().split())
    deadline = time.monotonic() + 10
    while not is_gone(first) or not is_gone(second):
        assert time.monotonic() < deadline


def test_limits_stop_a_file_that_needs_more(tmp_path: Path) -> None:
    """Of memory: one whose tensors do not fit."""
    legacy = tmp_path / "a.pth"
    torch.save({"x": torch.zeros(16 << 20)}, legacy, _use_new_zipfile_serialization=False)
    with pytest.raises(RefusedError, match="needs more memory than a file of its size may"):
        attempt(legacy, replace(ROOM, memory_bytes=32 << 20))


def test_limits_grow_with_the_file() -> None:
    """11 GB of a text encoder have 23 GB of address space and more than half an hour."""
    limits = Limits.for_size(11 * 2**30)
    assert limits.memory_bytes == 26 * 2**30
    assert limits.cpu_seconds > 600
    assert limits.wall_seconds > 1800
    assert limits.file_bytes > 44 * 2**30


def test_a_source_that_is_not_there_is_missing(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="cannot be read"):
        attempt(tmp_path / "a.pth")


def test_a_pickle_is_not_opened_where_nothing_limits_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.pth").write_bytes(b"x")
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("started"))
    with pytest.raises(RefusedError, match="Windows cannot limit"):
        attempt(tmp_path / "a.pth")


def test_an_error_keeps_its_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk is none of the source's faults."""
    (tmp_path / "a.pth").write_bytes(b"x")
    pretend(monkeypatch, 'print(\'{"error": {"message": "full", "fix": "free some", "exit_code": 6}}\', flush=True)')
    with pytest.raises(S2VFlowError) as caught:
        attempt(tmp_path / "a.pth")
    assert (int(caught.value.exit_code), caught.value.fix) == (6, "free some")


def test_no_scratch_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "a.pth").write_bytes(b"x")
    pretend(monkeypatch, "import sys")
    with pytest.raises(RefusedError):
        attempt(tmp_path / "a.pth")
    assert sorted(os.listdir(tmp_path)) == ["a.pth", "out"]
