"""Packed weights: every format's values bit for bit, and the layers that keep them."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from reference import load_golden, relative_error
from safetensors.torch import save_file

from s2v_flow.models.packed import PackedEmbedding, PackedLinear, PackedWeight, read_packed
from s2v_flow.weights.quantization import Packing, read_quantization
from s2v_flow.weights.reader import Checkpoint

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
FILES = ("int8_tensor", "int8_row", "int8_convrot", "nvfp4", "mxfp8")


def fp8(scale: torch.Tensor | None, dtype: torch.dtype = torch.float8_e4m3fn) -> PackedWeight:
    weight = torch.randn(24, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    name = "float8_e4m3fn" if dtype == torch.float8_e4m3fn else "float8_e5m2"
    return PackedWeight(Packing(name, (24, 16)), (24, 16), weight, scale)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("form", DTYPES)
def test_the_reference_files_are_expanded_to_the_same_bits(tmp_path: Path, name: str, form: str) -> None:
    """comfy-kitchen's own: all values by their sha256; with ConvRot, a sum whose order is free, within 1e-6."""
    inputs, outputs, case = load_golden(f"components/quant_{name}")
    save_file(inputs, tmp_path / "a.safetensors")
    checkpoint = Checkpoint.open(tmp_path / "a.safetensors")
    quantization = read_quantization(checkpoint)
    for layer, item in case["layers"].items():
        packed = read_packed(checkpoint, quantization, f"{layer}.weight", tuple(item["shape"]), "cpu")
        assert packed.packing.holds(tuple(item["shape"]))
        value = packed.expand(DTYPES[form]).contiguous()
        assert value.shape == tuple(item["shape"])
        if name != "int8_convrot":
            content = value.view(torch.uint8).numpy().tobytes()
            assert hashlib.sha256(content).hexdigest() == item[f"sha256_{form}"], layer
        elif form == "f32":
            key = next(key for key in outputs if key.startswith(f"{layer}.f32"))
            step = int(key.partition("::")[2].rstrip("]") or 1)
            assert relative_error(value[::step], outputs[key]) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("rows", [False, True])
def test_a_packed_linear_equals_a_linear_of_the_expanded_weight_bit_for_bit(
    dtype: torch.dtype, stored: torch.dtype, rows: bool
) -> None:
    """fp8 of both kinds, with one scale or one a row, rounded once."""
    generator = torch.Generator().manual_seed(1)
    scale = torch.rand(24, 1, generator=generator) if rows else torch.tensor(0.0123)
    packed = fp8(scale, stored)
    bias, x = torch.randn(24, generator=generator).to(dtype), torch.randn(3, 5, 16, generator=generator).to(dtype)
    expanded = (packed.data.double() * scale.double()).to(torch.float32).to(dtype)
    layer = PackedLinear(packed, bias)
    assert torch.equal(packed.expand(dtype), expanded)
    assert torch.equal(layer(x), F.linear(x, expanded, bias))
    assert layer(x).dtype == dtype
    assert layer.weight is None


def test_a_low_rank_branch_adds_its_product_to_the_weight() -> None:
    generator = torch.Generator().manual_seed(0)
    down, up, x = (torch.randn(*shape, generator=generator) for shape in [(3, 16), (24, 3), (7, 16)])
    layer = PackedLinear(fp8(torch.tensor(0.5)))
    layer.set_low_rank(down, up)
    assert relative_error(layer(x), F.linear(x, layer.packed.expand(torch.float32) + up @ down)) < 1e-6


def test_expanding_does_not_change_what_is_stored() -> None:
    packed = fp8(torch.tensor(3.0))
    before = packed.data.clone()
    packed.expand(torch.float32).mul_(2)
    assert torch.equal(packed.data.view(torch.uint8), before.view(torch.uint8))


def test_a_packed_embedding_gives_the_rows_of_its_table() -> None:
    rows = torch.randint(0, 100, (7, 34), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    packed = PackedWeight(Packing("Q8_0", (7, 32)), (7, 32), rows)
    ids = torch.tensor([[3, 3, 0], [6, 1, 2]])
    assert torch.equal(PackedEmbedding(packed, torch.bfloat16)(ids), packed.expand(torch.bfloat16)[ids])
