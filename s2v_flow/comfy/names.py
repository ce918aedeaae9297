"""Names: of nodes, from what people called them; of parameters, from the fields that they set; of LoRAs."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from types import MappingProxyType

_MAX = 40

PARAMS: Mapping[tuple[str, str], str] = MappingProxyType(
    {
        ("load_image", "file"): "image",
        ("load_audio", "file"): "audio",
        ("load_video", "file"): "video",
        ("encode_text", "text"): "prompt",
        ("encode_image", "width"): "width",
        ("encode_image", "height"): "height",
        ("sample", "width"): "width",
        ("sample", "height"): "height",
        ("sample", "length"): "length",
        ("sample", "steps"): "steps",
        ("sample", "cfg"): "cfg",
        ("sample", "seed"): "seed",
    }
)
"""What people turn: always a parameter. Of other values only those are that several fields share."""

PARAM_ORDER = ("image", "audio", "video", "prompt", "negative_prompt", "width", "height", "length", "steps", "cfg")


def param_name(kind: str, field: str, usual: str) -> str:
    """Return the usual name of a parameter for a field; negative prompts have their own."""
    name = PARAMS.get((kind, field), field)
    return "negative_prompt" if name == "prompt" and usual == "negative" else name


def slug(text: str) -> str:
    """Return a title as a name; empty where nothing of it can stand in one."""
    plain = re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")[:_MAX].strip("_")
    return f"n_{plain}" if plain[:1].isdigit() else plain


def unique(name: str, taken: Collection[str]) -> str:
    """Return the name, with a number behind it where it is taken; `params` is no name for a node."""
    name = "params_node" if name == "params" else name
    number, found = 1, name
    while found in taken:
        number += 1
        found = f"{name}_{number}"
    return found


def lora_id(title: str | None, file: str, taken: Collection[str]) -> str:
    """Return what a LoRA is called: by its title, else by its file."""
    stem = file.rsplit("/", 1)[-1].removesuffix(".safetensors")
    is_lightning = any(word in stem.lower() for word in ("lightning", "lightx2v"))
    return unique(slug(title or "") or ("lightning" if is_lightning else slug(stem)) or "lora", taken)
