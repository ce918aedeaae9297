"""The VAE's latent space: its strides, and the scale on which the DiT sees it.

Latents travel raw between nodes; inside the sampler every channel is normalised to about zero mean and unit variance.
"""

from __future__ import annotations

import torch
from torch import Tensor

from s2v_flow.models.footprint import LATENT_CHANNELS

SPATIAL_STRIDE = 8
TEMPORAL_STRIDE = 4

# Source: Wan-Video/Wan2.2, wan/modules/vae2_1.py, Wan2_1_VAE (mean, std).
MEAN = (
    *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
    *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
)
STD = (
    *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
    *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
)


def normalise(latent: Tensor) -> Tensor:
    """Turn a raw latent into what the DiT sees: (latent - mean) / std per channel.

    Args:
        latent: [B, 16, F, H, W], floating point, raw.

    Returns:
        [B, 16, F, H, W] in the latent's dtype, computed in float32.

    Raises:
        ValueError: The latent has not 5 dimensions or not 16 channels.
    """
    mean, std = _statistics(latent)
    return ((latent - mean) / std).to(latent.dtype)


def denormalise(latent: Tensor) -> Tensor:
    """Turn what the DiT sees into a raw latent: latent * std + mean per channel.

    Args:
        latent: [B, 16, F, H, W], floating point, normalised.

    Returns:
        [B, 16, F, H, W] in the latent's dtype, computed in float32.

    Raises:
        ValueError: The latent has not 5 dimensions or not 16 channels.
    """
    mean, std = _statistics(latent)
    return (latent * std + mean).to(latent.dtype)


def num_latent_frames(num_frames: int) -> int:
    """Return how many latent frames hold `num_frames` >= 1 pixel frames; a remainder of the stride is dropped."""
    return (num_frames - 1) // TEMPORAL_STRIDE + 1


def _statistics(latent: Tensor) -> tuple[Tensor, Tensor]:
    if latent.dim() != 5 or latent.shape[1] != LATENT_CHANNELS:
        raise ValueError(f"a latent is [B, {LATENT_CHANNELS}, F, H, W], got {list(latent.shape)}")
    mean = torch.tensor(MEAN, dtype=torch.float32, device=latent.device)
    std = torch.tensor(STD, dtype=torch.float32, device=latent.device)
    return mean.view(1, -1, 1, 1, 1), std.view(1, -1, 1, 1, 1)
