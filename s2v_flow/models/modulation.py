"""How the timestep reaches the tokens: its embedding, and shift, scale and gate by segment.

Noisy tokens see the timestep, the others time 0. Both are a row, applied to a slice: nothing is repeated per token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from s2v_flow.models.conditioning import Conditioning

FREQUENCY_WIDTH = 256
EPS = 1e-6


class Segments(NamedTuple):
    """A vector per segment: the first `num_noisy` tokens take `noisy` [B, 1, D], the others `still` [1, 1, D]."""

    noisy: Tensor
    still: Tensor
    num_noisy: int

    def slices(self, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Pair views of the tokens x [B, L, D] with the vector of their segment."""
        return [(x[:, : self.num_noisy], self.noisy), (x[:, self.num_noisy :], self.still)]


def split_rows(rows: Tensor, num_noisy: int) -> tuple[Segments, ...]:
    """Split rows [B + 1, vectors, D], the last of them for time 0, into one `Segments` per vector."""
    return tuple(Segments(row[:-1, None], row[-1:, None], num_noisy) for row in rows.unbind(1))


def timestep_embedding(timestep: Tensor, conditioning: Conditioning) -> Tensor:
    """Embed timesteps as cosines and sines.

    Args:
        timestep: sigma * 1000, floating point [B].
        conditioning: ComfyUI computes the angles in float32, the authors in float64.

    Returns:
        float32 [B, 256]: 128 cosines, then 128 sines.

    Source: A. Vaswani et al., 2017, section 3.5; Wan2.2, wan/modules/model.py, sinusoidal_embedding_1d.
    """
    half = FREQUENCY_WIDTH // 2
    dtype = torch.float64 if conditioning == "official" else torch.float32
    exponents = torch.arange(half, dtype=dtype, device=timestep.device) / -half
    angles = torch.outer(timestep.to(dtype), torch.pow(10000.0, exponents))  # [B, 128]
    return torch.cat([angles.cos(), angles.sin()], dim=1).float()


def modulate_(x: Tensor, shift: Segments, scale: Segments) -> Tensor:
    """Compute x * (1 + scale) + shift in place, segment by segment; x is float32 [B, L, D]."""
    for (tokens, factor), (_, offset) in zip(scale.slices(x), shift.slices(x), strict=True):
        tokens.mul_(1 + factor).add_(offset)
    return x


def add_gated_(x: Tensor, update: Tensor, gate: Segments) -> Tensor:
    """Compute x + update * gate in place, segment by segment; x is float32 [B, L, D], update may have fewer bits."""
    for (tokens, factor), (part, _) in zip(gate.slices(x), gate.slices(update), strict=True):
        tokens.add_(part * factor)
    return x
