"""A fault at every system call of a publish, and of a whole run of toys: killed, or refused with an error number.

Each call in turn is the one that fails, in a process of its own: forked, stopped, traced from there on and let go.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
from storing_for_tests import assert_sound, publish_all
from toy import Join, Save, Word, Workshop

from s2v_flow.cache.housekeeping import live_run, tidy, verify
from s2v_flow.cache.store import Store
from s2v_flow.errors import S2VFlowError
from s2v_flow.graph.ports import Ref

COUNT = 2
TOLD = 7
STRACE = shutil.which("strace")
CALLS = ("openat", "write", "close", "newfstatat", "fsync", "rename", "link", "mkdir", "unlink", "chmod", "rmdir")
FAULTS = {"kill": "signal=SIGKILL", "full": "error=ENOSPC", "broken": "error=EIO", "files": "error=EMFILE"}
FAULTS |= {"read-only": "error=EROFS"}
CASES = [("kill", call) for call in CALLS]
CASES += [(fault, call) for fault in ("full", "broken") for call in CALLS if call not in ("close", "newfstatat")]
CASES += [("files", "openat"), ("read-only", "openat"), ("read-only", "mkdir"), ("read-only", "rename")]
_PR_SET_PTRACER, _ANYBODY = 0x59616D61, ctypes.c_ulong(-1)


def publish(root: Path) -> None:
    publish_all(Store(root / "cache"), COUNT)


def run(root: Path) -> None:
    nodes = {"leaf": Word(text="a"), "join": Join(a=Ref.parse("$leaf"), suffix="b")}
    with live_run(root / "cache", []):
        Workshop(root).run({**nodes, "save": Save(a=Ref.parse("$join"), file="out/saved.txt")})


def traced(work: Callable[[Path], None], root: Path, call: str, fault: str = "") -> tuple[int, str, int]:
    """Do the work with a fault in it; return how it ended, what it said, and how many calls of the kind there were."""
    log, said = root.parent / "log", root.parent / "said"
    said.write_text("")
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            ctypes.CDLL(None).prctl(_PR_SET_PTRACER, _ANYBODY)
            os.kill(os.getpid(), signal.SIGSTOP)
            work(root)
            code = 0
        except S2VFlowError:
            code = TOLD
        except BaseException:  # noqa: BLE001
            said.write_text(traceback.format_exc())
        finally:
            os._exit(code)
    os.waitpid(pid, os.WUNTRACED)
    command = [str(STRACE), "-o", str(log), "-p", str(pid), "-e", f"trace={call}"]
    command += ["-e", f"inject={call}:{fault}"] if fault else []
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as strace:
        assert strace.stderr is not None
        assert "attached" in (line := strace.stderr.readline()), line
        os.kill(pid, signal.SIGCONT)
        _, status = os.waitpid(pid, 0)
        strace.stderr.read()
    found = re.findall(rf"^{call}\(", log.read_text(), re.MULTILINE)
    return os.waitstatus_to_exitcode(status), said.read_text(), len(found)


@pytest.mark.soak
@pytest.mark.skipif(STRACE is None, reason="strace is not here: no faults at single system calls")
@pytest.mark.parametrize("work", [publish, run])
@pytest.mark.parametrize(("fault", "call"), CASES)
def test_a_fault_at_every_system_call_leaves_a_sound_store(
    work: Callable[[Path], None], fault: str, call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no traceback: the work ends well, or with an error for people; then the same work ends well."""
    root = tmp_path / "work"
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    work(root)  # so that nothing is imported under way
    shutil.rmtree(root)
    code, said, count = traced(work, root, call)
    assert code == 0, said
    refused = 0
    for when in range(1, count + 1):
        shutil.rmtree(root)
        code, said, _ = traced(work, root, call, f"{FAULTS[fault]}:when={when}")
        assert code in ((-signal.SIGKILL,) if fault == "kill" else (0, TOLD)), f"{call} {when}: {code}: {said}"
        refused += code == TOLD
        tidy(root / "cache")
        assert verify(root / "cache")["damaged"] == []
        if work is publish:
            assert_sound(root / "cache", COUNT)
        elif code == 0:
            assert (root / "out/saved.txt").read_bytes() == b"ab"
        work(root)
        if work is publish:
            assert assert_sound(root / "cache", COUNT) == COUNT
        else:
            assert (root / "out/saved.txt").read_bytes() == b"ab"
            assert [path.name for path in (root / "out").iterdir()] == ["saved.txt"]
            assert not list((tmp_path / "temporary").iterdir())
    sys.stdout.write(f"\n{work.__name__}, {call} {fault}: {count} faults, {refused} refusals told, 0 wrong reads\n")
