"""The transformer block and the head of the DiT.

The residual stream is float32; what enters a matrix is cast to the dtype that the model computes in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s2v_flow.models.attention import CrossAttention, KeysValues, SelfAttention
from s2v_flow.models.float32 import LayerNorm
from s2v_flow.models.modulation import EPS, Segments, add_gated_, modulate_, split_rows


@dataclass(frozen=True)
class Step:
    """What every block of one forward pass shares.

    time: projected timesteps, float32 [B + 1, 6, D]; the last row is time 0.
    num_noisy: how many tokens, from the first, see the timestep.
    rotations: complex64 [L, 1, K / 2].
    dtype: what matrices and attention compute in.
    """

    time: Tensor
    num_noisy: int
    rotations: Tensor
    dtype: torch.dtype


class Block(nn.Module):
    """Self-attention, cross-attention to the text, feed-forward.

    Source: Wan2.2, wan/modules/model.py, WanAttentionBlock.
    """

    def __init__(self, dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.self_attn = SelfAttention(dim)
        self.norm3 = LayerNorm(dim, eps=EPS)
        self.cross_attn = CrossAttention(dim)
        self.ffn = nn.Sequential(nn.Linear(dim, ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(ffn_dim, dim))
        self.modulation = nn.Parameter(torch.zeros(1, 6, dim))

    def forward(
        self, hidden: Sequence[Tensor], texts: Sequence[KeysValues], step: Step, *, num_kept: int
    ) -> list[Tensor]:
        """Run the block for every branch of guidance.

        Args:
            hidden: One residual stream per branch, float32 [B, L, D], or a single one that all branches still share:
                then self-attention runs once. Overwritten.
            texts: Keys and values of each branch's text, one per branch.
            step: What the forward pass shares.
            num_kept: How many tokens, from the first, are asked for: all, or fewer after the last block.

        Returns:
            One stream per branch, float32 [B, num_kept, D].
        """
        rows = self.modulation.float() + step.time  # [B+1, 6, D]
        shift1, scale1, gate1, shift2, scale2, gate2 = split_rows(rows, step.num_noisy)
        streams = []
        for x in hidden:
            tokens = _modulated(x, shift1, scale1, step.dtype)
            kept = x[:, :num_kept]
            streams.append(add_gated_(kept, self.self_attn(tokens, step.rotations, num_kept), gate1))
            del tokens  # else held to the block's end
        if len(streams) < len(texts):
            streams += [streams[0].clone() for _ in texts[1:]]
        for x, text in zip(streams, texts, strict=True):
            x += self.cross_attn(self.norm3(x).to(step.dtype), text)
            add_gated_(x, self.ffn(_modulated(x, shift2, scale2, step.dtype)), gate2)
        return streams


class Head(nn.Module):
    """The last norm and the projection from tokens to patches.

    Source: Wan2.2, wan/modules/model.py, Head.
    """

    def __init__(self, dim: int, patch_values: int) -> None:
        super().__init__()
        self.head = nn.Linear(dim, patch_values)
        self.modulation = nn.Parameter(torch.zeros(1, 2, dim))

    def forward(self, x: Tensor, time: Tensor, num_noisy: int, dtype: torch.dtype) -> Tensor:
        """Project tokens to the values of their patches.

        Args:
            x: float32 [B, L, D].
            time: Timestep embeddings before projection, float32 [B + 1, D]; the last row is time 0.
            num_noisy: How many tokens, from the first, see the timestep.
            dtype: What the projection computes in.

        Returns:
            float32 [B, L, values per patch].
        """
        shift, scale = split_rows(self.modulation.float() + time.unsqueeze(1), num_noisy)
        patches: Tensor = self.head(_modulated(x, shift, scale, dtype))
        return patches.float()


def _modulated(x: Tensor, shift: Segments, scale: Segments, dtype: torch.dtype) -> Tensor:
    return modulate_(F.layer_norm(x, x.shape[-1:], eps=EPS), shift, scale).to(dtype)
