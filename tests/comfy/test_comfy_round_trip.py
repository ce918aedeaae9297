"""import(export(recipe)) plans the same as the recipe, in both formats, and twice gives the same bytes."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from comfy_workflows import editor, golden, imported, load_text, plan_meaning, planned, template_path
from hypothesis import given, settings
from hypothesis import strategies as st

from s2v_flow.api import KINDS
from s2v_flow.comfy.exporter import Format, export_workflow
from s2v_flow.comfy.importer import import_workflow

SAMPLERS = st.sampled_from(["uni_pc", "euler", "euler_ancestral", "dpmpp_2m", "lcm"])
SCHEDULERS = st.sampled_from(["simple", "normal", "beta"])
SEEDS = st.integers(0, 2**64 - 1)
LENGTHS = st.integers(2, 30).map(lambda n: 4 * n + 1)
TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs", "Cn", "Co"]), max_size=40)


@st.composite
def chunk_fields(draw: st.DrawFn) -> dict[str, Any]:
    """Draw what an extend may say for itself."""
    return draw(
        st.fixed_dictionaries(
            {},
            optional={
                "steps": st.integers(1, 50),
                "cfg": st.sampled_from([1.0, 4.5, 6.0]),
                "sampler": SAMPLERS,
                "scheduler": SCHEDULERS,
                "shift": st.sampled_from([3.0, 8.0]),
                "length": LENGTHS,
                "positive": st.just("$other"),
                "model": st.just("$bare"),
            },
        )
    )


@st.composite
def recipes(draw: st.DrawFn) -> dict[str, Any]:
    """Draw a recipe of what ComfyUI has words for."""
    width, height = draw(st.integers(4, 80)) * 16, draw(st.integers(4, 80)) * 16
    loras = [{"id": f"l{n}", "file": f"l{n}.safetensors", "strength": s} for n, s in enumerate(draw(_strengths()))]
    nodes: dict[str, Any] = {
        "dit": {"kind": "load_diffusion_model", "checkpoint": "a/x.safetensors", "loras": loras},
        "bare": {"kind": "load_diffusion_model", "checkpoint": "b.safetensors"},
        "umt5": {"kind": "load_text_encoder", "checkpoint": "umt5.safetensors"},
        "wav": {"kind": "load_audio_encoder", "checkpoint": "wav.safetensors"},
        "vae": {"kind": "load_vae", "checkpoint": "vae.safetensors"},
        "face": {"kind": "load_image", "file": "face.png", "background": "ignore"},
        "voice": {"kind": "load_audio", "file": "voice.wav", **draw(_parts())},
        "pose": {"kind": "load_video", "file": "pose.mp4"},
        "small": {"kind": "frames_scale", "frames": "$pose", "width": 64, "method": "area"},
        "good": {"kind": "encode_text", "text_encoder": "$umt5", "text": draw(TEXTS)},
        "other": {"kind": "encode_text", "text_encoder": "$umt5", "text": "another ${params.word}, " + "$" * 2},
        "bad": {"kind": "encode_text", "text_encoder": "$umt5", "text": draw(TEXTS)},
        "sound": {
            "kind": "encode_audio", "audio_encoder": "$wav", "audio": "$voice", "conditioning": "comfyui",
            "warmup_frames": 0,
        },
        "look": {
            "kind": "encode_image", "vae": "$vae", "image": "$face", "width": width, "height": height,
            "conditioning": "comfyui",
        },
        "first": {
            "kind": "sample", "model": "$dit", "positive": "$good", "negative": "$bad", "conditioning": "comfyui",
            "length": draw(LENGTHS), "seed": draw(SEEDS), "cfg": draw(st.sampled_from(["$params.cfg", 1.0])),
            "steps": draw(st.sampled_from(["$params.steps", 7])), "sampler": draw(SAMPLERS),
        },
    }  # fmt: skip
    first = nodes["first"]
    first |= {"speech": "$sound"} if draw(st.booleans()) else {}
    first |= {"reference": "$look"} if draw(st.booleans()) else {"width": width, "height": height}
    videos = [name for name in ("control_video", "motion_video") if draw(st.booleans())]
    first |= {"vae": "$vae", **dict.fromkeys(videos, "$small")} if videos else {}
    last = "first"
    for number in range(draw(st.integers(0, 3))):
        name = f"talk{number}"
        fields = {"video": f"${last}", "chunks": draw(st.integers(1, 3)), **draw(chunk_fields())}
        seed = draw(st.none() | SEEDS)
        nodes[name] = {"kind": "extend", **fields, **({} if seed is None else {"seed": seed})}
        last = name
    if draw(st.booleans()):
        # not the first frame alone: in front of the video itself, that is `prefix: first`
        cut = {"index": draw(st.integers(-3, 2)), "amount": draw(st.integers(2, 5))}
        nodes["piece"] = {"kind": "latent_cut", "latent": f"${last}", **cut}
        nodes["both"] = {"kind": "latent_concat", "first": "$piece", "second": f"${last}"}
        last = draw(st.sampled_from(["piece", "both", last]))
    drop, prefix = draw(st.integers(0, 1)), draw(st.sampled_from(["first", "none"]))
    nodes["frames"] = {
        "kind": "decode", "vae": "$vae", "latent": f"${last}", "prefix": prefix,
        "drop_frames": 0 if prefix == "none" else drop, "trim": "none",
    }  # fmt: skip
    nodes["video"] = {"kind": "save_video", "frames": "$frames", "file": "v/x_00001_.mp4", "fps": 16.0}
    nodes["video"] |= {"audio": "$voice"} if draw(st.booleans()) else {}
    if draw(st.booleans()):
        nodes["latents"] = {"kind": "save_latent", "latent": f"${last}", "file": "l_00001_.latent"}
        nodes["images"] = {"kind": "save_images", "frames": "$frames", "file": "i.png"}
    return {"s2vflow": 1, "params": {"cfg": 5.5, "steps": 4, "word": "w"}, "nodes": nodes}


def _strengths() -> st.SearchStrategy[list[float]]:
    return st.lists(st.sampled_from([1.0, 0.5, -2.0]), max_size=2)


def _parts() -> st.SearchStrategy[dict[str, float]]:
    start = st.sampled_from([0.5, 2.0])
    return st.fixed_dictionaries({}, optional={"start": start, "max_duration": st.just(3.25)})


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(recipes(), st.sampled_from(["api", "editor"]))
def test_an_exported_recipe_imported_again_plans_the_same(recipe: dict[str, Any], form: Format) -> None:
    """The property: whatever the chunks, seeds, LoRAs, prompts and unusual pieces."""
    for node in recipe["nodes"].values():
        if "text" in node:
            node["text"] = node["text"].replace("${", "$${").replace("$params.", "$$params.")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        loaded = load_text(json.dumps(recipe, ensure_ascii=False), folder)
        plan = planned(loaded)
        text, _ = export_workflow(loaded, plan, form)
        again = imported(text, folder)
        assert plan_meaning(planned(load_text(again.text, folder))) == plan_meaning(plan)


@pytest.mark.parametrize("form", ["api", "editor"])
def test_an_imported_workflow_exported_and_imported_is_the_same_recipe(form: Format, tmp_path: Path) -> None:
    """Down to the text, but for the comments and the profile."""
    first = import_workflow(template_path(), KINDS).text
    loaded = load_text(first, tmp_path)
    text, notes = export_workflow(loaded, planned(loaded), form)
    assert notes == ()
    (tmp_path / template_path().name).write_text(text)
    second = import_workflow(tmp_path / template_path().name, KINDS).text

    def bare(recipe: str) -> list[str]:
        lines = recipe.partition("\nprofiles:")[0].splitlines()
        return [line for line in lines if line.strip() and not line.lstrip().startswith("#")]

    assert bare(second) == bare(first)


def test_both_formats_of_a_workflow_give_the_same_recipe(tmp_path: Path) -> None:
    """The golden workflow in the API's format and in the editor's: the same bytes, and twice the same."""
    texts = {imported(document, tmp_path).text for document in (golden(), editor(), golden(), editor())}
    assert len(texts) == 1
