"""The reference workflows, imported and run as they are, give ComfyUI's numbers."""

from __future__ import annotations

import json
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from comfy_workflows import GOLDEN, golden
from PIL import Image
from reference import relative_error
from safetensors.torch import load_file

from s2v_flow import api
from s2v_flow.comfy.importer import import_workflow

INPUTS = Path(__file__).parents[2] / "recipes" / "inputs"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def run(workflow: Path, folder: Path, models: Path, cache: Path, as_of: int | None = None) -> api.RunResult:
    recipe = folder / "recipe.yaml"
    recipe.write_text(import_workflow(workflow, api.KINDS, as_of=as_of).text)
    options = api.Options(
        models_dirs=[models], input_dirs=[INPUTS], output_dir=folder / "output", cache_dir=cache, device="cpu"
    )
    return api.run(recipe, options)


@pytest.mark.parity
@pytest.mark.parametrize("name", ["ancestral", "template", "lightning", "fp8_scaled", "fp8_scaled_2026"])
def test_imported_workflow_gives_comfyuis_latents(name: str, tmp_path: Path, demo_models: Path, cache: Path) -> None:
    """Every chunk within 1e-4 of what ComfyUI saved, at the place where SaveLatent writes."""
    run(GOLDEN / f"{name}.json", tmp_path, demo_models, cache, 2025 if name == "fp8_scaled" else None)
    made = load_file(tmp_path / "output/latents/s2v_00001_.latent")["latent_tensor"]
    stored = load_file(GOLDEN / f"{name}.safetensors")
    chunks = [stored[key] for key in ("3.0.samples", "201.0.samples", "211.0.samples") if key in stored]
    assert relative_error(made, torch.cat(chunks, dim=2)) < 1e-4
    assert (tmp_path / "output/video/ComfyUI_00001_.mp4").stat().st_size > 1000


@pytest.mark.parity
def test_imported_workflow_gives_comfyuis_frames(tmp_path: Path, demo_models: Path, cache: Path) -> None:
    """A SaveImage put behind ImageFromBatch gets the frames that ComfyUI had there: the doubled one dropped."""
    workflow = golden("fp8_scaled")
    workflow["400"] = {"class_type": "SaveImage", "inputs": {"images": ["96", 0], "filename_prefix": "frame"}}
    del workflow["113"]
    file = tmp_path / "workflow.json"
    file.write_text(json.dumps(workflow))
    run(file, tmp_path, demo_models, cache, 2025)
    files = sorted((tmp_path / "output").glob("frame_*.png"))
    made = np.stack([np.asarray(Image.open(path)) for path in files]).astype(float)
    expected = load_file(GOLDEN / "fp8_scaled.safetensors")["96.0"].numpy().astype(float)
    assert made.shape == expected.shape
    assert np.abs(made - expected).mean() < 0.1


@pytest.mark.slow
def test_each_edited_latent_is_what_its_nodes_say(tmp_path: Path, demo_models: Path, cache: Path) -> None:
    """An unusual graph runs: the second chunk alone, and a piece of the video, beside and behind each other."""
    workflow = golden("ancestral")
    extra = {
        "400": ("SaveLatent", {"samples": ["201", 0], "filename_prefix": "second"}),
        "401": ("LatentCut", {"samples": ["202", 0], "dim": "t", "index": 1, "amount": 2}),
        "402": ("LatentConcat", {"samples1": ["401", 0], "samples2": ["201", 0], "dim": "-t"}),
        "403": ("SaveLatent", {"samples": ["402", 0], "filename_prefix": "turned"}),
        "404": ("LatentConcat", {"samples1": ["3", 0], "samples2": ["201", 0], "dim": "x"}),
        "405": ("SaveLatent", {"samples": ["404", 0], "filename_prefix": "wide"}),
        "406": ("LatentCut", {"samples": ["404", 0], "dim": "x", "index": -3, "amount": 2}),
        "407": ("SaveLatent", {"samples": ["406", 0], "filename_prefix": "narrow"}),
    }
    workflow |= {name: {"class_type": type_, "inputs": inputs} for name, (type_, inputs) in extra.items()}
    file = tmp_path / "workflow.json"
    file.write_text(json.dumps(workflow))
    run(file, tmp_path, demo_models, cache)

    def saved(prefix: str) -> torch.Tensor:
        return load_file(tmp_path / f"output/{prefix}_00001_.latent")["latent_tensor"]

    video = saved("latents/s2v")
    first, second = video[:, :, :2], video[:, :, 2:]
    assert torch.equal(saved("second"), second)
    assert torch.equal(saved("turned"), torch.cat([second, video[:, :, 1:3]], dim=2))
    wide = torch.cat([first, second], dim=4)
    assert torch.equal(saved("wide"), wide)
    assert torch.equal(saved("narrow"), wide[..., -3:-1])


@pytest.mark.parity
def test_a_pose_video_of_its_first_frames_is_what_every_chunk_gets(
    tmp_path: Path, demo_models: Path, cache: Path
) -> None:
    """As in ComfyUI: a clip that ends after the first chunk's frames steers the second chunk all the same."""
    with av.open(str(tmp_path / "pose.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=16)
        stream.width = stream.height = 64
        for number in range(8):
            frame = np.full((64, 64, 3), 30 * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        container.mux(stream.encode())
    latents = {}
    for name, chunks in (("none", ()), ("first", ("93",)), ("both", ("93", "200"))):
        workflow = golden("ancestral")
        workflow["700"] = {"class_type": "LoadVideo", "inputs": {"file": "pose.mp4"}}
        workflow["701"] = {"class_type": "GetVideoComponents", "inputs": {"video": ["700", 0]}}
        workflow["702"] = {
            "class_type": "ImageScaleBy",
            "inputs": {"image": ["701", 0], "upscale_method": "area", "scale_by": 0.5},
        }
        for chunk in chunks:
            workflow[chunk]["inputs"]["control_video"] = ["702", 0]
        file = tmp_path / "workflow.json"
        file.write_text(json.dumps(workflow))
        outputs = run(file, tmp_path, demo_models, cache).outputs
        (path,) = (path for paths in outputs.values() for path in paths if path.suffix == ".latent")
        latents[name] = load_file(path)["latent_tensor"]
    first = {name: latent[:, :, :2] for name, latent in latents.items()}
    assert not torch.equal(first["none"], first["first"])
    assert torch.equal(first["first"], first["both"])
    assert not torch.equal(latents["first"][:, :, 2:], latents["both"][:, :, 2:])
