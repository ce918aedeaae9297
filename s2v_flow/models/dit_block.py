"""The parts of the DiT: the transformer block, what injects audio behind it, and the head.

Audio runs at 16 frames a second, four to a latent frame: a causal encoder makes a few tokens of it for each latent
frame, and the frame's video tokens attend to them. The residual stream is float32; what enters a matrix is cast to the
dtype that the model computes in.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s2v_flow.models.attention import CrossAttention, Kernel, KeysValues, SelfAttention
from s2v_flow.models.conditioning import Conditioning, InjectedAudio
from s2v_flow.models.float32 import LayerNorm, TimeConv
from s2v_flow.models.footprint import INJECTION_BLOCKS, MOTION_LATENT_FRAMES

FREQUENCY_WIDTH = 256
EPS = 1e-6
AUDIO_LAYERS = 25
AUDIO_FRAMES_PER_LATENT = 4
LOCAL_HEADS = 4
# With the authors' alignment the encoder sees the motion's 73 pixel frames (19 latent ones) too, as copies of the first
# audio frame, and latent frame t hears the audio up to frame 4t + 3.
LEAD_IN_AUDIO_FRAMES = 73
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
    """Embed timesteps, sigma * 1000, floating point [B], as 128 cosines and then 128 sines, float32 [B, 256].

    ComfyUI computes the angles in float32, the authors in float64.

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
    """What every block of one forward pass shares."""

    time: Tensor  # projected timesteps, float32 [B + 1, 6, D]; the last row is time 0
    num_noisy: int  # how many tokens, from the first, see the timestep
    rotations: Tensor  # float32 [L, 1, K / 2, 2]
    dtype: torch.dtype  # what matrices and attention compute in
    kernel: Kernel | None = None  # what computes self-attention; None: torch


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
        """Project tokens x, float32 [B, L, D], to the values of their patches: float32 [B, L, values per patch].

        `time`: timestep embeddings before projection, float32 [B + 1, D]; the last row is time 0. `num_noisy`: how many
        tokens, from the first, see the timestep.
        """
        shift, scale = split_rows(self.modulation.float() + time.unsqueeze(1), num_noisy)
        patches: Tensor = self.head(modulated_norm(x, shift, scale, dtype))
        return patches.float()


class CausalConv1d(nn.Module):
    """A 1-D convolution of kernel 3 that sees the past only; the first frame is repeated in front."""

    def __init__(self, channels_in: int, channels_out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = TimeConv(channels_in, channels_out, kernel_size=3, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve x [B, T, channels in]; the result is float32 [B, ceil(T / stride), channels out]."""
        out: Tensor = self.conv(torch.cat([x[:, :1], x[:, :1], x], dim=1))
        return out


class AudioTokenEncoder(nn.Module):
    """Make one global and five local tokens per latent frame from audio features at pixel frame rate.

    Source: Wan2.2, wan/modules/s2v/auxi_blocks.py, MotionEncoder_tc.
    """

    def __init__(self, audio_dim: int, dim: int) -> None:
        super().__init__()
        self.padding_tokens = nn.Parameter(torch.zeros(1, 1, 1, dim))
        self.conv1_local = CausalConv1d(audio_dim, dim // 4 * LOCAL_HEADS)
        self.conv1_global = CausalConv1d(audio_dim, dim // 4)
        self.conv2 = CausalConv1d(dim // 4, dim // 2, stride=2)
        self.conv3 = CausalConv1d(dim // 2, dim, stride=2)
        self.final_linear = nn.Linear(dim, dim)

    def forward(self, features: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Encode features, float32 [B, T, E]: a global token [B, T / 4, D] and local ones [B, T / 4, 5, D], of `dtype`.

        The last local token is learned padding; T / 4 is rounded up.
        """
        heads = torch.unflatten(self.conv1_local(features), -1, (LOCAL_HEADS, -1)).transpose(1, 2)  # [B, 4, T, D/4]
        tokens = self._shared(heads.flatten(0, 1))  # [B 4, T/4, D]
        local = torch.unflatten(tokens, 0, (-1, LOCAL_HEADS)).transpose(1, 2)  # [B, T/4, 4, D]
        padding = self.padding_tokens.float().expand(local.shape[0], local.shape[1], 1, -1)
        global_token: Tensor = self.final_linear(self._shared(self.conv1_global(features)).to(dtype))  # [B, T/4, D]
        return global_token, torch.cat([local, padding], dim=2).to(dtype)

    def _shared(self, x: Tensor) -> Tensor:
        """Run the layers that local heads and the global path share: [B, T, D / 4] becomes [B, T / 4, D]."""
        return _normed_silu(self.conv3(_normed_silu(self.conv2(_normed_silu(x)))))


class CausalAudioEncoder(nn.Module):
    """Mix the layers of the audio model by learned weights, then encode the mixture.

    Source: Wan2.2, wan/modules/s2v/audio_utils.py, CausalAudioEncoder.
    """

    def __init__(self, audio_dim: int, dim: int) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.full((1, AUDIO_LAYERS, 1, 1), 0.01))
        self.encoder = AudioTokenEncoder(audio_dim, dim)

    def forward(self, audio_embed: Tensor, conditioning: Conditioning, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Encode a chunk's audio [B, A, E, 4 F]: the global token [B, F, D] and local tokens [B, F, 5, D], of `dtype`.

        `conditioning`: whose alignment of audio and latent frames.
        """
        weights = F.silu(self.weights.float())
        features = (audio_embed.float() * (weights / weights.sum(1, keepdim=True))).sum(1).transpose(1, 2)  # [B, 4F, E]
        if conditioning == "comfyui":
            tokens: tuple[Tensor, Tensor] = self.encoder(features, dtype)
            return tokens
        lead_in = features[:, :1].expand(-1, LEAD_IN_AUDIO_FRAMES, -1)
        global_token, local = self.encoder(torch.cat([lead_in, features], dim=1), dtype)
        return global_token[:, MOTION_LATENT_FRAMES:], local[:, MOTION_LATENT_FRAMES:]


class AdaptiveNorm(nn.Module):
    """Make the shift and scale of a norm from a token."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, 2 * dim)

    def forward(self, token: Tensor) -> tuple[Tensor, Tensor]:
        """Return shift and scale, float32 [B, F, D], for a token [B, F, D] in the dtype to compute in."""
        shift, scale = self.linear(F.silu(token)).float().chunk(2, dim=-1)
        return shift, scale


class AudioInjector(nn.Module):
    """Twelve cross-attention layers from a latent frame's tokens to its audio tokens.

    Source: Wan2.2, wan/modules/s2v/audio_utils.py, AudioInjector_WAN; model_s2v.py, after_transformer_block.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.injector = nn.ModuleList(CrossAttention(dim) for _ in INJECTION_BLOCKS)
        self.injector_adain_layers = nn.ModuleList(AdaptiveNorm(dim) for _ in INJECTION_BLOCKS)

    def prepare(
        self, global_token: Tensor, local: Tensor, num_blocks: int, layers: Iterable[int] = range(len(INJECTION_BLOCKS))
    ) -> dict[int, InjectedAudio]:
        """Compute what does not depend on the video, by index of the block that it is injected after.

        Args:
            global_token: [B, F, D], in the dtype to compute in.
            local: [B, F, 5, D], in the dtype to compute in.
            num_blocks: How many blocks the model has; injectors past the last are not used.
            layers: The injectors' numbers, in order, each given when its weights are at hand.
        """
        prepared = {}
        for layer in layers:
            block, cross_attention = INJECTION_BLOCKS[layer], self.injector[layer]
            if block >= num_blocks:
                break
            shift, scale = self.injector_adain_layers[layer](global_token)
            assert isinstance(cross_attention, CrossAttention)
            keys, values, _ = cross_attention.keys_values(local.flatten(0, 1))  # [B F, N, 5, K]
            keys, values = (torch.unflatten(part, 0, local.shape[:2]) for part in (keys, values))  # [B, F, N, 5, K]
            prepared[block] = InjectedAudio(keys, values, 1 + scale.unsqueeze(2), shift.unsqueeze(2))
        return prepared

    def forward(self, video: Tensor, audio: InjectedAudio, block: int, dtype: torch.dtype) -> Tensor:
        """Compute what the injector after `block` adds to the video tokens, float32 [B, L, D]: the same shape, `dtype`.

        `audio`: from `prepare`, for that block.
        """
        num_frames = audio.keys.shape[1]
        x = F.layer_norm(video, video.shape[-1:], eps=1e-5)
        x = torch.unflatten(x, 1, (num_frames, -1))  # [B, F, L/F, D]
        x = x.mul_(audio.scale).add_(audio.shift).to(dtype).flatten(0, 1)  # [B F, L/F, D]
        shape = (len(video), *audio.keys.shape[1:])
        keys, values = (part.expand(shape).flatten(0, 1) for part in (audio.keys, audio.values))  # [B F, N, 5, K]
        out: Tensor = self.injector[INJECTION_BLOCKS.index(block)](x, KeysValues(keys, values))
        return out.reshape(video.shape)


def _normed_silu(x: Tensor) -> Tensor:
    return F.silu(F.layer_norm(x, x.shape[-1:], eps=1e-6))
