"""What ComfyUI's nodes become, beyond the template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from comfy_workflows import Workflow, add, fields, golden, imported, mistake, plan_meaning, planned, recipe_of


def custom(workflow: Workflow, name: str, *, guider: str = "CFGGuider") -> None:
    """Exchange a KSampler for the custom sampler's family."""
    old = workflow.pop(name)["inputs"]
    inputs = {
        "noise": add(workflow, f"{name}a", "RandomNoise", noise_seed=old["seed"]),
        "sampler": add(workflow, f"{name}b", "KSamplerSelect", sampler_name=old["sampler_name"]),
        "sigmas": add(
            workflow, f"{name}c", "BasicScheduler", model=old["model"], scheduler=old["scheduler"],
            steps=old["steps"], denoise=1.0,
        ),
        "latent_image": old["latent_image"],
    }  # fmt: skip
    if guider == "SamplerCustom":
        kept = {key: old[key] for key in ("model", "positive", "negative", "cfg")}
        del inputs["noise"]
        add(workflow, name, guider, add_noise=True, noise_seed=old["seed"], **kept, **inputs)
        return
    if guider == "BasicGuider":
        guide = add(workflow, f"{name}d", guider, model=old["model"], conditioning=old["positive"])
    else:
        texts = {key: old[key] for key in ("model", "positive", "negative", "cfg")}
        guide = add(workflow, f"{name}d", guider, **texts)
    add(workflow, name, "SamplerCustomAdvanced", guider=guide, **inputs)


@pytest.mark.parametrize("guider", ["CFGGuider", "SamplerCustom"])
def test_the_custom_sampler_family_says_what_ksampler_says(guider: str, tmp_path: Path) -> None:
    """Noise, sampler, sigmas and guider put together."""
    workflow = golden("ancestral")
    expected = plan_meaning(planned(recipe_of(workflow, tmp_path)))
    custom(workflow, "3", guider=guider)
    custom(workflow, "201", guider=guider)
    made = imported(workflow, tmp_path)
    assert plan_meaning(planned(recipe_of(workflow, tmp_path))) == expected
    assert made.notes == ()


def test_uni_pc_with_a_basic_scheduler_is_noted(tmp_path: Path) -> None:
    """There ComfyUI's noise levels differ from KSampler's."""
    workflow = golden()
    custom(workflow, "3")
    assert any("a little from BasicScheduler's" in note for note in imported(workflow, tmp_path).notes)


def test_a_basic_guider_is_cfg_1(tmp_path: Path) -> None:
    """Without a negative prompt."""
    workflow = golden()
    custom(workflow, "3", guider="BasicGuider")
    first = fields(workflow, tmp_path, "first")
    assert (first["cfg"], first["negative"]) == (1.0, None)


def test_an_advanced_sampler_that_does_all_steps_is_a_sampler(tmp_path: Path) -> None:
    """Any part of them is refused."""
    workflow = golden()
    expected = plan_meaning(planned(recipe_of(workflow, tmp_path)))
    inputs = workflow["3"]["inputs"]
    inputs["noise_seed"] = inputs.pop("seed")
    del inputs["denoise"]
    inputs |= {"add_noise": "enable", "start_at_step": 0, "end_at_step": 10000, "return_with_leftover_noise": "disable"}
    workflow["3"]["class_type"] = "KSamplerAdvanced"
    assert plan_meaning(planned(recipe_of(workflow, tmp_path))) == expected
    inputs["end_at_step"] = 2
    assert "node 3 (KSamplerAdvanced): end_at_step lies before the last step" in mistake(workflow, tmp_path)


@pytest.mark.parametrize(
    ("node", "name", "value", "message"),
    [
        ("3", "denoise", 0.5, "denoise must be 1.0, got 0.5"),
        ("3", "sampler_name", "euler_cfg_pp", "there is no sampler euler_cfg_pp here"),
        ("3", "scheduler", "karras", "there is no scheduler karras here"),
        ("93", "batch_size", 2, "batch_size must be 1"),
        ("3", "positive", ["6", 0], "positive does not come from the same WanSoundImageToVideo as the latent"),
        ("3", "latent_image", ["201", 0], "depends on its own result"),
        ("201", "latent_image", ["3", 0], "latent_image is not an empty latent of a chunk"),
        ("94", "dim", "z", "dim: t, x or y expected, got z"),
        ("58", "audio", "", "audio: no file is chosen"),
        ("80", "samples", ["52", 0], "samples takes something that recipes cannot express here"),
    ],
)
def test_what_cannot_be_said_is_refused_at_its_node(
    node: str, name: str, value: Any, message: str, tmp_path: Path
) -> None:
    """With the node's id, its class and the reason."""
    workflow = golden()
    workflow[node]["inputs"][name] = value
    assert message in mistake(workflow, tmp_path)


def test_stacked_loras_keep_their_order(tmp_path: Path) -> None:
    """The one next to the checkpoint comes first; their ids come from titles or files."""
    workflow = golden("lightning")
    add(workflow, "108", "LoraLoaderModelOnly", model=["107", 0], lora_name="sub\\b.safetensors", strength_model=0.5)
    workflow["108"]["_meta"] = {"title": "More light"}
    workflow["54"]["inputs"]["model"] = ["108", 0]
    loras = fields(workflow, tmp_path, "dit")["loras"]
    assert [(lora["id"], lora["file"], lora["strength"]) for lora in loras] == [
        ("lightning", "tiny_lightning_lora.safetensors", 1.0),
        ("more_light", "sub/b.safetensors", 0.5),
    ]


def test_without_model_sampling_the_shift_is_comfyuis(tmp_path: Path) -> None:
    """Eight, for Wan."""
    workflow = golden()
    for name in ("3", "201"):
        workflow[name]["inputs"]["model"] = ["37", 0]
    assert fields(workflow, tmp_path, "first")["shift"] == 8.0


def test_a_chunk_with_settings_of_its_own_keeps_them(tmp_path: Path) -> None:
    """Another prompt, another number of steps: said in its extend, and nothing else is."""
    workflow = golden()
    add(workflow, "66", "CLIPTextEncode", text="He stops.", clip=["38", 0])
    workflow["200"]["inputs"]["positive"] = ["66", 0]
    workflow["201"]["inputs"]["steps"] = 9
    given = {key: value for key, value in fields(workflow, tmp_path, "talk").items() if value not in (None, [])}
    assert given == {"video": "$first", "chunks": 1, "seed": 1, "positive": "$positive_2", "steps": 9}


def test_a_trimmed_voice_is_a_part_of_its_file(tmp_path: Path) -> None:
    """Also where it is trimmed twice."""
    workflow = golden()
    one = add(workflow, "600", "TrimAudioDuration", audio=["58", 0], start_index=1.5, duration=4.0)
    two = add(workflow, "601", "TrimAudioDuration", audio=one, start_index=1.0, duration=60.0)
    workflow["56"]["inputs"]["audio"] = one
    workflow["82"]["inputs"]["audio"] = two
    recipe = recipe_of(workflow, tmp_path)
    voices = [spec.node.model_dump() for spec in recipe.nodes.values() if spec.kind == "load_audio"]
    assert [(voice["start"], voice["max_duration"]) for voice in voices] == [(1.5, 4.0), (2.5, 3.0)]
    for number in (4.0, 5.0):
        workflow["601"]["inputs"]["start_index"] = number
        assert f"node 601 (TrimAudioDuration): duration: {4 - number:g} seconds" in mistake(workflow, tmp_path)


def test_a_pose_video_begins_anew_in_every_chunk_as_in_comfyui(tmp_path: Path) -> None:
    """ComfyUI hands each extend the first frames; --modernise lets it go on."""
    workflow = golden()
    video = add(workflow, "700", "LoadVideo", file="pose.mp4")
    frames = add(workflow, "701", "GetVideoComponents", video=video)
    workflow["93"]["inputs"]["control_video"] = frames
    workflow["200"]["inputs"]["control_video"] = frames
    recipe = recipe_of(workflow, tmp_path)
    assert recipe.nodes["pose_again"].node.model_dump(mode="json") == {"frames": "$clip", "count": 20}
    modern = recipe_of(workflow, tmp_path, modernises=True)
    assert modern.nodes["talk"].node.refs().keys() == {"video"}
    del workflow["200"]["inputs"]["control_video"]
    stopped = recipe_of(workflow, tmp_path)
    assert stopped.nodes[stopped.nodes["talk"].node.refs()["control_video"].node].kind == "frames_slice"


def test_pictures_are_scaled_with_comfyuis_method(tmp_path: Path) -> None:
    """Every ImageScale node is image_scale; a width of 0 keeps the proportions."""
    scalers = {
        "ImageScale": {"upscale_method": "area", "width": 0, "height": 300, "crop": "disabled"},
        "ImageScaleBy": {"upscale_method": "lanczos", "scale_by": 0.5},
        "ImageScaleToTotalPixels": {"upscale_method": "bicubic", "megapixels": 0.5, "resolution_steps": 16},
        "ImageScaleToMaxDimension": {"upscale_method": "bilinear", "largest_size": 720},
    }
    found = {}
    for class_type, inputs in scalers.items():
        workflow = golden()
        scaled = add(workflow, "800", class_type, image=["52", 0], **inputs)
        for name in ("93", "200"):
            workflow[name]["inputs"]["ref_image"] = scaled
        made = fields(workflow, tmp_path, "scaled")
        found[class_type] = {key: made[key] for key in ("width", "height", "factor", "megapixels", "longest_side")}
    assert [{key: value for key, value in item.items() if value} for item in found.values()] == [
        {"height": 300},
        {"factor": 0.5},
        {"megapixels": 0.5},
        {"longest_side": 720},
    ]


def test_what_is_saved_is_numbered_as_comfyui_does(tmp_path: Path) -> None:
    """Two videos of the same prefix; tokens between % signs are left out; previews too."""
    workflow = golden()
    add(workflow, "114", "SaveVideo", video=["82", 0], filename_prefix="video/ComfyUI", format="auto", codec="auto")
    add(workflow, "115", "SaveAnimatedWEBP", images=["96", 0], filename_prefix="%date:yyyy%/w", fps=8.0)
    add(workflow, "116", "PreviewImage", images=["96", 0])
    made = imported(workflow, tmp_path)
    recipe = recipe_of(workflow, tmp_path)
    files = [spec.node.model_dump()["file"] for spec in recipe.nodes.values() if spec.kind == "save_video"]
    assert files == ["video/ComfyUI_00001_.mp4", "video/ComfyUI_00002_.mp4", "w_00001_.mp4"]
    assert any("node 116 (PreviewImage) is left out" in note for note in made.notes)
    assert "node 115 (SaveAnimatedWEBP): files are named w instead of %date:yyyy%/w" in made.notes


def test_a_preview_is_all_there_is_to_save(tmp_path: Path) -> None:
    """Then its frames are written; without any output there is nothing to import."""
    workflow = golden()
    for name in ("113", "300"):
        del workflow[name]
    assert "nothing in it saves" in mistake(workflow, tmp_path)
    add(workflow, "116", "PreviewImage", images=["96", 0])
    assert fields(workflow, tmp_path, "images")["file"] == "preview.png"


def test_a_number_of_frames_that_cuts_is_kept(tmp_path: Path) -> None:
    """ImageFromBatch with fewer frames than there are is a slice."""
    workflow = golden()
    workflow["96"]["inputs"] |= {"batch_index": 2, "length": 10}
    recipe = recipe_of(workflow, tmp_path)
    assert recipe.nodes["part"].node.model_dump(mode="json") == {"frames": "$frames", "start": 2, "length": 10}


def test_a_length_between_is_what_the_vae_makes_of_it(tmp_path: Path) -> None:
    """Twenty pixel frames are as good as seventeen."""
    workflow = golden()
    workflow["104"]["inputs"]["value"] = 20
    assert recipe_of(workflow, tmp_path).params["length"] == 17


def test_switches_and_texts_are_resolved(tmp_path: Path) -> None:
    """The branch that is switched on; texts put together."""
    workflow = golden()
    text = add(workflow, "900", "StringConcatenate", string_a="a", string_b="b", delimiter=", ")
    off = add(workflow, "901", "PrimitiveStringMultiline", value="never")
    yes = add(workflow, "902", "PrimitiveBoolean", value=True)
    workflow["6"]["inputs"]["text"] = add(workflow, "903", "ComfySwitchNode", switch=yes, on_true=text, on_false=off)
    assert recipe_of(workflow, tmp_path).params["prompt"] == "a, b"
