"""How much memory is free, where the system says so."""

from __future__ import annotations

from pathlib import Path

import pytest

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


@pytest.mark.parametrize(
    ("line", "folder", "names"),
    [
        ("0::/slice/job", "slice", ("memory.max", "memory.current", "inactive_file")),
        ("4:memory:/job", "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")),
    ],
)
def test_a_control_groups_limit_counts_wherever_it_stands(
    line: str, folder: str, names: tuple[str, str, str], tmp_path: Path
) -> None:
    """At the process's own group or above it; what its files take of it is free for others."""
    (tmp_path / "self").mkdir()
    (tmp_path / "self" / "cgroup").write_text(f"1:cpu:/\n{line}\n")
    (tmp_path / "meminfo").write_text("MemAvailable:   20000000 kB\n")
    group = tmp_path / "groups" / folder
    group.mkdir(parents=True)
    for name, text in zip((*names[:2], "memory.stat"), ("9000", "5000", f"anon 1\n{names[2]} 300\n"), strict=True):
        (group / name).write_text(text)
    assert free_memory_bytes("cpu", tmp_path / "meminfo", tmp_path / "groups") == 4300
    (group / names[0]).write_text("max\n")
    assert free_memory_bytes("cpu", tmp_path / "meminfo", tmp_path / "groups") == 20_000_000 * 1024
