"""The VAE as a plain function of its weights, with gradients: whole clips at once, as the package's streams them.

B batch, T frames, H W rows and columns, C channels. The weights are those of ComfyUI's file, by its keys.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from s2v_flow.models.vae import MEAN, STD


class TrainableVAE:
    """Encode to and decode from *normalised* latents, differentiably, where only `time_conv` looks at other frames.

    A convolution that sees three frames, but has weights for the last one only, works frame by frame: so a video's
    latents have no memory that could drift, and a still face has the same latent in every frame, the first included.

    Args:
        weights: By ComfyUI's keys, kernels of three frames cut to the last one: see `flat`.

    Source: Wan2.1, wan/modules/vae.py, WanVAE_.
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self.weights = weights
        self.mean = torch.tensor(MEAN).view(1, -1, 1, 1, 1)
        self.std = torch.tensor(STD).view(1, -1, 1, 1, 1)

    def encode(self, pixels: Tensor) -> Tensor:
        """Encode [B, 3, T, H, W] in -1..1 to [B, 16, (T - 1) / 4 + 1, H / 8, W / 8], about unit normal."""
        batch = len(pixels)
        x = self._conv("encoder.conv1", _frames(pixels))
        x = self._levels("encoder.downsamples", x, batch, self._down)
        x = self._head("encoder.head", self._middle("encoder.middle", x))
        raw = _clips(self._conv("conv1", x)[:, :16], batch)
        return (raw - self.mean) / self.std

    def decode(self, latent: Tensor) -> Tensor:
        """Decode [B, 16, F, H, W] to [B, 3, 4 F - 3, 8 H, 8 W]."""
        batch = len(latent)
        x = self._conv("decoder.conv1", self._conv("conv2", _frames(latent * self.std + self.mean)))
        x = self._levels("decoder.upsamples", self._middle("decoder.middle", x), batch, self._up)
        return _clips(self._head("decoder.head", x), batch)

    def halfway(self, latent: Tensor, *, parts: bool = True) -> Tensor:
        """Decode to where frames part for the second time: [B, 16, F, h, w] to [B, T, C, 2 h, 2 w]; T is 4 F - 3, or F."""
        batch = len(latent)
        x = self._conv("decoder.conv1", self._conv("conv2", _frames(latent * self.std + self.mean)))
        x = self._middle("decoder.middle", x)
        for index in range(7):
            layer = f"decoder.upsamples.{index}"
            x = self._up(layer, x, batch) if f"{layer}.resample.1.weight" in self.weights else self._residual(layer, x)
        x = _clips(x, batch)
        if parts:
            x = self._parted("decoder.upsamples.7", x)
        return x.transpose(1, 2)

    def _parted(self, key: str, clips: Tensor) -> Tensor:
        """Make two frames of each but the first: [B, C, T, H, W] to [B, C, 2 T - 1, H, W]."""
        weight, bias = self.weights[f"{key}.time_conv.weight"], self.weights[f"{key}.time_conv.bias"]
        y = F.conv3d(F.pad(clips[:, :, 1:], (0, 0, 0, 0, 2, 0)), weight, bias)
        y = y.unflatten(1, (2, -1)).permute(0, 2, 3, 1, 4, 5).flatten(2, 3)  # [B, C, 2 T, H, W]
        return torch.cat([clips[:, :, :1], y], 2)

    def _conv(self, key: str, x: Tensor) -> Tensor:
        weight = self.weights[f"{key}.weight"]
        return F.conv2d(x, weight, self.weights[f"{key}.bias"], padding=weight.shape[-1] // 2)

    def _norm(self, key: str, x: Tensor) -> Tensor:
        gamma = self.weights[f"{key}.gamma"].reshape(1, -1, 1, 1)
        return x * x.square().mean(1, keepdim=True).clamp_min(1e-10).rsqrt() * gamma

    def _residual(self, key: str, x: Tensor) -> Tensor:
        skipped = self._conv(f"{key}.shortcut", x) if f"{key}.shortcut.weight" in self.weights else x
        y = self._conv(f"{key}.residual.2", F.silu(self._norm(f"{key}.residual.0", x)))
        return skipped + self._conv(f"{key}.residual.6", F.silu(self._norm(f"{key}.residual.3", y)))

    def _attention(self, key: str, x: Tensor) -> Tensor:
        qkv = self._conv(f"{key}.to_qkv", self._norm(f"{key}.norm", x))
        q, k, v = qkv.flatten(2).transpose(1, 2).chunk(3, -1)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        return x + self._conv(f"{key}.proj", y)

    def _middle(self, key: str, x: Tensor) -> Tensor:
        return self._residual(f"{key}.2", self._attention(f"{key}.1", self._residual(f"{key}.0", x)))

    def _head(self, key: str, x: Tensor) -> Tensor:
        return self._conv(f"{key}.2", F.silu(self._norm(f"{key}.0", x)))

    def _levels(self, key: str, x: Tensor, batch: int, resample: Callable[[str, Tensor, int], Tensor]) -> Tensor:
        count = 1 + max(int(name.split(".")[2]) for name in self.weights if name.startswith(f"{key}."))
        for index in range(count):
            layer = f"{key}.{index}"
            if f"{layer}.resample.1.weight" in self.weights:
                x = resample(layer, x, batch)
            else:
                x = self._residual(layer, x)
        return x

    def _down(self, key: str, x: Tensor, batch: int) -> Tensor:
        weight, bias = self.weights[f"{key}.resample.1.weight"], self.weights[f"{key}.resample.1.bias"]
        x = F.conv2d(F.pad(x, (0, 1, 0, 1)), weight, bias, stride=2)
        if f"{key}.time_conv.weight" not in self.weights or len(x) == batch:
            return x
        weight, bias = self.weights[f"{key}.time_conv.weight"], self.weights[f"{key}.time_conv.bias"]
        clips = _clips(x, batch)
        return _frames(torch.cat([clips[:, :, :1], F.conv3d(clips, weight, bias, stride=(2, 1, 1))], 2))

    def _up(self, key: str, x: Tensor, batch: int) -> Tensor:
        if f"{key}.time_conv.weight" in self.weights and len(x) > batch:
            x = _frames(self._parted(key, _clips(x, batch)))
        y = F.interpolate(x, scale_factor=2.0, mode="nearest-exact")
        return F.conv2d(y, self.weights[f"{key}.resample.1.weight"], self.weights[f"{key}.resample.1.bias"], padding=1)


def _frames(x: Tensor) -> Tensor:
    """[B, C, T, H, W] to [B T, C, H, W]."""
    return x.transpose(1, 2).flatten(0, 1)


def _clips(x: Tensor, batch: int) -> Tensor:
    """[B T, C, H, W] to [B, C, T, H, W]."""
    return x.unflatten(0, (batch, -1)).transpose(1, 2)


def flat(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Cut kernels to the last of their frames, but for `time_conv`."""
    return {
        key: value[:, :, -1].clone() if value.ndim == 5 and "time_conv" not in key else value.clone()
        for key, value in weights.items()
    }


def forget_time(weights: dict[str, Tensor]) -> None:
    """Let `time_conv` take the mean of two frames, and give the same frame twice, to begin with. In place."""
    generator = torch.Generator().manual_seed(2)
    for key, value in weights.items():
        if key.endswith("time_conv.bias"):
            value.zero_()
        elif key.endswith("time_conv.weight"):
            channels = value.shape[1]
            value.copy_(torch.randn(value.shape, generator=generator) * 0.3 / (3 * channels) ** 0.5)
            eye = torch.eye(channels)
            if len(value) == channels:
                value[:, :, 1, 0, 0] += 0.5 * eye
                value[:, :, 2, 0, 0] += 0.5 * eye
            else:
                value[:, :, 2, 0, 0] += torch.cat([eye, eye])


def rescale_latents(weights: dict[str, Tensor], mean: Tensor, std: Tensor) -> None:
    """Make latents of measured `mean` and `std` (normalised, [16]) unit normal, and decode as before. Flat weights, in place."""
    latent_mean, latent_std = torch.tensor(MEAN), torch.tensor(STD)
    # raw' = (raw - latent_mean - latent_std * mean) / std + latent_mean
    scale = torch.ones(32)
    shift = torch.zeros(32)
    scale[:16] = 1 / std
    shift[:16] = latent_mean - (latent_mean + latent_std * mean) / std
    view = (-1, 1, 1, 1)
    weights["conv1.weight"] = weights["conv1.weight"] * scale.view(view)
    weights["conv1.bias"] = weights["conv1.bias"] * scale + shift
    # raw = (raw' - shift) * std
    matrix = weights["conv2.weight"][:, :, 0, 0]
    weights["conv2.bias"] = weights["conv2.bias"] - matrix @ (shift[:16] * std)
    weights["conv2.weight"] = weights["conv2.weight"] * std.view(1, -1, 1, 1)
