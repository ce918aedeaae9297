"""Tensors <-> an artifact's bytes, pixels <-> frames. Imports torch: only used inside run()."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from safetensors.torch import load, save
from torch import Tensor

from s2v_flow.graph.context import Artifact


def pack(tensors: Mapping[str, Tensor]) -> bytes:
    """Return tensors as a safetensors file's bytes; nothing run-specific is in them: equal tensors, equal bytes."""
    return save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})


def unpack(artifact: Artifact) -> dict[str, Tensor]:
    """Return an artifact's tensors, on the CPU."""
    return load(artifact.read())


def torch_dtype(precision: str) -> torch.dtype:
    """Return torch's dtype for "fp32", "bf16" or "fp16"; what fp8_fast does not multiply is in bfloat16."""
    return {"fp32": torch.float32, "fp16": torch.float16}.get(precision, torch.bfloat16)


def to_frames(pixels: Tensor) -> Tensor:
    """Turn decoded pixels into frames for people; `pixels`: [1, 3, T, 8H, 8W], about [-1, 1].

    Returns:
        uint8 [T, 8H, 8W, 3] on the CPU: (x + 1) / 2 clamped to [0, 1], times 255, rounded.
    """
    scaled = ((pixels[0].float() + 1) / 2).clamp(0, 1) * 255
    return scaled.round().to(torch.uint8).permute(1, 2, 3, 0).contiguous().cpu()  # [T, 8H, 8W, 3]


def to_pixels(images: Tensor) -> Tensor:
    """Turn images, float [T, 8H, 8W, 3] in [0, 1], into the VAE's pixels [1, 3, T, 8H, 8W] in [-1, 1]."""
    return (images.float() * 2 - 1).permute(3, 0, 1, 2)[None]
