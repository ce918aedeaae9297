"""What sampling holds of prompts: those of the chunk that is sampled, however many a video has."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
from recipes_for_tests import options, tiny, write_recipe, write_voice

from s2v_flow import api
from s2v_flow.graph.events import Event, NodeFinished
from s2v_flow.models.dit import WanS2V


@pytest.mark.slow
def test_a_chunks_prompts_are_released_with_the_chunk(
    tmp_path: Path, tiny_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A timeline of 6 prompts, without help of the garbage collector: two at most, none in between."""
    held: dict[int, weakref.ref[Any]] = {}
    most: list[int] = []
    between: list[int] = []
    prepare = WanS2V.prepare_text

    def count() -> int:
        return sum(ref() is not None for ref in held.values())

    def watched(model: WanS2V, context: Any, **more: Any) -> Any:
        found = prepare(model, context, **more)
        held[len(held)] = weakref.ref(found.blocks[0].keys)
        most.append(count())
        return found

    def listen(event: Event) -> None:
        if isinstance(event, NodeFinished):
            between.append(count())

    monkeypatch.setattr(WanS2V, "prepare_text", watched)
    write_voice(tmp_path / "voice.wav", 3.0)
    timeline = [{"at": 0.5 * number, "prompt": f"scene {number}"} for number in range(1, 6)]
    recipe = write_recipe(tmp_path, tiny(first={"cfg": 2.0, "steps": 1}, talk={"timeline": timeline}, video=None))
    gc.collect()
    gc.disable()
    try:
        result = api.run(recipe, options(tmp_path, tiny_models), on_event=listen)
    finally:
        gc.enable()
    assert result.failures == {}
    assert len(most) == 2 * 7
    assert max(most) == 2
    assert set(between) == {0}
