"""Attention of the DiT: the one call of the kernel, and the two layers around it."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from s2v_flow.models.float32 import RMSNorm
from s2v_flow.models.rope import HEAD_WIDTH, rotate_


class KeysValues(NamedTuple):
    """Keys and values of one attention layer, each [B or 1, N, S, K], in the dtype that attention computes in."""

    keys: Tensor
    values: Tensor


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute softmax(q k^T / sqrt(K)) v.

    Args:
        q: [B, N, L, K], floating point.
        k: [B, N, S, K], of q's dtype.
        v: [B, N, S, K], of q's dtype.

    Returns:
        The attended values with the heads joined, [B, L, N K], of q's dtype.
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
        """Let the first `num_queries` tokens attend to all.

        Args:
            x: Tokens [B, L, D], in the dtype to compute in.
            rotations: complex64 [L, 1, K / 2].
            num_queries: How many tokens are asked for, 1 to L.

        Returns:
            [B, num_queries, D], of x's dtype.
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
        """Let every token attend to the context.

        Args:
            x: Tokens [B, L, D], in the dtype to compute in.
            context: From `keys_values`; a batch of one serves every sample of x.

        Returns:
            [B, L, D], of x's dtype.
        """
        q = split_heads(self.norm_q(self.q(x))).to(x.dtype).transpose(1, 2)  # [B, N, L, K]
        keys, values = (part.expand(len(x), -1, -1, -1) for part in context)
        out: Tensor = self.o(attention(q, keys, values))
        return out
