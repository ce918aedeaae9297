"""A voice from a text. Most of it needs the engine: pip install hibari-tts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from recipes_for_tests import options, read_audio, tiny, write_recipe

from s2v_flow import api
from s2v_flow.comfy.exporter import export_workflow
from s2v_flow.errors import MissingError, RecipeError


def recipe(folder: Path, **fields: Any) -> Path:
    """Write a recipe whose voice is spoken; what `load_audio` reads is taken away."""
    voice = {"kind": "speak", "file": None, "text": "Good morning.", **fields}
    return write_recipe(folder, tiny(voice=voice, talk={"chunks": "auto"}))


@pytest.mark.parametrize("module", ["hibari", "onnxruntime"])
def test_without_the_engine_the_plan_says_how_to_get_it(
    module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The recipe itself is right."""
    monkeypatch.setitem(sys.modules, module, None)
    api.check(recipe(tmp_path))
    with pytest.raises(MissingError, match="voice: the engine that speaks is not installed") as caught:
        api.plan(recipe(tmp_path), options(tmp_path, tmp_path / "models"))
    assert caught.value.fix == "pip install hibari-tts"


def test_a_text_is_as_long_as_its_voice_and_is_spoken_the_same_again(tmp_path: Path, tiny_models: Path) -> None:
    """The plan knows the length and the chunks; the video's sound is the voice; twice the speed is half as long."""
    pytest.importorskip("hibari")
    first = api.plan(recipe(tmp_path), options(tmp_path, tiny_models))
    assert first.num_frames is not None
    result = api.run(recipe(tmp_path), options(tmp_path, tiny_models))
    assert result is not None
    sound = read_audio(tmp_path / "out" / "talk.mp4")
    assert abs(sound.num_samples / sound.sample_rate_hz - first.num_frames / 16) < 0.1
    assert np.abs(sound.waveform).max() > 0.05
    again = api.plan(recipe(tmp_path), options(tmp_path, tiny_models))
    assert not again.has_work
    fast = api.plan(recipe(tmp_path, speed=2.0), options(tmp_path, tiny_models))
    assert fast.num_frames is not None
    assert fast.num_frames < 0.7 * first.num_frames
    node = first.plan.node("voice").node
    assert node.identity({}, lambda kind, text: text)["engine"].startswith("hibari-tts ")
    with pytest.raises(RecipeError) as caught:
        export_workflow(first.recipe, first.plan, "api")
    assert caught.value.diagnostics[0].message == "ComfyUI has no voice from text"


def test_a_text_that_cannot_be_said_is_a_mistake_at_its_place(tmp_path: Path) -> None:
    """It has no English word."""
    pytest.importorskip("hibari")
    with pytest.raises(RecipeError) as caught:
        api.plan(recipe(tmp_path, text="你好"), options(tmp_path, tmp_path / "models"))
    assert [item.code for item in caught.value.diagnostics] == ["R130"]
