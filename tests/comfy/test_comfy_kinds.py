"""Workflows as people have them: other loaders, savers and scalers, wrappers, values as text, weights in prompts."""

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
from PIL import Image

from s2v_flow.comfy.exporter import export_workflow
from s2v_flow.errors import S2VFlowError


def entry(number: int, name: str, prompt: Any) -> list[Any]:
    """Return a run as the server's queue and history hold it."""
    return [number, name, prompt, {}, ["113"]]


OTHER: Workflow = {"9": {"class_type": "SaveImage", "inputs": {"images": ["8", 0]}}}
WRAPPED = {
    "entry": lambda prompt: entry(1, "a", prompt),
    "prompt as text": lambda prompt: entry(1, "a", json.dumps(prompt)),
    "history": lambda prompt: {"a": {"prompt": entry(1, "a", prompt), "outputs": {}, "status": {}}},
    "history of several": lambda prompt: {
        "b": {"prompt": entry(12, "b", prompt)},
        "a": {"prompt": entry(2, "a", golden("ancestral"))},
    },
    "newest is no talk": lambda prompt: {"a": {"prompt": entry(1, "a", prompt)}, "b": {"prompt": entry(2, "b", OTHER)}},
    "history 2": lambda prompt: {"history": [{"prompt": {"extra_data": {"extra_pnginfo": {"workflow": prompt}}}}]},
    "queue": lambda prompt: {"queue_running": [entry(3, "a", prompt)], "queue_pending": []},
    "list of runs": lambda prompt: [entry(1, "b", golden("ancestral")), entry(2, "a", prompt)],
    "list of prompts": lambda prompt: [prompt],
    "server": lambda prompt: {"prompt": prompt, "client_id": "c", "extra_data": {"extra_pnginfo": {}}},
}


@pytest.mark.parametrize("name", WRAPPED)
def test_what_the_server_keeps_is_imported_as_the_workflow_in_it(name: str, tmp_path: Path) -> None:
    """The queue's and the history's forms; of several runs the newest that makes video from sound."""
    made = imported(WRAPPED[name](golden()), tmp_path)
    assert made.text == imported(golden(), tmp_path).text
    assert any("workflows are in it" in note for note in made.notes) == (name in SEVERAL)


SEVERAL = ("history of several", "newest is no talk", "list of runs")


@pytest.mark.parametrize(
    "document", [[1, "a", {}, {}, []], {"a": {"outputs": {}}}, {"a": {"prompt": [1, "a"]}}, [[[]]]]
)
def test_a_history_without_a_workflow_says_so(document: Any, tmp_path: Path) -> None:
    """Empty prompts, runs without one, lists of nothing."""
    with pytest.raises(S2VFlowError, match="not a ComfyUI workflow"):
        imported(document, tmp_path)


def test_a_number_that_no_float_can_be_is_read_or_refused(tmp_path: Path) -> None:
    """A run's number is only compared; a seed is refused by name."""
    assert imported([entry(10**400, "a", golden())], tmp_path).text == imported(golden(), tmp_path).text
    prompt = golden()
    sampler = next(node for node in prompt.values() if node["class_type"] == "KSampler")
    sampler["inputs"]["seed"] = 10**400
    assert "seed" in mistake(prompt, tmp_path)


MODEL_LOADERS: dict[str, dict[str, Any]] = {
    "UnetLoaderGGUF": {"unet_name": "s2v-Q4_K_M.gguf"},
    "UnetLoaderGGUFAdvanced": {"unet_name": "s2v-Q4_K_M.gguf", "dequant_dtype": "default", "patch_on_device": False},
    "UnetLoaderGGUFDisTorch2MultiGPU": {"unet_name": "s2v-Q4_K_M.gguf", "virtual_vram_gb": 4.0},
    "GGUFLoaderKJ": {"model_name": "s2v-Q4_K_M.gguf", "extra_model_name": "none"},
    "LoaderGGUF": {"gguf_name": "s2v-Q4_K_M.gguf"},
    "DiffusionModelLoaderKJ": {"model_name": "s2v-Q4_K_M.gguf", "weight_dtype": "default", "sage_attention": "auto"},
}


@pytest.mark.parametrize("loader", MODEL_LOADERS)
def test_every_loader_of_a_model_names_its_checkpoint(loader: str, tmp_path: Path) -> None:
    """GGUF files too."""
    workflow = golden()
    workflow["37"] = {"class_type": loader, "inputs": MODEL_LOADERS[loader]}
    assert fields(workflow, tmp_path, "dit")["checkpoint"] == "s2v-Q4_K_M.gguf"


@pytest.mark.parametrize("loader", ["CLIPLoaderGGUF", "CLIPLoaderGGUFMultiGPU", "ClipLoaderGGUF"])
def test_every_loader_of_a_text_encoder_names_its_checkpoint(loader: str, tmp_path: Path) -> None:
    """GGUF files too; in the editor's format the name is the first value."""
    workflow = golden()
    workflow["38"] = {"class_type": loader, "inputs": {"clip_name": "sub\\umt5-Q8_0.gguf", "type": "wan"}}
    assert fields(workflow, tmp_path, "umt5")["checkpoint"] == "sub/umt5-Q8_0.gguf"
    document = editor()
    node_of(document, "CLIPLoader").update(type=loader, widgets_values=["umt5-Q8_0.gguf", "wan"])
    assert recipe_of(document, tmp_path).nodes["umt5"].node.model_dump()["checkpoint"] == "umt5-Q8_0.gguf"


def test_an_unknown_gguf_loader_is_answered_with_one_that_is_known(tmp_path: Path) -> None:
    """Bypassing it would leave the workflow without a model."""
    workflow = golden()
    workflow["37"]["class_type"] = "MyGgufLoader"
    with pytest.raises(S2VFlowError) as caught:
        imported(workflow, tmp_path)
    assert "UnetLoaderGGUF" in (caught.value.diagnostics[0].fix or "")  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("node", "name", "text", "field", "value"),
    [
        ("3", "seed", "12345678901234567890", "seed", 12345678901234567890),
        ("103", "value", "7", "steps", 7),
        ("103", "value", "7.0", "steps", 7),
        ("105", "value", "5.5", "cfg", 5.5),
        ("54", "shift", " 3 ", "shift", 3.0),
    ],
)
def test_numbers_may_stand_in_text(node: str, name: str, text: str, field: str, value: Any, tmp_path: Path) -> None:
    """In any widget, as scripts write them."""
    workflow = golden()
    workflow[node]["inputs"][name] = text
    assert fields(workflow, tmp_path, "first")[field] in (value, f"$params.{field}")
    assert recipe_of(workflow, tmp_path).params.get(field, value) == value


@pytest.mark.parametrize("text", ["2.5", "two", "", "nan", "1e999", "1" * 5000, True, None])
def test_what_is_no_whole_number_stays_a_mistake(text: Any, tmp_path: Path) -> None:
    """Named with its node and field."""
    workflow = golden()
    workflow["103"]["inputs"]["value"] = text
    assert "value: INT expected, got" in mistake(workflow, tmp_path)


def test_truth_values_may_stand_in_text_and_numbers_for_text(tmp_path: Path) -> None:
    """`"false"` is false, `1` is true; a prompt may be a number; in the editor's format numbers in text, too."""
    for switch, expected in (("false", "off"), ("True", "on"), (0, "off"), (1, "on"), (False, "off")):
        workflow = golden()
        texts = {key: add(workflow, f"9{key}", "PrimitiveString", value=key) for key in ("on", "off")}
        inputs = {"switch": switch, "on_true": texts["on"], "on_false": texts["off"]}
        workflow["6"]["inputs"]["text"] = add(workflow, "903", "ComfySwitchNode", **inputs)
        assert recipe_of(workflow, tmp_path).params["prompt"] == expected
    workflow["6"]["inputs"]["text"] = 1984
    assert recipe_of(workflow, tmp_path).params["prompt"] == "1984"
    document = editor()
    node_of(document, "KSampler")["widgets_values"][0] = "77"
    assert recipe_of(document, tmp_path).params["seed"] == 77


def test_a_prompt_with_weights_or_escapes_keeps_its_syntax_there_and_back(tmp_path: Path) -> None:
    workflow = golden()
    workflow["6"]["inputs"]["text"] = "A man (smiling:1.3) under a sign \\(open\\)"
    made = imported(workflow, tmp_path)
    assert not [note for note in made.notes if note.startswith("prompt:")]
    recipe = load_text(made.text, tmp_path)
    assert recipe.params["prompt"] == "A man (smiling:1.3) under a sign \\(open\\)"
    syntaxes = [spec.node.prompt_syntax for spec in recipe.nodes.values() if spec.node.kind == "encode_text"]
    assert sorted(syntaxes)[-1] == "plain"
    assert syntaxes.count("comfyui") == 1
    text, _ = export_workflow(recipe, planned(recipe), "api")
    again = imported(text, tmp_path)
    assert again.notes == ()
    assert load_text(again.text, tmp_path).params["prompt"] == recipe.params["prompt"]


@pytest.mark.parametrize(
    ("written", "meant"), [("\\)", ")"), ("a \\(b\\) c", "a (b) c"), ("()", ""), ("(a:1.0)", "a"), ("a ) (b", "a ) (b")]
)
def test_a_prompt_without_weights_becomes_the_words_as_they_are(written: str, meant: str, tmp_path: Path) -> None:
    workflow = golden()
    workflow["6"]["inputs"]["text"] = written
    made = imported(workflow, tmp_path)
    assert "prompt_syntax" not in made.text
    recipe = load_text(made.text, tmp_path)
    assert recipe.params["prompt"] == meant
    text, _ = export_workflow(recipe, planned(recipe), "api")
    assert load_text(imported(text, tmp_path).text, tmp_path).params["prompt"] == meant


def test_a_prompt_whose_weights_cannot_be_computed_is_taken_as_text(tmp_path: Path) -> None:
    workflow = golden()
    workflow["6"]["inputs"]["text"] = "A man (smiling:inf)"
    made = imported(workflow, tmp_path)
    assert [note for note in made.notes if note.startswith("prompt: node 6") and "the weight inf" in note]
    assert "prompt_syntax" not in made.text


DOTTED = {"format": "mp4", "format.codec": "h264", "format.codec.encoding": "re-encode"}
NESTED = {"format": "mp4", "codec": {"codec": "h264", "encoding": {"encoding": "re-encode", "crf": 14.0}}}


@pytest.mark.parametrize("form", [{"format": NESTED}, {**DOTTED, "format.codec.encoding.crf": "14"}])
def test_savevideos_quality_is_kept(form: dict[str, Any], tmp_path: Path) -> None:
    """Nested or with dotted names; with another codec it is another scale, and a note says that it is left out."""
    workflow = golden()
    workflow["113"]["inputs"] = {"video": ["82", 0], "filename_prefix": "v", **form}
    assert fields(workflow, tmp_path, "video")["crf"] == 14
    assert imported(workflow, tmp_path).notes == ()
    text = json.dumps(workflow).replace("h264", "av1")
    assert "crf" not in imported(text, tmp_path).text
    assert any("instead of av1; crf 14 " in note for note in imported(text, tmp_path).notes)


@pytest.mark.parametrize("named", [True, False])
def test_savevideos_quality_is_kept_in_the_editors_format(named: bool, tmp_path: Path) -> None:
    """By the names of its widgets, or by their places."""
    document = editor()
    saver = node_of(document, "SaveVideo")
    saver["widgets_values"] = ["v", "mp4", "h264", "re-encode", 14]
    if named:
        names = ["filename_prefix", *DOTTED, "format.codec.encoding.crf", "codec"]
        saver["widgets_values"].append("auto")
        saver["inputs"] += [{"name": name, "type": "*", "widget": {"name": name}, "link": None} for name in names]
    recipe = recipe_of(document, tmp_path)
    video = next(spec.node.model_dump() for spec in recipe.nodes.values() if spec.kind == "save_video")
    assert (video["crf"], video["file"]) == (14, "v_00001_.mp4")


@pytest.mark.parametrize(
    ("saver", "inputs", "crf", "note"),
    [
        ("VHS_VideoCombine", {"frame_rate": 16, "format": "video/h264-mp4", "crf": 21}, 21, None),
        ("VHS_VideoCombine", {"frame_rate": 16, "format": "video/h265-mp4", "crf": 21}, 18, "crf 21 is that codec's"),
        ("VHS_VideoCombine", {"frame_rate": 16, "format": "image/gif"}, 18, "instead of image/gif"),
        ("SaveWEBM", {"fps": 16, "codec": "vp9", "crf": 30}, 18, "crf 30 is that codec's"),
        ("SaveAnimatedPNG", {"fps": 16}, 18, "instead of SaveAnimatedPNG"),
        ("SaveAnimatedWEBP", {"fps": 16, "quality": 80}, 18, "instead of SaveAnimatedWEBP"),
    ],
)
def test_every_saver_of_frames_writes_an_mp4(
    saver: str, inputs: dict[str, Any], crf: int, note: str | None, tmp_path: Path
) -> None:
    """H.264's quality is taken over; of other formats a note says what is not."""
    workflow = golden()
    del workflow["113"], workflow["300"]
    add(workflow, "113", saver, images=["96", 0], filename_prefix="v", **inputs)
    made = imported(workflow, tmp_path)
    assert fields(workflow, tmp_path, "video")["crf"] == crf
    assert made.warnings == ()
    assert [text for text in made.notes if note is None or note not in text] == []
    assert bool(made.notes) == (note is not None)


@pytest.mark.parametrize("fps", [25, 24.0, "30", 8])
def test_another_rate_than_the_models_is_warned_of(fps: Any, tmp_path: Path) -> None:
    """At import and at plan, by the field's name."""
    workflow = golden()
    workflow["82"]["inputs"]["fps"] = fps
    made = imported(workflow, tmp_path)
    assert [warning.split(":")[0] for warning in made.warnings] == ["fps"]
    notes = [note for note in planned(recipe_of(workflow, tmp_path)).notes if note.startswith("warning: fps: ")]
    assert f"{float(fps):g} frames a second" in "".join(notes)
    workflow["82"]["inputs"]["fps"] = 16
    assert imported(workflow, tmp_path).warnings == ()
    assert not any("fps" in note for note in planned(recipe_of(workflow, tmp_path)).notes)


def test_an_extend_may_take_its_prompts_from_the_chunk_before(tmp_path: Path) -> None:
    """As if it had the plain prompts; a reference that it does not set anew stays."""
    workflow = golden()
    expected = plan_meaning(planned(recipe_of(workflow, tmp_path)))
    workflow["200"]["inputs"] |= {"positive": ["93", 0], "negative": ["93", 1]}
    assert plan_meaning(planned(recipe_of(workflow, tmp_path))) == expected
    del workflow["200"]["inputs"]["ref_image"]
    assert plan_meaning(planned(recipe_of(workflow, tmp_path))) == expected


def with_scaler(class_type: str, widgets: dict[str, Any], sides: tuple[int, int] | None = None) -> Workflow:
    """Put a scaler between the portrait and the chunks; `sides` are the outputs that give the first chunk its size."""
    workflow = golden()
    name = {"ResizeImageMaskNode": "input", "ResizeImagesByLongerEdge": "images", "ResizeImagesByShorterEdge": "images"}
    scaled = add(workflow, "800", class_type, **{name.get(class_type, "image"): ["52", 0]}, **widgets)
    for chunk in ("93", "200"):
        workflow[chunk]["inputs"]["ref_image"] = scaled
    if sides:
        workflow["93"]["inputs"] |= {"width": ["800", sides[0]], "height": ["800", sides[1]]}
    return workflow


KJ: dict[str, Any] = {"width": 130, "height": 100, "upscale_method": "area", "divisible_by": 16}
SCALERS: list[tuple[str, dict[str, Any], tuple[int, int]]] = [
    ("ImageResizeKJv2", KJ | {"keep_proportion": "stretch"}, (128, 96)),
    ("ImageResizeKJv2", KJ | {"keep_proportion": "crop"}, (128, 96)),
    ("ImageResizeKJv2", KJ | {"keep_proportion": "pad_edge"}, (128, 96)),
    ("ImageResizeKJv2", KJ | {"keep_proportion": "resize"}, (48, 96)),
    ("ImageResizeKJv2", KJ | {"keep_proportion": "resize", "width": "0"}, (48, 96)),
    ("ImageResizeKJv2", KJ | {"keep_proportion": "stretch", "width": 0}, (96, 96)),
    ("ImageResizeKJv2", KJ | {"keep_proportion": "total_pixels"}, (80, 160)),
    ("ImageResizeKJ", KJ | {"keep_proportion": False}, (128, 96)),
    ("ImageResizeKJ", KJ | {"keep_proportion": True}, (48, 96)),
    ("ImageResizeKJ", KJ | {"keep_proportion": "false", "width_input": 66}, (64, 96)),
    ("ResizeImageMaskNode", {"resize_type": {"resize_type": "scale dimensions", "width": 96, "height": 64}}, (96, 64)),
    ("ResizeImageMaskNode", {"resize_type": "scale by multiplier", "resize_type.multiplier": 0.5}, (50, 100)),
    ("ResizeImageMaskNode", {"resize_type": "scale longer dimension", "resize_type.longer_size": 64}, (32, 64)),
    ("ResizeImageMaskNode", {"resize_type": "scale shorter dimension", "resize_type.shorter_size": 64}, (64, 128)),
    ("ResizeImageMaskNode", {"resize_type": "scale width", "resize_type.width": 96}, (96, 192)),
    ("ResizeImageMaskNode", {"resize_type": "scale height", "resize_type.height": 64}, (32, 64)),
    ("ResizeImageMaskNode", {"resize_type": "scale to multiple", "resize_type.multiple": 32}, (96, 192)),
    ("ResizeImageMaskNode", {"resize_type": "match size", "resize_type.match": ["52", 0]}, (100, 200)),
    ("ResizeImagesByLongerEdge", {"longer_edge": 50}, (25, 50)),
    ("ResizeImagesByShorterEdge", {"shorter_edge": 50}, (50, 100)),
    ("ImageResizeKJv2", KJ | {"keep_proportion": "crop", "upscale_method": "nvidia_rtx_vsr"}, (128, 96)),
    ("ResizeAndPadImage", {"target_width": 64, "target_height": 64, "interpolation": "area"}, (64, 64)),
]


@pytest.mark.parametrize(("class_type", "widgets", "size"), SCALERS)
def test_every_scaler_makes_the_size_that_comfyui_makes(
    class_type: str, widgets: dict[str, Any], size: tuple[int, int], tmp_path: Path
) -> None:
    """Of a picture of 100 x 200 that lies beside the workflow."""
    Image.new("RGB", (100, 200)).save(tmp_path / golden()["52"]["inputs"]["image"])
    recipe = recipe_of(with_scaler(class_type, widgets), tmp_path)
    scale: Any = recipe.nodes["scaled"].node
    assert scale.target(100, 200) == size


@pytest.mark.parametrize("mode", ["stretch", "crop", "resize"])
def test_kjs_width_and_height_are_the_videos(mode: str, tmp_path: Path) -> None:
    """They are numbers where the node says them; where a picture would tell that is not there, a warning says so."""
    workflow = with_scaler("ImageResizeKJv2", KJ | {"keep_proportion": mode}, (1, 2))
    recipe = recipe_of(workflow, tmp_path)
    assert (recipe.params["width"], recipe.params["height"]) == (128, 96)
    said = [warning.split(":")[0] for warning in imported(workflow, tmp_path).warnings]
    assert said == (["width", "height"] if mode == "resize" else [])


@pytest.mark.parametrize("class_type", ["GetImageSize", "GetImageSizeAndCount"])
def test_the_size_of_a_picture_beside_the_workflow_is_the_videos(class_type: str, tmp_path: Path) -> None:
    """To multiples of 16, turned as the camera was held; without the picture, a size with a warning."""
    name = golden()["52"]["inputs"]["image"]
    first = 1 if class_type == "GetImageSizeAndCount" else 0
    workflow = golden()
    add(workflow, "800", class_type, image=["52", 0])
    workflow["93"]["inputs"] |= {"width": ["800", first], "height": ["800", first + 1]}
    made = imported(workflow, tmp_path)
    assert all(name in warning for warning in made.warnings)
    assert len(made.warnings) == 2
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "input").mkdir()
    Image.new("RGB", (150, 100)).save(tmp_path / "input" / name, exif=exif)
    recipe = recipe_of(workflow, tmp_path)
    assert (recipe.params["width"], recipe.params["height"]) == (96, 144)
    notes = imported(workflow, tmp_path).notes
    assert any("100 becomes 96" in note for note in notes)
    assert imported(workflow, tmp_path).warnings == ()


def test_a_size_that_only_a_picture_tells_is_asked_for_elsewhere(tmp_path: Path) -> None:
    """In another node than the first chunk's, a wrong guess would not be seen."""
    workflow = with_scaler("ImageScale", {"upscale_method": "area", "height": 64, "crop": "disabled"})
    add(workflow, "801", "GetImageSize", image=["52", 0])
    workflow["800"]["inputs"]["width"] = ["801", 0]
    assert "node 800 (ImageScale): width is taken from the size of" in mistake(workflow, tmp_path)


BATCHES: dict[str, dict[str, Any]] = {
    "ImageBatch": {"image1": ["80", 0], "image2": ["d2", 0]},
    "ImageBatchMulti": {"image_1": ["80", 0], "image_2": ["d2", 0], "inputcount": 2},
    "BatchImagesNode": {"images.image0": ["80", 0], "images.image1": ["d2", 0]},
    "BatchImagesNode ": {"images": {"image0": ["80", 0], "image1": ["d2", 0]}},
}


@pytest.mark.parametrize("batch", BATCHES)
def test_batches_put_frames_one_after_the_other(batch: str, tmp_path: Path) -> None:
    """The first chunk's frames, then the second's, decoded apart; there and back."""
    workflow = golden()
    workflow["80"]["inputs"]["samples"] = ["3", 0]
    add(workflow, "d2", "VAEDecode", samples=["201", 0], vae=["39", 0])
    workflow["82"]["inputs"]["images"] = add(workflow, "b", batch.strip(), **BATCHES[batch])
    plan = planned(recipe_of(workflow, tmp_path))
    assert plan.node("video").facts["frames"] == 2 * 17
    text, _ = export_workflow(recipe_of(workflow, tmp_path), plan, "editor")
    assert plan_meaning(planned(recipe_of(text, tmp_path))) == plan_meaning(plan)
