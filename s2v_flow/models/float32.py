"""Layers that compute in float32, whatever dtype their weights are stored in.

Norms, gains and the few convolutions of the DiT cost next to nothing beside its matrices, and are where 16 bits hurt
most. The layers keep the parameter names of the torch layers that they extend. Convolutions are written as matrix
products: torch lets cuDNN round float32 convolutions to 10 bits by default (TF32), and so tokens come out in the layout
that the blocks read.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PatchEmbedding(nn.Conv3d):
    """A convolution whose patches do not overlap: every patch becomes a token."""

    def __init__(self, channels: int, dim: int, patch: tuple[int, int, int]) -> None:
        super().__init__(channels, dim, kernel_size=patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        """Embed the patches of a latent [B, C, F, H, W], of any floating dtype, as tokens, float32 [B, L, D].

        L runs over columns first, then rows, then frames; what is left behind an axis' last whole patch is dropped.
        """
        for axis, size in enumerate(self.kernel_size, start=2):
            x = x.unfold(axis, size, size)  # at last [B, C, F', H', W', patch frames, patch rows, patch columns]
        patches = x.permute(0, 2, 3, 4, 1, 5, 6, 7).flatten(4).flatten(1, 3)  # [B, L, values per patch]
        return F.linear(patches.float(), self.weight.float().flatten(1), _float32(self.bias))


class TimeConv(nn.Conv1d):
    """A convolution over time, without padding, of features that come last."""

    def forward(self, x: Tensor) -> Tensor:
        """Convolve x [B, T, channels in], of any floating dtype; the result is float32 [B, T', channels out]."""
        windows = x.float().unfold(1, self.kernel_size[0], self.stride[0]).flatten(2)  # [B, T', channels in * kernel]
        return F.linear(windows, self.weight.float().flatten(1), _float32(self.bias))


class LayerNorm(nn.LayerNorm):
    """Layer norm with gain and bias."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension of x, of any floating dtype; the result is float32."""
        return F.layer_norm(x.float(), self.normalized_shape, self.weight.float(), _float32(self.bias), self.eps)


class RMSNorm(nn.Module):
    """x / rms(x) * weight, 1e-6 added under the root.

    Source: B. Zhang and R. Sennrich, 2019, equation 4.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension of x, of any floating dtype; the result is a new float32 tensor."""
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), 1e-6)


def _float32(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.float()
