"""What kind of model a file holds, by its keys and shapes: ours, and those that people have beside them.

Source: the keys of the files that ComfyUI, transformers, diffusers and the models' authors publish.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from s2v_flow.weights.header import convert_command
from s2v_flow.weights.names import is_lora
from s2v_flow.weights.reader import Shapes

_WAN = ("head.modulation", "blocks.0.self_attn.q.weight")
# In order: the first row fits whose keys the file has, all of them.
_FAMILIES: Sequence[tuple[str, tuple[str, ...]]] = (
    ("wan s2v", ("casual_audio_encoder.encoder.final_linear.weight",)),
    ("wan s2v", ("audio_injector.injector.0.q.weight", "head.modulation")),  # damaged: what it lacks is named later
    ("wan animate", (*_WAN, "pose_patch_embedding.weight")),
    ("wan vace", (*_WAN, "vace_patch_embedding.weight")),
    ("wan humo", (*_WAN, "audio_proj.audio_proj_glob_1.layer.weight")),
    ("wan infinitetalk", (*_WAN, "audio_proj.proj1.weight")),
    ("wan fun control", (*_WAN, "ref_conv.weight")),
    ("wan fun camera", (*_WAN, "control_adapter.conv.weight")),
    ("wan i2v", (*_WAN, "img_emb.proj.0.weight")),
    ("wan t2v", _WAN),
    ("vace module", ("vace_patch_embedding.weight",)),
    ("infinitetalk module", ("audio_proj.proj1.weight",)),
    ("diffusers wan", ("condition_embedder.time_embedder.linear_1.weight",)),
    ("flux or hunyuan video", ("double_blocks.0.img_attn.qkv.weight",)),
    ("flux or hunyuan video", ("double_blocks.0.img_attn_qkv.weight",)),
    ("stable diffusion unet", ("input_blocks.0.0.weight",)),
    ("qwen image", ("transformer_blocks.0.img_mod.1.weight",)),
    ("ltx video", ("transformer_blocks.0.attn1.to_q.weight", "scale_shift_table")),
    ("wan vae", ("decoder.head.0.gamma",)),
    ("wan vae", ("decoder.middle.1.to_qkv.weight", "encoder.head.0.gamma")),
    ("diffusers wan vae", ("decoder.mid_block.resnets.0.norm1.gamma",)),
    ("image vae", ("decoder.mid.block_1.conv1.weight",)),
    ("image vae", ("decoder.mid_block.resnets.0.conv1.weight",)),
    ("umt5 encoder", ("encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight",)),
    ("t5 encoder", ("encoder.block.1.layer.0.SelfAttention.q.weight",)),
    ("umt5 encoder", ("encoder.block.0.layer.0.SelfAttention.q.weight",)),
    ("clip vision encoder", ("vision_model.encoder.layers.0.self_attn.q_proj.weight",)),
    ("clip vision encoder", ("visual.transformer.resblocks.0.attn.in_proj_weight",)),
    ("clip text encoder", ("text_model.encoder.layers.0.self_attn.q_proj.weight",)),
    ("clip text encoder", ("transformer.resblocks.0.attn.in_proj_weight",)),
    ("language model", ("model.layers.0.self_attn.q_proj.weight",)),
    ("language model", ("model.language_model.layers.0.self_attn.q_proj.weight",)),
    ("bert encoder", ("embeddings.word_embeddings.weight",)),
    ("wavlm", ("encoder.layers.0.attention.gru_rel_pos_const",)),
    ("hubert", ("hubert.feature_extractor.conv_layers.0.conv.weight",)),
    ("fairseq wav2vec2", ("feature_extractor.conv_layers.0.0.weight",)),
    ("whisper", ("encoder.layers.0.self_attn.q_proj.weight", "encoder.conv1.weight")),
    ("whisper", ("model.encoder.layers.0.self_attn.q_proj.weight", "model.encoder.conv1.weight")),
    ("whisper", ("encoder.blocks.0.attn.query.weight",)),
    ("wav2vec2", ("feature_extractor.conv_layers.0.conv.weight",)),
    ("wav2vec2", ("feature_projection.projection.weight", "encoder.pos_conv_embed.conv.bias")),
    ("upscaler", ("body.0.rdb1.conv1.weight",)),
    ("upscaler", ("model.1.sub.0.RDB1.conv1.0.weight",)),
)  # fmt: skip
_LACKS: Mapping[str, str] = {
    "wan s2v": "audio_injector.*",
    "wan vae": "decoder.head.0.gamma of the 16-channel VAE",
    "umt5 encoder": "encoder.block.*.SelfAttention.relative_attention_bias",
    "wav2vec2": "feature_extractor.conv_layers.*",
    "lora": "lora_down, lora_up, lora_A or lora_B",
}
BELONGS: Mapping[str, str] = {
    "wan s2v": "the checkpoint of a load_diffusion_model node",
    "wan vae": "a load_vae node",
    "umt5 encoder": "a load_text_encoder node",
    "wav2vec2": "a load_audio_encoder node",
    "lora": "the loras of a load_diffusion_model node",
}
FAMILIES: Mapping[str, str] = {
    **dict.fromkeys(("diffusion_models", "unet"), "wan s2v"),
    **dict.fromkeys(("text_encoders", "clip"), "umt5 encoder"),
    "audio_encoders": "wav2vec2",
    "vae": "wan vae",
    "loras": "lora",
}
"""What the folders of ComfyUI hold."""
_EXAMPLES: Mapping[str, str] = {
    "wan s2v": "wan2.2_s2v_14B_fp8_scaled.safetensors",
    "wan vae": "wan_2.1_vae.safetensors",
    "umt5 encoder": "umt5_xxl_fp8_e4m3fn_scaled.safetensors",
    "wav2vec2": "wav2vec2_large_english_fp16.safetensors",
}
# How an all-in-one checkpoint names the parts beside its diffusion model.
_PARTS: Sequence[tuple[str, str]] = (
    ("first_stage_model.", "vae"),
    ("vae.", "vae"),
    ("text_encoders.umt5xxl.transformer.", "text_encoder"),
    ("text_encoders.", "text_encoder"),
    ("cond_stage_model.", "text_encoder"),
    ("conditioner.", "text_encoder"),
)
_DIFFUSION_PREFIX = "model.diffusion_model."
KINDS: Mapping[str, str] = {
    "text_encoder": "umt5 encoder",
    "vae": "wan vae",
    "diffusion_model": "wan s2v",
    "audio_encoder": "wav2vec2",
}


def detect_family(shapes: Shapes) -> str:
    """Say what kind of model a file holds, from its keys, without the file's prefix, and shapes.

    Returns "lora", "all-in-one", "wan s2v", "wan vae", "umt5 encoder", "wav2vec2", the name of another family, or
    "unknown (...)" with the first key.
    """
    if is_lora(shapes):
        return "lora"
    if is_all_in_one(shapes):
        return "all-in-one"
    found = next((name for name, keys in _FAMILIES if all(key in shapes for key in keys)), None)
    if found == "wan t2v":
        channels = (*shapes.get("patch_embedding.weight", ()), 0, 0)[1]
        return {36: "wan i2v", 48: "wan ti2v 5b"}.get(channels, found)
    if found == "wan vae":
        channels = (*shapes.get("conv2.weight", (16,)), 0)[0]
        return {16: found, 48: "wan 2.2 vae"}.get(channels, f"video vae of {channels} channels")
    has_norm = [f"feature_extractor.conv_layers.{index}.layer_norm.weight" in shapes for index in (0, 1)]
    if found == "wav2vec2" and has_norm == [True, False]:
        is_base = "encoder.layers.12.final_layer_norm.weight" not in shapes
        return "wav2vec2 base" if is_base else "wav2vec2 with group norm"
    if not shapes:
        return "unknown and empty"
    return found or f"unknown ({len(shapes)} tensors, the first {min(shapes)!r})"


def describe_mismatch(wanted: str, shapes: Shapes) -> str | None:
    """Explain why a file is not of the wanted family, naming what it lacks, by its shapes without the file's prefix.

    Returns a clause ("this is a wan t2v checkpoint: it has no audio_injector.*"), or None if the family fits.
    """
    found = detect_family(shapes)
    if found == wanted:
        return None
    if found == "all-in-one":
        parts = ", ".join(sorted(f"{kind} ({detect_family(part)})" for kind, part in parts_of(shapes).items()))
        return f"this is an all-in-one checkpoint of several models: {parts}"
    if found == "wav2vec2 base":
        return "this is a wav2vec2 base model, not large: only its first convolution has a norm"
    is_unknown = found.startswith("unknown")
    article = "an" if is_unknown or found[0] in "aeio" else "a"
    return f"this is {article} {found} {'file' if is_unknown else 'checkpoint'}: it has no {_LACKS[wanted]}"


def advice(path: Path, wanted: str, shapes: Shapes, node: str) -> str:
    """Return what to do about a file that is not of the wanted family, by its shapes without the file's prefix."""
    found = detect_family(shapes)
    kind = next((kind for kind, family in KINDS.items() if family == wanted), None)
    if found == "all-in-one" and kind is not None and detect_family(parts_of(shapes).get(kind, {})) == wanted:
        target = path.with_name(f"{path.stem}-{kind}.safetensors")
        return f"take its {kind} out: {convert_command(path, target, '--kind', kind)}"
    example = f", such as {_EXAMPLES[wanted]}" if wanted in _EXAMPLES else ""
    where = f"; this one belongs in {BELONGS[found]}" if found in BELONGS else ""
    return f"name another file in node {node}{example}{where}"


def is_all_in_one(keys: Iterable[str]) -> bool:
    """Tell whether a file holds parts of a pipeline beside, or instead of, a diffusion model."""
    prefixes = tuple(prefix for prefix, _ in _PARTS)
    return any(key.startswith(prefixes) for key in keys)


def part_of(key: str) -> tuple[str, str]:
    """Return which kind of model a key of an all-in-one checkpoint belongs to, and the key in a file of that kind."""
    for prefix, kind in _PARTS:
        if key.startswith(prefix):
            return kind, key.removeprefix(prefix)
    return "diffusion_model", key.removeprefix(_DIFFUSION_PREFIX)


def parts_of(shapes: Shapes) -> dict[str, dict[str, tuple[int, ...]]]:
    """Sort an all-in-one checkpoint's tensors by the kind of model that they belong to."""
    parts: dict[str, dict[str, tuple[int, ...]]] = {}
    for key, shape in shapes.items():
        kind, own = part_of(key)
        parts.setdefault(kind, {})[own] = shape
    return parts
