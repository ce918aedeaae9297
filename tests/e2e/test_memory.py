"""Decoding and writing hold a few frames at a time, however long the video is."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from recipes_for_tests import options, write_recipe, write_voice
from safetensors.numpy import save_file
from torch import Tensor, nn

from s2v_flow import api
from s2v_flow.models import load

LATENT_FRAMES = 20  # of a chunk at length 77
UNUSED = dict.fromkeys(("model", "positive", "negative", "speech", "reference", "vae", "seed", "video"))


def write_latent_recipe(folder: Path, num_chunks: int, side: int) -> Path:
    """Write a latent of noise, as long as `num_chunks` chunks, and a recipe that decodes it to a video."""
    shape = (1, 16, num_chunks * LATENT_FRAMES, side // 8, side // 8)
    noise = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    save_file({"latent_tensor": noise}, folder / f"{num_chunks}.latent")
    changes: dict[str, Any] = {
        "first": None,
        "talk": {**UNUSED, "kind": "load_latent", "file": f"{num_chunks}.latent"},
        "video": {"audio": None, "preset": "ultrafast"},
    }
    return write_recipe(folder, changes, name=f"{num_chunks}.yaml")


class CountingVae(nn.Module):
    """Decodes to grey, and knows how many of the arrays that it made are still held by somebody."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[weakref.ref[Tensor]] = []
        self.most_alive = 0

    def decode_next(self, latent: Tensor, state: bool | None) -> tuple[Tensor, bool]:
        gc.collect(0)
        self.most_alive = max(self.most_alive, sum(made() is not None for made in self.made))
        count = 4 * latent.shape[2] - (0 if state else 3)
        pixels = torch.zeros(1, 3, count, 8 * latent.shape[3], 8 * latent.shape[4])
        self.made.append(weakref.ref(pixels))
        return pixels, True


@pytest.mark.slow
def test_decoded_pixels_are_let_go_of_before_the_next_are_made(
    tmp_path: Path, tiny_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most two groups are alive at once, in a video of 2 chunks as in one of 10."""
    for num_chunks in (2, 10):
        vae = CountingVae()
        monkeypatch.setattr(load, "load_vae", lambda *_, vae=vae, **__: vae)
        recipe = write_latent_recipe(tmp_path, num_chunks, side=32)
        result = api.run(recipe, options(tmp_path, tiny_models))
        assert result.outputs["video"][0].is_file()
        assert len(vae.made) > num_chunks * LATENT_FRAMES // 2
        assert vae.most_alive <= 2


PEAK = """
import sys
from pathlib import Path
from recipes_for_tests import options
from s2v_flow import api
from s2v_flow.graph.run import peak_memory_bytes

recipe, folder, models = map(Path, sys.argv[1:])
result = api.run(recipe, options(folder, models))
print(peak_memory_bytes())
"""


@pytest.mark.soak
def test_peak_memory_of_ten_chunks_is_that_of_two(tmp_path: Path, tiny_models: Path) -> None:
    """Within a tenth. All frames of ten chunks as floats would take 155 MiB, a third of what a process takes here."""
    side, peaks = 128, {}
    assert (40 * LATENT_FRAMES - 3) * side * side * 3 * 4 > 140 * 2**20
    for num_chunks in (2, 10):
        recipe = write_latent_recipe(tmp_path, num_chunks, side)
        command = [sys.executable, "-c", PEAK, recipe, tmp_path, tiny_models]
        found = subprocess.run(
            list(map(str, command)), cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=True
        )
        peaks[num_chunks] = int(found.stdout)
    assert peaks[10] <= 1.1 * peaks[2], peaks


ENCODE = """
import sys
from pathlib import Path
from recipes_for_tests import options
from s2v_flow import api
from s2v_flow.graph.run import peak_memory_bytes
from s2v_flow.graph.status import Selection

recipe, folder, models = map(Path, sys.argv[1:])
api.run(recipe, options(folder, models, selection=Selection(only=("speech",))))
print(peak_memory_bytes())
"""


@pytest.mark.soak
def test_peak_memory_of_encoding_a_long_voice_is_that_of_a_short_one(tmp_path: Path, tiny_models: Path) -> None:
    """In windows of 20 s, within a tenth: 4 minutes of voice and 1. What is stored grows by 18 MB, what is held not."""
    peaks = {}
    for seconds in (60, 240):
        folder = tmp_path / str(seconds)
        folder.mkdir()
        write_voice(folder / "voice.wav", seconds)
        recipe = write_recipe(folder, {"speech": {"window_seconds": 20.0}})
        command = [sys.executable, "-c", ENCODE, recipe, folder, tiny_models]
        found = subprocess.run(
            list(map(str, command)), cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=True
        )
        peaks[seconds] = int(found.stdout)
    assert peaks[240] <= 1.1 * peaks[60], peaks
