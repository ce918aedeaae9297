"""A matrix, run: shared work, files for each cell, one page at the end, failures that stay where they are."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from recipes_for_tests import call, options, tiny, write_recipe, write_voice

from s2v_flow import api
from s2v_flow.errors import S2VFlowError
from s2v_flow.graph.events import Delivered, Event, NodeStarted
from s2v_flow.media.video import probe_video
from s2v_flow.models.registry import ModelRegistry
from s2v_flow.nodes.chunk import Chunk


@pytest.mark.slow
def test_a_matrix_writes_each_cell_and_one_page(
    tmp_path: Path, tiny_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two seeds: two videos, a contact sheet and a side-by-side video as long as they are."""
    recipe = write_recipe(tmp_path, tiny())
    write_voice(tmp_path / "voice.wav", 0.5)
    where = ["--models-dir", str(tiny_models), "--cache-dir", str(tmp_path / "cache"), "--output-dir", str(tmp_path)]
    code, out, err = call("run", str(recipe), *where, "-m", "nodes.first.seed=1,2", "--device", "cpu")
    assert code == 0, err
    paths = [Path(line) for line in out.split("\n") if line]
    videos = [path for path in paths if path.suffix == ".mp4"]
    assert [path.suffix for path in paths].count(".png") == 1
    assert len(videos) == 3
    assert len({probe_video(path).num_frames for path in videos}) == 1
    assert probe_video(videos[-1]).fps == Fraction(16)

    monkeypatch.setattr("s2v_flow.media.sheet.contact_sheet", fail)
    code, again, err = call("run", str(recipe), *where, "-m", "nodes.first.seed=1,2", "--device", "cpu")
    assert (code, "warning: the page of all cells cannot be made: the printer is out of ink" in err) == (0, True)
    assert again.splitlines() == [str(video) for video in videos[:2]]


def test_a_cell_is_delivered_before_the_next_is_sampled_and_each_model_is_loaded_once(
    tmp_path: Path, tiny_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever looks in the morning after a crash finds the videos of all cells that were sampled."""
    registries = []

    class Counted(ModelRegistry):
        def __init__(self, *args: Any, **given: Any) -> None:
            super().__init__(*args, **given)
            registries.append(self)

    monkeypatch.setattr("s2v_flow.models.registry.ModelRegistry", Counted)
    recipe = write_recipe(tmp_path, tiny(first={"vae": None}))
    write_voice(tmp_path / "voice.wav", 0.3)
    events: list[tuple[str, str]] = []

    def note(event: Event) -> None:
        if isinstance(event, (NodeStarted, Delivered)):
            events.append((type(event).__name__, event.node))

    api.run(recipe, options(tmp_path, tiny_models, axes=["nodes.first.seed=1,5"]), on_event=note)
    assert events.index(("Delivered", "seed=1/video")) < events.index(("NodeStarted", "seed=5/first"))
    (registry,) = registries
    assert sorted(registry.loads.values()) == [1] * 4


def fail(*_: Any, **__: Any) -> None:
    raise OSError("the printer is out of ink")


def test_a_cell_that_fails_does_not_stop_the_others(
    tmp_path: Path, tiny_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other cell's video is there, the failure is told, and with fail_fast the run stops at once."""
    sample = Chunk.run

    def faulty(self: Chunk, context: Any, inputs: Any) -> dict[str, Any]:
        if self.seed == 1:
            raise S2VFlowError("this seed is unlucky")
        return sample(self, context, inputs)

    monkeypatch.setattr(Chunk, "run", faulty)
    recipe = write_recipe(tmp_path, tiny())
    write_voice(tmp_path / "voice.wav", 0.5)
    given = options(tmp_path, tiny_models, axes=["nodes.first.seed=1,5"])
    result = api.run(recipe, given)
    assert list(result.outputs) == ["seed=5/video"]
    assert result.failures["seed=1/first"] == "this seed is unlucky"
    assert result.failures["seed=1/video"] == "needs a node that failed"
    with pytest.raises(S2VFlowError, match="unlucky"):
        api.run(recipe, options(tmp_path, tiny_models, axes=["nodes.first.seed=1,6"], fail_fast=True))
