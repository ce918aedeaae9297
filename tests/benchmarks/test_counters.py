"""Upper bounds on work at real sizes, counted on the meta device: a slow-down fails without a clock."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.__main__ import main

BOUNDS = {
    "DiT block 640x640, 77 frames: TFLOP": 48.5,
    "DiT block 640x640, 77 frames: operations": 63,
    "DiT block 640x640, 77 frames: GB outside products": 43.3,
    "DiT: weight GB in bf16": 32.6,
    "VAE: weight GB in float32": 0.508,
    "VAE decode, 4 frames of 640x640: TFLOP": 13.9,
    "VAE decode, 4 frames of 640x640: operations": 369,
    "VAE decode, 4 frames of 640x640: GB outside products": 59.0,
    "VAE decode, 8 frames of 640x640: TFLOP": 27.8,
    "VAE decode, 8 frames of 640x640: operations": 369,
    "VAE decode, 8 frames of 640x640: GB outside products": 102.4,
    "VAE encode, 4 frames of 640x640: TFLOP": 8.27,
    "VAE encode, 4 frames of 640x640: operations": 272,
    "VAE encode, 4 frames of 640x640: GB outside products": 36.0,
}


@pytest.mark.slow
def test_a_block_and_the_vae_do_no_more_work_than_they_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every line of the history says what it is of; half as much would be a mistake of the counting."""
    main(["--quick", "--json", str(tmp_path / "now.json"), "--history", str(tmp_path / "history.jsonl")])
    rows = json.loads((tmp_path / "now.json").read_text())
    assert [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()] == rows
    assert all(set(row) >= {"commit", "machine", "versions", "figure", "value"} for row in rows)
    found = {row["figure"]: row["value"] for row in rows}
    assert set(found) == set(BOUNDS)
    assert {name: found[name] for name in BOUNDS if not BOUNDS[name] / 2 < found[name] <= BOUNDS[name]} == {}
    assert all(name in capsys.readouterr().out for name in list(BOUNDS)[:1])
