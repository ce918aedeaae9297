"""What a model file's keys are called here: without the wrappers of frameworks, a text encoder's in ComfyUI's spelling.

Source: Wan-Video/Wan2.2, wan/modules/t5.py, T5Encoder; wan/configs/wan_s2v_14B.py; transformers, UMT5EncoderModel.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from s2v_flow.errors import CheckpointError
from s2v_flow.weights.lora_keys import is_lora

# Each family has one of these keys; what stands before it in a file is a prefix, if it is made of known words.
_MARKERS = (
    *("head.modulation", "decoder.head.0.gamma", "encoder.head.0.gamma", "blocks.0.ffn.gate.0.weight"),
    *("encoder.block.0.layer.0.SelfAttention.q.weight", "feature_extractor.conv_layers.0.conv.weight"),
    "block.0.layer.0.SelfAttention.q.weight",  # of a text encoder that was saved by itself
)
_WORDS = (
    *("model", "module", "net", "state_dict", "diffusion_model", "transformer", "unet", "pipe", "dit", "wav2vec2"),
    *("audio_encoder", "encoder", "text_encoder", "text_encoders", "cond_stage_model", "t5", "umt5", "umt5xxl"),
    *("t5xxl", "vae", "first_stage_model", "autoencoder"),
)
_PREFIX = re.compile(rf"(?:(?:{'|'.join(_WORDS)})\.)*")
_USUAL = ("model.diffusion_model.", "diffusion_model.", "wav2vec2.")  # for families that are not known here
_INNER = re.compile(r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")

_TEXT_PARTS = ("block.", "final_layer_norm.", "embed_tokens.")
_TEXT_KEYS = {"token_embedding": "shared", "norm": "encoder.final_layer_norm"}
_TEXT_BLOCK = re.compile(
    r"blocks\.([0-9]+)\.(norm[12]|attn\.[qkvo]|pos_embedding\.embedding|ffn\.(?:gate\.0|fc1|fc2))\."
)
_TEXT_LAYERS: Mapping[str, str] = {
    "norm1": "layer.0.layer_norm",
    **{f"attn.{name}": f"layer.0.SelfAttention.{name}" for name in "qkvo"},
    "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
    "norm2": "layer.1.layer_norm",
    "ffn.gate.0": "layer.1.DenseReluDense.wi_0",
    "ffn.fc1": "layer.1.DenseReluDense.wi_1",
    "ffn.fc2": "layer.1.DenseReluDense.wo",
}


def new_names(keys: Collection[str]) -> dict[str, str]:
    """Map each key of a file to the one that the loaders know; a LoRA's, and what has no other spelling, stay.

    Raises:
        CheckpointError: Two keys would become one.
    """
    if is_lora(keys):
        return {key: key for key in keys}
    names = {key: _INNER.sub("", key) for key in keys}
    prefix = _prefix(names.values())
    parts = prefix.split(".")
    # a head for another task stands outside some of the wrappers
    prefixes = [".".join(parts[:count]) + "." for count in range(len(parts) - 1, 0, -1)]
    for key, name in names.items():
        names[key] = name[len(next((found for found in prefixes if name.startswith(found)), "")) :]
    if "blocks.0.ffn.gate.0.weight" in names.values():
        names = {key: _text_name(name) for key, name in names.items()}
    elif "block.0.layer.0.SelfAttention.q.weight" in names.values():
        names = {key: f"encoder.{name}" if name.startswith(_TEXT_PARTS) else name for key, name in names.items()}
    firsts: dict[str, str] = {}
    for key, name in names.items():
        if firsts.setdefault(name, key) != key:
            raise CheckpointError(f"holds {name!r} twice, as {firsts[name]!r} and as {key!r}")
    return names


def _prefix(names: Collection[str]) -> str:
    found = {
        head
        for name in names
        if name.endswith(_MARKERS)
        for head in (name[: -len(marker)] for marker in _MARKERS if name.endswith(marker))
        if _PREFIX.fullmatch(head)
    }
    found -= {f"{prefix}encoder." for prefix in found}  # of a text encoder's two markers the longer one counts
    if len(found) == 1:
        return found.pop()
    return next((prefix for prefix in _USUAL if any(name.startswith(prefix) for name in names)), "")


def _text_name(name: str) -> str:
    match = _TEXT_BLOCK.match(name)
    if match is not None:
        return f"encoder.block.{match[1]}.{_TEXT_LAYERS[match[2]]}.{name[match.end() :]}"
    layer, dot, rest = name.partition(".")
    return _TEXT_KEYS.get(layer, layer) + dot + rest
