"""Many runs in one process: memory, open files and threads stay as they are, and a run does not see the one before it.

`make soak` runs more and prints figures: S2VFLOW_SOAK_RUNS says how many.
"""

from __future__ import annotations

import os
import shutil
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from recipes_for_tests import NODES, tiny, write_recipe, write_voice

from s2v_flow import api

LATENT = {"kind": "save_latent", "latent": "$first", "file": "out/talk.latent"}
PROC = Path("/proc/self")
BETWEEN = 3  # different recipes, taken in turn


def recipe(folder: Path, number: int) -> Path:
    """Write a recipe that ends with a latent of one frame: every model is loaded, and the DiT takes one step."""
    first = {"steps": 1, "length": 1, "seed": number % BETWEEN}
    unused = {name: None for name in ("talk", "frames", "video") if name in NODES}
    return write_recipe(folder, {**tiny(first=first), **unused, "all": LATENT})


def resident_bytes() -> int:
    return int((PROC / "statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def run_many(folder: Path, models: Path, count: int) -> dict[str, Any]:
    """Run recipes in turn, each with an empty cache; return what the process holds after the third run and the last."""
    write_voice(folder / "voice.wav", 0.1)
    made: dict[int, bytes] = {}
    begun: tuple[int, int, int] | None = None
    for number in range(count):
        options = api.Options(models_dirs=[models], cache_dir=folder / "cache", device="cpu")
        (latent,) = api.run(recipe(folder, number), options).outputs["all"]
        assert made.setdefault(number % BETWEEN, latent.read_bytes()) == latent.read_bytes(), "another result"
        assert not list((folder / "cache" / "tmp").iterdir())
        shutil.rmtree(folder / "cache")
        held = (resident_bytes(), len(list((PROC / "fd").iterdir())), threading.active_count())
        begun = held if number == BETWEEN * 2 else begun
    assert begun is not None
    return {"bytes": held[0] - begun[0], "files": held[1] - begun[1], "threads": held[2] - begun[2]}


@pytest.mark.skipif(not PROC.exists(), reason="reads /proc")
@pytest.mark.slow
def test_runs_leave_nothing_behind_in_the_process(tmp_path: Path, tiny_models: Path) -> None:
    """8 runs of 3 recipes in turn: the same results, a file for each of the three, no thread more."""
    grown = run_many(tmp_path, tiny_models, 8)
    assert (grown["files"], grown["threads"]) == (0, 0)
    assert len(set((tmp_path / "out").iterdir())) == 3


@pytest.mark.soak
def test_soak_runs(tmp_path: Path, tiny_models: Path) -> None:
    """S2VFLOW_SOAK_RUNS runs (100 unless told otherwise): at most 16 MB more, and 1 MB for each 100 beyond 1,600."""
    count = int(os.environ.get("S2VFLOW_SOAK_RUNS", "100"))
    grown = run_many(tmp_path, tiny_models, count)
    assert (grown["files"], grown["threads"]) == (0, 0)
    assert grown["bytes"] < (1 << 20) * max(count / 100, 16)
    sys.stdout.write(f"\n{count} runs in one process: {grown['bytes'] / 2**20:+.1f} MB, no file, no thread more\n")
