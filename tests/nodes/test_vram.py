"""A budget of memory: what it changes, what it must not change, and what it refuses before anything is computed."""

from __future__ import annotations

import gc
import re
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from recipes_for_tests import call, options, tiny, write_recipe, write_voice
from torch import nn

from s2v_flow import api
from s2v_flow.errors import S2VFlowError
from s2v_flow.graph.context import Numerics
from s2v_flow.graph.estimate import Needs
from s2v_flow.graph.status import Selection
from s2v_flow.models.registry import ModelKey, ModelRegistry
from s2v_flow.nodes.chunk import Chunk
from s2v_flow.nodes.memory import needs

ENCODED = ("positive", "negative", "speech", "reference")


def planned(folder: Path, models: Path, *, changes: Any = None, **more: Any) -> api.Planned:
    write_voice(folder / "voice.wav", 0.6)
    recipe = write_recipe(folder, tiny(first={"cfg": 2.0}, **(changes or {})))
    return api.plan(recipe, options(folder, models, **more))


def needed(plan: api.Planned, device: str, limit: int | None = None) -> dict[str, Needs]:
    return needs(plan.plan, {node.name for node in plan.plan.nodes if node.node.is_stored}, Numerics(device), limit)


def peak(of: Needs) -> int:
    assert of.peak_bytes is not None
    return of.peak_bytes


def test_on_a_gpu_weights_are_streamed_first_and_branches_run_in_turn_only_where_that_is_not_enough(
    tmp_path: Path, tiny_models: Path
) -> None:
    """By arithmetic: no GPU is here."""
    plan = planned(tmp_path, tiny_models)
    free, least = needed(plan, "cuda"), needed(plan, "cuda", 1)
    resident = peak(free["first"])
    assert not any(need.way for need in free.values())
    assert needed(plan, "cuda", max(map(peak, free.values()))) == free
    streamed = needed(plan, "cuda", resident - 1)
    assert streamed["dit"].way == {"placement": "streamed"} == streamed["first"].way
    assert peak(least["first"]) < peak(streamed["first"]) < 0.8 * resident
    both = needed(plan, "cuda", min(peak(free["first"]), peak(free["talk[1]"])) - 1)
    assert not any("in_turn" in need.way for need in both.values())  # one loader serves both chunks
    in_turn = needed(plan, "cuda", peak(streamed["first"]) - 1)
    assert in_turn["first"].way == {"placement": "streamed", "in_turn": True}
    assert peak(in_turn["first"]) == peak(least["first"])
    assert least["frames"].way == {"frames_per_call": 1}
    assert peak(least["video"]) < peak(free["video"])
    assert least["speech"] == free["speech"]


def test_loras_beside_packed_weights_are_counted(tmp_path: Path, tiny_models: Path) -> None:
    """Whole where the weights are resident, two of five blocks' where they are streamed; merged ones add nothing."""
    lora: dict[str, Any] = {"id": "l", "file": "tiny_lightning_lora.safetensors", "allow_partial": True}
    size = (tiny_models / "loras" / lora["file"]).stat().st_size
    for name, placement, expected in (
        ("tiny_s2v_fp8_scaled", "resident", size),
        ("tiny_s2v_fp8_scaled", "streamed", 2 * size // 5),
        ("tiny_s2v", "resident", 0),
    ):
        dit = {"checkpoint": f"{name}.safetensors", "placement": placement}
        both = [{"dit": {**dit, "loras": loras}} for loras in ([], [lora])]
        alone, beside = (peak(needed(planned(tmp_path, tiny_models, changes=each), "cuda")["first"]) for each in both)
        assert beside - alone == expected


@pytest.mark.parametrize("field", [{"placement": "resident"}, {"compile": "blocks"}])
def test_what_is_asked_to_stay_on_the_device_stays_there(
    field: dict[str, str], tmp_path: Path, tiny_models: Path
) -> None:
    plan = planned(tmp_path, tiny_models, changes={"dit": field})
    assert needed(plan, "cuda", 1)["first"].way == {"in_turn": True}


def test_without_guidance_there_is_nothing_to_run_in_turn(tmp_path: Path, tiny_models: Path) -> None:
    write_voice(tmp_path / "voice.wav", 0.6)
    recipe = write_recipe(tmp_path, tiny())
    assert needed(api.plan(recipe, options(tmp_path, tiny_models)), "cpu", 1)["first"].way == {}


@pytest.mark.slow
def test_a_run_within_a_budget_gives_the_same_bytes_under_the_same_fingerprints(
    tmp_path: Path, tiny_models: Path
) -> None:
    """On the CPU: branches in turn, fewer frames at once; what was done stands in the facts, and in no identity."""
    results: list[dict[str, Any]] = []
    for place in (tmp_path / "free", tmp_path / "held"):
        place.mkdir()
        plan, given = planned(place, tiny_models), options(place, tiny_models)
        if place.name == "held":
            api.run(plan.recipe.path, replace(given, selection=Selection(until=ENCODED)))
            chunks = {node.name for node in plan.plan.nodes if isinstance(node.node, Chunk)}
            given = replace(given, vram=max(map(peak, needs(plan.plan, chunks, Numerics("cpu"), 1).values())))
            plan = api.plan(plan.recipe.path, given)
            assert [note for note in plan.notes if "the branches of guidance run one after the other" in note]
            assert plan.to_json()["estimate"]["vram"] == given.vram
        entries = api.run_planned(plan, given).entries
        results.append({name: (entry.fingerprint, entry.outputs) for name, entry in entries.items()})
    assert results[0] == results[1]
    assert entries["talk[1]"].facts["way"] == {"in_turn": True}


def test_a_budget_that_holds_nothing_is_refused_before_anything_is_computed(tmp_path: Path, tiny_models: Path) -> None:
    """With figures and a fix, by plan and run alike; what is not to be computed does not count."""
    plan = planned(tmp_path, tiny_models)
    where = ("--models-dir", tiny_models, "--cache-dir", tmp_path / "cache", "--device", "cpu")
    budget = ("--vram", peak(needed(plan, "cpu")["reference"]))
    for command in ("plan", "run"):
        code, _, err = call(command, plan.recipe.path, *where, *budget)
        assert code == 7
        first = err.splitlines()[0]
        assert re.match(r"error: vram: [0-9.]+ MiB are too little for talk\[1\], which takes about [0-9.]+ MiB", first)
        assert "though the branches of guidance run one after the other" in first
        assert "fix: a larger --vram" in err
    assert not list((tmp_path / "cache").glob("entries/*/*"))
    code, out, _ = call("plan", plan.recipe.path, *where, *budget, "--until", "reference")
    assert (code, "RUN" in out) == (0, True)
    code, _, err = call("plan", plan.recipe.path, *where, "--vram", "much")
    assert (code, err.splitlines()[0]) == (2, "error: vram: 'much' is no size")


def test_a_budget_is_a_number_of_bytes_a_text_or_auto() -> None:
    assert [api.Options(vram=given).vram for given in (5, None)] == [5, None]
    given: Any
    for given, size in (("12GiB", 12 * 2**30), ("1.5 MiB", 3 * 2**19), ("2G", 2 * 10**9), ("auto", None)):
        assert api.Options(vram=given).vram == size
    with pytest.raises(S2VFlowError, match="is no size"):
        api.Options(vram="12 GiBs")  # type: ignore[arg-type]


def test_warm_models_leave_what_a_run_within_a_budget_takes_beside_them() -> None:
    """And come back to the session's own limit with the next run that has none."""
    registry = ModelRegistry(1000)
    for name in ("a", "b"):
        key = ModelKey("dit", (name,), "float32", "cpu")
        registry.acquire(key, lambda: nn.Linear(100, 1, bias=False, dtype=torch.float32))
        registry.release(key)
    registry.hold_to("cpu", 900, beside=300)
    registry.acquire(key, lambda: pytest.fail("it is live"))
    registry.release(key)
    assert registry.num_bytes == 400
    registry.hold_to("cpu", None, beside=300)
    assert registry.memory_budget_bytes == 1000


class WatchedRegistry(ModelRegistry):
    """Notes, as the diffusion model's weights are about to be read, which encoders' weights are still in memory."""

    def __init__(self, memory_budget_bytes: int | None) -> None:
        super().__init__(memory_budget_bytes)
        self.held: dict[str, list[weakref.ref[torch.Tensor]]] = {}
        self.seen: list[set[str]] = []

    def acquire(self, key: ModelKey, load: Any, *, expected_bytes: int = 0) -> Any:
        def watched() -> Any:
            if key.kind.startswith("dit"):
                alive = {kind for kind, refs in self.held.items() if any(ref() is not None for ref in refs)}
                self.seen.append(alive)
            model = load()
            module = getattr(model, "module", model)
            self.held[key.kind] = [weakref.ref(weight) for weight in module.parameters()]
            return model

        return super().acquire(key, watched, expected_bytes=expected_bytes)


@pytest.mark.parametrize(("memory", "alive"), [(0, set()), (None, {"text_encoder", "audio_encoder", "vae"})])
def test_encoders_are_gone_before_the_diffusion_model_is_read(
    memory: int | None, alive: set[str], tmp_path: Path, tiny_models: Path
) -> None:
    """Without help of the garbage collector; where models are kept for a next run, as in a session, they stay."""
    write_voice(tmp_path / "voice.wav", 0.6)
    until = replace(options(tmp_path, tiny_models), selection=Selection(until=("first",)))
    plan = api.plan(write_recipe(tmp_path, tiny()), until)
    registry = WatchedRegistry(memory)
    gc.collect()
    gc.disable()
    try:
        api.run_planned(plan, until, models=lambda: registry)
    finally:
        gc.enable()
    assert registry.held.keys() == {"text_encoder", "audio_encoder", "vae", *(key.kind for key in registry.loads)}
    assert registry.seen == [alive]
