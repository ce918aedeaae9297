"""What the DiT is conditioned on, prepared: everything that stays the same from one denoising step to the next.

These are read-only: a forward pass never writes to them, so one prepared state serves any number of steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from s2v_flow.models.attention import KeysValues

Conditioning = Literal["official", "comfyui"]
"""Whose numbers: the authors' (what the model was trained with) or ComfyUI's (audio and motion positions differ)."""


@dataclass(frozen=True)
class PreparedText:
    """A prompt, once per prompt: the keys and values of every block's cross-attention, each [B or 1, N, S, K]."""

    blocks: tuple[KeysValues, ...]


@dataclass(frozen=True)
class InjectedAudio:
    """What one injector adds to the video: keys and values of each frame's tokens, and the scale and shift of its norm.

    keys, values: [B or 1, F, N, 5, K], in the dtype to compute in.
    scale, shift: float32 [B or 1, F, 1, D]; the scale has one added already.
    """

    keys: Tensor
    values: Tensor
    scale: Tensor
    shift: Tensor


@dataclass(frozen=True)
class PreparedAudio:
    """A chunk's audio, once per chunk and branch: by index of the block that it is injected after."""

    blocks: Mapping[int, InjectedAudio]


@dataclass(frozen=True)
class Branch:
    """One side of guidance: what the velocity is conditioned on. No audio: nothing is injected."""

    text: PreparedText
    audio: PreparedAudio | None = None


@dataclass(frozen=True)
class PreparedChunk:
    """A chunk's geometry and tokens other than the noisy ones, once per chunk. Tokens run: video, reference, motion.

    latent_shape: the shape (B, C, F, H, W) of what is denoised.
    conditioning: whose numbers.
    num_video_tokens: F (H / 2) (W / 2).
    num_noisy_tokens: how many tokens, from the first, see the timestep; the others see time 0.
    video_offset: what is added to the embedded video, float32 [B or 1, L video or 1, D]: control tokens and mask.
    still_tokens: embedded reference and motion, masks added, float32 [B, L still, D]; L still may be 0.
    rotations: complex64 [L, 1, K / 2].
    """

    latent_shape: tuple[int, int, int, int, int]
    conditioning: Conditioning
    num_video_tokens: int
    num_noisy_tokens: int
    video_offset: Tensor
    still_tokens: Tensor
    rotations: Tensor


def require_conditioning(value: str) -> None:
    """Raise ValueError unless `value` is one of the two conditionings."""
    if value not in get_args(Conditioning):
        raise ValueError(f"conditioning: expected one of {', '.join(get_args(Conditioning))}, got {value!r}")


def require_shape(name: str, tensor: Tensor, *expected: int | tuple[int, ...] | None) -> None:
    """Raise ValueError unless a tensor has the expected shape.

    Args:
        name: What the tensor is, for the message.
        tensor: The tensor.
        expected: Per dimension a size, a choice of sizes, or None for any size but 0.
    """
    choices = [(size,) if isinstance(size, int) else size for size in expected]
    fits = tensor.ndim == len(choices) and all(
        size > 0 if choice is None else size in choice for size, choice in zip(tensor.shape, choices, strict=True)
    )
    if not fits:
        text = ", ".join(
            "any" if choice is None else " or ".join(map(str, dict.fromkeys(choice))) for choice in choices
        )
        raise ValueError(f"{name}: expected shape [{text}], got {list(tensor.shape)}")
