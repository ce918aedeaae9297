"""UMT5: a prompt's tokens and their features.

Only a prompt's own tokens are computed. Padding is masked in the encoder and zeroed after it, so leaving it out gives
the same rows, for a fraction of the work.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from s2v_flow.weights.layout import EMBEDDING_KEY, num_layers
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
