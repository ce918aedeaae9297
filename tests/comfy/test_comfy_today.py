"""Workflows as ComfyUI of 2026 saves them, and the small nodes that stand in most of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from comfy_workflows import (
    Workflow,
    add,
    editor,
    fields,
    golden,
    imported,
    load_text,
    mistake,
    node_of,
    plan_meaning,
    planned,
    recipe_of,
)

from s2v_flow.comfy.exporter import Format, export_workflow
from s2v_flow.comfy.values import calculated
from s2v_flow.errors import RecipeError, S2VFlowError


@pytest.mark.parametrize("form", ["api", "editor"])
def test_a_videos_quality_goes_there_and_back(form: Format, tmp_path: Path) -> None:
    """As the choices within SaveVideo's choices; an unchanged quality leaves them on auto."""
    text = imported(golden(), tmp_path).text
    recipe = load_text(text.replace("kind: save_video,", "kind: save_video, crf: 14,"), tmp_path)
    exported, notes = export_workflow(recipe, planned(recipe), form)
    assert notes == ()
    assert plan_meaning(planned(recipe_of(exported, tmp_path))) == plan_meaning(planned(recipe))
    if form == "api":
        saver = next(n for n in json.loads(exported).values() if n["class_type"] == "SaveVideo")["inputs"]
        assert saver["format"] == "mp4"
        assert saver["format.codec"] == "h264"
        assert saver["format.codec.encoding"] == "re-encode"
        assert saver["format.codec.encoding.crf"] == 14.0


def test_savevideos_choices_are_told_apart_by_place(tmp_path: Path) -> None:
    """Without names: an encoding of `auto` brings no quality along, the old two widgets are read as before."""
    document = editor()
    for values in (["v", "mp4", "h264", "auto", "auto"], ["v", "mp4", "h264"], ["v", "auto", "auto", "auto"]):
        node_of(document, "SaveVideo")["widgets_values"] = values
        made = imported(document, tmp_path)
        assert "crf" not in made.text
        assert made.notes == ()


@pytest.mark.parametrize(("name", "value", "is_said"), [("bit_depth", 10, True), ("bit_depth", 8, False)])
def test_more_bits_than_are_saved_are_said(name: str, value: Any, is_said: bool, tmp_path: Path) -> None:
    """In both formats."""
    workflow = golden()
    workflow["82"]["inputs"][name] = value
    document = editor()
    node_of(document, "CreateVideo")["widgets_values"] = [16, value, "sRGB", "none"]
    for given in (workflow, document):
        assert any("bit_depth is left out" in note for note in imported(given, tmp_path).notes) == is_said


def test_a_voice_may_come_from_a_video(tmp_path: Path) -> None:
    """LoadAudio lists videos too."""
    workflow = golden()
    workflow["58"]["inputs"]["audio"] = "talk.mp4"
    recipe = recipe_of(workflow, tmp_path)
    assert recipe.params["audio"] == "talk.mp4"


VHS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "VHS_LoadAudio": ({"audio_file": "input/v.wav", "seek_seconds": 1.5, "duration": 0}, {"start": 1.5}),
    "VHS_LoadAudioUpload": ({"audio": "v.wav", "start_time": 0, "duration": "3"}, {"max_duration": 3.0}),
}


@pytest.mark.parametrize("loader", VHS)
def test_vhs_sounds_are_parts_of_their_files(loader: str, tmp_path: Path) -> None:
    """0 stands for the beginning and the end."""
    workflow = golden()
    inputs, expected = VHS[loader]
    workflow["58"] = {"class_type": loader, "inputs": inputs}
    made = fields(workflow, tmp_path, "voice")
    assert recipe_of(workflow, tmp_path).params["audio"] == "v.wav"
    assert {key: made[key] for key in ("start", "max_duration") if made[key]} == expected


def test_a_vhs_video_is_a_pose_video_and_a_sound(tmp_path: Path) -> None:
    """Its part and its size are nodes of their own; frames that it leaves out are refused by name."""
    workflow = golden()
    values = {"force_rate": 16, "custom_width": 64, "custom_height": 96, "skip_first_frames": 8, "frame_load_cap": 40}
    add(workflow, "700", "VHS_LoadVideo", video="pose.mp4", select_every_nth=1, **values)
    workflow["93"]["inputs"]["control_video"] = ["700", 0]
    workflow["82"]["inputs"]["audio"] = ["700", 2]
    recipe = recipe_of(workflow, tmp_path)
    part = recipe.nodes["part"].node.model_dump()
    assert (part["start"], part["length"]) == (8, 40)
    scaled = recipe.nodes["scaled"].node.model_dump()
    assert (scaled["width"], scaled["height"], scaled["crop"], scaled["method"]) == (64, 96, "center", "lanczos")
    sound = recipe.nodes["clip_sound"].node.model_dump()
    assert (sound["start"], sound["max_duration"]) == (0.5, 2.5)
    assert not any("force_rate" in note for note in imported(workflow, tmp_path).notes)
    workflow["700"]["inputs"]["select_every_nth"] = 2
    assert "node 700 (VHS_LoadVideo): select_every_nth" in mistake(workflow, tmp_path)


@pytest.mark.parametrize("loader", ["VHS_LoadVideoFFmpeg", "VHS_LoadVideoFFmpegPath"])
def test_a_vhs_video_by_ffmpeg_begins_at_a_time(loader: str, tmp_path: Path) -> None:
    """Its second output is a mask, the sound the third, as with its sisters."""
    workflow = golden()
    values = {"force_rate": 16, "custom_width": 0, "custom_height": 0, "frame_load_cap": 40, "start_time": 0.5}
    add(workflow, "700", loader, video="pose.mp4", **values)
    workflow["93"]["inputs"]["control_video"] = ["700", 0]
    workflow["82"]["inputs"]["audio"] = ["700", 2]
    recipe = recipe_of(workflow, tmp_path)
    part, sound = (recipe.nodes[name].node.model_dump() for name in ("part", "clip_sound"))
    assert (part["start"], part["length"]) == (8, 40)
    assert (sound["start"], sound["max_duration"]) == (0.5, 2.5)
    assert "scaled" not in recipe.nodes


def test_a_vhs_picture_is_scaled_to_its_size(tmp_path: Path) -> None:
    """Zero keeps the shape."""
    workflow = golden()
    workflow["52"] = {"class_type": "VHS_LoadImagePath", "inputs": {"image": "input/astronaut.png", "custom_width": 64}}
    recipe = recipe_of(workflow, tmp_path)
    assert recipe.params["image"] == "astronaut.png"
    scaled = recipe.nodes["scaled"].node.model_dump()
    assert (scaled["width"], scaled["height"], scaled["crop"]) == (64, None, "disabled")


def test_pingpong_is_refused_by_name(tmp_path: Path) -> None:
    """Half of the video would be missing."""
    workflow = golden()
    add(workflow, "900", "VHS_VideoCombine", images=["96", 0], frame_rate=16, pingpong=True, filename_prefix="v")
    assert "node 900 (VHS_VideoCombine): pingpong" in mistake(workflow, tmp_path)


def test_trimming_to_the_sound_is_noted(tmp_path: Path) -> None:
    """Only where it is on."""
    for is_on in (True, False):
        workflow = golden()
        inputs = {"frame_rate": 16, "trim_to_audio": is_on, "filename_prefix": "v"}
        add(workflow, "900", "VHS_VideoCombine", images=["96", 0], **inputs)
        assert any("trim_to_audio is left out" in note for note in imported(workflow, tmp_path).notes) == is_on


@pytest.mark.parametrize(
    ("class_type", "slot", "node", "name", "message"),
    [
        ("VHS_LoadAudio", 1, "93", "length", "node 93 (WanSoundImageToVideo): length is computed by a node"),
        ("VHS_LoadAudio", 1, "82", "audio", "node 82 (CreateVideo): audio: a recipe needs audio here"),
        ("VHS_LoadImagePath", 1, "93", "ref_image", "ref_image: a recipe needs image here"),
        ("LoadImage", 1, "93", "ref_image", "ref_image: a recipe needs image here"),
        ("LoadImage", 9, "93", "ref_motion", "ref_motion: a recipe needs frames here"),
    ],
)
def test_an_output_without_a_meaning_is_refused_where_it_is_used(
    class_type: str, slot: int, node: str, name: str, message: str, tmp_path: Path
) -> None:
    """It is never taken for an input that is not connected."""
    workflow = golden()
    values = {"image": "a.png", "audio_file": "v.wav"}
    workflow[node]["inputs"][name] = [add(workflow, "950", class_type, **values)[0], slot]
    assert message in mistake(workflow, tmp_path)


def test_a_linked_input_that_is_not_known_is_warned_of(tmp_path: Path) -> None:
    """As a later version's would be; the recipe is the same without it."""
    workflow = golden()
    plain = imported(workflow, tmp_path)
    workflow["93"]["inputs"]["second_image"] = ["52", 0]
    made = imported(workflow, tmp_path)
    assert made.text == plain.text
    what = "this input is not known here, and what is linked to it left out"
    assert made.warnings == (f"second_image: node 93 (WanSoundImageToVideo): {what}",)


def joined(workflow: Workflow, first: list[Any], second: list[Any], direction: str = "after") -> Workflow:
    """Put two sounds together, for the speech and for the video's sound."""
    sound = add(workflow, "600", "AudioConcat", audio1=first, audio2=second, direction=direction)
    for node in workflow.values():
        if node["class_type"] in ("CreateVideo", "AudioEncoderEncode"):
            node["inputs"]["audio"] = sound
    return workflow


@pytest.mark.parametrize(("direction", "field"), [("after", "tail"), ("before", "lead")])
def test_silence_beside_a_voice_is_a_field_of_it(direction: str, field: str, tmp_path: Path) -> None:
    """There and back."""
    workflow = golden()
    silent = add(workflow, "601", "EmptyAudio", duration=0.5, sample_rate=44100, channels=2)
    recipe = recipe_of(joined(workflow, ["58", 0], silent, direction), tmp_path)
    assert recipe.nodes["voice"].node.model_dump()[field] == 0.5
    text, notes = export_workflow(recipe, planned(recipe), "api")
    assert notes == ()
    assert plan_meaning(planned(recipe_of(text, tmp_path))) == plan_meaning(planned(recipe))


def test_two_voices_are_one_sound(tmp_path: Path) -> None:
    """There and back; a part of both is refused where it stands."""
    workflow = golden()
    other = add(workflow, "602", "LoadAudio", audio="b.wav")
    louder = add(workflow, "603", "AudioAdjustVolume", audio=other, volume=6)
    recipe = recipe_of(joined(workflow, ["58", 0], louder, "before"), tmp_path)
    node = recipe.nodes["sound"].node.refs()
    assert recipe.nodes[node["first"].node].node.model_dump()["volume"] == 6
    assert recipe.nodes[node["second"].node].node.model_dump()["volume"] == 0
    text, _ = export_workflow(recipe, planned(recipe), "editor")
    assert plan_meaning(planned(recipe_of(text, tmp_path))) == plan_meaning(planned(recipe))
    workflow["82"]["inputs"]["audio"] = add(workflow, "604", "AudioAdjustVolume", audio=["600", 0], volume=6)
    assert "node 604 (AudioAdjustVolume): volume of joined sounds" in mistake(workflow, tmp_path)


ROWS: list[dict[str, Any]] = [
    {"on": True, "lora": "a\\light.safetensors", "strength": 0.6, "strengthTwo": None},
    {"on": False, "lora": "b.safetensors", "strength": 1},
    {"on": True, "lora": "None", "strength": 1},
    {"on": True, "lora": "c.safetensors", "strength": "1.5"},
]


@pytest.mark.parametrize("is_editor", [False, True])
def test_a_power_lora_loader_is_its_rows_that_are_on(is_editor: bool, tmp_path: Path) -> None:
    """In their order, in both formats."""
    workflow = golden()
    workflow["54"]["inputs"]["model"] = add(
        workflow, "500", "Power Lora Loader (rgthree)", model=["37", 0], **{f"lora_{i}": r for i, r in enumerate(ROWS)}
    )
    document: Any = workflow
    if is_editor:
        del workflow["500"]["inputs"]["lora_3"]
        document = editor(workflow)
        node = node_of(document, "Power Lora Loader (rgthree)")
        node["widgets_values"] = [{}, {"type": "PowerLoraLoaderHeaderWidget"}, *ROWS, {}, ""]
    loras = recipe_of(document, tmp_path).nodes["dit"].node.model_dump()["loras"]
    assert [(item["file"], item["strength"]) for item in loras] == [
        ("a/light.safetensors", 0.6),
        ("c.safetensors", 1.5),
    ]


IGNORED = ["MultiGPU_WorkUnits", "ModelAttentionBackend", "PathchSageAttentionKJ", "TorchCompileModel", "LazyCache"]


@pytest.mark.parametrize("class_type", IGNORED)
def test_what_only_chooses_how_to_compute_is_noted_and_left_out(class_type: str, tmp_path: Path) -> None:
    """The recipe is the one without it."""
    workflow = golden()
    workflow["54"]["inputs"]["model"] = add(workflow, "500", class_type, model=["37", 0])
    made = imported(workflow, tmp_path)
    assert made.text == imported(golden(), tmp_path).text
    assert [note for note in made.notes if f"node 500 ({class_type}) is left out" in note]


def test_easycache_is_step_cache_both_ways(tmp_path: Path) -> None:
    """On both chunks with its threshold; other percents, and heun, are told of; exported it is there again."""
    workflow = golden()
    percents = {"start_percent": 0.15, "end_percent": 0.9, "verbose": False}
    cached = add(workflow, "500", "EasyCache", model=["54", 0], reuse_threshold=0.1, **percents)
    samplers = [node for node in workflow.values() if node["class_type"] == "KSampler"]
    for node in samplers:
        node["inputs"]["model"] = cached
    made = imported(workflow, tmp_path)
    assert "step_cache: easy" in made.text
    assert "step_cache_threshold: 0.1" in made.text
    assert [note for note in made.notes if "start_percent and end_percent are left out" in note]
    recipe = load_text(made.text, tmp_path)
    exported = recipe_of(export_workflow(recipe, planned(recipe), "api")[0], tmp_path)
    assert plan_meaning(planned(exported)) == plan_meaning(planned(recipe))
    other = load_text(made.text.replace("step_cache: easy", "step_cache: velocity"), tmp_path)
    assert "step_cache: velocity has no equivalent" in export_workflow(other, planned(other), "api")[1][0]
    workflow["201"]["inputs"]["model"] = ["54", 0]  # the second chunk
    assert "step_cache: 'off'" in imported(workflow, tmp_path).text
    for node in samplers:
        node["inputs"] |= {"model": cached, "sampler_name": "heun"}
    made = imported(workflow, tmp_path)
    assert "step_cache" not in made.text
    assert [note for note in made.notes if "EasyCache is left out: heun calls the model twice a step" in note]


def test_a_multigpu_loader_is_its_plain_one_and_says_so(tmp_path: Path) -> None:
    """Where a model is kept is placement's."""
    workflow = golden()
    workflow["37"]["class_type"] = "UNETLoaderDisTorch2MultiGPU"
    made = imported(workflow, tmp_path)
    assert made.text == imported(golden(), tmp_path).text
    assert [note for note in made.notes if "UNETLoaderDisTorch2MultiGPU is read as UNETLoader" in note]


def test_rgthrees_reroute_does_not_count(tmp_path: Path) -> None:
    """It is the editor's only, like ComfyUI's."""
    document = editor()
    saver = node_of(document, "SaveVideo")
    link = next(item for item in document["links"] if item[0] == saver["inputs"][0]["link"])
    spot = {"id": 999, "type": "Reroute (rgthree)", "inputs": [{"name": "", "type": "*", "link": 990}], "outputs": []}
    document["links"].append([990, link[1], link[2], 999, 0, "VIDEO"])
    link[1:3] = [999, 0]
    document["nodes"].append(spot)
    assert imported(document, tmp_path).text == imported(editor(), tmp_path).text


@pytest.mark.parametrize(
    ("class_type", "inputs", "slot", "expected"),
    [
        ("ComfyMathExpression", {"expression": "max(((a + 15) // 16) * 16, 64)", "values.a": ["700", 0]}, 1, 96),
        ("ComfyMathExpression", {"expression": "a & ~31", "values": {"a": ["700", 0]}}, 1, 64),
        ("SimpleCalculatorKJ", {"expression": "a * 2 if a > 80 else 1", "a": ["700", 0]}, 1, 176),
        ("SimpleMath+", {"value": "a + 7.6", "a": ["700", 0]}, 0, 96),
        ("MathExpression|pysssss", {"expression": "floor(a / 16 + 0.9) * 16", "a": ["700", 0]}, 0, 96),
        ("ComfyNumberConvert", {"value": ["700", 0]}, 1, 80),
        ("easy int", {"value": "112"}, 0, 112),
    ],
)
def test_numbers_may_be_computed_from_known_ones(
    class_type: str, inputs: dict[str, Any], slot: int, expected: int, tmp_path: Path
) -> None:
    """88 in, the video's width out; the whole number is the node's own."""
    workflow = golden()
    add(workflow, "700", "INTConstant", value=88)
    add(workflow, "701", class_type, **inputs)
    workflow["93"]["inputs"]["width"] = ["701", slot]
    assert recipe_of(workflow, tmp_path).params["width"] == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "b",
        "a +",
        "__import__('os')",
        "a.real",
        "'x'",
        "9**9**9",
        "10**80",
        "1/0",
        "[1]",
        "a" * 2000,
        "(" * 900,
        "1j",
    ],
)
def test_what_is_no_arithmetic_is_refused(text: str, tmp_path: Path) -> None:
    """At its node, and nothing else of Python is run."""
    with pytest.raises(ValueError, match=r"."):
        calculated(text, {"a": 3})
    workflow = golden()
    workflow["93"]["inputs"]["width"] = add(workflow, "701", "SimpleMath+", value=text)
    assert "node 701 (SimpleMath+)" in mistake(workflow, tmp_path)


def test_a_seed_for_all_is_a_parameter(tmp_path: Path) -> None:
    """Use Everywhere's node, which gives it by a link in the API format."""
    workflow = golden()
    for name in ("3", "201"):
        workflow[name]["inputs"]["seed"] = add(workflow, "702", "Seed Everywhere", seed=7)
    made = recipe_of(workflow, tmp_path)
    assert made.params["seed"] == 7
    assert {made.nodes[name].node.model_dump()["seed"] for name in ("first", "talk")} == {7}


def test_a_random_seed_is_asked_for(tmp_path: Path) -> None:
    """rgthree's -1 draws one for each run."""
    workflow = golden()
    workflow["3"]["inputs"]["seed"] = add(workflow, "702", "Seed (rgthree)", seed=7)
    assert recipe_of(workflow, tmp_path).params["seed"] == 7
    workflow["702"]["inputs"]["seed"] = -1
    assert "node 702 (Seed (rgthree)): seed -1 draws another" in mistake(workflow, tmp_path)


def test_advice_fits_the_node(tmp_path: Path) -> None:
    """What has nothing in front of it cannot be bypassed; what it should give is named."""
    for node, word in (("58", "LoadAudio"), ("52", "LoadImage"), ("37", "UNETLoader")):
        workflow = golden()
        workflow[node] = {"class_type": "MyLoader", "inputs": {"name": "x"}}
        with pytest.raises(RecipeError) as caught:
            imported(workflow, tmp_path)
        fix = caught.value.diagnostics[0].fix or ""
        assert word in fix
        assert "bypass" not in fix
    for node, can_be_bypassed in (("54", True), ("80", False)):  # of a model; of a latent, a picture
        workflow = golden()
        workflow[node]["class_type"] = "MyNode"
        with pytest.raises(RecipeError) as caught:
            imported(workflow, tmp_path)
        assert ("bypass" in (caught.value.diagnostics[0].fix or "")) == can_be_bypassed


@pytest.mark.parametrize("document", [{"prompt": "hello"}, {"workflow": "a man talks", "prompt": 3}])
def test_a_prompt_that_is_a_text_is_no_workflow(document: Any, tmp_path: Path) -> None:
    """It is JSON, of another sort."""
    with pytest.raises(S2VFlowError, match="neither the editor's nor the API's format"):
        imported(document, tmp_path)
