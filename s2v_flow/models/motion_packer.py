"""FramePack: the past, packed into few tokens; the older, the coarser."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s2v_flow.models.conditioning import Conditioning
from s2v_flow.models.float32 import PatchEmbedding
from s2v_flow.models.rope import Grid, Positions

MOTION_FRAMES = 19


@dataclass(frozen=True)
class Bucket:
    """A stretch of the past and how it is packed.

    num_frames: latent frames.
    patch: latent frames, rows and columns that make one token.
    start_time: the position of its oldest token; the video starts at 0.
    """

    num_frames: int
    patch: tuple[int, int, int]
    start_time: int


BUCKETS = (
    Bucket(1, (1, 2, 2), -1),
    Bucket(2, (2, 4, 4), -3),
    Bucket(16, (4, 8, 8), -19),
)  # newest first, as tokens run


class MotionPacker(nn.Module):
    """Pack the last 19 latent frames of the video so far into tokens.

    Source: L. Zhang and M. Agrawala, 2025, section 3.1; Wan2.2, wan/modules/s2v/motioner.py, FramePackMotioner.
    """

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.proj, self.proj_2x, self.proj_4x = (PatchEmbedding(channels, dim, bucket.patch) for bucket in BUCKETS)

    def forward(self, motion_latent: Tensor) -> Tensor:
        """Pack the end of a latent; one shorter than 19 frames has zero frames put in front, which make tokens too.

        Args:
            motion_latent: Normalised, [B, C, any F, H, W], oldest frame first; H and W at least 8.

        Returns:
            Tokens, float32 [B, L motion, D]: of the newest frame, of the two before, of the sixteen before. Rows and
            columns past the last whole patch make no tokens.
        """
        recent = motion_latent[:, :, -MOTION_FRAMES:]
        recent = F.pad(recent, (0, 0, 0, 0, MOTION_FRAMES - recent.shape[2], 0))  # [B, C, 19, H, W]
        oldest, older, newest = torch.split(recent, [bucket.num_frames for bucket in reversed(BUCKETS)], dim=2)
        return torch.cat([self.proj(newest), self.proj_2x(older), self.proj_4x(oldest)], dim=1)


def motion_grids(height: int, width: int, conditioning: Conditioning) -> list[Grid]:
    """Place the motion tokens in time and space.

    ComfyUI's buckets step by one in time, at fractional places in space; the authors' step over their true span, at
    places truncated to integers.

    Args:
        height: Latent rows.
        width: Latent columns.
        conditioning: Whose places.

    Returns:
        One grid per bucket, in the order of the tokens.

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
