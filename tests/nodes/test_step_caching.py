"""`step_cache` of sample and extend: off costs nothing; on it survives stops and lack of memory, and is told."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from chunk_bench import KEY, Bench, CurvedModel
from recipes_for_tests import call, options, tiny, write_recipe, write_voice
from runs_for_tests import Place, copied
from safetensors.torch import load, save
from torch import Tensor

from s2v_flow import api
from s2v_flow.graph.interrupt import StoppedError
from s2v_flow.graph.ports import Ref
from s2v_flow.nodes.chunk import Chunk
from s2v_flow.nodes.fields import Settings, VideoSettings
from s2v_flow.nodes.sample import Sample, check_settings
from s2v_flow.runs.manifest import Manifest

STEPS = 12
EASY = {"steps": STEPS, "step_cache": "easy", "step_cache_threshold": 1.0}


def bits(latent: Tensor) -> Tensor:
    return latent.view(torch.int32)


class FailingModel(CurvedModel):
    """Has no memory in its n-th call."""

    def __init__(self, fails_at: int) -> None:
        super().__init__()
        self.fails_at = fails_at

    def forward(self, x: Tensor, timestep: Tensor, chunk: Any, branches: Sequence[Any]) -> list[Tensor]:
        found = super().forward(x, timestep, chunk, branches)
        if self.calls == self.fails_at:
            raise torch.OutOfMemoryError("tried to allocate 20 GiB")
        return found


@pytest.mark.parametrize("sampler", ["uni_pc", "euler_ancestral", "dpmpp_2m", "flow_unipc"])
def test_a_chunk_that_was_stopped_at_any_step_goes_on_to_the_same_bits(sampler: str, tmp_path: Path) -> None:
    """Also one that was stopped at every step; steps that were reused before the stop are counted after it."""
    bench, model = Bench(tmp_path, sampler, **EASY), CurvedModel()
    whole = bench.run(model=model)
    told = bench.facts["step_cache"]
    assert told == {"reused": STEPS - model.calls, "steps": STEPS}
    assert told["reused"] >= 3
    for step in range(1, STEPS):
        with pytest.raises(StoppedError):
            bench.run(step)
        resumed = bench.run()
        assert bench.steps() == list(range(step + 1, STEPS + 1))
        assert torch.equal(bits(resumed), bits(whole)), step
        assert bench.facts["step_cache"] == told
        bench.folder.forget(KEY)
    for step in range(1, STEPS):
        with pytest.raises(StoppedError):
            bench.run(step)
    assert torch.equal(bits(bench.run()), bits(whole))


def test_a_step_that_is_taken_again_for_lack_of_memory_sees_the_cache_before_it(tmp_path: Path) -> None:
    """In the model's call, and behind it: in the solver, which has the velocity already."""
    alone = Bench(tmp_path / "whole", **EASY)
    whole = alone.run()
    bench = Bench(tmp_path / "call", **EASY)
    assert torch.equal(bits(bench.run(model=FailingModel(4))), bits(whole))
    assert bench.facts["retreats"] == ["free"]
    assert bench.facts["step_cache"] == alone.facts["step_cache"]
    for number in (3, 5):
        told = list[int]()

        def watch(*_: Any, told: list[int] = told, number: int = number) -> None:
            told.append(1)
            if len(told) == number:
                raise torch.OutOfMemoryError("tried to allocate 20 GiB")

        bench = Bench(tmp_path / f"step {number}", **EASY)
        assert torch.equal(bits(bench.run(watch=watch)), bits(whole)), number
        assert bench.facts["retreats"] == ["free"]
        assert bench.facts["step_cache"] == alone.facts["step_cache"]


def test_what_is_remembered_is_needed(tmp_path: Path) -> None:
    """A resume point that lacks the cache's part is told of and not used; so is another threshold's."""
    bench = Bench(tmp_path, **EASY)
    whole = bench.run()
    with pytest.raises(StoppedError):
        bench.run(6)
    facts, payload = bench.folder.read(KEY) or ({}, b"")
    own = {name: text for name, text in facts.items() if name not in ("schema", "fingerprint")}
    tensors = {name: tensor for name, tensor in load(payload).items() if name != "cache.x"}
    bench.folder.write(KEY, own, save(tensors))
    assert torch.equal(bits(bench.run()), bits(whole))
    assert ["no step cache" in note.text for note in bench.notes()] == [True]
    with pytest.raises(StoppedError):
        Bench(tmp_path, steps=STEPS).run(6)  # without a cache
    bench.run()
    assert ["step_cache differs" in note.text for note in bench.notes()] == [True]


def test_off_nothing_changes(tmp_path: Path) -> None:
    """The same calls, the same bits, the same identity and resume points as before there was a step cache."""
    off, model = Bench(tmp_path, steps=STEPS), CurvedModel()
    latent = off.run(model=model)
    assert model.calls == STEPS
    assert "step_cache" not in off.facts
    assert not [name for name in off.chunk.identity({}, lambda kind, asked: asked) if "cache" in name]
    never = Bench(tmp_path, **{**EASY, "step_cache_threshold": 1e-9})
    assert torch.equal(bits(never.run()), bits(latent)), "what is computed is what is used"
    assert never.facts["step_cache"] == {"reused": 0, "steps": STEPS}
    with pytest.raises(StoppedError):
        off.run(3)
    facts, payload = off.folder.read(KEY) or ({}, b"")
    assert not [name for name in (*facts, *load(payload)) if "cache" in name]


def test_on_it_is_part_of_the_identity_with_its_threshold(tmp_path: Path) -> None:
    found = [
        Chunk.identity(Bench(tmp_path, **fields).chunk, {}, lambda kind, asked: asked)
        for fields in (EASY, {**EASY, "step_cache_threshold": 0.1})
    ]
    assert [(one["step_cache"], one["step_cache_threshold"]) for one in found] == [("easy", 1.0), ("easy", 0.1)]


@pytest.mark.slow
def test_a_run_says_how_many_steps_were_reused(quick_run: Place, tmp_path: Path) -> None:
    """Its closing line, show and the manifest; plan warns where there are few steps."""
    here = copied(quick_run, tmp_path / "here")
    values = {"steps": 5, "step_cache": "velocity", "step_cache_threshold": 3.0}
    sets = [f"nodes.first.{name}={value}" for name, value in values.items()]
    code, _, err = here.run(*(part for text in sets for part in ("--set", text)), "--overwrite")
    assert code == 0, err
    assert "warning: step_cache: first has steps 5: it pays from about 20 on, and is approximate" in err
    line = "6 of 15 steps reused (step cache, approximate)"
    assert line in err
    assert line in here.call("show", "last")[1]
    manifest = Manifest.model_validate(json.loads(here.call("show", "last", "--json")[1]))
    assert [node.step_cache for node in manifest.nodes if node.step_cache] == [{"reused": 2, "steps": 5}] * 3


def test_settings_that_do_nothing_are_noted(tmp_path: Path, tiny_models: Path) -> None:
    write_voice(tmp_path / "voice.wav", 0.3)

    def notes(**first: object) -> list[str]:
        made = api.plan(write_recipe(tmp_path, tiny(first=first)), options(tmp_path, tiny_models))
        return [note for note in made.notes if "step_cache" in note]

    assert notes(step_cache="easy", steps=20) == notes() == []
    assert notes(step_cache_threshold=0.1) == [
        "step_cache_threshold: it has no effect in first, where step_cache is off"
    ]


@pytest.mark.parametrize(
    ("node", "fields", "reason"),
    [
        ("first", {"sampler": "heun", "step_cache": "easy"}, "heun calls the model more than once"),
        ("talk", {"sampler": "heun"}, "heun calls the model more than once"),
    ],
)
def test_a_sampler_of_several_calls_a_step_is_refused(
    node: str, fields: dict[str, Any], reason: str, tmp_path: Path, tiny_models: Path
) -> None:
    """By check's planning, with the place, before anything is computed; also where the cache is inherited."""
    write_voice(tmp_path / "voice.wav", 0.3)
    path = write_recipe(tmp_path, tiny(**{"first": {"step_cache": "easy", "steps": 20}, node: fields}))
    code, out, err = call("plan", path, "--models-dir", tiny_models, "--cache-dir", tmp_path / "cache")
    assert code == 3
    assert "error[R125]: step_cache: easy needs one model call a step; " + reason in out + err
    assert "fix: set sampler: uni_pc, or step_cache: off" in out + err


def test_another_packages_sampler_is_refused_beside_a_step_cache() -> None:
    """How often it calls the model is not known."""
    found: list[tuple[str, ...]] = []
    planner = SimpleNamespace(problem=lambda *problem: found.append(problem))
    node = Sample(model=Ref("dit"), positive=Ref("positive"), cfg=1.0)
    settings = Settings(fields=VideoSettings.model_construct(sampler="theirs", step_cache="easy"))
    check_settings(planner, "first", node, settings)  # type: ignore[arg-type]
    (told,) = [problem for problem in found if problem[2] == "R125"]
    assert "theirs calls the model an unknown number of times" in told[3]
