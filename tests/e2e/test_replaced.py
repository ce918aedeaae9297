"""A file that stood under a result's name is not replaced without a word; odd rates are said before and after."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from recipes_for_tests import call

RECIPE = """\
s2vflow: 1
params: {side: 32, seed: 1, fps: 16}
nodes:
  face:    {kind: load_image, file: face.png}
  scaled:  {kind: image_scale, image: $face, width: $params.side, height: $params.side}
  still:   {kind: frames_from_image, image: $scaled, count: 3}
  video:   {kind: save_video, frames: $still, file: '${params.side}.mp4', fps: $params.fps}
  pictures: {kind: save_images, frames: $still, file: p.png}
"""


@pytest.fixture
def place(tmp_path: Path) -> list[object]:
    """Write the recipe; return the command that runs it."""
    Image.linear_gradient("L").convert("RGB").save(tmp_path / "face.png")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    folders = ["--cache-dir", tmp_path / "cache", "--output-dir", tmp_path / "out", "--input-dir", tmp_path]
    return [tmp_path / "recipe.yaml", *folders, "--device", "cpu"]


def told(text: str) -> list[str]:
    return [line for line in text.splitlines() if "was replaced" in line]


def test_another_result_under_the_same_name_is_told(place: list[object]) -> None:
    """What is new or the same is not; where the name holds the setting, both are kept."""
    first, again, other = (call("run", *place, *more) for more in ([], [], ["--set", "side=64"]))
    assert (first[0], again[0], other[0]) == (0, 0, 0)
    assert told(first[2]) == told(again[2]) == []
    (line,) = told(other[2])
    assert line.startswith("note: pictures: file: ")
    assert "p_00001.png and 2 more stood there" in line
    (line,) = told(call("run", *place, "--set", "side=64", "--set", "nodes.video.crf=30")[2])
    assert line.startswith("note: video: file: ")
    assert "64.mp4 stood there" in line


def test_another_rate_than_the_models_is_told_by_plan_and_run(place: list[object]) -> None:
    """As a warning that names the field; the model's own rate is not."""
    for command in ("plan", "run"):
        lines = [line for text in call(command, *place, "--set", "fps=25")[1:] for line in text.splitlines()]
        (line,) = [line for line in lines if "fps" in line]
        assert line.startswith("warning: fps: video plays 25 frames a second, the model makes 16")
    assert "warning" not in call("plan", *place)[1]
