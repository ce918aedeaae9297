"""Mistakes that only planning can see: each with its code, place, words and advice."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from recipes_for_tests import options, write_recipe, write_voice

from s2v_flow import api
from s2v_flow.errors import Diagnostic, RecipeError

Changes = Mapping[str, Mapping[str, Any] | None]
LOADED: Changes = {
    "first": {
        "kind": "load_latent",
        "file": "x.latent",
        **dict.fromkeys(("model", "positive", "negative", "speech", "reference", "vae", "seed")),
    }
}
SMALL = {"kind": "encode_image", "vae": "$vae", "image": "$portrait", "width": 32, "height": 96}


def problems(folder: Path, changes: Changes) -> list[Diagnostic]:
    write_voice(folder / "voice.wav", 1)
    Image.new("RGB", (90, 7)).save(folder / "odd.png")
    recipe = write_recipe(folder, changes)
    with pytest.raises(RecipeError) as caught:
        api.plan(recipe, options(folder, folder / "models"))
    assert {problem.place.file for problem in caught.value.diagnostics if problem.place} == {str(recipe)}
    return list(caught.value.diagnostics)


def marked(problem: Diagnostic) -> str:
    """Return the part of the recipe at which a problem points."""
    assert problem.place is not None
    assert problem.excerpt is not None
    return problem.excerpt[problem.place.column - 1 :][: problem.width]


CASES: list[tuple[str, Changes, str, str, str | None]] = [
    # code, changes, what is marked, message, advice
    ("R121", {"first": {"reference": None, "height": 64}}, "first", "width is unknown",
     "give a reference, or width and height"),
    ("R122", {"first": {"negative": None, "cfg": 2.5}}, "2.5", "cfg 2.5 needs a negative prompt",
     "add negative: $... (an encode_text node), or set cfg: 1"),
    ("R122", {"first": {"negative": None}}, "first", "cfg 6 needs a negative prompt",
     "add negative: $... (an encode_text node), or set cfg: 1"),
    ("R123", {"first": {"vae": None, "motion": "pixels"}}, '"pixels"', "motion needs the VAE",
     "add vae: $... (a load_vae node)"),
    ("R123", {"first": {"vae": None, "init_first_frame": True}}, "true", "init_first_frame needs the VAE",
     "add vae: $... (a load_vae node)"),
    ("R123", {"clip": {"kind": "load_video", "file": "x.mp4"}, "first": {"vae": None, "control_video": "$clip"}},
     '"$clip"', "control_video needs the VAE", "add vae: $... (a load_vae node)"),
    ("R123", {"clip": {"kind": "load_video", "file": "x.mp4"}, "first": {"vae": None, "motion_video": "$clip"}},
     '"$clip"', "motion_video needs the VAE", "add vae: $... (a load_vae node)"),
    ("R124", {"first": {"reference": None, "width": 64, "height": 64, "motion": "pixels"}}, '"pixels"',
     "motion needs a reference", "add reference: $... (an encode_image node)"),
    ("R124", {"first": {"reference": None, "width": 64, "height": 64, "init_first_frame": True}}, "true",
     "init_first_frame needs a reference", "add reference: $... (an encode_image node)"),
    ("R125", {"clip": {"kind": "load_video", "file": "x.mp4"},
              "first": {"motion_video": "$clip", "init_first_frame": True}},
     "true", "init_first_frame and motion_video exclude each other", None),
    ("R126", {"first": {"sampler": "euler", "scheduler": "kl_optimal", "steps": 1}}, "1",
     "steps: euler with kl_optimal needs at least 2, got 1", None),
    ("R135", {"first": {"shift": 0.005, "steps": 20}}, "0.005",
     "shift: shift 0.005 and steps 20 give no falling schedule with uni_pc and simple",
     "set shift: 0.05 (8 is usual), or take fewer steps"),
    ("R135", {"first": {"steps": 20, "shift": 0.05}, "talk": {"steps": 500}}, "500",
     "steps: shift 0.05 and steps 500 give no falling schedule with uni_pc and simple",
     "set shift: 0.25 (8 is usual), or take fewer steps"),
    ("R128", {"first": {"width": 96}}, "96", "width: the reference has 64, got 96",
     "leave width out, or change it in the reference's node"),
    ("R100", {"talk": {"motion": "pixels"}}, '"pixels"', "motion: pixels cannot follow chunks that hand over latents",
     None),
    ("R101", {"first": {"motion": "pixels"}, "talk": {"length": 9}}, "9",
     "length cannot change between chunks with motion: pixels", None),
    ("R102", {"talk": {"chunks": 3, "seed": [1, 2]}}, "[", "seed: expected 3 seeds, one per chunk, got 2", None),
    ("R103", {"first": {"speech": None}}, "talk", "chunks: auto needs a voice", "give speech, or a number of chunks"),
    ("R104", {"small": SMALL, "talk": {"reference": "$small"}}, '"$small"',
     "reference: 32x96 cannot follow a video of 64x64", "encode the portrait at the video's size"),
    ("R110", {"speech": {"warmup_frames": 2}, "frames": {"prefix": "none"}}, '"none"',
     "prefix: none needs warmup_frames of at least 3 to keep picture and sound in time, got 2",
     "set warmup_frames in the encode_audio node, or drop_frames here"),
    ("R110", {"speech": {"warmup_frames": 0}, "first": {"motion": "pixels"}}, '"$talk"',
     "motion: pixels needs warmup_frames of at least 3 to keep picture and sound in time, got 0",
     "set warmup_frames in the encode_audio node, or drop_frames here"),
    ("R132", {"scaled": {"kind": "frames_scale", "frames": "$frames", "width": 61, "height": 40},
              "video": {"frames": "$scaled"}},
     "61", "width: 61 pixels, where the mp4 that video writes needs an even number", "set width: 62 and height: 40"),
    ("R132", {"scaled": {"kind": "frames_scale", "frames": "$frames", "longest_side": 65},
              "part": {"kind": "frames_slice", "frames": "$scaled", "length": 4},
              "video": {"frames": "$part"}, "reference": {"width": 64, "height": 128}},
     "scaled", "height: 65 pixels, where the mp4 that video writes needs an even number",
     "set width: 32 and height: 66"),
    ("R132", {"face": {"kind": "image_scale", "image": "$portrait", "width": 40, "height": 31},
              "still": {"kind": "frames_from_image", "image": "$face", "count": 3}, "video": {"frames": "$still"}},
     "31", "height: 31 pixels, where the mp4 that video writes needs an even number", "set width: 40 and height: 32"),
    ("R132", {"clip": {"kind": "load_image", "file": "odd.png"},
              "still": {"kind": "frames_from_image", "image": "$clip", "count": 3}, "video": {"frames": "$still"}},
     '"$still"', "height: 7 pixels, where the mp4 that video writes needs an even number",
     "put a frames_scale node in front of it, with width: 90 and height: 8"),
    ("R133", {"face": {"kind": "image_scale", "image": "$wide", "longest_side": 4},
              "wide": {"kind": "load_image", "file": "odd.png"},
              "reference": {"image": "$face"}}, "4", "longest_side: 90x7 pixels become 4x0",
     "make it larger, or give width and height"),
    ("R134", {"piece": {"kind": "latent_cut", "latent": "$first", "axis": "x", "amount": 5},
              "talk": {"video": "$piece", "chunks": 1}}, '"$piece"',
     "video: 40x64 pixels, where a video that goes on needs multiples of 16",
     "cut an even amount of cells in its latent_cut node, or cut after extend"),
    ("R134", {"piece": {"kind": "latent_cut", "latent": "$first", "axis": "y", "index": 7, "amount": 9},
              "talk": {"video": "$piece", "chunks": 1}}, '"$piece"',
     "video: 64x8 pixels, where a video that goes on needs multiples of 16",
     "cut an even amount of cells in its latent_cut node, or cut after extend"),
    ("R134", {"reference": {"width": 32}, "talk": {"chunks": 1}}, '"$first"',
     "video: 32x64 pixels, where motion needs 64 a side at least", "make the video larger"),
    ("R134", {"reference": {"width": 32}, "talk": {"chunks": 0}, "first": {"init_first_frame": True, "vae": "$vae"}},
     '"$reference"', "reference: 32x64 pixels, where motion needs 64 a side at least", "make the video larger"),
    ("R111", {"frames": {"drop_frames": 81}}, "81", "drop_frames: no frame is left, 81 of 81 are dropped",
     "drop fewer frames, or add chunks"),
]  # fmt: skip


@pytest.mark.parametrize(("code", "changes", "mark", "message", "fix"), CASES)
def test_a_mistake_is_told_at_its_place(
    code: str, changes: Changes, mark: str, message: str, fix: str | None, tmp_path: Path
) -> None:
    (problem,) = problems(tmp_path, changes)
    assert (problem.code, problem.message, problem.fix) == (code, message, fix)
    assert marked(problem) == mark


def test_after_a_loaded_latent_extend_has_nothing_to_inherit(tmp_path: Path) -> None:
    """All that is lacking is told at once."""
    found = problems(tmp_path, {**LOADED, "talk": {"chunks": 1}})
    words = "is missing and cannot be inherited"
    inputs = [("R120", f"{key} {words}", f"add {key}: $...") for key in ("model", "positive")]
    keys = ("length", "steps", "cfg", "sampler", "scheduler", "shift", "conditioning", "motion")
    fields = [("R127", f"{key} {words}", f"add {key}: ...") for key in keys]
    assert sorted((p.code, p.message, p.fix or "") for p in found) == sorted(inputs + fields)
    assert {marked(problem) for problem in found} == {"talk"}


def test_mistakes_of_several_nodes_are_told_together(tmp_path: Path) -> None:
    found = problems(
        tmp_path, {"first": {"negative": None, "vae": None, "motion": "pixels"}, "frames": {"drop_frames": 500}}
    )
    assert [problem.code for problem in found] == ["R122", "R123"]


@pytest.mark.parametrize(
    ("file", "why"),
    [
        ("folder.mp4", "a folder has this name"),
        ("voice.wav/a.mp4", "voice.wav is no folder"),
        ("voice.wav/b/a.mp4", "voice.wav is no folder"),
        (f"{'ä' * 126}.mp4", "its name is too long"),
    ],
)
def test_a_file_that_cannot_be_written_under_its_name_is_found_before_the_run(
    file: str, why: str, tmp_path: Path
) -> None:
    """Not after everything has been computed; a name of 255 bytes can be."""
    (tmp_path / "folder.mp4").mkdir()
    (problem,) = problems(tmp_path, {"video": {"file": file}})
    assert (problem.code, problem.fix) == ("R136", "give it another name")
    assert problem.message.startswith(f"file: {tmp_path.resolve()}")
    assert problem.message.endswith(why)
    recipe = write_recipe(tmp_path, {"video": {"file": f"new/{'a' * 251}.mp4"}})
    assert api.plan(recipe, options(tmp_path, tmp_path / "models"))
