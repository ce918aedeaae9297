"""Whole workflows on the tiny models against what ComfyUI and the authors' code made of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from recipes_for_tests import options, tiny, write_recipe, write_voice
from reference import GOLDEN, relative_error
from safetensors.torch import load_file
from torch import Tensor

from s2v_flow import api
from s2v_flow.graph.status import Selection
from s2v_flow.models.vae import normalise

RECIPES = Path(__file__).parent / "recipes"
LATENTS_IN_ORDER = ("3.0.samples", "201.0.samples", "211.0.samples")
LATENT_TOLERANCE = 1e-4
FRAME_TOLERANCE = 0.1  # grey levels, on average


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return one cache for all runs: what they have in common is computed once."""
    return tmp_path_factory.mktemp("cache")


def run(name: str, out: Path, models: Path, cache: Path) -> tuple[Tensor, np.ndarray]:
    """Run a golden workflow's recipe; return the joined raw latent and the frames."""
    api.run(RECIPES / f"{name}.yaml", options(out, models, cache, output_dir=out))
    frames = [iio.imread(path) for path in sorted((out / "out").glob("frame_*.png"))]
    return saved_latent(out / "out" / "s2v.latent"), np.stack(frames)


def saved_latent(path: Path) -> Tensor:
    return load_file(path)["latent_tensor"]


def grey_levels_apart(actual: np.ndarray, expected: Tensor) -> float:
    assert actual.shape == tuple(expected.shape)
    return float(np.abs(actual.astype(int) - expected.numpy().astype(int)).mean())


@pytest.mark.parametrize(
    "name",
    [
        "ancestral",
        *(pytest.param(name, marks=pytest.mark.parity) for name in ("fp8_scaled_2026", "fp8_lora_exact", "template")),
        *(pytest.param(name, marks=pytest.mark.parity) for name in ("fp8_scaled", "lightning")),
    ],
)
def test_a_comfyui_workflow_gives_comfyuis_latents_and_frames(
    name: str, tmp_path: Path, demo_models: Path, cache: Path
) -> None:
    golden = load_file(GOLDEN / "e2e" / f"{name}.safetensors")
    chunks = [golden[key] for key in LATENTS_IN_ORDER if key in golden]
    latent, frames = run(name, tmp_path, demo_models, cache)
    parts = torch.split(latent, chunks[0].shape[2], dim=2)
    assert len(parts) == len(chunks) >= 2
    assert max(relative_error(part, chunk) for part, chunk in zip(parts, chunks, strict=True)) <= LATENT_TOLERANCE
    if "96.0" in golden:
        assert grey_levels_apart(frames, golden["96.0"]) < FRAME_TOLERANCE
    else:
        assert name in ("ancestral", "fp8_scaled_2026", "fp8_lora_exact")  # stored without frames


@pytest.mark.parity
def test_a_step_cache_reuses_no_more_than_its_threshold_lets_it(tmp_path: Path, demo_models: Path, cache: Path) -> None:
    """Untrained weights change by two fifths from step to step: the usual threshold lets nothing pass, 0.6 does."""
    found = []
    for threshold in (None, 0.2, 0.6):
        sets = ["steps=20", "nodes.talk.chunks=0", "nodes.talk.seed=[]"]
        if threshold is not None:
            sets += ["nodes.first.step_cache=easy", f"nodes.first.step_cache_threshold={threshold}"]
        given = options(tmp_path, demo_models, cache, output_dir=tmp_path, overwrite=True, sets=sets)
        given = replace(given, selection=Selection(until=("latents",)))
        result = api.run(RECIPES / "template.yaml", given)
        reused = sum(entry.facts.get("step_cache", {}).get("reused", 0) for entry in result.entries.values())
        found.append((saved_latent(tmp_path / "out" / "s2v.latent"), reused))
    (exact, _), (usual, none), (coarse, many) = found
    assert torch.equal(usual, exact)
    assert none == 0
    assert many >= 5
    assert 0 < relative_error(coarse, exact) < 0.1


@pytest.mark.parity
def test_the_authors_pipeline_gives_the_authors_latents_and_frames(
    tmp_path: Path, demo_models: Path, cache: Path
) -> None:
    golden = load_file(GOLDEN / "e2e" / "official.safetensors")
    clips = [golden["clip0.latent_normalised"], golden["clip1.latent_normalised"]]
    latent, frames = run("official", tmp_path, demo_models, cache)
    parts = torch.split(normalise(latent)[0], 4, dim=1)
    assert max(relative_error(part, clip) for part, clip in zip(parts, clips, strict=True)) <= LATENT_TOLERANCE
    assert len(frames) == 29
    assert grey_levels_apart(frames, golden["frames"]) < FRAME_TOLERANCE


@pytest.mark.slow
def test_bf16_stays_near_float32(tmp_path: Path, demo_models: Path, cache: Path) -> None:
    write_voice(tmp_path / "voice.wav", 0.4)
    found = {}
    for precision in ("fp32", "bf16"):
        changes = tiny(
            dit={"precision": precision},
            talk=None,
            frames=None,
            video=None,
            latent={"kind": "save_latent", "latent": "$first", "file": f"{precision}.latent"},
        )
        api.run(write_recipe(tmp_path, changes), options(tmp_path, demo_models, cache))
        found[precision] = saved_latent(tmp_path / f"{precision}.latent")
    assert 0 < relative_error(found["bf16"], found["fp32"]) <= 2e-2


@pytest.mark.slow
def test_a_saved_latent_is_continued_as_the_video_itself_would_be(
    tmp_path: Path, demo_models: Path, cache: Path
) -> None:
    write_voice(tmp_path / "voice.wav", 1.2)
    save = {"kind": "save_latent", "latent": "$talk", "file": "direct.latent"}
    first = {"kind": "save_latent", "latent": "$first", "file": "first.latent"}
    direct = tiny(talk={"chunks": 2, "seed": 5}, frames=None, video=None, all=save, start=first)
    api.run(write_recipe(tmp_path, direct), options(tmp_path, demo_models, cache))
    settings = {"length": 5, "steps": 2, "cfg": 1.0, "sampler": "uni_pc", "scheduler": "simple", "shift": 8.0}
    inputs = {"model": "$dit", "positive": "$positive", "speech": "$speech", "reference": "$reference"}
    continued = {
        "first": None,
        "start": {"kind": "load_latent", "file": "first.latent"},
        "talk": {
            "video": "$start",
            "chunks": 2,
            "seed": 5,
            "conditioning": "official",
            "motion": "latent",
            **inputs,
            **settings,
        },
        "frames": None,
        "video": None,
        "all": {**save, "file": "continued.latent"},
    }
    api.run(write_recipe(tmp_path, continued), options(tmp_path, demo_models, cache))
    assert torch.equal(saved_latent(tmp_path / "continued.latent"), saved_latent(tmp_path / "direct.latent"))
