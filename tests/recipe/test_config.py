from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft7Validator

from s2v_flow.graph.node import Node
from s2v_flow.nodes.table import NODE_KINDS
from s2v_flow.recipe.argument import Changes, Override
from s2v_flow.recipe.config import config_json, config_text
from s2v_flow.recipe.load import Recipe, load_recipe
from s2v_flow.recipe.reader import FORBIDDEN
from s2v_flow.recipe.schema import recipe_schema

Load = Callable[..., Recipe]
ROOT = Path(__file__).parents[2]
RECIPES = [*sorted((ROOT / "recipes").glob("*.yaml")), Path(__file__).parent / "good" / "design.yaml"]

TEXT = """
s2vflow: 1
description: "yes: no"
params: {image: in/a.png, prompt: hello, line: "a $${b} $$params.c", steps: 4, seeds: [1, $params.steps]}
nodes:
  dit:
    kind: load_diffusion_model
    checkpoint: a.safetensors
    loras:
      - {id: fast, file: f.safetensors}
  umt5: {kind: load_text_encoder, checkpoint: t5.safetensors}
  portrait: {kind: load_image, file: $params.image}
  positive: {kind: encode_text, text_encoder: $umt5, text: "${params.prompt}: ${params.line} $5"}
  first: {kind: sample, model: $dit, positive: $positive, steps: $params.steps}
  more: {kind: extend, video: $first, seed: $params.seeds, chunks: 2}
  out: {kind: save_latent, latent: $more, file: out.latent}
profiles:
  slow:
    params: {steps: 20}
    nodes: {first: {cfg: 4.5}}
"""


def nodes(recipe: Recipe) -> dict[str, Node]:
    return {name: spec.node for name, spec in recipe.nodes.items()}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
@pytest.mark.parametrize("with_origins", [False, True])
def test_the_text_of_a_recipe_loads_as_the_same_recipe(
    path: Path, with_origins: bool, kinds: Mapping[str, type[Node]], tmp_path: Path
) -> None:
    """Merged or resolved, with comments or without, it gives the same nodes and fits the schema."""
    recipe = load_recipe(path, kinds=kinds)
    validator = Draft7Validator(recipe_schema(kinds))
    for resolved in (True, False):
        copy = tmp_path / "copy.yaml"
        copy.write_text(config_text(recipe, resolved=resolved, with_origins=with_origins), encoding="utf-8")
        again = load_recipe(copy, kinds=kinds)
        assert list(again.nodes) == list(recipe.nodes)
        assert nodes(again) == nodes(recipe)
        assert (again.params, again.description) == (recipe.params, recipe.description)
        assert config_text(again) == config_text(recipe)
        data = config_json(recipe, resolved=resolved)
        assert data.pop("recipe") == str(path)
        validator.validate(data)


def test_each_value_says_where_it_was_written(load: Load, tmp_path: Path) -> None:
    """File and line, with the profile; or the option."""
    changes = [Override("set", "prompt=hi"), Override("set-json", "nodes.more.chunks=3")]
    recipe = load(TEXT, profiles=["slow"], overrides=changes)
    lines = config_text(recipe, with_origins=True).replace(str(tmp_path) + "/", "").splitlines()
    for line in (
        "  prompt: hi  # --set",
        "    - 1  # recipe.yaml:4",
        "    - 20  # recipe.yaml:19 (profile slow)",
        "      - id: fast  # recipe.yaml:10",
        "    steps: 20  # recipe.yaml:19 (profile slow)",
        "    cfg: 4.5  # recipe.yaml:20 (profile slow)",
        "    chunks: 3  # --set-json",
        "    file: in/a.png  # recipe.yaml:4",
    ):
        assert line in lines
    origins = config_json(recipe, with_origins=True)["origins"]
    assert origins["nodes.dit.loras[fast].file"].endswith("recipe.yaml:10")
    assert origins["params.prompt"] == "--set"
    assert "  seeds: [1, 4]  # " in config_text(load(TEXT), with_origins=True)


def test_references_can_be_kept(load: Load) -> None:
    """Then the matrix stays as well, for it varies what is referred to."""
    recipe = load(TEXT + "matrix: {steps: [4, 8], include: [{steps: 4, prompt: x}]}\n")
    text = config_text(recipe, resolved=False)
    assert "steps: $params.steps" in text
    again = load(text)
    assert set(again.matrix.axes) == {"steps"}
    assert len(again.matrix.include) == 1
    assert nodes(again) == nodes(recipe)
    assert "matrix" not in config_text(recipe)


def test_inputs_are_found_from_the_recipes_folder_wherever_they_were_named(
    tmp_path: Path, kinds: Mapping[str, type[Node]]
) -> None:
    """A base or an override elsewhere has paths of its own; outputs are not moved."""
    for folder in ("base", "mine", "there"):
        (tmp_path / folder).mkdir()
    (tmp_path / "base" / "base.yaml").write_text(TEXT)
    path = tmp_path / "mine" / "recipe.yaml"
    path.write_text("s2vflow: 1\nextends: ../base/base.yaml\n")
    found = config_json(load_recipe(path, kinds=kinds))["nodes"]
    assert found["portrait"]["file"] == "../base/in/a.png"
    assert found["out"]["file"] == "out.latent"
    changes = Changes(overrides=[Override("set", "image=b.png")], base_dir=tmp_path / "there")
    found = config_json(load_recipe(path, kinds=kinds, changes=changes))["nodes"]
    assert found["portrait"]["file"] == "../there/b.png"


TEXTS = st.one_of(
    st.text(max_size=30),
    st.lists(st.sampled_from(["$", "{", "}", "params.", "steps", "word ", "\n", ": ", "#", " ", "'", '"'])).map(
        "".join
    ),
).filter(lambda text: FORBIDDEN.search(text) is None)


@settings(max_examples=80, derandomize=True, database=None, deadline=None)
@given(TEXTS, TEXTS)
def test_any_text_comes_back_the_same(tmp_path_factory: pytest.TempPathFactory, prompt: str, negative: str) -> None:
    """Also what looks like a reference and is none."""
    path = tmp_path_factory.getbasetemp() / "config.yaml"
    path.write_text(TEXT)
    kinds = {kind.kind: kind for kind in NODE_KINDS}

    def literal(text: str) -> str:
        return text.replace("${", "$${").replace("$params.", "$$params.")

    overrides = [Override("set", f"prompt={literal(prompt)}"), Override("set", f"line={literal(negative)}")]
    recipe = load_recipe(path, kinds=kinds, changes=Changes(overrides=overrides))
    text: Any = recipe.nodes["positive"].node
    assert text.text == f"{prompt}: {negative} $5"
    path.write_text(config_text(recipe, with_origins=True), encoding="utf-8")
    again = load_recipe(path, kinds=kinds)
    assert again.params == recipe.params
    assert nodes(again) == nodes(recipe)
