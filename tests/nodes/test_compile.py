"""compile: blocks: the real compiler's result, what it says meanwhile, what is refused, and its identity."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from recipes_for_tests import options, tiny, write_recipe, write_voice
from runs_for_tests import QUICK, Place, ran

from s2v_flow import api
from s2v_flow.errors import S2VFlowError


def planned(folder: Path, models: Path, **fields: str) -> api.Planned:
    write_voice(folder / "voice.wav", 0.3)
    return api.plan(write_recipe(folder, tiny(dit=fields)), options(folder, models))


def latents(place: Place) -> list[torch.Tensor]:
    """Return the stored chunks' latents, in the order of their seeds."""
    from safetensors.torch import load_file

    entries = [json.loads(path.read_text())["entry"] for path in place.cache.glob("entries/*/*.json")]
    chunks = [entry for entry in entries if entry["preimage"]["kind"] == "chunk"]
    chunks.sort(key=lambda entry: entry["preimage"]["fields"]["seed"])
    digests = [entry["outputs"]["latent"]["sha256"] for entry in chunks]
    return [load_file(next(place.cache.glob(f"objects/*/{digest}*")))["samples"] for digest in digests]


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore")  # of torch's own compiler, about torch
def test_a_compiled_run_gives_the_same_latents_to_the_last_bits(
    tmp_path: Path, tiny_models: Path, quick_run: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Minutes at most: the compiler is real. It says that it compiles, in the first step."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    compiled = ran(tmp_path, tiny_models, {**QUICK, "dit": {"compile": "blocks"}})
    for ours, theirs in zip(latents(compiled), latents(quick_run), strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) <= 1e-4


def test_the_plan_refuses_streamed_weights_and_a_machine_without_a_compiler(
    tmp_path: Path, tiny_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(S2VFlowError, match="dit: compile: blocks is refused: compiled blocks need their weights"):
        planned(tmp_path, tiny_models, compile="blocks", placement="streamed")
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(S2VFlowError, match=r"there is no C\+\+ compiler no-such-compiler") as caught:
        planned(tmp_path, tiny_models, compile="blocks")
    assert caught.value.fix is not None
    assert caught.value.fix.endswith("or set compile: off in node dit")


def test_compiled_blocks_are_another_result(tmp_path: Path, tiny_models: Path) -> None:
    def identity(**fields: str) -> dict[str, Any]:
        plan = planned(tmp_path, tiny_models, **fields).plan
        return plan.node("dit").node.identity({("checkpoint",): "sha256:0"}, lambda kind, asked: asked)

    assert identity(compile="off") == identity()
    assert identity(compile="blocks") == {**identity(), "compile": "blocks"}
