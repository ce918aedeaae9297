"""The shipped recipes' fingerprints stay as they were: what is stored in somebody's cache is found again."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from recipes_for_tests import RECIPES

from s2v_flow import api
from s2v_flow.cache.resume_point import ResumePoints
from s2v_flow.graph.context import Numerics
from s2v_flow.graph.fingerprint import fingerprint
from s2v_flow.graph.ports import Source
from s2v_flow.graph.status import preimage

# plan node -> fingerprint, for each "recipe profile", as commit f1c4276 computed them
PINNED = json.loads((Path(__file__).parent / "golden/fingerprints/cpu.json").read_text(encoding="utf-8"))
STAND_INS = {  # a plan reads the headers of model files: tiny models under the names of large ones
    "wan2.2_s2v_14B_fp8_scaled": "diffusion_models/tiny_s2v",
    "wan2.2_s2v_14B_bf16": "diffusion_models/tiny_s2v",
    "umt5_xxl_fp8_e4m3fn_scaled": "text_encoders/tiny_umt5",
    "umt5_xxl_fp16": "text_encoders/tiny_umt5",
    "wav2vec2_large_english_fp16": "audio_encoders/tiny_wav2vec2",
    "wan_2.1_vae": "vae/tiny_vae",
    "wan2.2_t2v_lightx2v_4steps_lora_v1.1_high_noise": "loras/tiny_lightning_lora",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, tiny_models: Path) -> Path:
    folder = tmp_path_factory.mktemp("large") / "models"
    for name, tiny in STAND_INS.items():
        path = folder / Path(tiny).parent / f"{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(tiny_models / f"{tiny}.safetensors")
    return folder


def digest(path: Path) -> str:
    """A model's content is made up from its name: no weights are needed, and none count."""
    is_model = path.suffix == ".safetensors"
    return hashlib.sha256(path.name.encode() if is_model else path.read_bytes()).hexdigest()


@pytest.mark.parametrize("name", PINNED)
def test_the_fingerprints_of_a_shipped_recipe_are_the_same(
    name: str, tmp_path: Path, tiny_models: Path, models: Path
) -> None:
    """Of every node, on made-up results of those before it.

    If this fails because a kind's `version` was raised on purpose, update the file; else old caches are lost.
    """
    recipe, *profiles = name.split()
    given = {"models_dirs": [tiny_models, models], "cache_dir": tmp_path / "cache", "device": "cpu"}
    path = Path(__file__).parent / "untrained.yaml" if recipe == "demo" else RECIPES / f"{recipe}.yaml"  # moved there
    plan = api.plan(path, profiles=profiles, **given).plan
    made: dict[str, str] = {}

    def result(source: Source) -> str:
        return f"{made[source.node]}.{source.port}"

    for node in plan.nodes:
        image = preimage(node, Numerics("cpu"), digest, result)
        assert not isinstance(image, str), image
        made[node.name] = fingerprint(image)
    assert made == PINNED[name]


def test_a_resume_point_is_kept_under_its_nodes_fingerprint() -> None:
    """Where an earlier version left it."""
    key = PINNED["demo"]["first"]
    assert ResumePoints(Path("cache")).path(key) == Path("cache/checkpoints") / key[:2] / f"{key}.safetensors"
