"""What a recipe is planned as: chunks, seeds, offsets, and which frames end up in the file. Nothing runs here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from recipes_for_tests import options, write_clip, write_recipe, write_voice

from s2v_flow import api
from s2v_flow.graph.node import PlanNode
from s2v_flow.nodes.chunk import Chunk
from s2v_flow.nodes.decode import DecodeFrames

Changes = Mapping[str, Mapping[str, Any] | None]


def planned(folder: Path, seconds: float, changes: Changes | None = None, rate_hz: int = 8000) -> api.Planned:
    write_voice(folder / "voice.wav", seconds, rate_hz)
    return api.plan(write_recipe(folder, changes), options(folder, folder / "models"))


def chunks(plan: api.Planned) -> dict[str, Chunk]:
    return {node.name: node.node for node in plan.plan.nodes if isinstance(node.node, Chunk)}


def decoding(plan: api.Planned) -> DecodeFrames:
    node = plan.plan.node("frames").node
    assert isinstance(node, DecodeFrames)
    return node


def notes(plan: api.Planned) -> list[str]:
    """Return a plan's notes, but for that on the models for tests, which all of these recipes name."""
    return [note for note in plan.notes if "is a model for tests" not in note]


def input_nodes(node: PlanNode) -> dict[str, list[str]]:
    return {
        key: [source.node for source in (given if isinstance(given, tuple) else (given,))]
        for key, given in node.inputs.items()
    }


@pytest.mark.parametrize(
    ("seconds", "num_chunks", "num_frames"),
    [(60, 13, 960), (14, 3, 224), (1, 1, 16), (0.001, 1, 1), (4.8125, 1, 77), (4.875, 2, 78)],
)
def test_auto_adds_the_least_chunks_that_cover_the_voice_and_its_warm_up(
    tmp_path: Path, seconds: float, num_chunks: int, num_frames: int
) -> None:
    """Chunks of 80 frames; three frames of warm-up stand before the voice."""
    plan = planned(tmp_path, seconds)
    assert (plan.num_chunks, plan.num_frames) == (num_chunks, num_frames)
    assert plan.seconds == num_frames / 16
    assert decoding(plan).num_frames == num_frames
    assert notes(plan) == []


def test_a_part_of_a_frame_counts_as_a_frame(tmp_path: Path) -> None:
    """11026 samples at 11025 Hz are 16.001 frames."""
    assert planned(tmp_path, 11026 / 11025, rate_hz=11025).num_frames == 17


def test_chunks_stand_at_consecutive_frames_of_sound_and_see_the_last_19_latent_frames(tmp_path: Path) -> None:
    plan = planned(tmp_path, 14)
    assert {name: chunk.audio_offset for name, chunk in chunks(plan).items()} == {
        "first": 0,
        "talk[1]": 80,
        "talk[2]": 160,
    }
    assert {chunk.num_latent_frames for chunk in chunks(plan).values()} == {20}
    assert "history" not in plan.plan.node("first").inputs
    assert input_nodes(plan.plan.node("talk[2]"))["history"] == ["talk[1]"]
    assert input_nodes(plan.plan.node("frames"))["latent"] == ["first", "talk[1]", "talk[2]"]


def test_short_chunks_see_as_many_earlier_ones_as_hold_19_latent_frames(tmp_path: Path) -> None:
    plan = planned(tmp_path, 7, {"first": {"length": 5}, "talk": {"chunks": 12}})
    assert input_nodes(plan.plan.node("talk[2]"))["history"] == ["first", "talk[1]"]
    assert input_nodes(plan.plan.node("talk[12]"))["history"] == [f"talk[{number}]" for number in range(2, 12)]


@pytest.mark.parametrize(
    ("seed", "expected"),
    [
        (None, [20, 21, 22]),
        (100, [20, 100, 101]),
        (2**64 - 1, [20, 2**64 - 1, 0]),
        ([7, 9], [20, 7, 9]),
    ],
)
def test_seeds_are_inherited_counted_on_or_listed(tmp_path: Path, seed: object, expected: list[int]) -> None:
    plan = planned(tmp_path, 14, {"talk": {"chunks": 2, "seed": seed}})
    assert [chunk.seed for chunk in chunks(plan).values()] == expected


@pytest.mark.parametrize(
    ("seeds", "expected"), [([7], [20, 7, 8]), ([], [20, 21, 22]), ([2**64 - 1], [20, 2**64 - 1, 0])]
)
def test_where_auto_needs_more_seeds_than_listed_it_counts_on(
    tmp_path: Path, seeds: list[int], expected: list[int]
) -> None:
    plan = planned(tmp_path, 14, {"talk": {"seed": seeds}})
    assert [chunk.seed for chunk in chunks(plan).values()] == expected


def test_a_second_extend_counts_seeds_on_from_the_first_chunk(tmp_path: Path) -> None:
    changes = {
        "talk": {"chunks": 1, "seed": 500},
        "more": {"kind": "extend", "video": "$talk", "chunks": 1},
        "frames": {"latent": "$more"},
    }
    assert [chunk.seed for chunk in chunks(planned(tmp_path, 14, changes)).values()] == [20, 500, 22]


def test_with_cfg_1_the_negative_prompt_is_not_planned(tmp_path: Path) -> None:
    def names(cfg: float) -> set[str]:
        return {node.name for node in planned(tmp_path, 1, {"first": {"cfg": cfg}}).plan.nodes}

    assert names(6.0) - names(1.0) == {"negative"}


def test_extend_inherits_all_settings_and_inputs(tmp_path: Path) -> None:
    settings = {
        "steps": 7,
        "cfg": 3.5,
        "sampler": "euler",
        "scheduler": "normal",
        "shift": 5.0,
        "conditioning": "comfyui",
        "length": 13,
    }
    plan = planned(tmp_path, 1, {"first": settings, "talk": {"chunks": 1}})
    first, further = chunks(plan).values()
    assert further == first.model_copy(update={"seed": 21, "audio_offset": 16})
    assert (first.steps, first.conditioning, first.num_latent_frames) == (7, "comfyui", 4)
    given, inherited = (input_nodes(plan.plan.node(name)) for name in ("first", "talk[1]"))
    assert {key: inherited[key] for key in given} == given


def test_what_extend_says_itself_goes_over_what_it_inherits(tmp_path: Path) -> None:
    other = {"kind": "encode_text", "text_encoder": "$umt5", "text": "She laughs."}
    plan = planned(tmp_path, 9, {"other": other, "talk": {"chunks": 1, "steps": 3, "cfg": 1, "positive": "$other"}})
    first, further = chunks(plan).values()
    assert (first.steps, first.cfg, further.steps, further.cfg) == (20, 6.0, 3, 1.0)
    inputs = input_nodes(plan.plan.node("talk[1]"))
    assert inputs["positive"] == ["other"]
    assert "negative" not in inputs


def test_in_pixel_mode_every_chunk_is_decoded_before_the_next(tmp_path: Path) -> None:
    plan = planned(tmp_path, 14, {"first": {"motion": "pixels"}, "talk": {"chunks": 2}})
    inputs = {node.name: input_nodes(node) for node in plan.plan.nodes}
    assert inputs["first.pixels"] == {"vae": ["vae"], "latent": ["first"], "before": ["reference"]}
    assert inputs["talk[1]"]["motion"] == ["first.pixels"]
    assert inputs["talk[1].pixels"] == {
        "vae": ["vae"],
        "latent": ["talk[1]"],
        "before": ["first.pixels"],
        "tail": ["first.pixels"],
    }
    assert inputs["talk[2]"]["motion"] == ["talk[1].pixels"]
    assert inputs["frames"] == {"parts": ["first.pixels", "talk[1].pixels", "talk[2].pixels"]}


# 14 s of sound are 224 frames; three chunks make 240 frames besides what the prefix adds
DROPPED = [
    ("latent", "reference", 0, 1, 240),
    ("latent", "reference", 3, 4, 237),
    ("latent", "reference", 7, 8, 233),
    ("latent", "first", 0, 1, 240),
    ("latent", "first", 3, 4, 237),
    ("latent", "first", 7, 8, 233),
    ("latent", "none", 3, 0, 237),
    ("latent", "none", 7, 4, 233),
    ("pixels", "reference", 3, 0, 237),
    ("pixels", "reference", 7, 4, 233),
]


@pytest.mark.parametrize(("motion", "prefix", "warmup", "drop", "untrimmed"), DROPPED)
def test_what_stands_before_the_voice_is_dropped(
    tmp_path: Path, motion: str, prefix: str, warmup: int, drop: int, untrimmed: int
) -> None:
    changes = {"first": {"motion": motion}, "speech": {"warmup_frames": warmup}, "frames": {"prefix": prefix}}
    node = decoding(planned(tmp_path, 14, changes))
    assert (node.drop_frames, node.num_frames) == (drop, 224)
    assert node.doubles_first == (prefix == "first")
    changes["frames"] = {"prefix": prefix, "trim": "none"}
    assert decoding(planned(tmp_path, 14, changes)).num_frames == untrimmed


@pytest.mark.parametrize(("motion", "drop"), [("latent", 76), ("pixels", 3)])
def test_a_video_that_begins_with_the_portrait_drops_what_was_before_it(tmp_path: Path, motion: str, drop: int) -> None:
    """In latent mode all 73 motion frames are decoded, and dropped with the warm-up; in pixel mode never given out."""
    plan = planned(tmp_path, 14, {"first": {"motion": motion, "init_first_frame": True}})
    assert (decoding(plan).drop_frames, decoding(plan).num_frames) == (drop, 224)
    assert input_nodes(plan.plan.node("first.motion")) == {"vae": ["vae"], "reference": ["reference"]}


def test_frames_to_drop_can_be_given(tmp_path: Path) -> None:
    node = decoding(planned(tmp_path, 14, {"frames": {"drop_frames": 30, "trim": "none"}}))
    assert (node.drop_frames, node.num_frames) == (30, 241 - 30)


def test_too_few_chunks_are_noted(tmp_path: Path) -> None:
    plan = planned(tmp_path, 14, {"talk": {"chunks": 0}})
    (note,) = notes(plan)
    assert note.startswith("frames: the chunks cover 4.81 s of 14.00 s of sound")
    assert plan.num_frames == 77


def test_without_the_voices_file_the_length_is_open(tmp_path: Path) -> None:
    plan = api.plan(write_recipe(tmp_path), options(tmp_path, tmp_path / "models"))
    assert (plan.num_chunks, plan.num_frames, plan.seconds) == (None, None, None)
    assert [item.file for item in plan.plan.missing] == ["voice.wav"]


def test_without_a_saved_latents_file_the_length_is_open(tmp_path: Path) -> None:
    latent = {"kind": "load_latent", "file": "gone.latent"}
    changes = {"first": None, "talk": latent | {"video": None}, "frames": {"drop_frames": 9}}
    plan = planned(tmp_path, 1, changes)
    assert (plan.num_chunks, plan.num_frames) == (None, None)
    assert [item.file for item in plan.plan.missing] == ["gone.latent"]


def test_a_pose_video_is_planned_once_per_chunk_at_the_chunks_time(tmp_path: Path) -> None:
    write_clip(tmp_path / "pose.mp4", 4)
    changes = {
        "pose": {"kind": "load_video", "file": "pose.mp4"},
        "first": {"control_video": "$pose"},
        "talk": {"chunks": 1},
    }
    plan = planned(tmp_path, 9, changes)
    nodes = [plan.plan.node(f"{name}.control").node for name in ("first", "talk[1]")]
    assert [(node.offset, node.warmup_frames, node.num_latent_frames) for node in nodes] == [(0, 3, 20), (80, 3, 20)]  # type: ignore[attr-defined]


def test_a_recipe_without_outputs_is_noted(tmp_path: Path) -> None:
    plan = planned(tmp_path, 1, {"video": None, "frames": None})
    assert notes(plan) == ["the recipe writes no file: results stay in the cache (add a save_video node)"]


def test_silence_and_a_second_sound_lengthen_the_voice(tmp_path: Path) -> None:
    """`lead` and `tail` count as sound; joined sounds as both, at the higher rate; without one, the length is open."""
    assert planned(tmp_path, 4.8, {"voice": {"lead": "0.25s", "tail": "0.5s"}}).num_frames == 77 + 12
    write_voice(tmp_path / "b.wav", 2, 44_100)
    more = {"kind": "load_audio", "file": "b.wav"}
    both = {"kind": "audio_concat", "first": "$voice", "second": "$more"}
    changes: Changes = {"more": more, "both": both, "speech": {"audio": "$both"}, "video": {"audio": "$both"}}
    plan = planned(tmp_path, 4.8, changes)
    assert plan.num_frames == 109  # 6.8 s
    assert plan.plan.node("speech").facts["num_samples"] == 3000 + 16_000 * 6.8
    (tmp_path / "b.wav").unlink()
    assert planned(tmp_path, 4.8, changes).num_frames is None


def test_silence_and_volume_count_in_a_sounds_identity_where_they_are_used(tmp_path: Path) -> None:
    """Without them what is stored is found as before they were there."""

    def identity(**fields: Any) -> dict[str, Any]:
        node = planned(tmp_path, 1, {"voice": fields}).plan.node("voice").node
        return node.identity({("file",): "sha256:0"}, lambda kind, text: text)

    plain = {"file": "sha256:0", "start": 0.0, "end": None, "max_duration": None, "fade": 0.0}
    assert identity(lead=0.0, tail=0, volume=0.0) == identity() == plain
    assert identity(tail="0.5s", volume=-3.0) == {**plain, "tail": 0.5, "volume": -3.0}
