"""The encoders: UMT5 for a prompt's tokens, Wav2Vec2 for a waveform in every layer, about 50 times a second.

Only a prompt's own tokens are computed. Padding is masked in the encoder and zeroed after it, so leaving it out gives
the same rows, for a fraction of the work.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized, remove_parametrizations

from s2v_flow.errors import MediaError
from s2v_flow.models.conditioning import Conditioning
from s2v_flow.models.speech_rate import RECEPTIVE_FIELD, SAMPLES_PER_STATE
from s2v_flow.weights.layout import ADAPTER_KEY, EMBEDDING_KEY, MASK_KEY, MERGED_NORM_KEY, num_layers
from s2v_flow.weights.reader import Shapes
from s2v_flow.weights.tokenizer import EOS_ID, MAX_TOKENS, tokens

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor


class TextEncoder:
    """A UMT5 encoder with its tokenizer. `module` holds the weights."""

    def __init__(self, module: nn.Module, tokenizer: SentencePieceProcessor):
        self.module = module
        self._tokenizer = tokenizer

    def tokenize(self, text: str) -> list[int]:
        """Return every token id of `text` and the end-of-text id, however many; brackets and escapes mean nothing."""
        return [*tokens(self._tokenizer, text), EOS_ID]

    def encode(self, text: str) -> Tensor:
        """Encode a prompt: [1, S, D], the features of its own tokens, in the weights' dtype.

        Past 512 tokens it is cut, so that the end-of-text token is the last of 512. A model that expects 512 rows
        expects zeros in the rest.
        """
        return self.encode_parts([(text, 1.0)])

    def encode_parts(self, parts: Sequence[tuple[str, float]]) -> Tensor:
        """Encode a prompt whose parts have weights, each tokenised by itself; see `encode`.

        A row of weight w is (row - empty) * w + empty, in float32, where `empty` is the row at its place in an empty
        prompt padded to the same length: that of the end-of-text token in front, zero everywhere else.

        Source: ComfyUI, comfy/sd1_clip.py, encode_token_weights.
        """
        pairs = [(token, weight) for text, weight in parts for token in tokens(self._tokenizer, text)]
        ids, weights = ([pair[index] for pair in pairs[: MAX_TOKENS - 1]] for index in (0, 1))
        hidden = self._rows([*map(int, ids), EOS_ID])
        if all(weight == 1 for weight in weights):
            return hidden
        rows, empty = hidden.float(), torch.zeros_like(hidden, dtype=torch.float32)
        empty[:, :1] = self._rows([EOS_ID])
        scale = torch.tensor([*weights, 1.0], device=rows.device)[:, None]
        return torch.where(scale == 1, rows, (rows - empty) * scale + empty).to(hidden.dtype)  # [1, S, D]

    def _rows(self, ids: list[int]) -> Tensor:
        input_ids = torch.tensor([ids], dtype=torch.int64, device=next(self.module.parameters()).device)
        return self.hidden(input_ids, torch.ones_like(input_ids))

    @torch.no_grad()
    def hidden(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Encode tokens: [B, S, D], zero where the mask is; `input_ids`: int64 [B, S]; `attention_mask`: [B, S].

        Source: Raffel et al., "Exploring the Limits of Transfer Learning", 2020; transformers' UMT5EncoderModel.
        """
        output: Tensor = self.module(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return output * attention_mask[..., None].to(output.dtype)  # [B, S, D]


def build_umt5(shapes: Shapes) -> nn.Module:
    """Build a UMT5 encoder on the meta device: transformers' UMT5EncoderModel, its embedding one module of two names.

    `shapes`: the checkpoint's keys and shapes; every size is read off them.

    Raises:
        KeyError: A key that gives a size is missing.
    """
    import_module("transformers")  # another thread's import is waited for; `from` alone fails where it waits
    from transformers import UMT5Config, UMT5EncoderModel

    attention = "encoder.block.0.layer.0.SelfAttention."
    buckets, num_heads = shapes[attention + "relative_attention_bias.weight"]
    inner, width = shapes[attention + "q.weight"]
    config = UMT5Config(
        vocab_size=shapes[EMBEDDING_KEY][0],
        d_model=width,
        d_kv=inner // num_heads,
        d_ff=shapes["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"][0],
        num_layers=num_layers(shapes, "encoder.block"),
        num_heads=num_heads,
        relative_attention_num_buckets=buckets,
        relative_attention_max_distance=128,
        layer_norm_epsilon=1e-6,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        attn_implementation="eager",
    )
    with torch.device("meta"):
        model: Any = UMT5EncoderModel(config)
    model.set_input_embeddings(model.shared)
    module: nn.Module = model
    return module


STRIDES = (5, 2, 2, 2, 2, 2, 2)  # the feature extractor's; their product is one state
WINDOW_STATES = 1500  # 30 s: bounds the memory of the first convolutions

_DIRECTION_KEY = "encoder.pos_conv_embed.conv.parametrizations.weight.original1"


class AudioEncoder:
    """A Wav2Vec2 encoder. `module` holds the weights."""

    def __init__(self, module: nn.Module):
        self.module = module

    def mono(self, waveform: Tensor, conditioning: Conditioning) -> Tensor:
        """Average and normalise a clip: [L] or [channels, L], 16 kHz, to float32 [L], on the weights' device.

        `conditioning`: whose variance counts: "official" divides by the number of samples, "comfyui" by one less.

        Raises:
            MediaError: The clip is shorter than one state, 400 samples.
        """
        mono = waveform.float().reshape(-1, waveform.shape[-1]).mean(0)  # [L]
        require_state(mono.shape[0])
        device = next(self.module.parameters()).device
        return normalise(mono.to(device), unbiased=conditioning == "comfyui")

    @torch.no_grad()
    def states(self, samples: Tensor, *, final_norm: bool = True) -> Iterator[Tensor]:
        """Yield each layer's input, then the last layer's output: A of [T, E], T = (L - 400) // 320 + 1, in its dtype.

        `samples`: [L], 16 kHz, normalised; at least 400. `final_norm`: whether the last state is normed, as in
        transformers 4, on which the model's authors are. In transformers 5 the last hidden state is before the norm.

        Source: Baevski et al., "wav2vec 2.0", 2020; the layers are transformers' Wav2Vec2Model's.
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
