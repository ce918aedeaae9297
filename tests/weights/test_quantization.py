"""Quantised weights by a file's header: every layout, and what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from s2v_flow.errors import CheckpointError
from s2v_flow.models.packed import read_packed
from s2v_flow.weights.quantization import Packing, Quantization, read_quantization
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
    assert dict(found.packings) == {"x.weight": Packing("float8_e4m3fn", (4, 4), "x.scale_weight")}
    assert found.bookkeeping == {"x.scale_weight", "x.scale_input", "scaled_fp8"}
    assert read_packed(checkpoint, found, "x.weight", (4, 4), "cpu").factor == float(SCALE)


def test_newer_layout_with_metadata_and_prefix(tmp_path: Path) -> None:
    tensors = {"x.weight": WEIGHT, "x.weight_scale": SCALE, "x.input_scale": SCALE.clone()}
    tensors = {f"diffusion_model.{key}": value for key, value in tensors.items()}
    _, found = read(tmp_path, tensors, _quantization_metadata=metadata("float8_e4m3fn", "diffusion_model.x"))
    assert dict(found.packings) == {"x.weight": Packing("float8_e4m3fn", (4, 4), "x.weight_scale")}
    assert found.bookkeeping == {"x.weight_scale", "x.input_scale"}


def test_newer_layout_with_tags(tmp_path: Path) -> None:
    _, found = read(tmp_path, {"x.weight": WEIGHT, "x.weight_scale": SCALE, "x.comfy_quant": TAG})
    assert dict(found.packings) == {"x.weight": Packing("float8_e4m3fn", (4, 4), "x.weight_scale")}
    assert found.bookkeeping == {"x.weight_scale", "x.comfy_quant"}


def test_fp8_without_any_scale_counts_as_it_is(tmp_path: Path) -> None:
    checkpoint, found = read(tmp_path, {"x.weight": WEIGHT})
    assert dict(found.packings) == {"x.weight": Packing("float8_e4m3fn", (4, 4))}
    assert read_packed(checkpoint, found, "x.weight", (4, 4), "cpu").factor == 1.0


def test_full_precision_has_no_quantization(tmp_path: Path) -> None:
    _, found = read(tmp_path, {"x.weight": WEIGHT.float()})
    assert found == Quantization()


def tag(name: str, **options: object) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps({"format": name, **options}).encode()), dtype=torch.uint8)


@pytest.mark.parametrize("shape", [(), (1,), (4,), (4, 1)])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_of_both_kinds_has_one_scale_or_one_a_row(
    tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    tensors = {
        "x.weight": WEIGHT.float().to(dtype),
        "x.weight_scale": torch.ones(shape),
        "x.input_scale": SCALE.clone(),
    }
    _, found = read(tmp_path, tensors)
    assert found.packings["x.weight"].scale == "x.weight_scale"
    assert found.packings["x.weight"].format == str(dtype).removeprefix("torch.")


def test_a_scale_for_each_row_may_be_in_the_formats_name(tmp_path: Path) -> None:
    scale = torch.rand(4)
    tensors = {"x.weight": WEIGHT, "x.weight_scale": scale, "x.comfy_quant": tag("float8_e4m3fn_rowwise")}
    checkpoint, found = read(tmp_path, tensors)
    packed = read_packed(checkpoint, found, "x.weight", (4, 4), "cpu")
    assert torch.equal(packed.expand(torch.float32), WEIGHT.float() * scale[:, None])


def test_a_convolution_in_fp8_may_be_tagged_too(tmp_path: Path) -> None:
    """As every weight of a VAE is."""
    weight = torch.ones(4, 4, 1, 1, 1).to(torch.float8_e4m3fn)
    tensors = {"x.weight": weight, "x.weight_scale": SCALE.clone(), "x.comfy_quant": tag("float8_e4m3fn")}
    assert read(tmp_path, tensors)[1].packings["x.weight"].shape == (4, 4, 1, 1, 1)


def test_options_may_stand_beside_the_format_or_under_params(tmp_path: Path) -> None:
    for options in ({"convrot": True}, {"params": {"convrot": True}}):
        tensors = {
            "x.weight": torch.zeros(4, 512, dtype=torch.int8),
            "x.weight_scale": torch.ones(4, 1),
            "x.comfy_quant": tag("int8_tensorwise", **options),
        }
        _, found = read(tmp_path, tensors)
        assert found.packings["x.weight"] == Packing("int8_tensorwise", (4, 512), "x.weight_scale", group=256)


def test_a_packed_weight_counts_its_bytes_and_those_of_its_scales(tmp_path: Path) -> None:
    tensors = {
        "x.weight": torch.zeros(16, 8, dtype=torch.uint8),
        "x.weight_scale": torch.zeros(128, 4).to(torch.float8_e4m3fn),
        "x.weight_scale_2": SCALE,
        "x.comfy_quant": tag("nvfp4"),
    }
    checkpoint, found = read(tmp_path, tensors)
    assert found.shape(checkpoint, "x.weight") == (16, 16)
    assert found.num_bytes(checkpoint, "x.weight") == 16 * 8 + 128 * 4 + 4
    assert found.packings["x.weight"].holds((10, 9))
    assert not found.packings["x.weight"].holds((17, 9))


REFUSED: dict[str, tuple[dict[str, Tensor], dict[str, str], str]] = {
    "deepseek": (
        {"x.weight": WEIGHT, "x.weight_scale_inv": torch.ones(1, 1)},
        {},
        "quantised as fp8 with a scale for each block ('x.weight_scale_inv')",
    ),
    "nunchaku": (
        {"x.qweight": torch.zeros(4, 2, dtype=torch.int8), "x.wscales": torch.ones(1, 4)},
        {},
        "quantised as SVDQuant ('x.wscales')",
    ),
    "gptq": (
        {"x.qweight": torch.zeros(1, 4, dtype=torch.int32), "x.scales": torch.ones(1, 4)},
        {},
        "quantised as GPTQ, AWQ or SVDQuant ('x.qweight')",
    ),
    "quanto": (
        {"x.weight._data": WEIGHT, "x.weight._scale": torch.ones(4, 1)},
        {},
        "quantised as optimum-quanto's ('x.weight._data')",
    ),
    "nf4": (
        {"x.weight": torch.zeros(8, 1, dtype=torch.uint8), "x.weight.absmax": SCALE},
        {},
        "quantised as bitsandbytes' ('x.weight.absmax')",
    ),
    "awq": ({"x.weight": WEIGHT}, {"_quantization_metadata": metadata("awq_w4a16")}, "quantised as awq_w4a16"),
    "w4a4": (
        {"x.weight": torch.zeros(4, 2, dtype=torch.int8), "x.comfy_quant": tag("convrot_w4a4")},
        {},
        "quantised as convrot_w4a4",
    ),
    "smoothed": (
        {
            "x.weight": torch.zeros(16, 8, dtype=torch.uint8),
            "x.comfy_quant": tag("nvfp4"),
            "x.pre_quant_scale": torch.ones(16),
        },
        {},
        "quantised as nvfp4 with a pre_quant_scale",
    ),
    "int8 alone": ({"x.weight": torch.zeros(2, 2, dtype=torch.int8)}, {}, "quantised as int8 without its format"),
    "bytes alone": ({"x.weight": torch.zeros(2, 2, dtype=torch.uint8)}, {}, "quantised as U8 without its format"),
    "whole numbers": ({"x.weight": torch.zeros(2, 2, dtype=torch.int64)}, {}, "quantised as I64 without its format"),
    "blockwise": ({"x.weight": WEIGHT, "x.weight_scale": torch.ones(2, 2)}, {}, "scales of the shape [2, 2]"),
    "nvfp4 without scales": (
        {"x.weight": torch.zeros(16, 8, dtype=torch.uint8), "x.comfy_quant": tag("nvfp4")},
        {},
        "'x.weight_scale' is missing",
    ),
    "nvfp4 of floats": (
        {"x.weight": torch.zeros(16, 8), "x.comfy_quant": tag("nvfp4")},
        {},
        "nvfp4 has U8 [out, in]",
    ),
    "rotation": (
        {
            "x.weight": torch.zeros(4, 8, dtype=torch.int8),
            "x.weight_scale": SCALE,
            "x.comfy_quant": tag("int8_tensorwise", convrot=True, convrot_groupsize=8),
        },
        {},
        "rotates groups of 8 of its 8 columns",
    ),
    "two scales": (
        {"x.weight": WEIGHT, "x.weight_scale": SCALE, "x.scale_weight": SCALE.clone()},
        {},
        "'x.weight_scale' scales 'x.weight', which has another scale already",
    ),
    "blockwise by its name": (
        {"x.weight": WEIGHT, "x.weight_scale": SCALE, "x.comfy_quant": tag("float8_e4m3fn_blockwise")},
        {},
        "quantised as float8_e4m3fn_blockwise",
    ),
    "torchao": (
        {"x._weight_qdata": WEIGHT, "x._weight_scale": torch.ones(4, 1)},
        {},
        "quantised as torchao's ('x._weight_qdata')",
    ),
    "modelopt": (
        {"x.weight": WEIGHT, "x.weight_quantizer._amax": SCALE},
        {},
        "quantised as ModelOpt's ('x.weight_quantizer._amax')",
    ),
    **{
        f"fp8 with {end}": (
            {"x.weight": WEIGHT, f"x.{end}": SCALE},
            {},
            f"has 'x.{end}' beside a weight, a form of quantisation that is not supported",
        )
        for end in ("scale", "weight.scale", "scale_inv", "weight_scales", "weight_zero_point", "input_amax")
    },
    "no_scale": (
        {"x.weight": WEIGHT, "scaled_fp8": WEIGHT[:0, 0].clone()},
        {},
        "its scale 'x.scale_weight' is missing",
    ),
    "scale_of_bf16": ({"x.weight": WEIGHT.bfloat16(), "x.scale_weight": SCALE}, {}, "not quantised (it is BF16)"),
    "scale_of_none": ({"x.scale_weight": SCALE}, {}, "not quantised (it is missing)"),
    "tag_of_none": ({"x.comfy_quant": TAG}, {}, "'x' is said to be quantised, but has no weight"),
    "metadata": ({"x.weight": WEIGHT}, {"_quantization_metadata": "[]"}, "_quantization_metadata is damaged"),
    "tag": ({"x.weight": WEIGHT, "x.comfy_quant": TAG[:5].clone()}, {}, "'x.comfy_quant' is damaged"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_formats_are_refused_by_name(tmp_path: Path, name: str) -> None:
    tensors, text, message = REFUSED[name]
    with pytest.raises(CheckpointError) as caught:
        read(tmp_path, tensors, **text)
    assert message in caught.value.message
    assert caught.value.fix


def test_a_scale_that_is_no_number_is_refused(tmp_path: Path) -> None:
    checkpoint, found = read(tmp_path, {"x.weight": WEIGHT, "x.weight_scale": torch.tensor(float("nan"))})
    with pytest.raises(CheckpointError, match=r"'x\.weight_scale' is nan"):
        read_packed(checkpoint, found, "x.weight", (4, 4), "cpu")
