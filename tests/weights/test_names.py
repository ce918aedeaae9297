"""A model's file is the same model whatever wrapped its keys, and in either spelling of the text encoder's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pickles_for_tests import authors_text_key
from reference import load_keys
from safetensors.torch import load_file, save_file
from torch import Tensor

from s2v_flow.errors import CheckpointError
from s2v_flow.models.load import load_audio_encoder, load_dit, load_text_encoder, load_vae
from s2v_flow.weights.family import detect_family
from s2v_flow.weights.layout import check_layout
from s2v_flow.weights.names import new_names
from s2v_flow.weights.quantization import read_quantization
from s2v_flow.weights.reader import Checkpoint

F32 = torch.float32
PREFIXES = {
    "s2v_14b": ["model.", "module.", "_orig_mod.", "model.diffusion_model.", "diffusion_model.", "pipe.dit."],
    "wan21_vae": ["vae.", "first_stage_model.", "module._orig_mod.", "model."],
    "umt5_xxl": ["encoder.", "text_encoder.", "text_encoders.umt5xxl.transformer.", "module."],
    "wav2vec2_large": ["wav2vec2.", "model.wav2vec2.", "audio_encoder.", "_orig_mod.module."],
}


@pytest.mark.parametrize("name", PREFIXES)
def test_every_key_of_the_full_models_is_seen_through_every_prefix(name: str) -> None:
    keys = list(load_keys(name))
    assert list(new_names(keys).values()) == keys
    for prefix in PREFIXES[name]:
        assert list(new_names([f"{prefix}{key}" for key in keys]).values()) == keys, prefix


def test_the_authors_spelling_is_read_with_the_scales_of_each_layer() -> None:
    keys = [key for key in load_keys("umt5_xxl") if key != "spiece_model"]
    theirs = [authors_text_key(key) for key in keys]
    assert list(new_names([f"encoder.{key}" for key in theirs]).values()) == keys
    assert new_names([*theirs, "blocks.3.attn.q.scale_weight"])["blocks.3.attn.q.scale_weight"] == (
        "encoder.block.3.layer.0.SelfAttention.q.scale_weight"
    )


def test_parts_of_an_all_in_one_file_keep_their_prefixes() -> None:
    names = ["model.diffusion_model.head.modulation", "vae.decoder.head.0.gamma"]
    assert list(new_names(names).values()) == ["head.modulation", "vae.decoder.head.0.gamma"]
    with pytest.raises(
        CheckpointError, match=r"holds 'head.modulation' twice, as 'head.modulation' and as 'model.head"
    ):
        new_names(["head.modulation", "model.head.modulation", "model.diffusion_model.x"])


def dit(path: Path) -> Any:
    return load_dit(path, dtype=F32, device="cpu", quantized=False).module


def vae(path: Path) -> Any:
    return load_vae(path, F32, "cpu")


def umt5(path: Path) -> Any:
    return load_text_encoder(path, dtype=F32, device="cpu", quantized=False).module


def wav2vec2(path: Path) -> Any:
    return load_audio_encoder(path, dtype=F32, device="cpu").module


def bare(key: str) -> str:
    return key.removeprefix("encoder.").replace("shared", "embed_tokens")


def old_norm(key: str) -> str:
    """Return a weight norm's key as torch 1 spelt it."""
    return key.replace("parametrizations.weight.original0", "weight_g").replace(
        "parametrizations.weight.original1", "weight_v"
    )


HEADS = (
    *("lm_head.weight", "projector.weight", "classifier.bias", "adapter.layers.0.conv.weight", "layer_weights"),
    *("quantizer.codevectors", "feature_extractor.weight", "tdnn.0.kernel.weight"),
)
# what a file is called, how its keys are rewritten, what stands beside them
WRAPPED: dict[str, tuple[str, Callable[[str], str], tuple[str, ...]]] = {
    "dit": ("diffusion_models/tiny_s2v", lambda key: f"module.{key.replace('blocks.0.', 'blocks.0._orig_mod.')}", ()),
    "dit fp8": ("diffusion_models/tiny_s2v_fp8_scaled", lambda key: f"model.{key}" if "." in key else key, ()),
    "dit fp8 by metadata": ("diffusion_models/tiny_s2v_fp8_metadata", lambda key: f"_orig_mod.{key}", ()),
    "vae": ("vae/tiny_vae", lambda key: f"first_stage_model.{key}", ()),
    "umt5": ("text_encoders/tiny_umt5", lambda key: f"text_encoder.{key}", ("text_encoder.decoder.x", "logit_scale")),
    "umt5, the authors'": ("text_encoders/tiny_umt5", authors_text_key, ()),
    "umt5 fp8, the authors'": ("text_encoders/tiny_umt5_fp8_scaled", authors_text_key, ()),
    "umt5, by itself": ("text_encoders/tiny_umt5", lambda key: key.removeprefix("encoder."), ()),
    "umt5 fp8, by itself": ("text_encoders/tiny_umt5_fp8_scaled", lambda key: f"model.{bare(key)}", ()),
    "wav2vec2": ("audio_encoders/tiny_wav2vec2", lambda key: f"wav2vec2.{old_norm(key)}", HEADS),
    "wav2vec2 in two": ("audio_encoders/tiny_wav2vec2", lambda key: f"model.wav2vec2.{key}", ("model.lm_head.x",)),
}  # fmt: skip
LOADERS = {"dit": dit, "vae": vae, "umt5": umt5, "wav2vec2": wav2vec2}


@pytest.mark.parametrize("name", WRAPPED)
def test_a_wrapped_file_is_whole_and_loads_as_the_same_model(name: str, tiny_models: Path, tmp_path: Path) -> None:
    file, rename, beside = WRAPPED[name]
    original, wrapped = tiny_models / f"{file}.safetensors", tmp_path / "wrapped.safetensors"
    tensors: dict[str, Tensor] = {key: torch.zeros(3) for key in beside}
    for key, value in load_file(original).items():
        layer, dot, rest = key.rpartition(".")
        is_scale = rest in ("scale_weight", "scale_input", "weight_scale", "input_scale")
        new = rename(f"{layer}.weight").removesuffix("weight") + rest if dot and is_scale else rename(key)
        tensors[new] = value.clone()
    metadata = Checkpoint.open(original).metadata
    save_file(tensors, wrapped, {key: text.replace('"blocks', '"_orig_mod.blocks') for key, text in metadata.items()})
    checkpoint, family = Checkpoint.open(wrapped), detect_family(Checkpoint.open(original).shapes)
    assert detect_family(checkpoint.shapes) == family
    check_layout(wrapped, family, checkpoint.entries, read_quantization(checkpoint).packings)
    load = LOADERS[name.partition(" ")[0].strip(",")]
    found, expected = load(wrapped).state_dict(), load(original).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_an_adapter_in_each_layer_of_an_audio_encoder_is_computed(tiny_models: Path, tmp_path: Path) -> None:
    """As transformers does for MMS: left out, the features would be other ones."""
    tensors = load_file(tiny_models / "audio_encoders/tiny_wav2vec2.safetensors")
    width, generator = tensors["encoder.layer_norm.weight"].shape[0], torch.Generator().manual_seed(0)
    shapes = {"norm.weight": (width,), "norm.bias": (width,), "linear_1.bias": (16,), "linear_2.bias": (width,)}
    shapes |= {"linear_1.weight": (16, width), "linear_2.weight": (width, 16)}
    for layer in {key.split(".")[2] for key in tensors if key.startswith("encoder.layers.")}:
        for name, shape in shapes.items():
            tensors[f"encoder.layers.{layer}.adapter_layer.{name}"] = torch.randn(shape, generator=generator)
    save_file(tensors, tmp_path / "a.safetensors")
    checkpoint = Checkpoint.open(tmp_path / "a.safetensors")
    check_layout(checkpoint.path, "wav2vec2", checkpoint.entries)
    encoder = wav2vec2(checkpoint.path)
    samples = torch.randn(1, 4000, generator=generator)
    plain = wav2vec2(tiny_models / "audio_encoders/tiny_wav2vec2.safetensors")
    first = encoder.encoder.layers[0]
    hidden = torch.randn(1, 5, width, generator=generator)
    assert torch.equal(encoder.feature_extractor(samples), plain.feature_extractor(samples))
    before, after = plain.encoder.layers[0](hidden), first(hidden)
    before, after = (value[0] if isinstance(value, tuple) else value for value in (before, after))
    assert torch.equal(after, before + first.adapter_layer(before))
