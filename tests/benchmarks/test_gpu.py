"""The GPU's script, every part at toy size on the CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import gpu


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of torch's own compiler, about torch
def test_every_part_runs_at_toy_size(tmp_path: Path) -> None:
    assert gpu.main(["--toy", "--json", str(tmp_path / "rows.json")]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert {row["part"] for row in rows} == {part.__name__ for part in gpu.PARTS}
    assert [row["case"] for row in rows if row["part"] == "correctness"] == ["bf16", "fp16", "fp8"]
    tried = {row["case"]: row["status"] for row in rows if row["part"] == "backends"}
    assert tried == {"sdpa": "ok", "cudnn": "skipped", "flash": "ok", "efficient": "skipped", "sage": "skipped"}


def test_a_part_that_fails_costs_its_own_row() -> None:
    def broken(scale: gpu.Scale) -> gpu.Iterator[gpu.Row]:
        yield {"case": "before"}
        raise RuntimeError("no kernel")

    rows = list(gpu.rows_of(broken, gpu.TOY))
    assert [row["status"] for row in rows] == ["ok", "failed"]
    assert rows[1]["error"] == "RuntimeError: no kernel"
