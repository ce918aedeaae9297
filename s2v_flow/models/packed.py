"""Weights that stay as a file has them, and layers that expand them for each use.

Every format is expanded by one function to the compute dtype, so that a layer equals, bit for bit, a plain one whose
weight was expanded when it was loaded. Formulas: QUANTIZATION.md of ComfyUI and comfy-kitchen's layouts, as facts;
GGUF: gguf_blocks.py.

Beside them, layers that multiply in fp8, for `precision: fp8_fast`: approximate; from compute capability 8.9 on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import skip_init

from s2v_flow.errors import CheckpointError, UsageError
from s2v_flow.models.gguf_blocks import dequantize_blocks
from s2v_flow.weights.quantization import GGUF_FORMATS, Packing, Quantization
from s2v_flow.weights.reader import Checkpoint

FP8 = torch.float8_e4m3fn
_LARGEST = 448.0


class PackedWeight(nn.Module):
    """A weight [out, in] as its file has it: the packed numbers and their scales.

    Attributes:
        packing: The format.
        shape: The weight's own shape, without padding.
    """

    data: Tensor
    scale: Tensor | None
    scale_2: Tensor | None

    def __init__(
        self,
        packing: Packing,
        shape: tuple[int, ...],
        data: Tensor,
        scale: Tensor | None = None,
        scale_2: Tensor | None = None,
    ):
        """Keep what is given, without copying."""
        super().__init__()
        self.packing = packing
        self.shape = shape
        self.factor = 1.0 if scale is None or scale.numel() != 1 else float(scale)
        if scale is not None and scale.numel() == 1 and packing.format != "nvfp4":
            scale = None  # a number: nothing to be sent along
        self.register_buffer("data", data, persistent=False)
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("scale_2", scale_2, persistent=False)

    def expand(self, dtype: torch.dtype) -> Tensor:
        """Return the weight [out, in] in `dtype`."""
        whole = _EXPANDED[self.packing.format](self, dtype)
        return whole if tuple(whole.shape) == self.shape else whole[: self.shape[0], : self.shape[1]]

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the rows [..., in] that `ids` [...] name, in `dtype`; of GGUF blocks only these are expanded."""
        if self.packing.format in GGUF_FORMATS and len(self.data) == self.shape[0]:
            return dequantize_blocks(self.data[ids], self.packing.format).to(dtype)
        return self.expand(dtype)[ids]


def read_packed(
    checkpoint: Checkpoint, quantization: Quantization, key: str, shape: tuple[int, ...], device: torch.device | str
) -> PackedWeight:
    """Read a quantised weight and its scales to a device; `shape`: its own in the module, without padding.

    Raises:
        CheckpointError: A scale is not finite.
    """
    packing = quantization.packings[key]
    scales = [None if name is None else checkpoint.tensor(name) for name in (packing.scale, packing.scale_2)]
    for name, scale in zip((packing.scale, packing.scale_2), scales, strict=True):
        if scale is not None and scale.dtype == torch.float32 and not bool(scale.isfinite().all()):
            raise CheckpointError(f"{checkpoint.path}: {name!r} is {scale.flatten()[~scale.isfinite().flatten()][0]}")
    moved = [None if scale is None else scale.to(device) for scale in scales]
    return PackedWeight(packing, shape, checkpoint.tensor(key).to(device), moved[0], moved[1])


class PackedLinear(nn.Module):
    """A linear layer that keeps its weight packed and expands it for each use; LoRAs stay beside it, as factors.

    `weight` is None on purpose: transformers casts activations to `weight.dtype` where it finds a weight.
    """

    bias: Tensor | None
    lora_down: Tensor | None
    lora_up: Tensor | None

    def __init__(self, packed: PackedWeight, bias: Tensor | None = None):
        """Keep what is given, without copying: the weight [out, in] and the bias [out]."""
        super().__init__()
        self.out_features, self.in_features = packed.shape
        self.packed = packed
        self.register_parameter("weight", None)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
        self.register_buffer("lora_down", None, persistent=False)
        self.register_buffer("lora_up", None, persistent=False)

    def set_low_rank(self, down: Tensor, up: Tensor) -> None:
        """Add `up @ down` to the weight, as a side branch: the packed weight is not rounded again.

        `down`: [R, in], `up`: [out, R], strength included; in the compute dtype.
        """
        assert down.shape == (up.shape[1], self.in_features)
        assert up.shape[0] == self.out_features
        self.lora_down, self.lora_up = down, up

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in] to [..., out], in the dtype of `x`."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        y = F.linear(x, self.packed.expand(x.dtype), bias)
        if self.lora_down is not None and self.lora_up is not None:
            y = y + F.linear(F.linear(x, self.lora_down.to(x.dtype)), self.lora_up.to(x.dtype))
        return y


class PackedEmbedding(nn.Module):
    """An embedding that keeps its table packed and expands the rows that are looked up."""

    def __init__(self, packed: PackedWeight, dtype: torch.dtype):
        """Keep the table [rows, width] as it is; `dtype` is what rows are given in."""
        super().__init__()
        self.packed = packed
        self.dtype = dtype

    def forward(self, ids: Tensor) -> Tensor:
        """Map ids [...] to rows [..., width]."""
        return self.packed.rows(ids, self.dtype)


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


def require_products(device: torch.device | str) -> None:
    """Multiply two small matrices on a device as `Fp8Linear` does: compute capability alone does not tell.

    Raises:
        S2VFlowError: torch, as it is installed, cannot.
    """
    options = {"bias": False, "dtype": torch.bfloat16, "device": device}
    layer: nn.Linear = skip_init(nn.Linear, 32, 32, **options)  # type: ignore[no-untyped-call]
    nn.init.ones_(layer.requires_grad_(False).weight)
    try:
        failure = "" if bool((Fp8Linear(layer)(layer.weight) == 32).all()) else "it gives wrong numbers"
    except RuntimeError as error:
        failure = str(error).partition("\n")[0]
    if failure:
        text = f"precision: fp8_fast does not work on {device} with torch {torch.__version__}: {failure}"
        raise UsageError(text, "use precision: auto, or a newer torch")


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


def _fp8(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """Expand q * s, rounded once: every fp8 value is exact in 16 bits."""
    if weight.scale is None:
        return weight.data.to(dtype, copy=True).mul_(weight.factor)
    rows = (-1, *[1] * (weight.data.ndim - 1))
    return (weight.data.float() * weight.scale.float().reshape(rows)).to(dtype)


def _int8(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """Expand q * s in float32, then rotate groups of columns back, where they were rotated."""
    scale = weight.factor if weight.scale is None else weight.scale.reshape(-1, 1)
    value = (weight.data.float() * scale).to(dtype)
    group = weight.packing.group
    if not group:
        return value
    rows, columns = value.shape
    rotated = value.float().reshape(rows, columns // group, group) @ _hadamard(group, value.device)
    return rotated.reshape(rows, columns).to(dtype)


def _hadamard(size: int, device: torch.device) -> Tensor:
    """Return the regular Hadamard matrix, symmetric and orthonormal, float32 [size, size]; size is a power of 4."""
    seed = 1 - 2 * torch.eye(4, device=device).flip(0)  # made there: a copy from the host would be waited for
    matrix = seed
    while len(matrix) < size:
        matrix = torch.kron(matrix, seed)
    normed: Tensor = matrix / size**0.5
    return normed


def _nvfp4(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """Expand lut[code] * (s2 * s): two codes a byte, the even column's in the high nibble; a scale for 16 columns."""
    assert weight.scale is not None
    assert weight.scale_2 is not None
    rows, columns = weight.packing.shape
    codes = torch.stack([weight.data >> 4, weight.data & 15], dim=-1).reshape(rows, columns).long()
    low = torch.arange(8, device=codes.device)  # e2m1: halves up to 1.5, then 2, 3, 4, 6; made there, not copied
    table = torch.where(low < 4, low / 2, (2 + low % 2) * (low // 2 - 1)).to(dtype)
    table = torch.cat([table, -table])
    scales = _unswizzled(weight.scale.view(torch.float8_e4m3fn), rows, columns // 16).to(dtype)
    factors = weight.scale_2.reshape(()).to(dtype) * scales  # [rows, columns / 16]
    values = table[codes].reshape(rows, -1, 16)
    return (values * factors[..., None]).reshape(rows, columns)


def _mxfp8(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """Expand q * 2^(b - 127), a power for 32 columns; b = 0 is 0."""
    assert weight.scale is not None
    rows, columns = weight.packing.shape
    exponents = _unswizzled(weight.scale.view(torch.uint8), rows, columns // 32).float()
    factors = torch.where(exponents == 0, 0.0, torch.exp2(exponents - 127))
    value = weight.data.float().reshape(rows, -1, 32) * factors[..., None]
    return value.reshape(rows, columns).to(dtype)


def _unswizzled(stored: Tensor, rows: int, columns: int) -> Tensor:
    """Order block scales by row and column: in a tile of 128 x 4, row 32 a + b, column c lies at 16 b + 4 a + c."""
    tall, wide = stored.shape
    tiles = stored.reshape(tall // 128, wide // 4, 32, 4, 4)  # tile rows, tile columns, b, a, c
    return tiles.permute(0, 3, 2, 1, 4).reshape(tall, wide)[:rows, :columns]


def _blocks(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    return dequantize_blocks(weight.data, weight.packing.format).reshape(weight.shape).to(dtype)


_EXPANDED: Mapping[str, Callable[[PackedWeight, torch.dtype], Tensor]] = {
    "float8_e4m3fn": _fp8,
    "float8_e5m2": _fp8,
    "int8_tensorwise": _int8,
    "nvfp4": _nvfp4,
    "mxfp8": _mxfp8,
    **dict.fromkeys(GGUF_FORMATS, _blocks),
}
