"""What is computed in what, and what is refused, is decided by the plan; the table in docs/hardware.md is that rule."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from recipes_for_tests import call, options, tiny, write_recipe, write_voice

from s2v_flow import api
from s2v_flow.cli.doctor import precision_text
from s2v_flow.errors import S2VFlowError
from s2v_flow.machine import compute_capability, cpu_bf16_units
from s2v_flow.nodes import precision
from s2v_flow.nodes.precision import COMPUTED, STORED, precision_notes

PAGE = Path(__file__).parents[2] / "docs/hardware.md"


def test_the_page_has_the_table() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for row in COMPUTED:
        assert f"| {row.device} | {row.precision} | {row.verdict} | {row.why} |".replace("|  |", "| |") in page
    for stored in STORED:
        assert f"| {' | '.join(stored)} |" in page


def test_doctor_prints_the_table_and_what_it_measured() -> None:
    told = json.loads(call("doctor", "--precision", "--json")[1])
    assert [row["verdict"] for row in told["computed"]] == [row.verdict for row in COMPUTED]
    assert told["kind"] in {row.device for row in COMPUTED}
    assert all(row.why in precision_text(told) for row in COMPUTED)


@pytest.mark.parametrize(
    ("capability", "asked", "is_refused"),
    [((7, 5), "auto", True), ((7, 5), "fp16", False), ((8, 0), "auto", False), (None, "bf16", False)],
)
def test_bf16_is_refused_below_compute_capability_8(
    capability: tuple[int, int] | None,
    asked: str,
    is_refused: bool,
    tmp_path: Path,
    tiny_models: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_voice(tmp_path / "voice.wav", 0.3)
    changes = {name: {"precision": asked} for name in ("dit", "umt5", "vae")}
    plan = api.plan(write_recipe(tmp_path, tiny(**changes)), options(tmp_path, tiny_models)).plan
    monkeypatch.setattr(precision, "compute_capability", lambda device: capability)
    if is_refused:
        with pytest.raises(S2VFlowError, match="refused: bfloat16 arithmetic begins with compute") as caught:
            list(precision_notes(plan, "cuda"))
        assert caught.value.message.startswith("dit, umt5, vae: to compute in bf16 on cuda is refused: ")
        assert caught.value.fix == "set precision: fp32 or fp16 in dit, umt5, vae, or use another device"
    else:
        assert list(precision_notes(plan, "cuda")) == []


def test_bf16_on_a_cpu_is_said_to_be_slow_or_worth_a_try(
    tmp_path: Path, tiny_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_voice(tmp_path / "voice.wav", 0.3)
    monkeypatch.setattr(precision, "_LARGE_BYTES", 0)
    found = {}
    for asked in ("auto", "bf16"):
        plan = api.plan(write_recipe(tmp_path, tiny(dit={"precision": asked})), options(tmp_path, tiny_models)).plan
        for units in ((), ("amx_bf16",)):
            monkeypatch.setattr(precision, "cpu_bf16_units", lambda units=units: units)
            found[asked, len(units)] = list(precision_notes(plan, "cpu"))
    assert found["auto", 0] == found["bf16", 1] == []
    assert found["bf16", 0][0].startswith("precision: dit computes in bf16, which is slow here")
    assert found["auto", 1][0].startswith("precision: this CPU has amx_bf16: bf16 in node dit takes half the memory")


def test_what_a_cpu_has_is_read_off_its_flags(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nflags\t\t: fpu avx2 avx512_bf16 amx_tile amx_bf16\nbugs\t: x\n")
    assert cpu_bf16_units(tmp_path / "cpuinfo") == ("amx_bf16", "avx512_bf16")
    assert cpu_bf16_units(tmp_path / "none") == ()
    assert compute_capability("cpu") is None
