"""The stored reference outputs, and the figure that says how near we are to them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn

from s2v_flow.demo.plan import fill_all
from s2v_flow.models.conditioning import Branch, Conditioning, PreparedChunk
from s2v_flow.models.dit import WanS2V

GOLDEN = Path(__file__).parent / "golden"


def load_golden(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """Return the tensors `in.*` and `out.*` of golden/<name>.safetensors, and the metadata's `case`."""
    inputs, outputs = {}, {}
    with safe_open(GOLDEN / f"{name}.safetensors", framework="pt") as file:
        case = json.loads((file.metadata() or {}).get("case", "{}"))
        for key in file.keys():  # noqa: SIM118 (safe_open is no mapping)
            side, _, rest = key.partition(".")
            {"in": inputs}.get(side, outputs)[rest if side in ("in", "out") else key] = file.get_tensor(key)
    return inputs, outputs, case


def load_keys(name: str) -> dict[str, tuple[int, ...]]:
    """Return a full-size checkpoint's keys and shapes from golden/keys/<name>.json."""
    return {key: tuple(shape) for key, shape in json.loads((GOLDEN / "keys" / f"{name}.json").read_text()).items()}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return ||actual - expected|| / ||expected|| in float64; shapes must be equal."""
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} != {tuple(expected.shape)}"
    difference = (actual.double() - expected.double()).norm()
    return float(difference / expected.double().norm())


def fill_module(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give a module (on the meta device or not) the deterministic weights, strictly, and put it into eval mode."""
    shapes = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    module.load_state_dict(fill_all(shapes, seed), strict=True, assign=True)
    return module.eval().requires_grad_(False)


def prepare_case(
    model: WanS2V, name: str, inputs: dict[str, Tensor], case: Mapping[str, Any], device: str = "cpu"
) -> tuple[PreparedChunk, Branch]:
    """Prepare the chunk and the branch of a golden case of the diffusion transformer, on a device."""
    conditioning: Conditioning = "official" if name.startswith("dit_official") else "comfyui"
    batch_size, _, num_latent_frames, height, width = inputs["x"].shape
    chunk = model.prepare_chunk(
        num_latent_frames=num_latent_frames,
        height=height,
        width=width,
        reference_latent=inputs.get("reference_latent"),
        motion_latent=None if case.get("drop_motion") else inputs.get("reference_motion"),
        control_latent=inputs.get("control_video"),
        conditioning=conditioning,
        batch_size=batch_size,
        device=device,
    )
    audio = model.prepare_audio(
        inputs.get("audio_embed"), num_latent_frames=num_latent_frames, conditioning=conditioning
    )
    return chunk, Branch(model.prepare_text(inputs["context"]), audio)
