"""The GPU's script at toy size on the CPU; tests/test_pretend_cuda.py runs its parts on a device that pretends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu


@pytest.mark.filterwarnings("ignore")  # of torch's own compiler, about torch
@pytest.mark.parametrize(
    "parts",
    [
        pytest.param((gpu.correctness, gpu.backends, gpu.compiled), id="what differs on a CPU", marks=pytest.mark.slow),
        pytest.param(gpu.PARTS, id="all", marks=pytest.mark.soak),
    ],
)
def test_parts_run_at_toy_size(parts: tuple[Any, ...]) -> None:
    rows = [row for part in parts for row in gpu.rows_of(part, gpu.TOY)]
    assert [row for row in rows if row["status"] == "failed"] == []
    assert {row["part"] for row in rows} == {part.__name__ for part in parts}
    assert [row["case"] for row in rows if row["part"] == "correctness"] == ["bf16", "fp16", "fp8"]
    tried = {row["case"]: row["status"] for row in rows if row["part"] == "backends"}
    assert tried == {"sdpa": "ok", "cudnn": "skipped", "flash": "ok", "efficient": "skipped", "sage": "skipped"}


@pytest.mark.slow
def test_parts_have_a_process_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their rows come into one file; once the time is over, what is left is told as failed."""
    monkeypatch.setattr(gpu, "PARTS", (gpu.correctness,))
    assert gpu.main(["--toy", "--json", str(tmp_path / "rows.json")]) == 0
    found = json.loads((tmp_path / "rows.json").read_text())
    assert [row["case"] for row in found["rows"]] == ["bf16", "fp16", "fp8"]
    assert (found["device"], found["is_toy"]) == ("cpu", True)
    ((_, row),) = gpu.rows_apart(gpu.correctness, gpu.TOY, left=0)
    assert (row["status"], "for all parts are over" in row["error"]) == ("failed", True)


def test_a_part_that_fails_costs_its_own_row() -> None:
    def broken(scale: gpu.Scale) -> gpu.Iterator[gpu.Row]:
        yield {"case": "before"}
        raise RuntimeError("no kernel")

    rows = list(gpu.rows_of(broken, gpu.TOY))
    assert [row["status"] for row in rows] == ["ok", "failed"]
    assert rows[1]["error"] == "RuntimeError: no kernel"
