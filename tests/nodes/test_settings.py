"""Sampling settings are declared once: a new one that is forgotten somewhere is noticed here."""

from __future__ import annotations

from pathlib import Path

import pytest
from recipes_for_tests import options, tiny, write_recipe, write_voice

from s2v_flow import api
from s2v_flow.nodes.chunk import Chunk
from s2v_flow.nodes.fields import ChunkSettings, SamplingSettings, VideoSettings
from s2v_flow.nodes.sample import Extend, Sample, TimelineEntry

OTHER = {  # a value that differs from what the recipe has, for every setting; a new setting needs one
    "steps": 3,
    "cfg": 2.0,
    "sampler": "euler",
    "scheduler": "normal",
    "shift": 5.0,
    "conditioning": "comfyui",
    "step_cache": "easy",
    "step_cache_threshold": 0.05,
}
OF_THE_SIZE = {"width", "height"}
OF_THE_START = {"init_first_frame"}


def test_every_setting_is_a_field_of_sample_and_can_be_changed_by_extend() -> None:
    assert VideoSettings.model_fields.keys() <= Sample.model_fields.keys()
    assert VideoSettings.model_fields.keys() - OF_THE_SIZE - OF_THE_START <= Extend.model_fields.keys()
    assert SamplingSettings.model_fields.keys() <= Chunk.model_fields.keys()
    assert OTHER.keys() == ChunkSettings.model_fields.keys() - OF_THE_SIZE


def test_what_a_timelines_entry_changes_is_a_setting_a_prompt_or_a_seed() -> None:
    others = {"at", "prompt", "negative_prompt", "seed"}
    assert TimelineEntry.model_fields.keys() - others <= VideoSettings.model_fields.keys()


@pytest.mark.parametrize("name", OTHER)
def test_every_setting_reaches_the_chunk_from_sample_extend_and_timeline(name: str, tmp_path: Path) -> None:
    """One that is given to `sample` is inherited; one that is given later counts from there on."""
    write_voice(tmp_path / "voice.wav", 1)

    def values(**changes: dict[str, object]) -> list[object]:
        recipe = write_recipe(tmp_path, tiny(**{"talk": {"chunks": 1}, **changes}))
        nodes = api.plan(recipe, options(tmp_path, tmp_path / "models")).plan.nodes
        return [getattr(node.node, name) for node in nodes if isinstance(node.node, Chunk)]

    usual, other = values()[0], OTHER[name]
    assert usual != other
    assert values(first={name: other}) == [other, other]
    assert values(talk={"chunks": 1, name: other}) == [usual, other]
    if name in TimelineEntry.model_fields:
        assert values(talk={"chunks": 1, "timeline": [{"at": 0.1, name: other}]}) == [usual, other]
