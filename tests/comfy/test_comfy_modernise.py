"""`import --modernise`: exact time instead of ComfyUI's numbers, and every change is said."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from comfy_workflows import golden, imported, planned, recipe_of, template_path
from reference import GOLDEN

from s2v_flow.api import KINDS
from s2v_flow.comfy.importer import import_workflow


def test_the_template_becomes_one_extend_in_exact_time(tmp_path: Path) -> None:
    """No number of frames is dropped by hand, no field keeps ComfyUI's way; the profile stays."""
    made = import_workflow(template_path(), KINDS, modernises=True)
    nodes = re.sub(r": +", ": ", made.text.partition("nodes:\n")[2].partition("# Notes")[0])
    assert "  talk: {kind: extend, video: $first, chunks: auto}\n" in nodes
    assert "  frames: {kind: decode, vae: $vae, latent: $talk}\n" in nodes
    assert "  speech: {kind: encode_audio, audio_encoder: $wav2vec2, audio: $voice}\n" in nodes
    assert "  steps_20: {params: {steps: 20, cfg: 6.0}, nodes: {dit: {loras: []}}}\n" in nodes
    for word in ("comfyui", "ignore", "warmup", "talk_2", "drop_frames"):
        assert word not in nodes
    for said in ("conditioning: official", "i/16 s", "chunks: auto", "seed", "smoothed"):
        assert any(said in change for change in made.changes), said


def test_chunks_with_settings_of_their_own_stay_apart(tmp_path: Path) -> None:
    """Only what repeats is put together; the last one follows the voice."""
    workflow: dict[str, Any] = golden("lightning")
    workflow["211"]["inputs"]["steps"] = 9
    recipe = recipe_of(workflow, tmp_path, modernises=True)
    assert recipe.nodes["talk"].node.model_dump()["chunks"] == 1
    last = recipe.nodes["talk_2"].node.model_dump()
    assert (last["chunks"], last["steps"]) == ("auto", 9)


def test_a_chunk_that_something_else_needs_stays(tmp_path: Path) -> None:
    """The first extend's latent is saved, so it remains a node."""
    workflow = golden("lightning")
    workflow["300"]["inputs"]["samples"] = ["202", 0]
    recipe = recipe_of(workflow, tmp_path, modernises=True)
    assert recipe.nodes["latents"].node.refs()["latent"].node == "talk"
    assert recipe.nodes["frames"].node.refs()["latent"].node == "talk_2"


def test_unusual_pieces_are_left_alone_and_named(tmp_path: Path) -> None:
    """A cut that counts frames by hand may mean anything."""
    workflow = golden()
    inputs = {"samples": ["202", 0], "dim": "t", "index": 2, "amount": 3}
    workflow["400"] = {"class_type": "LatentCut", "inputs": inputs}
    workflow["300"]["inputs"]["samples"] = ["400", 0]
    made = imported(workflow, tmp_path, modernises=True)
    assert "latent_cut" in made.text
    assert any("latent_cut; they count frames by hand" in change for change in made.changes)


def test_frames_that_were_cut_only_by_the_nodes_limit_are_kept(tmp_path: Path) -> None:
    """More frames than ImageFromBatch takes: cut in the faithful recipe, whole in the modern one."""
    workflow = golden("lightning")
    for name in ("93", "200", "210"):
        workflow[name]["inputs"]["length"] = 1001
    for number in range(3):
        extend, sampler, joined = f"5{number}0", f"5{number}1", f"5{number}2"
        below = "212" if number == 0 else f"5{number - 1}2"
        workflow[extend] = {"class_type": "WanSoundImageToVideoExtend", "inputs": dict(workflow["210"]["inputs"])}
        workflow[extend]["inputs"]["video_latent"] = [below, 0]
        workflow[sampler] = {"class_type": "KSampler", "inputs": dict(workflow["211"]["inputs"])}
        links = {"positive": [extend, 0], "negative": [extend, 1], "latent_image": [extend, 2]}
        workflow[sampler]["inputs"] |= links
        inputs = {"samples1": [below, 0], "samples2": [sampler, 0], "dim": "t"}
        workflow[joined] = {"class_type": "LatentConcat", "inputs": inputs}
    workflow["94"]["inputs"]["samples"] = workflow["95"]["inputs"]["samples2"] = ["522", 0]
    made = imported(workflow, tmp_path)
    assert any("takes 4096 of 6022 frames" in note for note in made.notes)
    recipe = recipe_of(workflow, tmp_path)
    assert planned(recipe).node("video").facts["frames"] == 4096
    assert "frames_slice" not in imported(workflow, tmp_path, modernises=True).text


def test_the_rounding_of_2025_is_written_where_it_is_asked_for_and_the_model_is_in_fp8() -> None:
    """ComfyUI of today loads fp8-scaled files as we do."""
    for name, expected in (("fp8_scaled", True), ("template", False)):
        path = GOLDEN / "e2e" / f"{name}.json"
        assert ("fp8_rounding: comfyui_2025" in import_workflow(path, KINDS, as_of=2025).text) == expected
        assert "fp8_rounding" not in import_workflow(path, KINDS).text
