"""Wav2Vec2: a waveform's features in every layer, about 50 times a second."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized, remove_parametrizations

from s2v_flow.errors import MediaError
from s2v_flow.models.conditioning import Conditioning
from s2v_flow.models.speech_rate import RECEPTIVE_FIELD, SAMPLES_PER_STATE
from s2v_flow.weights.layout import ADAPTER_KEY, MASK_KEY, MERGED_NORM_KEY, num_layers
from s2v_flow.weights.reader import Shapes

STRIDES = (5, 2, 2, 2, 2, 2, 2)  # the feature extractor's; their product is one state
WINDOW_STATES = 1500  # 30 s: bounds the memory of the first convolutions

_DIRECTION_KEY = "encoder.pos_conv_embed.conv.parametrizations.weight.original1"


class AudioEncoder:
    """A Wav2Vec2 encoder. `module` holds the weights."""

    def __init__(self, module: nn.Module):
        self.module = module

    @torch.no_grad()
    def encode(self, waveform: Tensor, conditioning: Conditioning, *, final_norm: bool = True) -> Tensor:
        """Encode a clip.

        Args:
            waveform: [L] or [channels, L], 16 kHz; channels are averaged.
            conditioning: Whose variance normalises the clip: "official" divides by the count, "comfyui" by one less.
            final_norm: Whether the last state is normed, as in transformers 4, on which the model's authors are. In
                transformers 5 the last hidden state is that before the norm.

        Returns:
            [A, T, E], float32, on the weights' device: the input of each layer, then the last layer's output, normed
            (A = layers + 1; T = (L - 400) // 320 + 1).

        Raises:
            MediaError: The clip is shorter than one state, 400 samples.

        Source: Baevski et al., "wav2vec 2.0", 2020; the layers are transformers' Wav2Vec2Model's.
        """
        mono = self.mono(waveform, conditioning)
        return torch.cat([state[None] for state in self.states(mono, final_norm=final_norm)]).float()  # [A, T, E]

    def mono(self, waveform: Tensor, conditioning: Conditioning) -> Tensor:
        """Average channels and normalise, as `encode` does: [L], float32, on the weights' device.

        Raises:
            MediaError: The clip is shorter than one state, 400 samples.
        """
        mono = waveform.float().reshape(-1, waveform.shape[-1]).mean(0)  # [L]
        require_state(mono.shape[0])
        device = next(self.module.parameters()).device
        return normalise(mono.to(device), unbiased=conditioning == "comfyui")

    @torch.no_grad()
    def states(self, samples: Tensor, *, final_norm: bool = True) -> Iterator[Tensor]:
        """Yield each layer's input, then the last layer's output, [T, E] each, in the weights' dtype.

        `samples`: [L], 16 kHz, normalised; at least 400.
        """
        model: Any = self.module
        weight = model.feature_projection.projection.weight
        hidden = model.feature_projection(self._extract(samples.to(weight.device, weight.dtype)))[0]  # [1, T, E]
        hidden = hidden + model.encoder.pos_conv_embed(hidden)
        for layer in model.encoder.layers:
            yield hidden[0]
            output = layer(hidden)
            hidden = output[0] if isinstance(output, tuple) else output  # transformers 4 returns tuples
        yield (model.encoder.layer_norm(hidden) if final_norm else hidden)[0]

    def _extract(self, mono: Tensor) -> Tensor:
        """Run the convolutions over mono [L], in windows that join exactly (nothing is padded): [1, T, channels]."""
        model: Any = self.module
        num_states = (mono.shape[0] - RECEPTIVE_FIELD) // SAMPLES_PER_STATE + 1
        windows = []
        for first in range(0, num_states, WINDOW_STATES):
            last = min(first + WINDOW_STATES, num_states) - 1
            samples = mono[first * SAMPLES_PER_STATE : last * SAMPLES_PER_STATE + RECEPTIVE_FIELD]
            windows.append(model.feature_extractor(samples[None]).transpose(1, 2))  # [1, t, channels]
        return torch.cat(windows, dim=1)


def require_state(num_samples: int) -> None:
    """Refuse a clip that is too short for one state.

    Raises:
        MediaError: It has fewer than 400 samples at 16 kHz.
    """
    if num_samples < RECEPTIVE_FIELD:
        raise MediaError(
            f"the sound has {num_samples} samples at 16 kHz; the audio encoder needs {RECEPTIVE_FIELD} (25 ms)"
        )


def normalise(mono: Tensor, *, unbiased: bool) -> Tensor:
    """Give a mono clip [L] zero mean and unit variance, with 1e-7 under the root."""
    return (mono - mono.mean()) / torch.sqrt(mono.var(correction=1 if unbiased else 0) + 1e-7)


def build_wav2vec2(shapes: Shapes) -> nn.Module:
    """Build a Wav2Vec2 encoder (layer norm in every convolution, norm before each block) on the meta device.

    `shapes`: the checkpoint's keys and shapes; every size is read off them, except that heads are 64 wide, or four in a
    model narrower than that allows.

    Raises:
        KeyError: A key that gives a size is missing.
    """
    import_module("transformers")  # another thread's import is waited for; `from` alone fails where it waits
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    convolutions = [shapes[f"feature_extractor.conv_layers.{i}.conv.weight"] for i in range(len(STRIDES))]
    is_merged = MERGED_NORM_KEY in shapes
    width, group_width, kernel = shapes[MERGED_NORM_KEY if is_merged else _DIRECTION_KEY]
    config = Wav2Vec2Config(
        hidden_size=width,
        num_hidden_layers=num_layers(shapes, "encoder.layers"),
        num_attention_heads=max(4, width // 64),
        intermediate_size=shapes["encoder.layers.0.feed_forward.intermediate_dense.weight"][0],
        conv_dim=[shape[0] for shape in convolutions],
        conv_kernel=[shape[2] for shape in convolutions],
        conv_stride=list(STRIDES),
        conv_bias=True,
        feat_extract_norm="layer",
        feat_extract_activation="gelu",
        hidden_act="gelu",
        do_stable_layer_norm=True,
        num_conv_pos_embeddings=kernel,
        num_conv_pos_embedding_groups=width // group_width,
        layer_norm_eps=1e-5,
        adapter_attn_dim=shapes[ADAPTER_KEY][0] if ADAPTER_KEY in shapes else None,
        mask_time_prob=0.05 if MASK_KEY in shapes else 0.0,  # whether there is a masked_spec_embed; unused here
        attn_implementation="sdpa",
    )
    with torch.device("meta"):
        model: nn.Module = Wav2Vec2Model(config)
        if is_merged:
            merge_weight_norm(model)
    return model


def merge_weight_norm(model: nn.Module) -> None:
    """Make one weight of the two that the positions' convolution has; what joins them would refer to itself."""
    convolution = model.get_submodule("encoder.pos_conv_embed.conv")
    if is_parametrized(convolution, "weight"):
        remove_parametrizations(convolution, "weight")
