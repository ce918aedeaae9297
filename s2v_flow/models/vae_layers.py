"""The layers of the Wan 2.1 VAE: convolutions that are causal in time and stream, norms, attention, resampling.

Every causal convolution needs the last input frames of the call before it. A `Carry` gives them in the order in
which the layers run and collects the next ones; it lives for one call. Layers are inference only: activations are
written in place.

Everything between a model's input and its output lies channels last (`LAYOUT`): convolutions then convert nothing, and
norms read their channels in one piece. Other layouts give the same results, slower.

Attribute names and the numbers in the module dictionaries equal the checkpoint's keys.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CAUSAL_FRAMES = 2  # a kernel of 3 frames looks two frames back
LAYOUT = torch.channels_last_3d


class Carry:
    """One call's passage through the causal layers: what each one remembers, and what it is to remember.

    `past`: the frames kept by the call before, in the order in which the layers run; None at the video's start.
    """

    def __init__(self, past: Sequence[Tensor] | None) -> None:
        self.is_first = past is None
        self._past = past or ()
        self._kept: list[Tensor] = []

    @property
    def kept(self) -> tuple[Tensor, ...]:
        """The frames to hand to the next call, once every layer has run."""
        assert self.is_first or len(self._kept) == len(self._past), "a causal layer did not run"
        return tuple(self._kept)

    def window(self, x: Tensor, num_past: int = CAUSAL_FRAMES) -> tuple[Tensor, Tensor]:
        """Allocate the input of a causal convolution over x [B, D, T, H, W]: past frames, then room for the present.

        Returns the window [B, D, num_past + T, H, W], of x's dtype and device, its first frames those of the past,
        zeros at the video's start; and a view of its last T frames, for the caller to fill.
        """
        B, D, T, H, W = x.shape
        window = empty(x, B, D, num_past + T, H, W)
        if self.is_first:
            window[:, :, :num_past].zero_()
        else:
            window[:, :, :num_past].copy_(self.past())
        return window, window[:, :, num_past:]

    def past(self) -> Tensor:
        """Return the frames that the running layer kept in the call before."""
        return self._past[len(self._kept)]

    def keep(self, frames: Tensor) -> None:
        """Remember `frames` for the running layer's next call, as a copy: a view would keep all activations alive."""
        self._kept.append(frames.clone(memory_format=LAYOUT))


def empty(like: Tensor, *shape: int) -> Tensor:
    """Allocate [B, D, T, H, W], channels last, of another tensor's dtype and device."""
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=LAYOUT)


class RMSNorm(nn.Module):
    """Scale every pixel's channel vector to length sqrt(D), times a gain per channel.

    Lengths are measured in float32 at least, where the squares of 16-bit activations neither overflow nor vanish. The
    stored gain has `num_axes` axes of size 1 after its channels.

    Source: Wan-Video/Wan2.2, wan/modules/vae2_1.py, RMS_norm.
    """

    def __init__(self, width: int, num_axes: int = 3) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width, *(1,) * num_axes))

    def forward(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Normalise x [B, D, T, H, W] over channels, in its dtype; into `out`, of that shape, if given."""
        out = torch.empty_like(x) if out is None else out
        precision = torch.promote_types(x.dtype, torch.float32)
        length = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=precision)  # [B, 1, T, H, W]
        torch.mul(x, math.sqrt(x.shape[1]) / length.clamp_min_(1e-12), out=out)
        return out.mul_(self.gamma.view(-1, 1, 1, 1))


class FrameConv(nn.Conv2d):
    """A convolution of single frames, run as a 3-D one so that [B, D, T, H, W] needs no transposed copy."""

    def forward(self, x: Tensor) -> Tensor:
        """Convolve every frame of x [B, D, T, H, W] by itself; [B, D', T, H', W'] comes out."""
        assert isinstance(self.padding, tuple)
        stride, padding = (1, *self.stride), (0, *self.padding)
        return conv3d(x, self.weight.unsqueeze(2), self.bias, stride, padding)


class VideoConv(nn.Conv3d):
    """A 3-D convolution that is quick on small tensors too."""

    def forward(self, x: Tensor) -> Tensor:
        """Convolve x [B, D, T, H, W]; [B, D', T', H', W'] comes out."""
        assert isinstance(self.padding, tuple)
        return conv3d(x, self.weight, self.bias, self.stride, self.padding)


def conv3d(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int]) -> Tensor:
    """Convolve in 3-D. On the CPU, torch takes a slow kernel for small single videos (B D T H up to 20480): not here.

    Measured at 128x128 with the tiny VAE in groups of two: decoding takes a fifth of the time (python -m benchmarks).
    """
    if x.device.type == "cpu" and x.dtype == torch.float32 and torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        y: Tensor = torch.ops.aten.mkldnn_convolution(x, weight, bias, padding, stride, (1, 1, 1), 1)
        return y
    return F.conv3d(x, weight, bias, tuple(stride), tuple(padding))


def causal_conv(num_inputs: int, num_outputs: int) -> nn.Conv3d:
    """Make a 3x3x3 convolution to run over a `Carry.window`: padded in space, not in time."""
    return VideoConv(num_inputs, num_outputs, 3, padding=(0, 1, 1))


def run_causal(conv: nn.Module, x: Tensor, carry: Carry) -> Tensor:
    """Run a `causal_conv` over x [B, D, T, H, W] and its past; [B, D', T, H, W] comes out."""
    window, present = carry.window(x)
    present.copy_(x)
    carry.keep(window[:, :, -CAUSAL_FRAMES:])
    y: Tensor = conv(window)
    return y


def run_activated(layers: nn.ModuleDict, norm: str, conv: str, x: Tensor, carry: Carry) -> Tensor:
    """Run norm, SiLU and causal convolution over x [B, D, T, H, W]; [B, D', T, H, W] comes out.

    The activation is written straight into the convolution's window, which saves a copy.
    """
    window, present = carry.window(x)
    layers[norm](x, out=present)
    F.silu(present, inplace=True)
    carry.keep(window[:, :, -CAUSAL_FRAMES:])
    y: Tensor = layers[conv](window)
    return y


class ResidualBlock(nn.Module):
    """Two activated causal convolutions beside a shortcut.

    Source: Wan-Video/Wan2.2, wan/modules/vae2_1.py, ResidualBlock.
    """

    def __init__(self, num_inputs: int, num_outputs: int) -> None:
        super().__init__()
        self.residual = nn.ModuleDict(
            {
                "0": RMSNorm(num_inputs),
                "2": causal_conv(num_inputs, num_outputs),
                "3": RMSNorm(num_outputs),
                "6": causal_conv(num_outputs, num_outputs),
            }
        )
        self.shortcut = None if num_inputs == num_outputs else VideoConv(num_inputs, num_outputs, 1)

    def forward(self, x: Tensor, carry: Carry) -> Tensor:
        """Map x [B, D, T, H, W] to [B, D', T, H, W]."""
        y = run_activated(self.residual, "0", "2", x, carry)
        y = run_activated(self.residual, "3", "6", y, carry)
        return y.add_(x if self.shortcut is None else self.shortcut(x))


class FrameAttention(nn.Module):
    """Single-head self-attention among the pixels of each frame.

    Source: Wan-Video/Wan2.2, wan/modules/vae2_1.py, AttentionBlock.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = RMSNorm(width, num_axes=2)
        self.to_qkv = FrameConv(width, 3 * width, 1)
        self.proj = FrameConv(width, width, 1)

    def forward(self, x: Tensor, carry: Carry) -> Tensor:
        """Map x [B, D, T, H, W] to the same shape; frames do not see each other, so that nothing is carried."""
        B, D, T, H, W = x.shape
        qkv = self.to_qkv(self.norm(x))  # [B, 3D, T, H, W]
        q, k, v = qkv.permute(0, 2, 3, 4, 1).reshape(B, T, H * W, 3 * D).chunk(3, dim=-1)  # 3 x [B, T, H*W, D]
        attended = F.scaled_dot_product_attention(q, k, v)  # [B, T, H*W, D]
        y: Tensor = self.proj(attended.reshape(B, T, H, W, D).permute(0, 4, 1, 2, 3))  # [B, D, T, H, W]
        return y.add_(x)


class Downsample(nn.Module):
    """Halve rows and columns and, where `in_time`, the frames after the first.

    Source: Wan-Video/Wan2.2, wan/modules/vae2_1.py, Resample (downsample2d, downsample3d).
    """

    def __init__(self, width: int, in_time: bool) -> None:
        super().__init__()
        self.resample = nn.ModuleDict({"1": FrameConv(width, width, 3, stride=2)})
        self.time_conv = VideoConv(width, width, (3, 1, 1), stride=(2, 1, 1)) if in_time else None

    def forward(self, x: Tensor, carry: Carry) -> Tensor:
        """Map x [B, D, T, 2H, 2W] to [B, D, T', H, W].

        T' = T, or where `in_time`: 1 + (T - 1) / 2 at the video's start, T / 2 later.
        """
        x = self.resample["1"](F.pad(x, (0, 1, 0, 1)))  # [B, D, T, H, W]
        return x if self.time_conv is None else self._halve_frames(self.time_conv, x, carry)

    def _halve_frames(self, time_conv: nn.Module, x: Tensor, carry: Carry) -> Tensor:
        """Convolve frames 2j - 2, 2j - 1, 2j of the video to frame j >= 1; its first frame is not convolved."""
        frames = x if carry.is_first else torch.cat([carry.past(), x], dim=2)  # [B, D, T or 1 + T, H, W]
        carry.keep(x[:, :, -1:])
        if frames.shape[2] == 1:
            return x
        y: Tensor = time_conv(frames)  # [B, D, T // 2, H, W]
        return torch.cat([x[:, :, :1], y], dim=2) if carry.is_first else y


class Upsample(nn.Module):
    """Double rows and columns, halving the channels, and, where `in_time`, the frames after the first.

    The video's first frame is not convolved in time and stays single.

    Source: Wan-Video/Wan2.2, wan/modules/vae2_1.py, Resample (upsample2d, upsample3d).
    """

    def __init__(self, width: int, in_time: bool) -> None:
        super().__init__()
        self.resample = nn.ModuleDict({"1": FrameConv(width, width // 2, 3, padding=1)})
        self.time_conv = VideoConv(width, 2 * width, (3, 1, 1)) if in_time else None

    def forward(self, x: Tensor, carry: Carry) -> Tensor:
        """Map x [B, D, T, H, W] to [B, D/2, T', 2H, 2W].

        T' = T, or where `in_time`: 1 + 2 (T - 1) at the video's start, 2T later.
        """
        B, D, T, H, W = x.shape
        single = T if self.time_conv is None else int(carry.is_first)
        pairs = None if self.time_conv is None else self._pairs(self.time_conv, x[:, :, single:], carry)
        wide = empty(x, B, D, single + 2 * (T - single), 2 * H, 2 * W)
        _double(x[:, :, :single], wide[:, :, :single])
        if pairs is not None:
            _double(pairs[:, :D], wide[:, :, single::2])  # the earlier frame of each pair
            _double(pairs[:, D:], wide[:, :, single + 1 :: 2])
        y: Tensor = self.resample["1"](wide)
        return y

    def _pairs(self, time_conv: nn.Module, x: Tensor, carry: Carry) -> Tensor | None:
        """Map x [B, D, T, H, W] to [B, 2D, T, H, W], the channels of two frames; None where T is 0."""
        window, present = carry.window(x)
        present.copy_(x)
        carry.keep(window[:, :, -CAUSAL_FRAMES:])
        return time_conv(window) if x.shape[2] else None


def _double(x: Tensor, out: Tensor) -> None:
    """Write every pixel of x [B, D, T, H, W] to four of `out` [B, D, T, 2H, 2W], which lies channels last."""
    B, D, T, H, W = x.shape
    pixels = out.permute(0, 2, 3, 4, 1).view(B, T, H, 2, W, 2, D)
    pixels.copy_(x.permute(0, 2, 3, 4, 1)[:, :, :, None, :, None])
