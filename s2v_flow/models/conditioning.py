"""What the DiT is conditioned on, prepared: everything that stays the same from one denoising step to the next.

These are read-only: a forward pass never writes to them, so one prepared state serves any number of steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s2v_flow.models.attention import Grid, Kernel, KeysValues, Positions
from s2v_flow.models.float32 import PatchEmbedding
from s2v_flow.models.footprint import MOTION_LATENT_FRAMES

Conditioning = Literal["official", "comfyui"]
"""Whose numbers: the authors' (what the model was trained with) or ComfyUI's (audio and motion positions differ)."""


@dataclass(frozen=True)
class PreparedText:
    """A prompt, once per prompt: the keys and values of every block's cross-attention, each [B or 1, N, S, K]."""

    blocks: tuple[KeysValues, ...]


@dataclass(frozen=True)
class InjectedAudio:
    """What one injector adds to the video: keys and values of each frame's tokens, scale and shift of its norm."""

    keys: Tensor  # [B or 1, F, N, 5, K], in the dtype to compute in
    values: Tensor  # alike
    scale: Tensor  # float32 [B or 1, F, 1, D], one added already
    shift: Tensor  # float32 [B or 1, F, 1, D]


@dataclass(frozen=True)
class PreparedAudio:
    """A chunk's audio, once per chunk and branch: by index of the block that it is injected after."""

    blocks: Mapping[int, InjectedAudio]


@dataclass(frozen=True)
class Branch:
    """One side of guidance: what the velocity is conditioned on. No audio: nothing is injected."""

    text: PreparedText
    audio: PreparedAudio | None = None


class Shard(Protocol):
    """A process's part of a chunk's tokens, where several processes share a forward pass: L' of L tokens."""

    def own(self, tokens: Tensor) -> Tensor:
        """Take this process's tokens [B, L', D] out of all, [B, L, D]."""

    def attend(self, kernel: Kernel, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Let its queries [B, N, L', K] attend to every process's keys and values: [B, N, L', K]."""

    def inject(self, injector: Callable[..., Tensor], video: Tensor, audio: InjectedAudio, *more: object) -> Tensor:
        """Call `injector(video, audio, *more)` for those of its tokens that are the video's."""

    def join(self, patches: Tensor) -> Tensor:
        """Put every process's patches, here [B, L', 64], together: those of the video, [B, L video, 64]."""


@dataclass(frozen=True)
class PreparedChunk:
    """A chunk's geometry and tokens other than the noisy ones, once per chunk. Tokens run: video, reference, motion."""

    latent_shape: tuple[int, int, int, int, int]  # (B, C, F, H, W) of what is denoised
    conditioning: Conditioning
    num_video_tokens: int  # F (H / 2) (W / 2)
    num_noisy_tokens: int  # how many tokens, from the first, see the timestep; the others see time 0
    video_offset: Tensor  # added to the embedded video: control tokens and mask, float32 [B or 1, L video or 1, D]
    still_tokens: Tensor  # embedded reference and motion, masks added, float32 [B, L still, D]; L still may be 0
    rotations: Tensor  # float32 [L, 1, K / 2, 2]
    shard: Shard | None = None  # this process's part: then the two numbers and the rotations are its own tokens'


def require_conditioning(value: str) -> None:
    """Raise ValueError unless `value` is one of the two conditionings."""
    if value not in get_args(Conditioning):
        raise ValueError(f"conditioning: expected one of {', '.join(get_args(Conditioning))}, got {value!r}")


def require_shape(name: str, tensor: Tensor, *expected: int | tuple[int, ...] | None) -> None:
    """Raise ValueError unless a tensor has a shape: per dimension a size, a choice of sizes, or None for any but 0."""
    choices = [(size,) if isinstance(size, int) else size for size in expected]
    fits = tensor.ndim == len(choices) and all(
        size > 0 if choice is None else size in choice for size, choice in zip(tensor.shape, choices, strict=True)
    )
    if not fits:
        text = ", ".join(
            "any" if choice is None else " or ".join(map(str, dict.fromkeys(choice))) for choice in choices
        )
        raise ValueError(f"{name}: expected shape [{text}], got {list(tensor.shape)}")


@dataclass(frozen=True)
class Bucket:
    """A stretch of the past and how it is packed."""

    num_frames: int  # latent frames
    patch: tuple[int, int, int]  # latent frames, rows and columns that make one token
    start_time: int  # the position of its oldest token; the video starts at 0


# newest first, as tokens run
BUCKETS = (Bucket(1, (1, 2, 2), -1), Bucket(2, (2, 4, 4), -3), Bucket(16, (4, 8, 8), -19))


class MotionPacker(nn.Module):
    """Pack the last 19 latent frames of the video so far into tokens.

    Source: L. Zhang and M. Agrawala, 2025, section 3.1; Wan2.2, wan/modules/s2v/motioner.py, FramePackMotioner.
    """

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.proj, self.proj_2x, self.proj_4x = (PatchEmbedding(channels, dim, bucket.patch) for bucket in BUCKETS)

    def forward(self, motion_latent: Tensor) -> Tensor:
        """Pack the end of a latent; one shorter than 19 frames has zero frames put in front, which make tokens too.

        `motion_latent`: normalised, [B, C, any F, H, W], oldest frame first; H and W at least 8.

        Returns tokens, float32 [B, L motion, D]: of the newest frame, of the two before, of the sixteen before. Rows
        and columns past the last whole patch make no tokens.
        """
        recent = motion_latent[:, :, -MOTION_LATENT_FRAMES:]
        recent = F.pad(recent, (0, 0, 0, 0, MOTION_LATENT_FRAMES - recent.shape[2], 0))  # [B, C, 19, H, W]
        oldest, older, newest = torch.split(recent, [bucket.num_frames for bucket in reversed(BUCKETS)], dim=2)
        return torch.cat([self.proj(newest), self.proj_2x(older), self.proj_4x(oldest)], dim=1)


def motion_grids(height: int, width: int, conditioning: Conditioning) -> list[Grid]:
    """Place the motion tokens in time and space: one grid per bucket, in the order of the tokens.

    ComfyUI's buckets step by one in time, at fractional places in space; the authors' step over their true span, at
    places truncated to integers. `height`, `width`: of the latent.

    Source: Wan2.2, wan/modules/s2v/s2v_utils.py, rope_precompute.
    """
    grids = []
    for bucket in BUCKETS:
        frames_per_token, rows_per_token, columns_per_token = bucket.patch
        num_times = bucket.num_frames // frames_per_token
        span = bucket.num_frames if conditioning == "official" else num_times
        times = bucket.start_time + np.linspace(0.0, span - 1.0, num_times)
        rows = _spread(height // 2, height // rows_per_token, conditioning)
        columns = _spread(width // 2, width // columns_per_token, conditioning)
        grids.append(Grid(times, rows, columns))
    return grids


def _spread(full: int, count: int, conditioning: Conditioning) -> Positions:
    places = np.linspace(0.0, full - 1.0, count)
    return np.trunc(places) if conditioning == "official" else places
