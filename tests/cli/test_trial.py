"""`try`: the first chunk at half size in few steps, and how long the whole will take."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from recipes_for_tests import call, options, tiny, write_clip, write_recipe, write_voice

from s2v_flow import api
from s2v_flow.cli.running import trial
from s2v_flow.errors import ExitCode, S2VFlowError
from s2v_flow.nodes.chunk import Chunk

LARGE = {"reference": {"width": 160, "height": 128}}


def plan_trial(folder: Path, changes: Mapping[str, Any], extra: str = "", **more: Any) -> api.Planned:
    """Plan the trial of a recipe whose models are not there."""
    write_voice(folder / "voice.wav", 1.2)
    given = options(folder, folder, **more)
    return trial(api.plan(write_recipe(folder, tiny(**changes), extra=extra), given), given)[0]


def chunks(planned: api.Planned) -> list[Chunk]:
    return [node.node for node in planned.plan.nodes if isinstance(node.node, Chunk)]


def outputs(planned: api.Planned) -> list[Path]:
    return [node.files["file",] for node in planned.plan.nodes if node.node.is_sink]


@pytest.mark.slow
def test_a_trial_is_run_and_the_whole_is_estimated_by_it(
    tmp_path: Path, tiny_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The path first, then the estimate; nothing of it is computed again, and the whole's own video is not there."""
    write_voice(tmp_path / "voice.wav", 1.2)
    changes = tiny(first={"steps": 6}, reference={"width": 128, "height": 128}, video={"preset": "ultrafast"})
    recipe = write_recipe(tmp_path, changes)
    where = ["--models-dir", tiny_models, "--cache-dir", tmp_path / "cache", "--device", "cpu"]
    code, out, err = call("try", recipe, *where)
    assert code == 0, err
    path, whole = out.splitlines()
    assert [path] == [str(file) for file in (tmp_path / "out").iterdir()] == [str(tmp_path / "out" / "talk.try.mp4")]
    assert whole.startswith("the whole: 3 chunks, 20 frames, 1.25 s")
    assert "; about " in whole
    assert "(scaled from 64x64" in whole
    piped = io.TextIOWrapper(io.BytesIO(recipe.read_bytes()))
    with monkeypatch.context() as patch:
        patch.chdir(tmp_path)
        patch.setattr("sys.stdin", piped)
        code, out, err = call("try", "-", *where, "--json")
    assert (code, json.loads(out)["outputs"]) == (0, {"video": [path]}), err
    code, out, _ = call("try", recipe, *where, "--json")
    told = json.loads(out)
    assert (code, told["computed"], told["outputs"]) == (0, [], {"video": [path]})
    assert told["estimate"]["source"] == "scaled"
    assert told["estimate"]["seconds"] > 0
    made = call("show", path)[1]
    assert "first (sample): " in made
    assert "steps 4" in made
    assert "chunks 0" in made


def test_only_the_first_chunk_is_planned_smaller_and_shorter(tmp_path: Path) -> None:
    """With the recipe's seed; what comes in time, and seeds of further chunks, are left out with these."""
    later = {"seed": [5, 6], "chunks": 2, "timeline": [{"at": 0.5, "prompt": "She laughs."}]}
    still = {"kind": "save_images", "frames": "$frames", "file": "out/frame.png"}
    planned = plan_trial(tmp_path, {**LARGE, "first": {"steps": 9, "cfg": 2.0}, "talk": later, "still": still})
    (chunk,) = chunks(planned)
    assert (chunk.width, chunk.height, chunk.steps, chunk.seed, chunk.cfg) == (80, 64, 4, 20, 2.0)
    assert outputs(planned) == [tmp_path / "out" / "talk.try.mp4"]


def test_what_is_small_and_quick_stays_as_it_is(tmp_path: Path) -> None:
    (chunk,) = chunks(plan_trial(tmp_path, {}))
    assert (chunk.width, chunk.height, chunk.steps) == (64, 64, 2)


def test_pose_video_and_decoded_pixels_come_along(tmp_path: Path) -> None:
    write_clip(tmp_path / "pose.mp4", 8)
    pose = {"pose": {"kind": "load_video", "file": "pose.mp4"}}
    planned = plan_trial(tmp_path, {**LARGE, **pose, "first": {"control_video": "$pose", "motion": "pixels"}})
    (chunk,) = chunks(planned)
    assert (chunk.width, chunk.height) == (80, 64)
    assert "first.control" in {node.name for node in planned.plan.nodes}


def test_two_videos_are_both_tried_and_of_two_samples_each(tmp_path: Path) -> None:
    second = {"kind": "sample", "model": "$dit", "positive": "$positive", "width": 96, "height": 160, "cfg": 1.0}
    more = {
        "second": {**second, "length": 5, "steps": 2},
        "seen": {"kind": "decode", "vae": "$vae", "latent": "$second"},
        "silent": {"kind": "save_video", "frames": "$seen", "file": "out/silent.mp4"},
    }
    planned = plan_trial(tmp_path, {**LARGE, **more})
    assert {(chunk.width, chunk.height) for chunk in chunks(planned)} == {(80, 64), (64, 80)}
    assert {path.name for path in outputs(planned)} == {"talk.try.mp4", "silent.try.mp4"}


def test_the_cells_of_a_matrix_are_tried_each(tmp_path: Path) -> None:
    """With what varies left as it is, and parameters in the file's name."""
    extra = "params: {seed: 1, tag: a}\nmatrix: {seed: [1, 2], nodes.first.steps: [7, 9]}"
    planned = plan_trial(
        tmp_path, {**LARGE, "first": {"seed": "$params.seed"}, "video": {"file": "${params.seed}.mp4"}}, extra
    )
    assert {(chunk.width, chunk.steps, chunk.seed) for chunk in chunks(planned)} == {
        (80, 7, 1),
        (80, 7, 2),
        (80, 9, 1),
        (80, 9, 2),
    }
    assert len(set(outputs(planned))) == 4
    assert {path.name[:5] for path in outputs(planned)} == {"1.try", "2.try"}


def test_profiles_and_the_output_folder_count(tmp_path: Path) -> None:
    extra = "profiles: {long: {nodes: {first: {steps: 30, seed: 3}}}}"
    planned = plan_trial(tmp_path, LARGE, extra, profiles="long", output_dir=tmp_path / "else")
    (chunk,) = chunks(planned)
    assert (chunk.steps, chunk.seed) == (4, 3)
    assert outputs(planned) == [tmp_path / "else" / "out" / "talk.try.mp4"]


def test_a_recipe_that_cannot_be_halved_is_tried_at_its_size(tmp_path: Path) -> None:
    """A film of 128x128 is joined to the video."""
    write_clip(tmp_path / "intro.mp4", 8)
    joined = {
        "reference": {"width": 128, "height": 128},
        "intro": {"kind": "load_video", "file": "intro.mp4"},
        "large": {"kind": "frames_scale", "frames": "$intro", "factor": 2},
        "both": {"kind": "frames_concat", "first": "$large", "second": "$frames"},
        "video": {"frames": "$both", "audio": None},
    }
    (chunk,) = chunks(plan_trial(tmp_path, {**joined, "first": {"steps": 9}}))
    assert (chunk.width, chunk.steps) == (128, 4)


@pytest.mark.parametrize(
    ("changes", "lacks"),
    [
        ({"video": None}, "no save_video node that shows what is sampled"),
        ({"first": None, "talk": None, "frames": None, "video": {"frames": "$film"}}, "no sample node"),
    ],
)
def test_a_recipe_with_nothing_to_try_is_refused(changes: dict[str, Any], lacks: str, tmp_path: Path) -> None:
    write_clip(tmp_path / "film.mp4", 8)
    film = {"film": {"kind": "load_video", "file": "film.mp4"}}
    given = options(tmp_path, tmp_path)
    write_voice(tmp_path / "voice.wav", 1.2)
    recipe = write_recipe(tmp_path, {**film, **changes})
    with pytest.raises(S2VFlowError, match=lacks) as caught:
        trial(api.plan(recipe, given), given)
    assert caught.value.exit_code == ExitCode.RECIPE == 3


@pytest.mark.slow
def test_a_long_run_without_a_past_is_estimated_by_a_measurement(
    tmp_path: Path, tiny_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A short one begins at once; what counts as long is so little here that this one is."""
    recipe = write_recipe(tmp_path, tiny())
    command = ["run", recipe, "--until", "reference", "--models-dir", tiny_models, "--device", "cpu", "--cache-dir"]
    write_voice(tmp_path / "voice.wav", 0.3)
    assert "calibration" not in call(*command, tmp_path / "one")[2]
    monkeypatch.setattr("s2v_flow.cli.running._LONG_ON_CPU", 1)
    code, _, err = call(*command, tmp_path / "two")
    assert code == 0, err
    assert "note: nothing like this ran here yet: about " in err
    assert "(from a calibration of this machine, not measured)" in err
