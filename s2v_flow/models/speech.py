"""From the audio encoder's 50 states a second to the rows that the diffusion model takes, 16 a second."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

STATES_HZ = 50
INTERPOLATED_HZ = 30
VIDEO_HZ = 16


@dataclass(frozen=True)
class SpeechTable:
    """A voice at video rate, whatever the chunks' length.

    `rows` [T, A, E] holds row i for video frame i, as far as there is sound; `num_features_30hz` is the length of the
    30 Hz sequence from which they were picked, which says where a table of chunks ends.
    """

    rows: Tensor
    num_features_30hz: int

    def num_chunks(self, num_frames: int) -> int:
        """Return how many chunks of `num_frames` video frames the table has; the last is filled up with zeros."""
        return int(self.num_features_30hz / (num_frames * INTERPOLATED_HZ / VIDEO_HZ)) + 1


def to_video_rate(features: Tensor) -> SpeechTable:
    """Interpolate features to 30 Hz and pick the nearest for each video frame.

    Args:
        features: [A, T, E], 50 states a second.

    Returns:
        The table: row i is state round_half_to_even(1.875 i) of the 30 Hz sequence.

    Source: Wan2.2, wan/modules/s2v/audio_encoder.py, linear_interpolation and get_audio_embed_bucket_fps.
    """
    num_states = features.shape[1]
    length = int(num_states / STATES_HZ * INTERPOLATED_HZ)
    if length == 0:
        return SpeechTable(features.new_zeros(0, features.shape[0], features.shape[2]), 0)
    at_30hz = F.interpolate(features.transpose(1, 2), size=length, mode="linear", align_corners=True)  # [A, E, length]
    picks: list[int] = []
    while (pick := round(len(picks) * INTERPOLATED_HZ / VIDEO_HZ)) < length:
        picks.append(pick)
    rows = at_30hz[:, :, picks].permute(2, 0, 1).contiguous()  # [T, A, E]
    return SpeechTable(rows, length)


def chunk_embed(table: SpeechTable, offset: int, num_latent_frames: int) -> Tensor | None:
    """Take one chunk's rows.

    Args:
        table: The voice.
        offset: The chunk's first video frame, at least 0.
        num_latent_frames: The chunk's length F; it takes 4F video frames.

    Returns:
        [1, A, E, 4F], zeros past the sound, or None if the chunk begins past the table.
    """
    num_frames = 4 * num_latent_frames
    if offset >= table.num_chunks(num_frames) * num_frames:
        return None
    rows = table.rows[offset : offset + num_frames]
    rows = F.pad(rows, (0, 0, 0, 0, 0, num_frames - rows.shape[0]))  # [4F, A, E]
    return rows.permute(1, 2, 0)[None]  # [1, A, E, 4F]
