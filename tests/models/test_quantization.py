"""fp8 weights: both layouts, what is refused, and the layer that keeps them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from reference import relative_error
from safetensors.torch import save_file
from torch import Tensor

from s2v_flow.errors import CheckpointError
from s2v_flow.models.quantization import Fp8Linear, Quantization, dequantize, read_quantization, read_scale
from s2v_flow.weights.reader import Checkpoint

WEIGHT = torch.arange(-8, 8).reshape(4, 4).to(torch.float8_e4m3fn)
SCALE = torch.tensor(0.37)
TAG = torch.frombuffer(bytearray(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)


def read(tmp_path: Path, tensors: dict[str, Tensor], **metadata: str) -> tuple[Checkpoint, Quantization]:
    save_file(tensors, tmp_path / "a.safetensors", metadata=metadata or None)
    checkpoint = Checkpoint.open(tmp_path / "a.safetensors")
    return checkpoint, read_quantization(checkpoint)


def metadata(name: str, layer: str = "x") -> str:
    return json.dumps({"format_version": "1.0", "layers": {layer: {"format": name}}})


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("marker", [0, 2])
def test_older_layout(tmp_path: Path, shape: tuple[int, ...], marker: int) -> None:
    checkpoint, found = read(
        tmp_path,
        {
            "x.weight": WEIGHT,
            "x.scale_weight": SCALE.reshape(shape),
            "x.scale_input": torch.tensor(1.0),
            "scaled_fp8": torch.zeros(marker, dtype=torch.float8_e4m3fn),
            "norm.weight": torch.ones(4),
        },
    )
    assert dict(found.scales) == {"x.weight": "x.scale_weight"}
    assert found.bookkeeping == {"x.scale_weight", "x.scale_input", "scaled_fp8"}
    assert read_scale(checkpoint, found, "x.weight") == float(SCALE)


def test_newer_layout_with_metadata_and_prefix(tmp_path: Path) -> None:
    tensors = {"x.weight": WEIGHT, "x.weight_scale": SCALE, "x.input_scale": SCALE.clone()}
    tensors = {f"diffusion_model.{key}": value for key, value in tensors.items()}
    _, found = read(tmp_path, tensors, _quantization_metadata=metadata("float8_e4m3fn", "diffusion_model.x"))
    assert dict(found.scales) == {"x.weight": "x.weight_scale"}
    assert found.bookkeeping == {"x.weight_scale", "x.input_scale"}


def test_newer_layout_with_tags(tmp_path: Path) -> None:
    _, found = read(tmp_path, {"x.weight": WEIGHT, "x.weight_scale": SCALE, "x.comfy_quant": TAG})
    assert dict(found.scales) == {"x.weight": "x.weight_scale"}
    assert found.bookkeeping == {"x.weight_scale", "x.comfy_quant"}


def test_fp8_without_any_scale_counts_as_it_is(tmp_path: Path) -> None:
    checkpoint, found = read(tmp_path, {"x.weight": WEIGHT})
    assert dict(found.scales) == {"x.weight": None}
    assert read_scale(checkpoint, found, "x.weight") == 1.0


def test_full_precision_has_no_quantization(tmp_path: Path) -> None:
    _, found = read(tmp_path, {"x.weight": WEIGHT.float()})
    assert found == Quantization({}, frozenset())


def tag(name: str) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps({"format": name}).encode()), dtype=torch.uint8)


REFUSED: dict[str, tuple[dict[str, Tensor], dict[str, str], str]] = {
    "nvfp4": (
        {"x.weight": torch.zeros(2, 2, dtype=torch.uint8), "x.comfy_quant": tag("nvfp4")},
        {},
        "quantised as nvfp4",
    ),
    "mxfp8": ({"x.weight": WEIGHT}, {"_quantization_metadata": metadata("mxfp8")}, "quantised as mxfp8"),
    "int4": ({"x.weight": WEIGHT}, {"_quantization_metadata": metadata("int4_awq")}, "quantised as int4_awq"),
    "int8": ({"x.weight": torch.zeros(2, 2, dtype=torch.int8)}, {}, "quantised as int8"),
    "e5m2": ({"x.weight": torch.zeros(2, 2).to(torch.float8_e5m2)}, {}, "quantised as float8_e5m2"),
    "e5m2_marker": ({"scaled_fp8": torch.zeros(2).to(torch.float8_e5m2)}, {}, "quantised as float8_e5m2"),
    "blockwise": ({"x.weight": WEIGHT, "x.weight_scale": torch.ones(4, 1)}, {}, "blockwise or per-channel fp8"),
    "no_scale": (
        {"x.weight": WEIGHT, "scaled_fp8": WEIGHT[:0, 0].clone()},
        {},
        "its scale 'x.scale_weight' is missing",
    ),
    "scale_of_bf16": ({"x.weight": WEIGHT.bfloat16(), "x.scale_weight": SCALE}, {}, "not in fp8 (it is BF16)"),
    "scale_of_none": ({"x.scale_weight": SCALE}, {}, "not in fp8 (it is missing)"),
    "metadata": ({"x.weight": WEIGHT}, {"_quantization_metadata": "[]"}, "_quantization_metadata is damaged"),
    "tag": ({"x.weight": WEIGHT, "x.comfy_quant": TAG[:5].clone()}, {}, "'x.comfy_quant' is damaged"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_formats_are_refused_by_name(tmp_path: Path, name: str) -> None:
    tensors, text, message = REFUSED[name]
    with pytest.raises(CheckpointError) as caught:
        read(tmp_path, tensors, **text)
    assert message in caught.value.message


def test_a_scale_that_is_no_number_is_refused(tmp_path: Path) -> None:
    checkpoint, found = read(tmp_path, {"x.weight": WEIGHT, "x.weight_scale": torch.tensor(float("nan"))})
    with pytest.raises(CheckpointError, match=r"'x\.weight_scale' is nan"):
        read_scale(checkpoint, found, "x.weight")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fp8_linear_equals_a_linear_of_the_expanded_weight_bit_for_bit(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 16, generator=generator).to(torch.float8_e4m3fn)
    bias, x = torch.randn(24, generator=generator).to(dtype), torch.randn(3, 5, 16, generator=generator).to(dtype)
    scale = float(torch.tensor(0.0123))
    expanded = (weight.double() * scale).to(torch.float32).to(dtype)
    layer = Fp8Linear(weight, scale, bias)
    assert torch.equal(layer.dequantized(dtype), expanded)
    assert torch.equal(layer(x), F.linear(x, expanded, bias))
    assert layer(x).dtype == dtype
    assert layer.weight_fp8.dtype == torch.float8_e4m3fn
    assert layer.weight is None


def test_low_rank_branch_adds_its_product_to_the_weight() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 16, generator=generator).to(torch.float8_e4m3fn)
    down, up, x = (torch.randn(*shape, generator=generator) for shape in [(3, 16), (24, 3), (7, 16)])
    layer = Fp8Linear(weight, 0.5)
    layer.set_low_rank(down, up)
    assert relative_error(layer(x), F.linear(x, weight.float() * 0.5 + up @ down)) < 1e-6


def test_expanding_does_not_change_its_argument() -> None:
    widened = WEIGHT.to(torch.float32)
    dequantize(widened, 3.0, torch.float32)
    assert torch.equal(widened, WEIGHT.to(torch.float32))
