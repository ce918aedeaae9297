"""The process's peak memory."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from s2v_flow.machine import peak_device_bytes, peak_memory_bytes


def test_the_peak_is_read_from_the_systems_status(tmp_path: Path) -> None:
    """In kilobytes there; where it says nothing, what `getrusage` says counts."""
    status = tmp_path / "status"
    status.write_text("Name:\tpython\nVmHWM:\t  123 kB\nVmRSS:\t 1 kB\n")
    assert peak_memory_bytes(status) == 123 * 1024
    status.write_bytes(b"\xff")
    assert peak_memory_bytes(status) == peak_memory_bytes(tmp_path / "none") > 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell a parent's peak from the process's own")
def test_a_large_parent_does_not_count() -> None:
    """What a program had before it became another one is not the other one's."""
    code = "import os, sys; big = b'x' * 200_000_000; os.execv(sys.executable, [sys.executable, '-c', sys.argv[1]])"
    inner = "from s2v_flow.machine import peak_memory_bytes; print(peak_memory_bytes())"
    done = subprocess.run([sys.executable, "-c", code, inner], capture_output=True, text=True, timeout=60, check=True)
    assert int(done.stdout) < 150_000_000


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no such call")
def test_what_is_freed_below_something_that_is_kept_goes_back_to_the_system() -> None:
    """The heap cannot shrink then by itself."""
    code = """
from pathlib import Path
from s2v_flow.machine import trim_heap
def resident(): return int(Path("/proc/self/statm").read_text().split()[1])
blocks = [bytes([n % 256]) * 100_000 for n in range(1000)]
kept, before = blocks.pop(), resident()
blocks.clear()
trim_heap()
print(4096 * (before - resident()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert int(done.stdout) > 80_000_000


def test_the_peak_of_a_gpu_is_asked_only_where_one_was_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two, the larger; torch is never imported for it. Played: no GPU is needed here."""
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    assert peak_device_bytes() is None
    for is_used, expected in ((False, None), (True, 70)):
        cuda = SimpleNamespace(
            is_initialized=lambda is_used=is_used: is_used,
            device_count=lambda: 2,
            max_memory_allocated=lambda index: (70, 30)[index],
        )
        monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
        assert peak_device_bytes() == expected


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the system forgets no peak")
def test_a_peak_can_be_forgotten(tmp_path: Path) -> None:
    """So that each node's is its own; where that cannot be done, nothing happens. In a process without a past."""
    code = """
import sys
from pathlib import Path
from s2v_flow.machine import forget_peaks, peak_memory_bytes
big = b"x" * 200_000_000
print(peak_memory_bytes())
del big
forget_peaks(Path(sys.argv[1]))
print(peak_memory_bytes())
forget_peaks()
print(peak_memory_bytes())
"""
    command = [sys.executable, "-c", code, str(tmp_path / "no" / "such" / "file")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    before, kept, forgotten = map(int, done.stdout.split())
    assert kept > before - 10_000_000  # counted per processor, and not to the byte
    assert forgotten < before - 100_000_000
