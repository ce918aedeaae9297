"""What a model file's keys are called here: without the wrappers of frameworks, a text encoder's in ComfyUI's spelling.

Trainers and converters write the path of a LoRA's layer with dots or underscores, behind one of a dozen prefixes, in
Wan's own names or in diffusers', and the factors in kohya's, PEFT's or LyCORIS' words, PEFT's with an adapter's name in
between.

Source: Wan-Video/Wan2.2, wan/modules/t5.py, T5Encoder; wan/configs/wan_s2v_14B.py; transformers, UMT5EncoderModel.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from functools import lru_cache

from s2v_flow.errors import CheckpointError

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
_WRAPPERS = re.compile(r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")

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
    names = {key: _WRAPPERS.sub("", key) for key in keys}
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


# Role by what stands behind the layer's path. PEFT puts an adapter's name before `.weight`.
_FACTORS = re.compile(
    r"(?P<path>.+?)[._](?P<role>lora_down|lora_up|lora_A|lora_B|lora\.down|lora\.up|lora_linear_layer\.down"
    r"|lora_linear_layer\.up|lora_magnitude_vector)(?:\.(?!(?:weight|bias)$)[\w-]+)?(?:\.weight)?"
)
_OTHERS = re.compile(
    r"(?P<path>.+?)\.(?P<role>alpha|diff|diff_b|w_norm|b_norm|dora_scale|lokr_w1|lokr_w2|lokr_w1_a|lokr_w1_b"
    r"|lokr_w2_a|lokr_w2_b|hada_w1_a|hada_w1_b|hada_w2_a|hada_w2_b)(?:\.weight)?"
)
_ROLES = {
    **dict.fromkeys(("lora_down", "lora_A", "lora.down", "lora_linear_layer.down"), "down"),
    **dict.fromkeys(("lora_up", "lora_B", "lora.up", "lora_linear_layer.up"), "up"),
    **dict.fromkeys(("dora_scale", "lora_magnitude_vector"), "magnitude"),
    "w_norm": "diff",
    "b_norm": "diff_b",
}
_METHODS = re.compile(
    r"\.(?:(?P<oft>oft_)|(?P<boft>boft_)|(?P<glora>[ab][12]\.weight$)|(?P<tucker>lokr_t[12]|hada_t[12]|lora_mid)"
    r"|(?P<adalora>lora_E\b)|(?P<ia3>on_input$)|(?P<vera>vera_lambda_)|(?P<scalar>scalar$)|(?P<set>(?:set|reshape)_weight$))"
)
_METHOD_NAMES = {
    "oft": "OFT", "boft": "BOFT", "glora": "GLoRA", "adalora": "AdaLoRA", "ia3": "(IA)^3", "vera": "VeRA",
    "tucker": "LoRA with a Tucker core", "scalar": "LoRA with a scalar", "set": "LoRA that sets or reshapes weights",
}  # fmt: skip

_LORA_PREFIXES = re.compile(
    r"(?:(?:base_model|model|diffusion_model|transformer|pipe|dit|unet|module|net|generator|state_dict)[._]"
    r"|lora_unet_+|lora_transformer_+|lycoris_+)+"
)
# diffusers' names for Wan, collapsed, and Wan's
_DIFFUSERS = (
    ("_attn1_", "_self_attn_"),
    ("_attn2_", "_cross_attn_"),
    ("_norm2", "_norm3"),  # the norm before cross-attention
    ("_to_out_0", "_o"),
    *((f"_to_{name}", f"_{name}") for name in "qkv"),
    ("_ffn_net_0_proj", "_ffn_0"),
    ("_ffn_net_2", "_ffn_2"),
    ("condition_embedder_text_embedder_linear_1", "text_embedding_0"),
    ("condition_embedder_text_embedder_linear_2", "text_embedding_2"),
    ("condition_embedder_time_embedder_linear_1", "time_embedding_0"),
    ("condition_embedder_time_embedder_linear_2", "time_embedding_2"),
    ("condition_embedder_time_proj", "time_projection_1"),
    ("proj_out", "head_head"),
    ("scale_shift_table", "modulation"),
)


@lru_cache(maxsize=20_000)
def read_key(key: str) -> tuple[str, str] | None:
    """Take a LoRA's key apart: the layer's path as written, and the role; None for a key that is none of a LoRA.

    Roles are down, up, alpha, diff, diff_b, magnitude, lokr_w1 ... hada_w2_b.
    """
    match = _FACTORS.fullmatch(key) or _OTHERS.fullmatch(key)
    return None if match is None else (match["path"], _ROLES.get(match["role"], match["role"]))


def is_lora(keys: Iterable[str]) -> bool:
    """Tell whether a file's keys are those of a LoRA, or of a related method."""
    return any((read_key(key) or ("", "alpha"))[1] != "alpha" or other_method(key) for key in keys)


def other_method(key: str) -> str | None:
    """Name the method of a key that is of none that is supported; None for all other keys."""
    match = _METHODS.search(key)
    return None if match is None else _METHOD_NAMES[match.lastgroup or ""]


class Layers:
    """A model's parameters, found by what LoRA files call their layers."""

    def __init__(self, parameters: Iterable[str]) -> None:
        self._by_name = {_collapsed(name.removesuffix(".weight")): name for name in parameters}

    def parameter(self, path: str, role: str) -> str | None:
        """Return the parameter that a key changes, or None where the model has none of that name."""
        path = _WRAPPERS.sub("", path)
        name = _collapsed(path)
        bare = _collapsed(_LORA_PREFIXES.sub("", path, count=1) if _LORA_PREFIXES.match(path) else path)
        for found in dict.fromkeys((name, bare, _from_diffusers(bare))):
            wanted = f"{found}_bias" if role == "diff_b" else found
            if wanted in self._by_name:
                return self._by_name[wanted]
        return None


def _collapsed(path: str) -> str:
    return path.replace(".", "_")


def _from_diffusers(name: str) -> str:
    marked = f"_{name}"
    for theirs, ours in _DIFFUSERS:
        marked = marked.replace(theirs, ours)
    return marked.removeprefix("_")
