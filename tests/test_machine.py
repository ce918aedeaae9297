"""How much memory is free, where the system says so."""

from __future__ import annotations

from pathlib import Path

from s2v_flow.machine import free_memory_bytes


def test_free_memory_is_what_the_system_calls_available(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:       24000000 kB\nMemFree:         1000000 kB\nMemAvailable:   20000000 kB\n")
    assert free_memory_bytes("cpu", meminfo) == 20_000_000 * 1024


def test_it_is_unknown_on_a_gpu_and_on_systems_that_do_not_say(tmp_path: Path) -> None:
    assert free_memory_bytes("cuda:0") is None
    assert free_memory_bytes("cpu", tmp_path / "none") is None
    (tmp_path / "other").write_text("MemTotal: 1 kB\n")
    assert free_memory_bytes("cpu", tmp_path / "other") is None
