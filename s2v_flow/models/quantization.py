"""fp8-scaled checkpoints: which layers are quantised, and a linear layer that keeps its weight in fp8.

Two layouts are in use. Older files hold a tensor `scaled_fp8` and, per layer X, `X.scale_weight` (and perhaps
`X.scale_input`); newer ones hold `X.weight_scale` (and `X.input_scale`) and name the format in the metadata
(`_quantization_metadata`) or in a tensor of JSON bytes `X.comfy_quant`. The input scales serve fp8 matrix
multiplication, which is not used here: weights are expanded to the compute dtype, exactly.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s2v_flow.errors import CheckpointError
from s2v_flow.weights.layout import FP8_BOOKKEEPING, FP8_MARKER, FP8_SCALES
from s2v_flow.weights.reader import Checkpoint

FP8_FORMAT = "float8_e4m3fn"
_MAX_TAG_BYTES = 4096
_UNSUPPORTED_WEIGHTS = {"F8_E5M2": "float8_e5m2", "F8_E8M0": "mxfp8", "I8": "int8"}


@dataclass(frozen=True)
class Quantization:
    """What is quantised in a file.

    `scales` gives each fp8 weight's key the key of its scale (None: the scale is 1); `bookkeeping` are the keys that
    are no weights.
    """

    scales: Mapping[str, str | None]
    bookkeeping: frozenset[str]


def read_quantization(checkpoint: Checkpoint) -> Quantization:
    """Find a file's quantised weights, in any of the supported layouts.

    Args:
        checkpoint: An open model file.

    Returns:
        The quantised weights; empty for a file in full precision.

    Raises:
        CheckpointError: The file uses another format (it is named), or a scale is missing or not a scalar.
    """
    _refuse_other_formats(checkpoint)
    bookkeeping = frozenset(key for key in checkpoint.entries if key == FP8_MARKER or key.endswith(FP8_BOOKKEEPING))
    scales: dict[str, str | None] = {}
    for key, entry in checkpoint.entries.items():
        if key in bookkeeping or entry.dtype != "F8_E4M3":
            continue
        layer = key.removesuffix(".weight")
        scale = next((layer + suffix for suffix in FP8_SCALES if layer + suffix in checkpoint.entries), None)
        if scale is None and bookkeeping:
            raise CheckpointError(
                f"{checkpoint.path}: {key!r} is in fp8, but its scale {layer + FP8_SCALES[0]!r} is missing"
            )
        scales[key] = scale
    for key in sorted(bookkeeping):
        if key.endswith(FP8_SCALES):
            _check_scale(checkpoint, key, scales)
    return Quantization(scales, bookkeeping)


def _check_scale(checkpoint: Checkpoint, key: str, scales: Mapping[str, str | None]) -> None:
    shape = checkpoint.shapes[key]
    if math.prod(shape) != 1:
        raise _refused(checkpoint, f"blockwise or per-channel fp8 ({key!r} has the shape {list(shape)})")
    weight = key.rpartition(".")[0] + ".weight"
    if scales.get(weight) != key:
        found = checkpoint.dtypes.get(weight, "missing")
        raise CheckpointError(f"{checkpoint.path}: {key!r} scales {weight!r}, which is not in fp8 (it is {found})")


def _refuse_other_formats(checkpoint: Checkpoint) -> None:
    formats = _formats_in_metadata(checkpoint)
    for key in checkpoint.entries:
        if key.endswith(".comfy_quant"):
            formats[key.removesuffix(".comfy_quant")] = _format_of(checkpoint, key)
    for layer, name in sorted(formats.items()):
        if name != FP8_FORMAT:
            raise _refused(checkpoint, f"{name} (layer {layer!r})")
    for key, dtype in checkpoint.dtypes.items():
        if key.endswith(".weight") and dtype in _UNSUPPORTED_WEIGHTS:
            raise _refused(checkpoint, f"{_UNSUPPORTED_WEIGHTS[dtype]} ({key!r})")
    if checkpoint.dtypes.get(FP8_MARKER, "F8_E4M3") != "F8_E4M3":
        raise _refused(
            checkpoint, f"{_UNSUPPORTED_WEIGHTS.get(checkpoint.dtypes[FP8_MARKER], checkpoint.dtypes[FP8_MARKER])}"
        )


def _formats_in_metadata(checkpoint: Checkpoint) -> dict[str, str]:
    text = checkpoint.metadata.get("_quantization_metadata")
    if text is None:
        return {}
    try:
        layers = json.loads(text)["layers"]
        return {name.removeprefix(checkpoint.prefix): str(layer["format"]) for name, layer in layers.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{checkpoint.path}: its _quantization_metadata is damaged") from error


def _format_of(checkpoint: Checkpoint, key: str) -> str:
    entry = checkpoint.entries[key]
    try:
        if entry.dtype != "U8" or math.prod(entry.shape) > _MAX_TAG_BYTES:
            raise ValueError("it is no short text")
        return str(json.loads(bytes(checkpoint.tensor(key).flatten().tolist()))["format"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{checkpoint.path}: {key!r} is damaged") from error


def _refused(checkpoint: Checkpoint, what: str) -> CheckpointError:
    return CheckpointError(
        f"{checkpoint.path}: is quantised as {what}, which is not supported",
        fix=f"use the {FP8_FORMAT} scaled, bf16 or fp16 file",
    )


def read_scale(checkpoint: Checkpoint, quantization: Quantization, key: str) -> float:
    """Read the factor that turns a stored fp8 weight into the true one.

    Raises:
        CheckpointError: The factor is not a finite number.
    """
    scale_key = quantization.scales[key]
    scale = 1.0 if scale_key is None else float(checkpoint.tensor(scale_key).reshape(()))
    if not math.isfinite(scale):
        raise CheckpointError(f"{checkpoint.path}: {scale_key!r} is {scale}")
    return scale


class Fp8Linear(nn.Module):
    """A linear layer that keeps its weight in fp8 and expands it for each use.

    The product weight * scale is rounded once, to the input's dtype, so the result equals, bit for bit, that of a plain
    linear layer whose weight was expanded when it was loaded. `weight` is None on purpose: transformers casts
    activations to `weight.dtype` where it finds a weight, and fp8 activations would be wrong.
    """

    weight_fp8: Tensor
    bias: Tensor | None
    lora_down: Tensor | None
    lora_up: Tensor | None

    def __init__(self, weight_fp8: Tensor, scale: float, bias: Tensor | None = None):
        """Keep what is given, without copying.

        Args:
            weight_fp8: [out, in], float8_e4m3fn.
            scale: The true weight is `weight_fp8 * scale`.
            bias: [out], or None.
        """
        super().__init__()
        self.out_features, self.in_features = weight_fp8.shape
        self.scale = scale
        self.register_parameter("weight", None)
        self.register_buffer("weight_fp8", weight_fp8, persistent=False)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
        self.register_buffer("lora_down", None, persistent=False)
        self.register_buffer("lora_up", None, persistent=False)

    def set_low_rank(self, down: Tensor, up: Tensor) -> None:
        """Add `up @ down` to the weight, as a side branch: the fp8 weight is not rounded again.

        Args:
            down: [R, in], in the compute dtype.
            up: [out, R], in the compute dtype, strength included.
        """
        assert down.shape == (up.shape[1], self.in_features)
        assert up.shape[0] == self.out_features
        self.lora_down, self.lora_up = down, up

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """Return the weight [out, in] in `dtype`, rounded once; the low-rank branch is not part of it."""
        return dequantize(self.weight_fp8, self.scale, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in] to [..., out], in the dtype of `x`."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        y = F.linear(x, self.dequantized(x.dtype), bias)
        if self.lora_down is not None and self.lora_up is not None:
            y = y + F.linear(F.linear(x, self.lora_down.to(x.dtype)), self.lora_up.to(x.dtype))
        return y

    def extra_repr(self) -> str:
        """Describe the layer as nn.Linear does."""
        rank = 0 if self.lora_down is None else self.lora_down.shape[0]
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, rank={rank}"


def dequantize(weight_fp8: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """Expand an fp8 weight: `weight_fp8 * scale`, rounded once to `dtype` (every fp8 value is exact in 16 bits)."""
    return weight_fp8.to(dtype, copy=True).mul_(scale)
