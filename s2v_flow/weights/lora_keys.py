"""The spellings of LoRA files: which layer a key changes, and what it is of the change.

Trainers and converters write the layer's path with dots or underscores, behind one of a dozen prefixes, in Wan's own
names or in diffusers', and the factors in kohya's, PEFT's or LyCORIS' words, PEFT's with an adapter's name in between.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache

# Role by what stands behind the layer's path. PEFT puts an adapter's name before `.weight`.
_FACTORS = re.compile(
    r"(?P<path>.+?)[._](?P<role>lora_down|lora_up|lora_A|lora_B|lora\.down|lora\.up|lora_linear_layer\.down"
    r"|lora_linear_layer\.up|lora_magnitude_vector)(?:\.(?!weight$)[\w-]+)?(?:\.weight)?"
)
_OTHERS = re.compile(
    r"(?P<path>.+?)\.(?P<role>alpha|diff|diff_b|dora_scale|lokr_w1|lokr_w2|lokr_w1_a|lokr_w1_b|lokr_w2_a|lokr_w2_b"
    r"|hada_w1_a|hada_w1_b|hada_w2_a|hada_w2_b)(?:\.weight)?"
)
_ROLES = {
    **dict.fromkeys(("lora_down", "lora_A", "lora.down", "lora_linear_layer.down"), "down"),
    **dict.fromkeys(("lora_up", "lora_B", "lora.up", "lora_linear_layer.up"), "up"),
    **dict.fromkeys(("dora_scale", "lora_magnitude_vector"), "magnitude"),
}
_METHODS = re.compile(
    r"\.(?:(?P<oft>oft_)|(?P<boft>boft_)|(?P<glora>[ab][12]\.weight$)|(?P<tucker>lokr_t[12]|hada_t[12]|lora_mid))"
)
_METHOD_NAMES = {"oft": "OFT", "boft": "BOFT", "glora": "GLoRA", "tucker": "LoRA with a Tucker core"}

_PREFIXES = re.compile(
    r"(?:base_model[._]model[._]|model[._]diffusion_model[._]|diffusion_model[._]|transformer[._]|pipe[._]dit[._]|dit[._]"
    r"|unet[._]|module[._]|_orig_mod[._]|model[._]|lora_unet_+|lora_transformer_+|lycoris_+)+"
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
    """Take a LoRA's key apart.

    Returns:
        The layer's path as written, and the role: down, up, alpha, diff, diff_b, magnitude, lokr_w1 ... hada_w2_b; None
        for a key that is none of a LoRA.
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
        name = _collapsed(path)
        bare = _collapsed(_PREFIXES.sub("", path, count=1) if _PREFIXES.match(path) else path)
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
