"""Linear layers that multiply in fp8, for `precision: fp8_fast`: approximate; from compute capability 8.9 on."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s2v_flow.models.packed import PackedLinear

FP8 = torch.float8_e4m3fn
_LARGEST = 448.0


class Fp8Linear(nn.Module):
    """A linear layer whose weight and input are rounded to e4m3fn, with a float32 scale a row; LoRAs stay beside it.

    The weight's scales are made here, the input's in each call. A weight that is in e4m3fn with one scale stays so.
    """

    data: Tensor
    scale: Tensor
    bias: Tensor | None
    lora_down: Tensor | None
    lora_up: Tensor | None

    def __init__(self, layer: nn.Linear | PackedLinear) -> None:
        """Take a layer's weight [out, in], its bias, and its low-rank factors."""
        super().__init__()
        packed = layer.packed if isinstance(layer, PackedLinear) else None
        if packed is not None and packed.packing.format == "float8_e4m3fn" and packed.scale is None:
            data = packed.data
            scale = data.new_full((len(data), 1), packed.factor, dtype=torch.float32)
        else:
            weight = layer.weight if isinstance(layer, nn.Linear) else layer.packed.expand(torch.float32)
            data, scale = rounded(weight.detach())
        for name, value in (
            ("data", data),
            ("scale", scale.t().contiguous()),  # [1, out]
            ("bias", layer.bias),
            ("lora_down", getattr(layer, "lora_down", None)),
            ("lora_up", getattr(layer, "lora_up", None)),
        ):
            self.register_buffer(name, None if value is None else value.detach(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map bfloat16 [..., in] to bfloat16 [..., out]."""
        rows, scale = rounded(x.flatten(0, -2))
        y = torch._scaled_mm(
            rows, self.data.t(), scale_a=scale, scale_b=self.scale, out_dtype=x.dtype, use_fast_accum=x.is_cuda
        )
        if self.bias is not None:
            y += self.bias.to(x.dtype)
        y = y.view(*x.shape[:-1], -1)
        if self.lora_down is not None and self.lora_up is not None:
            y += F.linear(F.linear(x, self.lora_down.to(x.dtype)), self.lora_up.to(x.dtype))
        return y


def rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round rows [M, K] to e4m3fn [M, K] times a scale, float32 [M, 1]: the row's largest number is 448 of it."""
    scale = x.abs().amax(-1, keepdim=True).float().clamp_(min=1e-12) / _LARGEST
    return (x / scale).to(FP8), scale


def multiply_in_fp8(module: nn.Module, *paths: str) -> None:
    """Put `Fp8Linear`s in the place of linear layers, each of which is freed before the next; weights stay in place.

    `paths`: unless given, those of a DiT's blocks, see `multiplied`.
    """
    for path in paths or multiplied(module):
        layer: Any = module.get_submodule(path)
        parent, _, leaf = path.rpartition(".")
        setattr(module.get_submodule(parent), leaf, Fp8Linear(layer))


def multiplied(blocks: nn.Module) -> list[str]:
    """Name every linear layer of a DiT's blocks but those that a prompt is projected by."""
    layers = ((path, layer) for path, layer in blocks.named_modules() if isinstance(layer, (nn.Linear, PackedLinear)))
    return [path for path, _ in layers if not path.endswith(("cross_attn.k", "cross_attn.v"))]
