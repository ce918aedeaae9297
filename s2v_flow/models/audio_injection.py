"""Audio in the DiT: a causal encoder makes a few tokens per latent frame, and the video attends to them.

Audio runs at 16 frames a second, four to a latent frame.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s2v_flow.models.attention import CrossAttention, KeysValues
from s2v_flow.models.conditioning import Conditioning, InjectedAudio
from s2v_flow.models.float32 import TimeConv

AUDIO_LAYERS = 25
AUDIO_FRAMES_PER_LATENT = 4
INJECTION_BLOCKS = (0, 4, 8, 12, 16, 20, 24, 27, 30, 33, 36, 39)  # audio enters after these blocks
LOCAL_HEADS = 4

# With the authors' alignment the encoder sees the motion's 73 pixel frames (19 latent ones) too, as copies of the first
# audio frame, and latent frame t hears the audio up to frame 4t + 3.
LEAD_IN_AUDIO_FRAMES = 73
LEAD_IN_LATENT_FRAMES = 19


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
        """Encode features.

        `features`: float32 [B, T, E].

        Returns:
            The global token [B, T / 4, D] and the local tokens [B, T / 4, 5, D] (the last is learned padding), both of
            `dtype`; T / 4 is rounded up.
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
        """Encode a chunk's audio: the global token [B, F, D] and the local tokens [B, F, 5, D], both of `dtype`.

        Args:
            audio_embed: [B, A, E, 4 F].
            conditioning: Whose alignment of audio and latent frames.
        """
        weights = F.silu(self.weights.float())
        features = (audio_embed.float() * (weights / weights.sum(1, keepdim=True))).sum(1).transpose(1, 2)  # [B, 4F, E]
        if conditioning == "comfyui":
            tokens: tuple[Tensor, Tensor] = self.encoder(features, dtype)
            return tokens
        lead_in = features[:, :1].expand(-1, LEAD_IN_AUDIO_FRAMES, -1)
        global_token, local = self.encoder(torch.cat([lead_in, features], dim=1), dtype)
        return global_token[:, LEAD_IN_LATENT_FRAMES:], local[:, LEAD_IN_LATENT_FRAMES:]


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
        """Compute what does not depend on the video.

        Args:
            global_token: [B, F, D], in the dtype to compute in.
            local: [B, F, 5, D], in the dtype to compute in.
            num_blocks: How many blocks the model has; injectors past the last are not used.
            layers: The injectors' numbers, in order, each given when its weights are at hand.

        Returns:
            By index of the block that it is injected after.
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
        """Compute what one injector adds to the video tokens: [B, L, D], of `dtype`.

        Args:
            video: Video tokens, float32 [B, L, D].
            audio: From `prepare`, for `block`.
            block: The block that has just run; one of INJECTION_BLOCKS.
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
