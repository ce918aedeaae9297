"""The Wan 2.1 video VAE: causal in time, so that a video can be encoded and decoded as a stream.

Shapes: B batch, F latent frames, H W latent rows and columns, T pixel frames, 8H 8W pixels, D width. Whatever the
grouping of frames into calls, the result is the same; the state between calls is an argument and a result, never
changed in place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from s2v_flow.errors import CheckpointError
from s2v_flow.models.footprint import LATENT_CHANNELS
from s2v_flow.models.vae_layers import (
    LAYOUT,
    Carry,
    Downsample,
    FrameAttention,
    ResidualBlock,
    RMSNorm,
    Upsample,
    causal_conv,
    run_activated,
    run_causal,
)


@dataclass(frozen=True)
class VAEConfig:
    """The sizes of a Wan 2.1 VAE. `width` is that of its widest pictures: 96 in the released model."""

    width: int = 96

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, Sequence[int]]) -> VAEConfig:
        """Read the sizes off a checkpoint's keys and shapes.

        Raises:
            CheckpointError: The file is no Wan 2.1 VAE.
        """
        gain, latent = shapes.get("decoder.head.0.gamma"), shapes.get("conv2.weight")
        if gain is None or latent is None or tuple(latent[:2]) != (LATENT_CHANNELS, LATENT_CHANNELS):
            raise CheckpointError("this file is not a Wan 2.1 VAE", fix="use wan_2.1_vae.safetensors")
        return cls(width=gain[0])


@dataclass(frozen=True)
class StreamState:
    """What encoder or decoder remember between calls: the last input frames of every causal layer, as they run."""

    frames: tuple[Tensor, ...]


class Encoder(nn.Module):
    """Pixels to twice the latent channels (mean, log variance), before the last 1x1x1 convolution.

    Source: Wan-Video/Wan2.2, wan/modules/vae2_1.py, Encoder3d.
    """

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        D = config.width
        self.conv1 = causal_conv(3, D)
        self.downsamples = nn.ModuleList(
            [
                *(ResidualBlock(D, D), ResidualBlock(D, D), Downsample(D, in_time=False)),
                *(ResidualBlock(D, 2 * D), ResidualBlock(2 * D, 2 * D), Downsample(2 * D, in_time=True)),
                *(ResidualBlock(2 * D, 4 * D), ResidualBlock(4 * D, 4 * D), Downsample(4 * D, in_time=True)),
                *(ResidualBlock(4 * D, 4 * D), ResidualBlock(4 * D, 4 * D)),
            ]
        )
        self.middle = _middle(4 * D)
        self.head = nn.ModuleDict({"0": RMSNorm(4 * D), "2": causal_conv(4 * D, 2 * LATENT_CHANNELS)})

    def forward(self, x: Tensor, carry: Carry) -> Tensor:
        """Map pixels [B, 3, T, 8H, 8W] to [B, 32, F, H, W]."""
        x = run_causal(self.conv1, x, carry)
        for layer in (*self.downsamples, *self.middle):
            x = layer(x, carry)
        return run_activated(self.head, "0", "2", x, carry)


class Decoder(nn.Module):
    """Latents, after the first 1x1x1 convolution, to pixels.

    Source: Wan-Video/Wan2.2, wan/modules/vae2_1.py, Decoder3d.
    """

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        D = config.width
        self.conv1 = causal_conv(LATENT_CHANNELS, 4 * D)
        self.middle = _middle(4 * D)
        self.upsamples = nn.ModuleList(
            [
                *(*_three_blocks(4 * D, 4 * D), Upsample(4 * D, in_time=True)),
                *(*_three_blocks(2 * D, 4 * D), Upsample(4 * D, in_time=True)),
                *(*_three_blocks(2 * D, 2 * D), Upsample(2 * D, in_time=False)),
                *_three_blocks(D, D),
            ]
        )
        self.head = nn.ModuleDict({"0": RMSNorm(D), "2": causal_conv(D, 3)})

    def forward(self, x: Tensor, carry: Carry) -> Tensor:
        """Map [B, 16, F, H, W] to pixels [B, 3, T, 8H, 8W]."""
        x = run_causal(self.conv1, x, carry)
        for layer in (*self.middle, *self.upsamples):
            x = layer(x, carry)
        return run_activated(self.head, "0", "2", x, carry)


class WanVAE(nn.Module):
    """The Wan 2.1 VAE. Inference only; computes in its weights' dtype (norms in float32), on its weights' device."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.conv1 = nn.Conv3d(2 * LATENT_CHANNELS, 2 * LATENT_CHANNELS, 1)
        self.conv2 = nn.Conv3d(LATENT_CHANNELS, LATENT_CHANNELS, 1)
        self.decoder = Decoder(config)

    def encode(self, pixels: Tensor) -> Tensor:
        """Encode a whole clip, [B, 3, T, 8H, 8W] in [-1, 1], T = 4k + 1, four frames at a time: memory stays the same.

        Returns the raw latent mean [B, 16, k + 1, H, W], in the weights' dtype. Nothing is sampled.

        Raises:
            ValueError: The shape is not as above.
        """
        _check_pixels(pixels, is_first=True)
        latent, state = self.encode_next(pixels[:, :, :1], None)
        latents = [latent]
        for start in range(1, pixels.shape[2], TEMPORAL_STRIDE):
            latent, state = self.encode_next(pixels[:, :, start : start + TEMPORAL_STRIDE], state)
            latents.append(latent)
        return torch.cat(latents, dim=2)  # [B, 16, F, H, W]

    @torch.no_grad()
    def encode_next(self, pixels: Tensor, state: StreamState | None) -> tuple[Tensor, StreamState]:
        """Encode the next frames of a clip: the raw latent mean [B, 16, f + 1 or f, H, W], and the state for the next.

        `pixels`: [B, 3, T, 8H, 8W] in [-1, 1]; T = 4f + 1 (f >= 0) in the first call, whose state is None, 4f (f >= 1)
        later.

        Raises:
            ValueError: The shape is not as above, or is not that of the state.
        """
        _check_pixels(pixels, is_first=state is None)
        _check_stream(pixels, state)
        carry = Carry(state.frames if state else None)
        x = self.encoder(pixels.to(self.conv1.weight.dtype, memory_format=LAYOUT), carry)  # [B, 32, F, H, W]
        return self.conv1(x)[:, :LATENT_CHANNELS].contiguous(), StreamState(carry.kept)

    def decode(self, latent: Tensor) -> Tensor:
        """Decode a whole raw latent [B, 16, F, H, W] at once; memory grows with its length (`decode_next` streams).

        Returns pixels [B, 3, 4F - 3, 8H, 8W], about [-1, 1] but not clamped, in the weights' dtype.

        Raises:
            ValueError: The shape is not as above.
        """
        return self.decode_next(latent, None)[0]

    @torch.no_grad()
    def decode_next(self, latent: Tensor, state: StreamState | None) -> tuple[Tensor, StreamState]:
        """Decode the next latent frames of a video, raw [B, 16, f, H, W], f >= 1; memory grows with f.

        Returns pixels [B, 3, 4f - 3 in the first call, whose state is None, or 4f, 8H, 8W], about [-1, 1] but not
        clamped, in the weights' dtype, and the state for the next call.

        Raises:
            ValueError: The shape is not as above, or is not that of the state.
        """
        if latent.dim() != 5 or latent.shape[1] != LATENT_CHANNELS or latent.shape[2] < 1:
            raise ValueError(f"a latent is [B, {LATENT_CHANNELS}, F, H, W] with F >= 1, got {list(latent.shape)}")
        _check_stream(latent, state)
        carry = Carry(state.frames if state else None)
        pixels: Tensor = self.decoder(self.conv2(latent.to(self.conv2.weight.dtype, memory_format=LAYOUT)), carry)
        return pixels, StreamState(carry.kept)


def _middle(width: int) -> nn.ModuleList:
    return nn.ModuleList([ResidualBlock(width, width), FrameAttention(width), ResidualBlock(width, width)])


def _three_blocks(num_inputs: int, num_outputs: int) -> tuple[ResidualBlock, ResidualBlock, ResidualBlock]:
    first = ResidualBlock(num_inputs, num_outputs)
    return first, ResidualBlock(num_outputs, num_outputs), ResidualBlock(num_outputs, num_outputs)


def _check_pixels(pixels: Tensor, is_first: bool) -> None:
    if pixels.dim() != 5 or pixels.shape[1] != 3:
        raise ValueError(f"pixels are [B, 3, T, rows, columns], got {list(pixels.shape)}")
    if not all(size > 0 and size % SPATIAL_STRIDE == 0 for size in pixels.shape[3:]):
        raise ValueError(f"rows and columns must be multiples of {SPATIAL_STRIDE}, got {list(pixels.shape[3:])}")
    num_frames = pixels.shape[2]
    if num_frames < 1 or num_frames % TEMPORAL_STRIDE != int(is_first):
        rule = f"starts with {TEMPORAL_STRIDE}k + 1" if is_first else f"goes on in multiples of {TEMPORAL_STRIDE}"
        raise ValueError(f"a clip {rule} frames, got {num_frames}")


def _check_stream(x: Tensor, state: StreamState | None) -> None:
    """Refuse a state of another video: the first causal layer has remembered frames of the input's own size."""
    if state is None:
        return
    B, D, _, H, W = state.frames[0].shape
    if (x.shape[0], x.shape[1], *x.shape[3:]) != (B, D, H, W):
        raise ValueError(f"the state is of a stream of [{B}, {D}, *, {H}, {W}], got {list(x.shape)}")


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
    """Turn a raw latent [B, 16, F, H, W] into what the DiT sees: (latent - mean) / std in float32, given in its dtype.

    Raises:
        ValueError: The latent has not 5 dimensions or not 16 channels.
    """
    mean, std = _statistics(latent)
    return ((latent - mean) / std).to(latent.dtype)


def denormalise(latent: Tensor) -> Tensor:
    """Turn what the DiT sees, [B, 16, F, H, W], into a raw latent: latent * std + mean in float32, given in its dtype.

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
