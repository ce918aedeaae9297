"""Backends of attention: chosen by device, tried before use, refused by the plan, and part of a result's identity."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from recipes_for_tests import options, tiny, write_recipe, write_voice
from reference import fill_module, load_golden, prepare_case, relative_error
from runs_for_tests import Place

from s2v_flow import api
from s2v_flow.errors import S2VFlowError
from s2v_flow.models.attention import backends_for, try_backend, usable_backend
from s2v_flow.models.dit import S2VConfig, WanS2V
from s2v_flow.nodes import precision
from s2v_flow.nodes.precision import attention_refusal

STAND_IN = """
import torch
calls = []

def sageattn(q, k, v, tensor_layout, is_causal):
    assert (tensor_layout, is_causal) == ("HND", False)
    calls.append(tuple(q.shape))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v)
"""


def velocity_of(attention: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the velocity of a golden case computed with a backend, and what it must be."""
    model = fill_module(WanS2V(S2VConfig(dim=256, ffn_dim=512, num_layers=5, text_dim=64, audio_dim=64)))
    model.attention = attention
    inputs, outputs, case = load_golden("components/dit_no_audio")
    chunk, branch = prepare_case(model, "dit_no_audio", inputs, case)
    (velocity,) = model(inputs["x"], inputs["timestep"], chunk, [branch])
    return velocity, outputs["velocity"]


def planned(folder: Path, models: Path, **fields: str) -> api.Planned:
    write_voice(folder / "voice.wav", 0.3)
    return api.plan(write_recipe(folder, tiny(dit=fields)), options(folder, models))


@pytest.mark.parametrize(
    ("capability", "dtype", "names"),
    [
        ((9, 0), torch.bfloat16, ("cudnn", "flash", "sdpa")),
        ((10, 0), torch.float16, ("cudnn", "flash", "sdpa")),
        ((8, 9), torch.bfloat16, ("flash", "sdpa")),
        ((12, 0), torch.bfloat16, ("sdpa",)),
        ((9, 0), torch.float32, ("sdpa",)),
        (None, torch.bfloat16, ("sdpa",)),
    ],
)
def test_auto_goes_by_compute_capability(
    capability: tuple[int, int] | None, dtype: torch.dtype, names: tuple[str, ...]
) -> None:
    assert backends_for(capability, dtype) == names


def test_what_fails_on_a_small_tensor_is_passed_over_by_name() -> None:
    """A CPU has flash and no cuDNN."""
    backend, warning = usable_backend("auto", ("cudnn", "flash", "sdpa"), "cpu", torch.bfloat16)
    assert backend == "flash"
    assert warning.startswith("attention: cudnn does not work on cpu (RuntimeError: ")
    assert warning.endswith(": flash is used")
    assert usable_backend("auto", ("flash", "sdpa"), "cpu", torch.bfloat16) == ("flash", "")
    assert usable_backend("auto", ("cudnn", "sdpa"), "cpu", torch.bfloat16)[0] == "sdpa"


def test_what_is_asked_for_by_name_works_or_is_an_error() -> None:
    assert usable_backend("flash", ("sdpa",), "cpu", torch.float32) == ("flash", "")
    with pytest.raises(S2VFlowError, match="attention: cudnn does not work on cpu") as caught:
        usable_backend("cudnn", ("sdpa",), "cpu", torch.float32)
    assert "attention: auto" in (caught.value.fix or "")


@pytest.mark.parametrize("attention", ["flash", "efficient"])
def test_the_model_prefers_a_backend_and_takes_another_where_it_cannot_compute(attention: str) -> None:
    """Efficient attention does not exist on a CPU."""
    assert relative_error(*velocity_of(attention)) <= 5e-6


@pytest.fixture
def sageattention(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A stand-in for the package, of the same call."""
    (tmp_path / "sageattention.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("sageattention")
    del sys.modules["sageattention"]


def test_sage_computes_self_attention_only(sageattention: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert relative_error(*velocity_of("sage")) <= 5e-6
    assert [shape[1] for shape in sageattention.calls] == [2] * 5
    assert try_backend("sage", "cpu", torch.float32) is None
    monkeypatch.setattr(sageattention, "sageattn", lambda q, k, v, **layout: v)
    assert try_backend("sage", "cpu", torch.float32) == "it gives wrong numbers"

    class CompilationError(Exception):
        """As triton's, which is an Exception and no more."""

    def fail(*given: Any, **layout: Any) -> None:
        raise CompilationError("at 3:4")

    monkeypatch.setattr(sageattention, "sageattn", fail)
    assert try_backend("sage", "cpu", torch.float32) == "CompilationError: at 3:4"


@pytest.mark.parametrize("attention", ["cudnn", "efficient", "sage"])
def test_the_plan_refuses_what_a_cpu_has_not(attention: str, tmp_path: Path, tiny_models: Path) -> None:
    with pytest.raises(
        S2VFlowError, match=f"dit: attention: {attention} is refused: .* the device is the CPU"
    ) as caught:
        planned(tmp_path, tiny_models, attention=attention)
    assert caught.value.fix == "set attention: auto in node dit"


@pytest.mark.parametrize(
    ("asked", "capability", "computed", "reason"),
    [
        ("flash", (7, 5), "fp16", "flash needs compute capability 8.0, and cuda has 7.5"),
        ("efficient", (7, 5), "fp32", None),
        ("cudnn", (9, 0), "fp32", "cudnn computes in 16 bits only"),
        ("cudnn", None, "bf16", "cudnn needs an NVIDIA GPU"),
        ("cudnn", (9, 0), "bf16", None),
        ("sage", (9, 0), "bf16", "the package sageattention is not installed"),
        ("auto", (7, 5), "fp32", None),
    ],
)
def test_the_plan_refuses_what_a_gpu_has_not(
    asked: str, capability: Any, computed: str, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "compute_capability", lambda device: capability)
    refusal = attention_refusal(asked, "cuda", computed)
    assert (refusal is None) == (reason is None)
    assert reason is None or (refusal is not None and refusal[0].startswith(reason))


def test_a_backend_by_name_is_another_result_and_auto_is_what_it_was(tmp_path: Path, tiny_models: Path) -> None:
    def identity(**fields: str) -> dict[str, Any]:
        plan = planned(tmp_path, tiny_models, **fields).plan
        return plan.node("dit").node.identity({("checkpoint",): "sha256:0"}, lambda kind, asked: asked)

    assert set(identity()) == {"checkpoint", "precision", "loras", "fp8_rounding"}
    assert identity(attention="auto") == identity()
    assert identity(attention="flash") == {**identity(), "attention": "flash"}
    assert identity(attention="sdpa") != identity()


def test_what_computed_attention_is_kept_with_the_result(quick_run: Place) -> None:
    entries = [json.loads(path.read_text())["entry"] for path in quick_run.cache.glob("entries/*/*.json")]
    facts = [entry["facts"] for entry in entries if entry["preimage"]["kind"] == "chunk"]
    assert [each["attention"] for each in facts] == ["sdpa"] * 3
