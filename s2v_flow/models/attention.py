"""Attention of the DiT: rotary position embeddings, the one call of the kernel, and the two layers around it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s2v_flow.models.float32 import RMSNorm

HEAD_WIDTH = 128
AXIS_WIDTHS = (44, 42, 42)  # how the head's 128 channels are split over time, rows and columns
THETA = 10000.0

Positions = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Grid:
    """Where the tokens of one segment sit, by axis; tokens run over columns first, then rows, then time."""

    time: Positions
    rows: Positions
    columns: Positions

    @property
    def num_tokens(self) -> int:
        """How many tokens the segment has."""
        return len(self.time) * len(self.rows) * len(self.columns)

    @staticmethod
    def dense(num_frames: int, num_rows: int, num_columns: int, *, start_time: int = 0) -> Grid:
        """Place one token on every integer position, the first frame at `start_time`."""
        time, rows, columns = (np.arange(count, dtype=np.float64) for count in (num_frames, num_rows, num_columns))
        return Grid(time + start_time, rows, columns)


def rotation_table(grids: Sequence[Grid], device: torch.device | str = "cpu") -> Tensor:
    """Compute the rotations of a sequence of segments; `grids`: the segments, in the order of their tokens.

    Returns:
        Unit complex numbers, complex64 [L, 1, K / 2], to be broadcast over heads.

    Source: J. Su et al., 2021, section 3.4; Wan2.2, wan/modules/model.py, rope_params.
    """
    angles = np.concatenate([_angles(grid) for grid in grids])  # [L, K/2]
    rotations = (np.cos(angles) + 1j * np.sin(angles)).astype(np.complex64)
    return torch.from_numpy(rotations).unsqueeze(1).to(device)  # [L, 1, K/2]


def rotate_(x: Tensor, rotations: Tensor) -> Tensor:
    """Rotate each pair of neighbouring channels (0 and 1, 2 and 3, ...) in place; return x.

    Args:
        x: Queries or keys, float32 [B, L, N, K], contiguous; overwritten.
        rotations: complex64 [L, 1, K / 2], from `rotation_table`.
    """
    torch.view_as_complex(x.view(*x.shape[:-1], -1, 2)).mul_(rotations)
    return x


def _angles(grid: Grid) -> Positions:
    shape = (len(grid.time), len(grid.rows), len(grid.columns))
    parts = []
    for axis, (positions, width) in enumerate(zip((grid.time, grid.rows, grid.columns), AXIS_WIDTHS, strict=True)):
        frequencies = THETA ** (-np.arange(0, width, 2, dtype=np.float64) / width)
        angles = np.expand_dims(np.outer(positions, frequencies), [other for other in range(3) if other != axis])
        parts.append(np.broadcast_to(angles, (*shape, width // 2)))
    return np.concatenate(parts, axis=-1).reshape(-1, HEAD_WIDTH // 2)


class KeysValues(NamedTuple):
    """Keys and values of one attention layer, each [B or 1, N, S, K], in the dtype that attention computes in."""

    keys: Tensor
    values: Tensor


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute softmax(q k^T / sqrt(K)) v: the attended values with the heads joined, [B, L, N K], of q's dtype.

    Args:
        q: [B, N, L, K], floating point.
        k: [B, N, S, K], of q's dtype.
        v: [B, N, S, K], of q's dtype.
    """
    attended = F.scaled_dot_product_attention(q, k, v)  # [B, N, L, K]
    return attended.transpose(1, 2).flatten(2)  # [B, L, D]


def split_heads(x: Tensor) -> Tensor:
    """Split the width into heads: [B, L, N K] becomes [B, L, N, K]."""
    return x.view(*x.shape[:-1], -1, HEAD_WIDTH)


class Projections(nn.Module):
    """The linear layers of attention; queries and keys are normalised over the full width, before heads are split."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.o = nn.Linear(dim, dim)
        self.norm_q = RMSNorm(dim)
        self.norm_k = RMSNorm(dim)


class SelfAttention(Projections):
    """Attention of all tokens to all tokens, with rotary positions."""

    def forward(self, x: Tensor, rotations: Tensor, num_queries: int) -> Tensor:
        """Let the first `num_queries` tokens attend to all: [B, num_queries, D], of x's dtype.

        Args:
            x: Tokens [B, L, D], in the dtype to compute in.
            rotations: complex64 [L, 1, K / 2].
            num_queries: How many tokens are asked for, 1 to L.
        """
        q = rotate_(split_heads(self.norm_q(self.q(x[:, :num_queries]))), rotations[:num_queries]).to(x.dtype)
        k = rotate_(split_heads(self.norm_k(self.k(x))), rotations).to(x.dtype)
        v = split_heads(self.v(x))
        out: Tensor = self.o(attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)))
        return out


class CrossAttention(Projections):
    """Attention of tokens to a context whose keys and values are prepared beforehand."""

    def context_layers(self) -> list[nn.Module]:
        """Return the layers that `keys_values` uses, and nothing else does."""
        return [self.k, self.v, self.norm_k]

    def keys_values(self, context: Tensor) -> KeysValues:
        """Project a context [B, S, D], in the dtype to compute in, to keys and values [B, N, S, K] of that dtype."""
        keys = split_heads(self.norm_k(self.k(context))).to(context.dtype)
        return KeysValues(keys.transpose(1, 2), split_heads(self.v(context)).transpose(1, 2))

    def forward(self, x: Tensor, context: KeysValues) -> Tensor:
        """Let every token attend to the context: [B, L, D], of x's dtype.

        Args:
            x: Tokens [B, L, D], in the dtype to compute in.
            context: From `keys_values`; a batch of one serves every sample of x.
        """
        q = split_heads(self.norm_q(self.q(x))).to(x.dtype).transpose(1, 2)  # [B, N, L, K]
        keys, values = (part.expand(len(x), -1, -1, -1) for part in context)
        out: Tensor = self.o(attention(q, keys, values))
        return out
