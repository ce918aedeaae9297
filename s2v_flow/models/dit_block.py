"""The transformer block and the head of the DiT.

The residual stream is float32; what enters a matrix is cast to the dtype that the model computes in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s2v_flow.models.attention import CrossAttention, Kernel, KeysValues, SelfAttention
from s2v_flow.models.conditioning import Conditioning
from s2v_flow.models.float32 import LayerNorm

FREQUENCY_WIDTH = 256
EPS = 1e-6
_GELU = 2 * (2 / math.pi) ** 0.5


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
    """Embed timesteps as 128 cosines and then 128 sines, float32 [B, 256].

    Args:
        timestep: sigma * 1000, floating point [B].
        conditioning: ComfyUI computes the angles in float32, the authors in float64.

    Source: A. Vaswani et al., 2017, section 3.5; Wan2.2, wan/modules/model.py, sinusoidal_embedding_1d.
    """
    half = FREQUENCY_WIDTH // 2
    dtype = torch.float64 if conditioning == "official" else torch.float32
    exponents = torch.arange(half, dtype=dtype, device=timestep.device) / -half
    angles = torch.outer(timestep.to(dtype), torch.pow(10000.0, exponents))  # [B, 128]
    return torch.cat([angles.cos(), angles.sin()], dim=1).float()


def modulated_norm(x: Tensor, shift: Segments, scale: Segments, dtype: torch.dtype) -> Tensor:
    """Compute norm(x) * (1 + scale) + shift, segment by segment, in one pass: [B, L, D], of `dtype`.

    `x`: float32 [B, L, D].
    """
    samples = []
    for sample, factor, offset in zip(x, 1 + scale.noisy[:, 0], shift.noisy[:, 0], strict=True):
        y = F.layer_norm(sample, factor.shape, factor, offset, EPS)  # [L, D]
        if scale.num_noisy < len(sample):
            still = sample[scale.num_noisy :]  # few: they are computed twice rather than all copied
            y[scale.num_noisy :] = F.layer_norm(still, factor.shape, 1 + scale.still[0, 0], shift.still[0, 0], EPS)
        samples.append(y.to(dtype))
    return samples[0][None] if len(samples) == 1 else torch.stack(samples)


def add_gated_(x: Tensor, update: Tensor, gate: Segments) -> Tensor:
    """Compute x + update * gate in place, segment by segment; x is float32 [B, L, D], update may have fewer bits."""
    for (tokens, factor), (part, _) in zip(gate.slices(x), gate.slices(update.float()), strict=True):
        tokens.addcmul_(part, factor)
    return x


class Gelu(nn.GELU):
    """GELU by tanh, which overwrites its input on a CPU, as x sigmoid(2 z), some rows at a time: they stay in cache.

    z = sqrt(2 / pi) (x + 0.044715 x^3), as tanh has it: (1 + tanh z) / 2 is sigmoid(2 z), whose exponential is cheaper.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return the GELU of x [B, L, width], computed in float32, in its dtype."""
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            return F.gelu(x, approximate="tanh")
        for rows in torch.split(x.flatten(0, -2), 64):
            values = rows.float()
            gates = values.square().mul_(_GELU * 0.044715).add_(_GELU).mul_(values).sigmoid_()
            torch.mul(values, gates, out=rows) if rows is values else rows.copy_(gates.mul_(values))
        return x


@dataclass(frozen=True)
class Step:
    """What every block of one forward pass shares.

    time: projected timesteps, float32 [B + 1, 6, D]; the last row is time 0.
    num_noisy: how many tokens, from the first, see the timestep.
    rotations: float32 [L, 1, K / 2, 2].
    dtype: what matrices and attention compute in.
    kernel: what computes self-attention; None: torch.
    """

    time: Tensor
    num_noisy: int
    rotations: Tensor
    dtype: torch.dtype
    kernel: Kernel | None = None


class Block(nn.Module):
    """Self-attention, cross-attention to the text, feed-forward.

    Source: Wan2.2, wan/modules/model.py, WanAttentionBlock.
    """

    def __init__(self, dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.self_attn = SelfAttention(dim)
        self.norm3 = LayerNorm(dim, eps=EPS)
        self.cross_attn = CrossAttention(dim)
        self.ffn = nn.Sequential(nn.Linear(dim, ffn_dim), Gelu(), nn.Linear(ffn_dim, dim))
        self.modulation = nn.Parameter(torch.zeros(1, 6, dim))

    def forward(
        self, hidden: Sequence[Tensor], texts: Sequence[KeysValues], step: Step, *, num_kept: int
    ) -> list[Tensor]:
        """Run the block for every branch of guidance: one stream per branch, float32 [B, num_kept, D].

        Args:
            hidden: One residual stream per branch, float32 [B, L, D], or a single one that all branches still share:
                then self-attention runs once. Overwritten.
            texts: Keys and values of each branch's text, one per branch.
            step: What the forward pass shares.
            num_kept: How many tokens, from the first, are asked for: all, or fewer after the last block.
        """
        rows = self.modulation.float() + step.time  # [B+1, 6, D]
        shift1, scale1, gate1, shift2, scale2, gate2 = split_rows(rows, step.num_noisy)
        streams = []
        for x in hidden:
            tokens = modulated_norm(x, shift1, scale1, step.dtype)
            kept = x[:, :num_kept]
            streams.append(add_gated_(kept, self.self_attn(tokens, step.rotations, num_kept, step.kernel), gate1))
            del tokens  # else held to the block's end
        if len(streams) < len(texts):
            streams += [streams[0].clone() for _ in texts[1:]]
        for x, text in zip(streams, texts, strict=True):
            x += self.cross_attn(self.norm3(x).to(step.dtype), text)
            add_gated_(x, self.ffn(modulated_norm(x, shift2, scale2, step.dtype)), gate2)
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
        """Project tokens to the values of their patches: float32 [B, L, values per patch].

        Args:
            x: float32 [B, L, D].
            time: Timestep embeddings before projection, float32 [B + 1, D]; the last row is time 0.
            num_noisy: How many tokens, from the first, see the timestep.
        """
        shift, scale = split_rows(self.modulation.float() + time.unsqueeze(1), num_noisy)
        patches: Tensor = self.head(modulated_norm(x, shift, scale, dtype))
        return patches.float()
