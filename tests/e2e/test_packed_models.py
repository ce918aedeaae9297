"""Models that stay packed, from the recipe to the latent: the same as their expanded twins."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from reference import relative_error
from safetensors.torch import load, load_file, save_file

import s2v_flow
from s2v_flow.errors import CheckpointError
from s2v_flow.models.load import load_text_encoder
from s2v_flow.nodes.load import LoadDiffusionModel
from s2v_flow.weights.gguf import _T5_NAMES

KINDS = gguf.GGMLQuantizationType
RECIPES = Path(__file__).parents[2] / "recipes"
SPIECE = Path(__file__).parents[2] / "s2v_flow" / "demo" / "tiny_spiece.model"


def is_matrix(key: str, value: torch.Tensor) -> bool:
    return value.ndim == 2 and key.endswith(".weight") and value.shape[1] % 32 == 0 and "text_embedding" not in key


def write_gguf(path: Path, tensors: dict[str, torch.Tensor], kind: str, twin: Path, **strings: str) -> None:
    """Write tensors as a GGUF file, matrices quantised, and beside it what the file's values are, in float32."""
    writer = gguf.GGUFWriter(path, strings.pop("arch", "wan"))
    expanded = {}
    for key, value in tensors.items():
        array = value.float().numpy()
        if is_matrix(key, value):
            packed = gguf.quants.quantize(array, KINDS[kind])
            writer.add_tensor(key, packed, raw_dtype=KINDS[kind])
            expanded[key] = torch.from_numpy(gguf.quants.dequantize(packed, KINDS[kind])).clone()
        else:
            writer.add_tensor(key, array)
            expanded[key] = value.float().clone()
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    save_file(expanded, twin)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, tiny_models: Path) -> Path:
    """The tiny models, with a diffusion model in GGUF and its twin."""
    root = tmp_path_factory.mktemp("packed") / "models"
    shutil.copytree(tiny_models, root)
    dit = load_file(root / "diffusion_models" / "tiny_s2v.safetensors")
    (root / "unet").mkdir()
    for kind in ("Q8_0", "Q4_0"):
        name = f"tiny_{kind.lower()}"
        write_gguf(root / "unet" / f"{name}.gguf", dit, kind, root / "diffusion_models" / f"{name}_twin.safetensors")
    return root


def latent(models: Path, folder: Path, checkpoint: str, **fields: Any) -> torch.Tensor:
    """Return the first chunk's latent of a small recipe."""
    dit = {"kind": "load_diffusion_model", "checkpoint": checkpoint, **fields}
    recipe = {
        "s2vflow": 1,
        "nodes": {
            "dit": dit,
            "umt5": {"kind": "load_text_encoder", "checkpoint": "tiny_umt5.safetensors"},
            "prompt": {"kind": "encode_text", "text_encoder": "$umt5", "text": "She speaks."},
            "first": {"kind": "sample", "model": "$dit", "positive": "$prompt", "cfg": 1.0, "steps": 2, "seed": 3}
            | {"width": 64, "height": 64, "length": 9},
            "kept": {"kind": "save_latent", "latent": "$first", "file": "a.latent"},
        },
    }
    folder.mkdir(exist_ok=True)
    (folder / "r.yaml").write_text(json.dumps(recipe))
    result = s2v_flow.run(folder / "r.yaml", models_dirs=[models], cache_dir=folder / "cache")
    return load(result.outputs["kept"][0].read_bytes())["latent_tensor"]


@pytest.mark.parametrize("kind", ["q8_0", pytest.param("q4_0", marks=pytest.mark.slow)])
@pytest.mark.parametrize("loras", [[], [{"id": "l", "file": "tiny_lightning_lora.safetensors", "allow_partial": True}]])
def test_a_gguf_diffusion_model_gives_the_latents_of_its_expanded_twin(
    models: Path, tmp_path: Path, kind: str, loras: list[dict[str, Any]]
) -> None:
    """`checkpoint: x.gguf`, found in unet/; a LoRA stands beside the packed weights."""
    packed = latent(models, tmp_path / "a", f"tiny_{kind}.gguf", loras=loras)
    assert relative_error(packed, latent(models, tmp_path / "b", f"tiny_{kind}_twin.safetensors", loras=loras)) < 1e-6


def test_a_plan_counts_a_packed_model_with_its_size_in_the_file(models: Path, tmp_path: Path) -> None:
    """Weights of a GGUF file stay packed in memory, on a CPU too."""
    latent(models, tmp_path / "a", "tiny_q4_0.gguf")
    peaks = {}
    for name in ("tiny_q4_0.gguf", "tiny_q4_0_twin.safetensors"):
        sets = [f"nodes.dit.checkpoint={name}"]
        planned = s2v_flow.plan(tmp_path / "a" / "r.yaml", models_dirs=[models], cache_dir=tmp_path / name, sets=sets)
        peaks[name] = planned.estimate.memory["first"].peak_bytes or 0
    sizes = [
        (models / folder / name).stat().st_size
        for folder, name in zip(("unet", "diffusion_models"), peaks, strict=True)
    ]
    saved = peaks["tiny_q4_0_twin.safetensors"] - peaks["tiny_q4_0.gguf"]
    assert saved == pytest.approx(sizes[1] - sizes[0], rel=0.1)


@pytest.mark.parametrize("has_tokenizer", [False, True])
def test_a_gguf_text_encoder_encodes_as_its_twin(tiny_models: Path, tmp_path: Path, has_tokenizer: bool) -> None:
    """llama.cpp's names; the table packed; the tokenizer inside (the golden file), or named beside."""
    if has_tokenizer:
        path = Path(__file__).parents[1] / "golden" / "components" / "gguf_umt5_q8_0.gguf"
        encoder = load_text_encoder(path, dtype=torch.float32, device="cpu", quantized=False)
        assert encoder.tokenize("The man sings.") == encoder_of(tiny_models).tokenize("The man sings.")
        assert relative_error(encoder.encode("The man sings."), encoder_of(tiny_models).encode("The man sings.")) < 0.05
        return
    tensors = load_file(tiny_models / "text_encoders" / "tiny_umt5.safetensors")
    del tensors["spiece_model"]
    theirs = {_llama(key): value for key, value in tensors.items()}
    write_gguf(tmp_path / "u.gguf", theirs, "Q8_0", tmp_path / "twin.safetensors", arch="t5encoder")
    with pytest.raises(CheckpointError, match="has no tokenizer inside"):
        load_text_encoder(tmp_path / "u.gguf", dtype=torch.float32, device="cpu", quantized=False)
    options: dict[str, Any] = {"dtype": torch.float32, "device": "cpu", "quantized": False, "tokenizer": SPIECE}
    packed = load_text_encoder(tmp_path / "u.gguf", **options).encode("The man sings.")
    twin = {_ours(key): value for key, value in load_file(tmp_path / "twin.safetensors").items()}
    save_file(twin, tmp_path / "t.safetensors")
    assert (
        relative_error(packed, load_text_encoder(tmp_path / "t.safetensors", **options).encode("The man sings.")) < 1e-6
    )


def encoder_of(models: Path) -> Any:
    path = models / "text_encoders" / "tiny_umt5.safetensors"
    return load_text_encoder(path, dtype=torch.float32, device="cpu", quantized=False)


def _llama(key: str) -> str:
    for theirs, ours in reversed(_T5_NAMES):
        key = key.replace(ours, theirs)
    return key


def _ours(key: str) -> str:
    for theirs, ours in _T5_NAMES:
        key = key.replace(theirs, ours)
    return key


def test_both_names_of_the_rounding_are_one() -> None:
    """Recipes and caches of before go on to count."""
    old, new = (LoadDiffusionModel(checkpoint="a", fp8_rounding=name) for name in ("comfyui", "comfyui_2025"))
    assert old == new
    identity = new.identity({("checkpoint",): "sha256:0"}, lambda kind, asked: "fp32")
    assert identity["fp8_rounding"] == "comfyui"
