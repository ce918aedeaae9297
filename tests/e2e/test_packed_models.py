"""Models that stay packed, from the recipe to the latent: the same as their expanded twins."""

from __future__ import annotations

import functools
import json
import math
import os
import re
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from models_for_tests import features
from reference import load_keys, relative_error
from safetensors.torch import load, load_file, save_file

import s2v_flow
from s2v_flow.errors import CheckpointError
from s2v_flow.models.footprint import INJECTION_BLOCKS
from s2v_flow.models.load import load_audio_encoder, load_text_encoder
from s2v_flow.nodes.load import LoadDiffusionModel
from s2v_flow.weights.gguf import _T5_NAMES
from s2v_flow.weights.reader import Checkpoint

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


RECIPE: dict[str, Any] = {
    "s2vflow": 1,
    "nodes": {
        "dit": {"kind": "load_diffusion_model"},
        "umt5": {"kind": "load_text_encoder", "checkpoint": "tiny_umt5.safetensors"},
        "prompt": {"kind": "encode_text", "text_encoder": "$umt5", "text": "She speaks."},
        "first": {"kind": "sample", "model": "$dit", "positive": "$prompt", "cfg": 1.0, "steps": 2, "seed": 3}
        | {"width": 64, "height": 64, "length": 9},
        "kept": {"kind": "save_latent", "latent": "$first", "file": "a.latent"},
    },
}


def latent(models: Path, folder: Path, checkpoint: str, **fields: Any) -> torch.Tensor:
    """Return the first chunk's latent of a small recipe."""
    dit = {**RECIPE["nodes"]["dit"], "checkpoint": checkpoint, **fields}
    recipe = {**RECIPE, "nodes": {**RECIPE["nodes"], "dit": dit}}
    folder.mkdir(exist_ok=True)
    (folder / "r.yaml").write_text(json.dumps(recipe))
    result = s2v_flow.run(folder / "r.yaml", models_dirs=[models], cache_dir=folder / "cache")
    return load(result.outputs["kept"][0].read_bytes())["latent_tensor"]


@pytest.mark.parametrize("kind", ["q8_0", pytest.param("q4_0", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "loras",
    [
        pytest.param([], marks=pytest.mark.slow),
        [{"id": "l", "file": "tiny_lightning_lora.safetensors", "allow_partial": True}],
    ],
)
def test_a_gguf_diffusion_model_gives_the_latents_of_its_expanded_twin(
    models: Path, tmp_path: Path, kind: str, loras: list[dict[str, Any]]
) -> None:
    """`checkpoint: x.gguf`, found in unet/; a LoRA stands beside the packed weights."""
    packed = latent(models, tmp_path / "a", f"tiny_{kind}.gguf", loras=loras)
    assert relative_error(packed, latent(models, tmp_path / "b", f"tiny_{kind}_twin.safetensors", loras=loras)) < 1e-6


def test_a_plan_counts_a_packed_model_with_its_size_in_the_file(models: Path, tmp_path: Path) -> None:
    """Weights of a GGUF file stay packed in memory, on a CPU too; its twin's are mapped, and some are never read."""
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
    entries = Checkpoint.open(models / "diffusion_models" / "tiny_q4_0_twin.safetensors").entries
    layers = len({key.split(".")[1] for key in entries if key.startswith("blocks.")})
    unread = sum(
        entry.end - entry.begin
        for key, entry in entries.items()
        if key.startswith("audio_injector.") and INJECTION_BLOCKS[int(key.split(".")[2])] >= layers
    )
    assert saved == pytest.approx(sizes[1] - unread - sizes[0], rel=0.1)


def test_a_full_size_model_is_planned_from_its_header_alone(tmp_path: Path) -> None:
    """Files of full size, all hole behind their headers: the weights count with the bytes that they have there."""
    tensors, recipe = load_keys("s2v_14b"), json.loads(json.dumps(RECIPE))
    recipe["nodes"]["dit"]["checkpoint"], recipe["nodes"]["umt5"]["checkpoint"] = "full.gguf", "full.safetensors"
    (tmp_path / "m" / "unet").mkdir(parents=True)
    (tmp_path / "m" / "text_encoders").mkdir()
    writer = gguf.GGUFWriter(tmp_path / "m" / "unet" / "full.gguf", "wan")
    for key, shape in tensors.items():
        kind = KINDS.Q4_K if len(shape) == 2 and shape[1] % 256 == 0 and key.endswith("weight") else KINDS.F32
        block, size = gguf.GGML_QUANT_SIZES[kind]
        rows = (*shape[:-1], shape[-1] // block * size) if block > 1 else shape
        item = np.dtype(np.uint8 if block > 1 else np.float32)
        writer.add_tensor_info(key, rows, item, math.prod(shape) // block * size, kind if block > 1 else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    weights = sum(writer.ggml_pad(info.nbytes, writer.data_alignment) for info in writer.tensors[0].values())
    writer.close()
    os.truncate(tmp_path / "m/unet/full.gguf", (tmp_path / "m/unet/full.gguf").stat().st_size + weights + 64)
    header, end = {}, 0
    for key, shape in (load_keys("umt5_xxl") | {"spiece_model": (1,)}).items():
        start, end = end, end + math.prod(shape)
        header[key] = {
            "dtype": "U8" if key == "spiece_model" else "F8_E4M3",
            "shape": shape,
            "data_offsets": (start, end),
        }
    text = json.dumps(header).encode()
    (tmp_path / "m/text_encoders/full.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(tmp_path / "m/text_encoders/full.safetensors", 8 + len(text) + end)
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    planned = s2v_flow.plan(tmp_path / "r.yaml", models_dirs=[tmp_path / "m"], cache_dir=tmp_path / "c", device="cpu")
    peak = planned.estimate.memory["first"].peak_bytes or 0
    assert 9.5e9 < weights < peak < 1.2 * weights
    assert sum(path.stat().st_blocks * 512 for path in tmp_path.rglob("full.*")) < 1e6


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


def test_a_gguf_audio_encoder_hears_as_its_twin(tiny_models: Path, tmp_path: Path) -> None:
    tensors = load_file(tiny_models / "audio_encoders" / "tiny_wav2vec2.safetensors")
    write_gguf(tmp_path / "a.gguf", tensors, "Q8_0", tmp_path / "twin.safetensors", arch="wav2vec2")
    sound = torch.sin(torch.arange(4000) / 9)
    heard = [
        features(load_audio_encoder(tmp_path / name, dtype=torch.float32, device="cpu"), sound, "official")
        for name in ("a.gguf", "twin.safetensors")
    ]
    assert torch.equal(*heard)


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


PEFT = {"lora_down": "lora_A", "lora_up": "lora_B"}
DIFFUSERS = {"self_attn": "attn1", "cross_attn": "attn2", ".ffn.0": ".ffn.net.0.proj", ".ffn.2": ".ffn.net.2"}


def respelled(key: str, style: str) -> str:
    """Spell a key of the tiny LoRA, `diffusion_model.LAYER.lora_down.weight`, as other trainers do."""
    layer, role = re.fullmatch(
        r"diffusion_model\.(.*?)\.(lora_down\.weight|lora_up\.weight|alpha|diff|diff_b)", key
    ).groups()
    joined = layer.replace(".", "_")
    peft = functools.reduce(lambda text, pair: text.replace(*pair), PEFT.items(), role)
    theirs = functools.reduce(lambda text, pair: text.replace(*pair), DIFFUSERS.items(), layer)
    theirs = re.sub(r"(attn[12])\.([qkv])$", r"\1.to_\2", re.sub(r"(attn[12])\.o$", r"\1.to_out.0", theirs))
    return {
        "bare": f"{layer}.{role}",
        "kohya": f"lora_unet_{joined}.{role}",
        "two underscores": f"lora_unet__{joined}.{role}",
        "lycoris": f"lycoris_{joined}.{role}",
        "mixed": f"{layer.replace('_', '.', 1)}.{role}",
        "pipe": f"pipe.dit.{layer}.{peft.replace('.weight', '.default.weight')}",
        "peft": f"base_model.model.{layer}.{peft.replace('.weight', '.default.weight')}",
        "diffusers": f"transformer.{theirs}.{peft}",
    }[style]


@pytest.mark.slow
def test_all_spellings_of_one_lora_give_the_same_latent(tiny_models: Path, tmp_path: Path) -> None:
    """Bit for bit, with the same number of tensors that have a home."""
    shutil.copytree(tiny_models, tmp_path / "models")
    folder = tmp_path / "models" / "loras"
    tensors = load_file(folder / "tiny_lightning_lora.safetensors")
    found = {}
    for style in (None, "bare", "kohya", "two underscores", "lycoris", "mixed", "pipe", "peft", "diffusers"):
        spelled = {respelled(key, style) if style else key: value for key, value in tensors.items()}
        save_file(spelled, folder / "spelled.safetensors")
        loras = [{"id": "l", "file": "spelled.safetensors", "allow_partial": True}]
        found[style] = latent(tmp_path / "models", tmp_path / str(style), "tiny_s2v.safetensors", loras=loras)
    assert [style for style, one in found.items() if not torch.equal(one, found[None])] == []
