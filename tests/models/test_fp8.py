"""fp8 products: the error that they make, what they leave as it is, and where they are refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from recipes_for_tests import options, tiny, write_recipe, write_voice
from reference import fill_module, relative_error
from test_dit import TINY, run_case
from torch import nn

from s2v_flow import api
from s2v_flow.demo.plan import uniform
from s2v_flow.errors import S2VFlowError
from s2v_flow.models.dit import WanS2V
from s2v_flow.models.footprint import read_weights
from s2v_flow.models.load import load_dit
from s2v_flow.models.packed import (
    Fp8Linear,
    PackedLinear,
    PackedWeight,
    multiply_in_fp8,
    require_products,
    rounded,
)
from s2v_flow.models.registry import weight_bytes
from s2v_flow.nodes import precision
from s2v_flow.nodes.precision import precision_notes
from s2v_flow.weights.quantization import Packing


@pytest.fixture
def products() -> None:
    """Skip the test where torch multiplies on GPUs only, as older ones do."""
    try:
        require_products("cpu")
    except S2VFlowError as error:
        pytest.skip(error.message)


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("name", ["dit_extend_full_motion", "dit_official_extend_odd", "dit_no_audio"])
def test_a_velocity_is_within_four_percent(name: str) -> None:
    """Measured: 1.9e-2 to 3.1e-2 over all golden cases."""
    model = fill_module(WanS2V(TINY, compute_dtype=torch.bfloat16)).to(torch.bfloat16)
    multiply_in_fp8(model.blocks)
    assert 1e-2 <= relative_error(*run_case(model, name)) <= 4e-2


def test_each_row_has_its_own_scale() -> None:
    """A row of zeros stays one; a large row costs a small one nothing."""
    x = uniform(0, "x", (3, 32)) * torch.tensor([[1e-4], [0.0], [1e4]])
    data, scale = rounded(x)
    for row in (0, 2):
        assert relative_error(data[row].float() * scale[row], x[row]) <= 0.03
    assert not data[1].float().any()


@pytest.mark.usefixtures("products")
def test_fp8_weights_and_low_rank_factors_stay_as_they_are() -> None:
    data = uniform(0, "data", (48, 32)).to(torch.float8_e4m3fn)
    packed = PackedWeight(Packing("float8_e4m3fn", (48, 32)), (48, 32), data, torch.tensor(0.5))
    layer = PackedLinear(packed, nn.Parameter(uniform(0, "bias", (48,))))
    layer.set_low_rank(uniform(0, "down", (2, 32)), uniform(0, "up", (48, 2)))
    fast, x = Fp8Linear(layer), uniform(0, "x", (2, 5, 32)).to(torch.bfloat16)
    assert fast.data.data_ptr() == data.data_ptr()
    assert relative_error(fast(x).float(), layer(x.float())) <= 0.03


@pytest.mark.usefixtures("products")
def test_streamed_or_resident_a_file_gives_the_same_bits_and_the_counted_bytes(tiny_models: Path) -> None:
    path = tiny_models / "diffusion_models" / "tiny_s2v.safetensors"
    common: dict[str, Any] = {"dtype": torch.bfloat16, "device": "cpu", "quantized": False, "fp8_fast": True}
    models = [load_dit(path, streamed=streamed, **common).module for streamed in (False, True)]
    velocities = [run_case(model, "dit_no_audio")[0] for model in models]
    assert torch.equal(*velocities)
    counted = read_weights(path, "load_diffusion_model", "fp8_fast", on_cpu=True).num_bytes
    assert weight_bytes(models[0]) == pytest.approx(counted, rel=0.05)  # and a scale for each row of 256 bytes


@pytest.mark.parametrize(("device", "capability", "is_refused"), [
    ("cpu", None, True), ("cuda", (8, 6), True), ("cuda", (8, 9), False), ("cuda", None, True),
])  # fmt: skip
def test_the_plan_refuses_devices_without_fp8_products(
    device: str, capability: Any, is_refused: bool, tmp_path: Path, tiny_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_voice(tmp_path / "voice.wav", 0.3)
    recipe = write_recipe(tmp_path, tiny(dit={"precision": "fp8_fast"}))
    with pytest.raises(S2VFlowError, match=r"dit: precision: fp8_fast is refused: .* capability 8\.9, and cpu"):
        api.plan(recipe, options(tmp_path, tiny_models))
    plan = api.plan(write_recipe(tmp_path, tiny()), options(tmp_path, tiny_models)).plan
    asked = plan.node("dit").node.model_copy(update={"precision": "fp8_fast"})
    plan = replace(plan, nodes=(replace(plan.node("dit"), node=asked),))
    monkeypatch.setattr(precision, "compute_capability", lambda device: capability)
    if is_refused:
        with pytest.raises(S2VFlowError, match="fp8_fast is refused"):
            list(precision_notes(plan, device))
    else:
        list(precision_notes(plan, device))
