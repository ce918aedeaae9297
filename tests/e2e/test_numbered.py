"""A file under a result's name that is another stays, and the result is numbered; odd rates are said."""

from __future__ import annotations

import json
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
    return [line for line in text.splitlines() if " kept: " in line or "replaced" in line]


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_another_result_under_the_same_name_is_numbered(place: list[object], tmp_path: Path) -> None:
    """What is new or the same is not; where the name holds the setting, none is needed. Pictures are a set."""
    first, again, other = (call("run", *place, *more) for more in ([], [], ["--set", "side=64"]))
    assert (first[0], again[0], other[0]) == (0, 0, 0)
    assert told(first[2]) == told(again[2]) == []
    expected = "note: pictures: p_00001.png kept: it is another result; written as p.2_00001.png"
    assert told(other[2]) == [expected]
    plan = call("plan", *place, "--set", "side=64", "--set", "nodes.video.crf=30")
    assert "64.mp4 (" in plan[1]
    assert "stays, unless it is this result; else written as 64.2.mp4" in plan[1]
    _, out, err = call("run", *place, "--set", "side=64", "--set", "nodes.video.crf=30")
    assert told(err) == ["note: video: 64.mp4 kept: it is another result; written as 64.2.mp4"]
    assert f"pictures: {tmp_path}/out/p.2_00001.png is up to date" in err
    assert str(tmp_path / "out" / "64.2.mp4") in out.splitlines()
    assert "stays" not in call("plan", *place, "--set", "side=64", "--set", "nodes.video.crf=30")[1]
    pictures = [f"p{number}_0000{index}.png" for number in (".2", "") for index in (1, 2, 3)]
    assert files(tmp_path / "out") == ["32.mp4", "64.2.mp4", "64.mp4", *pictures]


def test_overwrite_replaces_and_says_so(place: list[object], tmp_path: Path) -> None:
    call("run", *place)
    before = (tmp_path / "out" / "32.mp4").read_bytes()
    code, _, err = call("run", *place, "--set", "nodes.video.crf=30", "--overwrite")
    assert (code, len(told(err))) == (0, 2)
    assert "will be replaced (--overwrite)" in told(err)[0]
    assert "was replaced (--overwrite)" in told(err)[1]
    assert (tmp_path / "out" / "32.mp4").read_bytes() != before


def test_a_sequence_on_the_disk_is_one_result(place: list[object], tmp_path: Path) -> None:
    """A shorter one that begins alike goes elsewhere, a longer one completes it; --overwrite removes what is stored."""
    recipe, out, count = tmp_path / "recipe.yaml", tmp_path / "out", "nodes.still.count="
    recipe.write_text("".join(line for line in RECIPE.splitlines(keepends=True) if "video" not in line))

    def names(number: str, last: int) -> list[str]:
        return [f"p{number}_{index:05}.png" for index in range(1, last + 1)]

    call("run", *place)
    assert "3 more" not in call("plan", *place)[1]
    assert "p.2_00001.png" in call("plan", *place, "--set", f"{count}2")[1]
    for _ in range(2):
        call("run", *place, "--set", f"{count}2")
        assert files(out) == [*names(".2", 2), *names("", 3)]
    call("run", *place, "--set", f"{count}4")
    assert files(out) == [*names(".2", 2), *names("", 4)]
    _, _, err = call("run", *place, "--set", f"{count}1", "--overwrite")
    assert files(out) == [*names(".2", 2), *names("", 1)]
    assert "p_00002.png and 2 more" in err
    mine = out / "p_00007.png"
    mine.write_bytes(b"mine")
    _, _, err = call("run", *place, "--set", f"{count}1", "--overwrite")
    assert "p_00007.png kept: it is another result; written as p.3_00001.png" in err
    assert mine.read_bytes() == b"mine"
    assert files(out) == [*names(".2", 2), *names(".3", 1), *names("", 1), "p_00007.png"]


def test_o_names_the_only_output_wherever_it_lies(place: list[object], tmp_path: Path) -> None:
    """Its bytes are those of the recipe's own file; a recipe with two outputs, or another suffix, is refused."""
    code, _, err = call("run", *place, "-o", tmp_path / "x.mp4")
    assert (code, "-o names one file, the recipe writes 2" in err, "nodes.pictures.file" in err) == (2, True, True)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("".join(line for line in RECIPE.splitlines(keepends=True) if "pictures" not in line))
    code, _, err = call("run", *place, "-o", tmp_path / "x.gif")
    assert (code, "x.gif: video (save_video) cannot write a file of this name" in err) == (2, True)
    assert "ending in .mp4" in err
    other = tmp_path / "elsewhere" / "x.mp4"
    shown = []
    for more in (["-o", other], []):
        ran = json.loads(call("run", *place, *more, "--json")[1])
        shown += [item["name"] for item in json.loads(call("show", ran["run"], *place[1:3], "--json")[1])["outputs"]]
    assert ran["outputs"] == {"video": [str(tmp_path / "out" / "32.mp4")]}
    assert (tmp_path / "out" / "32.mp4").read_bytes() == other.read_bytes()
    assert shown == [str(other), "32.mp4"]
    call("run", *place, "-o", other, "-m", "seed=1,2")
    assert [name for name in files(other.parent) if name.startswith("x.")] == ["x.mp4", "x.seed=1.mp4", "x.seed=2.mp4"]


def test_another_rate_than_the_models_is_told_by_plan_and_run(place: list[object]) -> None:
    """As a warning that names the field; the model's own rate is not."""
    for command in ("plan", "run"):
        lines = [line for text in call(command, *place, "--set", "fps=25")[1:] for line in text.splitlines()]
        (line,) = [line for line in lines if "fps" in line]
        assert line.startswith("warning: fps: video plays 25 frames a second, the model makes 16")
    assert "warning" not in call("plan", *place)[1]
