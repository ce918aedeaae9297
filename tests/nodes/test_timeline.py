"""What changes in an `extend` node's chunks as the voice goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
from recipes_for_tests import options, tiny, write_recipe, write_voice

from s2v_flow import api
from s2v_flow.errors import RecipeError


def planned(folder: Path, timeline: str, seconds: float = 14.0) -> api.Planned:
    write_voice(folder / "voice.wav", seconds)
    changes = {**tiny(), "first": {**tiny()["first"], "length": 77}, "talk": {"timeline": timeline}}
    recipe = write_recipe(folder, changes)
    recipe.write_text(recipe.read_text().replace(f'"{timeline}"', timeline).replace(f"'{timeline}'", timeline))
    return api.plan(recipe, options(folder, folder / "models"))


def test_entries_take_effect_where_chunks_meet(tmp_path: Path) -> None:
    """Chunks begin at -0.19, 4.81 and 9.81 s: an entry at 4 s comes with the second, one at 8 s with the third."""
    made = planned(tmp_path, "[{at: 4s, prompt: She smiles., seed: 7}, {at: 8, prompt: She waves.}]")
    chunks = {name: made.plan.node(name) for name in ("first", "talk[1]", "talk[2]")}
    assert [chunk.facts["seed"] for chunk in chunks.values()] == [20, 7, 8]
    prompts = [made.plan.node(chunk.inputs["positive"].node).node.text for chunk in chunks.values()]
    assert prompts == ["She speaks.", "She smiles.", "She waves."]


def test_prompts_of_the_timeline_are_encoded_before_anything_is_sampled(tmp_path: Path) -> None:
    """So the text encoder is gone when the diffusion model comes."""
    names = [node.name for node in planned(tmp_path, "[{at: 8s, prompt: She waves.}]").plan.nodes]
    assert names.index("talk.positive[1]") < names.index("first")


def test_entries_without_effect_are_told(tmp_path: Path) -> None:
    """One after the end, and one that another follows within its chunk."""
    made = planned(tmp_path, "[{at: 5, seed: 1}, {at: 6, seed: 2}, {at: 99, seed: 3}]")
    assert made.plan.node("talk[1]").facts["seed"] == 2
    assert "talk: the timeline's entry at 5 s has no chunk of its own; the next one counts" in made.notes
    assert "talk: the timeline's entry at 99 s comes after the last chunk and has no effect" in made.notes


@pytest.mark.parametrize(
    ("timeline", "message"),
    [
        ("[{at: 5, seed: 1}, {at: 5s, seed: 2}]", "times must rise: 5 s stands after 5 s"),
        ("[{at: soon}]", "must be"),
        ("[{at: 5, prompts: hi}]", "prompts"),
        ("[{seed: 5}]", "at"),
    ],
)
def test_a_wrong_timeline_is_refused(tmp_path: Path, timeline: str, message: str) -> None:
    with pytest.raises(RecipeError) as error:
        planned(tmp_path, timeline)
    assert any(message in item.message for item in error.value.diagnostics)


def test_prompts_have_the_syntax_of_the_videos_own(tmp_path: Path) -> None:
    """Plain ones keep the identity that they have in caches; weights that cannot be computed are told with a place."""
    write_voice(tmp_path / "voice.wav", 14.0)

    def made(prompt: str, **positive: str) -> api.Planned:
        first = {**tiny()["first"], "length": 77}
        changes = tiny(first=first, talk={"timeline": [{"at": "8s", "prompt": prompt}]}, positive=positive)
        return api.plan(write_recipe(tmp_path, changes), options(tmp_path, tmp_path / "models"))

    text = "She (waves:1.3)."
    weighed = made(text, prompt_syntax="comfyui").plan.node("talk.positive[1]").node
    assert weighed.parts() == [("She ", 1.0), ("waves", 1.3), (".", 1.0)]
    plain = made(text).plan.node("talk.positive[1]").node
    assert plain.identity({}, lambda kind, asked: asked) == {"text": text}
    with pytest.raises(RecipeError) as error:
        made("She (waves:1e999).", prompt_syntax="comfyui")
    (found,) = error.value.diagnostics
    assert (found.code, "weight 1e999 in a prompt is not finite" in found.message) == ("R106", True)
