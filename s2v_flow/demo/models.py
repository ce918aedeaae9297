"""The demo's models: complete, tiny, in ComfyUI's folders; the full models' structure with narrow layers.

`demo_*` are trained: they make a drawn character talk. `tiny_*` are not: they make a video of noise, for tests. Both
run by the same code and in the same files as the real ones.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from s2v_flow.demo.plan import fill_all, trained_files, uniform, wav2vec2_sizes
from s2v_flow.errors import RefusedError
from s2v_flow.models.dit import S2VConfig, WanS2V
from s2v_flow.models.encoders import build_umt5, build_wav2vec2
from s2v_flow.models.load import shapes_of
from s2v_flow.models.vae import VAEConfig, WanVAE
from s2v_flow.weights.layout import TOKENIZER_KEY

Weights = dict[str, Tensor]
Shapes = dict[str, tuple[int, ...]]

DIT = S2VConfig(dim=256, ffn_dim=512, num_layers=5, text_dim=64, audio_dim=64)
VAE = VAEConfig(width=16)
# The text and audio encoders are built from these shapes, which fix all others.
UMT5_SIZES: Shapes = {
    "shared.weight": (512, 64),
    "encoder.block.0.layer.0.SelfAttention.q.weight": (64, 64),
    "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (32, 4),
    "encoder.block.0.layer.1.DenseReluDense.wi_0.weight": (128, 64),
    "encoder.block.1.layer.0.layer_norm.weight": (64,),
}
WAV2VEC2_SIZES: Shapes = {**wav2vec2_sizes(512), "masked_spec_embed": (64,)}
LORA_RANK = 4
LORA_BLOCKS = 7  # two more than the model has: their keys have no home
FP8, FP8_MAX = torch.float8_e4m3fn, 448.0
_TOKENIZER = Path(__file__).with_name("tiny_spiece.model")


def make_demo_models(root: Path, seed: int = 0) -> None:
    """Write the demo's models below `root`, which must not exist or be empty: all of them or none.

    `seed`: which set of untrained weights.

    Raises:
        RefusedError: `root` has files in it.
    """
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise RefusedError(f"{root}: is not empty", fix="name a new folder")
    root.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(dir=root.parent, prefix=f".{root.name}-"))
    try:
        for name, content, *metadata in _files(seed):
            (beside / name).parent.mkdir(exist_ok=True)
            weights = {key: value.contiguous() for key, value in content.items()}
            save_file(weights, beside / name, *metadata)
            (beside / name).chmod(0o644)  # safetensors makes files private
        beside.chmod(0o755)
        if root.exists():
            root.rmdir()
        os.replace(beside, root)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _files(seed: int) -> Iterator[tuple[str, Weights] | tuple[str, Weights, dict[str, str]]]:
    """Make each file's path below the models folder, its weights, and its metadata where it has some."""
    yield from trained_files()
    with torch.device("meta"):
        dit_shapes, vae_shapes = shapes_of(WanS2V(DIT)), shapes_of(WanVAE(VAE))
    dit, scale_shape = fill_all(dit_shapes, seed), (1,) if seed % 2 else ()
    yield "diffusion_models/tiny_s2v.safetensors", dit
    # the older layout has a marker, the newer one each layer's format, in the metadata or in a tensor beside the layer
    older = _in_fp8(dit, _is_dit_fp8, "scale_weight", scale_shape)
    yield "diffusion_models/tiny_s2v_fp8_scaled.safetensors", {**older, "scaled_fp8": torch.zeros(2, dtype=FP8)}
    newer = _in_fp8(dit, _is_dit_fp8, "weight_scale")
    told = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": _formats(newer)})}
    yield "diffusion_models/tiny_s2v_fp8_metadata.safetensors", newer, told
    yield "vae/tiny_vae.safetensors", fill_all(vae_shapes, seed)

    text = fill_all(shapes_of(build_umt5(UMT5_SIZES)), seed)
    text[TOKENIZER_KEY] = _as_bytes(_TOKENIZER.read_bytes())
    yield "text_encoders/tiny_umt5.safetensors", text
    older = _in_fp8(text, _is_umt5_fp8, "scale_weight", scale_shape)
    yield "text_encoders/tiny_umt5_fp8_scaled.safetensors", {**older, "scaled_fp8": torch.zeros(0, dtype=FP8)}
    newer = _in_fp8(text, _is_umt5_fp8, "weight_scale")
    tags = {f"{layer}.comfy_quant": _as_bytes(json.dumps(form).encode()) for layer, form in _formats(newer).items()}
    yield "text_encoders/tiny_umt5_fp8_tagged.safetensors", newer | tags
    audio = fill_all(shapes_of(build_wav2vec2(WAV2VEC2_SIZES)), seed)
    yield "audio_encoders/tiny_wav2vec2.safetensors", audio

    lora = _lora(seed)
    yield "loras/tiny_lightning_lora.safetensors", lora
    yield "loras/tiny_lightning_lora_peft.safetensors", _as_peft(lora)


def _as_bytes(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def _is_dit_fp8(key: str) -> bool:
    return key.startswith(("blocks.", "audio_injector."))


def _is_umt5_fp8(key: str) -> bool:
    return ("SelfAttention" in key and "relative" not in key) or "DenseReluDense" in key


def _in_fp8(weights: Weights, is_fp8: Callable[[str], bool], scale_name: str, shape: tuple[int, ...] = ()) -> Weights:
    """Store the chosen matrices in fp8, each beside the float32 number that scales it back."""
    stored = dict(weights)
    for key, value in weights.items():
        if key.endswith(".weight") and value.ndim == 2 and is_fp8(key):
            scale = value.abs().max() / FP8_MAX
            stored[key] = (value / scale).to(FP8)
            stored[f"{key.removesuffix('.weight')}.{scale_name}"] = scale.reshape(shape)
    return stored


def _formats(stored: Weights) -> dict[str, dict[str, str]]:
    """Return each fp8 layer's format, as files of the newer layout say it."""
    return {key.removesuffix(".weight"): {"format": "float8_e4m3fn"} for key in stored if stored[key].dtype == FP8}


def _lora(seed: int) -> Weights:
    """Make a LoRA in the layout of the Lightning files; keys of two blocks and one layer have no home."""
    dim, ffn_dim = DIT.dim, DIT.ffn_dim
    square = ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "cross_attn.q", "cross_attn.v")
    layers = {**dict.fromkeys(square, (dim, dim)), "ffn.0": (ffn_dim, dim), "ffn.2": (dim, ffn_dim)}
    lora: Weights = {}
    for block in range(LORA_BLOCKS):
        prefix = f"diffusion_model.blocks.{block}"
        for layer, (outputs, inputs) in layers.items():
            path = f"{prefix}.{layer}"
            lora[f"{path}.lora_down.weight"] = uniform(seed, path + "d", (LORA_RANK, inputs)) * 0.1
            lora[f"{path}.lora_up.weight"] = uniform(seed, path + "u", (outputs, LORA_RANK)) * 0.5
            lora[f"{path}.alpha"] = torch.tensor(2.0 if block % 2 else float(LORA_RANK))
        lora[f"{prefix}.self_attn.q.diff_b"] = uniform(seed, f"db{block}", (dim,)) * 0.2
        lora[f"{prefix}.norm3.diff"] = uniform(seed, f"d{block}", (dim,)) * 0.1
    homeless = "diffusion_model.img_emb.proj.1"
    lora[f"{homeless}.lora_down.weight"] = torch.zeros(LORA_RANK, 64)
    lora[f"{homeless}.lora_up.weight"] = torch.zeros(64, LORA_RANK)
    return lora


def _as_peft(lora: Weights) -> Weights:
    """Rename a LoRA's keys to PEFT's, with alpha / r folded into the first factor."""
    peft: Weights = {}
    for key, value in lora.items():
        path = key.removesuffix(".lora_down.weight")
        if path != key:
            alpha = lora.get(f"{path}.alpha")
            peft[f"{path}.lora_A.weight"] = value * (1.0 if alpha is None else float(alpha) / LORA_RANK)
            peft[f"{path}.lora_B.weight"] = lora[f"{path}.lora_up.weight"]
        elif key.endswith((".diff", ".diff_b")):
            peft[key] = value
    return peft
