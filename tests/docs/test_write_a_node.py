"""The code of docs/write-a-node.md does what the page says."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest
import torch
from pages import blocks, text_of

from s2v_flow.nodes.frames import Frames
from s2v_flow.sampling.sampler import Sampler, Solver, initial_noise
from s2v_flow.sampling.schedule import scheduled_sigmas

NO_CONTEXT: Any = None


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return what the page's modules define."""
    folder = tmp_path_factory.mktemp("written")
    found: dict[str, Any] = {}
    for number, block in enumerate(blocks(text_of("docs/write-a-node.md"), "python")):
        path = folder / f"written_{number}.py"
        path.write_text(block, encoding="utf-8")
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(folder)
            found |= vars(importlib.import_module(path.stem))
    return found


def test_the_node_mirrors_frames(written: dict[str, Any]) -> None:
    pixels = np.arange(2 * 2 * 3 * 3, dtype=np.uint8).reshape(2, 2, 3, 3)
    frames = Frames(3, 2, 2, lambda: iter([pixels[:1], pixels[1:]]), lambda start, count: pixels[start : start + count])
    node = written["FramesMirror"].model_validate({"frames": "$x"})
    made = node.run(NO_CONTEXT, {"frames": frames})["frames"]
    assert np.array_equal(np.concatenate(list(made)), pixels[:, :, ::-1])
    assert np.array_equal(made.read(1, 1), pixels[1:, :, ::-1])
    both = written["FramesMirror"].model_validate({"frames": "$x", "also_vertical": True})
    assert np.array_equal(both.run(NO_CONTEXT, {"frames": frames})["frames"].read(0, 2), pixels[:, ::-1, ::-1])


def test_the_sampler_is_of_second_order(written: dict[str, Any]) -> None:
    """On a flow whose solution is known, halving the step divides the error by about four."""

    def denoise(x: torch.Tensor, sigma: float) -> torch.Tensor:
        return x - sigma * x.sin()  # the slope is sin x

    def end(steps: int) -> torch.Tensor:
        levels = torch.linspace(1, 0.5, steps + 1, dtype=torch.float64).tolist()
        sampler = Sampler("euler", tuple(levels), 0, torch.device("cpu"), Solver(written["midpoint"]))
        *_, last = sampler.iterate(denoise, sampler.start(torch.linspace(0.5, 2, 8, dtype=torch.float64)))
        return last.x

    start = torch.linspace(0.5, 2, 8, dtype=torch.float64)
    exact = 2 * torch.atan(torch.tan(start / 2) * torch.exp(torch.tensor(-0.5, dtype=torch.float64)))
    errors = [float((end(steps) - exact).abs().max()) for steps in (8, 16)]
    assert 3 < errors[0] / errors[1] < 5


def test_the_sampler_runs_down_to_no_noise(written: dict[str, Any]) -> None:
    solver = Solver(written["midpoint"])
    sampler = Sampler("euler", scheduled_sigmas("simple", 4, 8.0), 0, torch.device("cpu"), solver)
    *_, last = sampler.iterate(lambda x, sigma: torch.zeros_like(x), sampler.start(initial_noise((2, 3), seed=1)))
    assert torch.equal(sampler.result(last), torch.zeros(2, 3))
