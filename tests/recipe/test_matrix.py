from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s2v_flow.errors import Diagnostic, RecipeError
from s2v_flow.graph.node import Node
from s2v_flow.nodes.table import NODE_KINDS
from s2v_flow.options import Options
from s2v_flow.recipe.argument import Override
from s2v_flow.recipe.load import Variant, load_cells, load_recipe

Vary = Callable[..., tuple[Variant, ...]]

TEXT = """
s2vflow: 1
params: {steps: 4, cfg: 1, seed: 20, prompt: hello}
nodes:
  dit: {kind: load_diffusion_model, checkpoint: a.safetensors, loras: [{id: fast, file: f.safetensors}]}
  umt5: {kind: load_text_encoder, checkpoint: t5.safetensors}
  positive: {kind: encode_text, text_encoder: $umt5, text: $params.prompt}
  first: {kind: sample, model: $dit, positive: $positive, steps: $params.steps, cfg: $params.cfg, seed: $params.seed}
  out: {kind: save_latent, latent: $first, file: out.latent}
"""


@pytest.fixture
def vary(tmp_path: Path, kinds: Mapping[str, type[Node]]) -> Vary:
    """Return a function that writes a recipe with a matrix and loads its cells."""

    def load(matrix: str = "", **options: Any) -> tuple[Variant, ...]:
        path = tmp_path / "recipe.yaml"
        path.write_text(f"{TEXT}matrix: {matrix}\n" if matrix else TEXT)
        given = Options(**options)
        return load_cells(path, kinds=kinds, changes=given.changes, axes=given.axes)[1]

    return load


def labels(variants: tuple[Variant, ...]) -> list[str]:
    return [variant.cell.label for variant in variants]


def test_cells_are_all_combinations_the_first_axis_slowest(vary: Vary) -> None:
    """Each is the recipe with the cell's values, typed by their places."""
    found = vary('{seed: [1, 2], "nodes.dit.loras[fast].strength": [0.6, 1]}')
    assert labels(found) == [
        "seed=1,strength=0.6",
        "seed=1,strength=1",
        "seed=2,strength=0.6",
        "seed=2,strength=1",
    ]
    first: Any = found[2].recipe.nodes["first"].node
    dit: Any = found[2].recipe.nodes["dit"].node
    assert (first.seed, dit.loras[0].strength) == (2, 0.6)
    assert found[2].cell.values == {"seed": 2, "nodes.dit.loras[fast].strength": 0.6}
    assert [variant.recipe.params["seed"] for variant in found] == [1, 1, 2, 2]


def test_include_and_exclude_are_those_of_github(vary: Vary) -> None:
    """The example of GitHub's documentation, with our names: colour is cfg, shape is prompt, animal is seed."""
    found = vary(
        """
          prompt: [apple, pear]
          seed: [1, 2]
          include:
            - {cfg: 3}
            - {cfg: 4, seed: 1}
            - {prompt: apple, steps: 9}
            - {prompt: banana}
            - {prompt: banana, seed: 1}
        """.replace("\n        ", "\n")
    )
    assert [variant.cell.values for variant in found] == [
        {"prompt": "apple", "seed": 1, "cfg": 4, "steps": 9},
        {"prompt": "apple", "seed": 2, "cfg": 3, "steps": 9},
        {"prompt": "pear", "seed": 1, "cfg": 4},
        {"prompt": "pear", "seed": 2, "cfg": 3},
        {"prompt": "banana"},
        {"prompt": "banana", "seed": 1},
    ]
    found = vary("{seed: [1, 2], steps: [1, 2], exclude: [{params.seed: 1}, {seed: 2, steps: 2}]}")
    assert labels(found) == ["seed=2,steps=1"]


def test_include_alone_makes_each_of_its_items_a_cell(vary: Vary) -> None:
    """As in GitHub's workflows."""
    assert labels(vary("{include: [{seed: 1}, {seed: 1, cfg: 2}]}")) == ["seed=1", "seed=1,cfg=2"]


@pytest.mark.parametrize(
    ("axes", "expected"),
    [
        (["seed=1..3"], ["seed=1", "seed=2", "seed=3"]),
        (["seed=3..1"], ["seed=3", "seed=2", "seed=1"]),
        (["seed=1..2,7"], ["seed=1", "seed=2", "seed=7"]),
        (["cfg=1.0,4.5"], ["cfg=1.0", "cfg=4.5"]),
        (["cfg=1.0", "params.seed= 1 , 2"], ["cfg=1.0,seed=1", "cfg=1.0,seed=2"]),
        (['prompt=a,"b, c",12,e: f'], ["prompt=a", "prompt=b, c", "prompt=12", "prompt=e: f"]),
        (
            ["nodes.dit.loras=[],[{id: a, file: f},{id: b, file: g}]"],
            ["loras=[]", "loras=a+b"],
        ),
        (["nodes.first.sampler=euler,heun"], ["sampler=euler", "sampler=heun"]),
        (["seed=1", "nodes.first.seed=2,3"], ["params.seed=1,nodes.first.seed=2", "params.seed=1,nodes.first.seed=3"]),
        ([], []),
    ],
)
def test_an_axis_can_come_from_the_command_line(vary: Vary, axes: list[str], expected: list[str]) -> None:
    """Ranges hold both ends; brackets and quotes keep commas together; values are typed by their places."""
    found = vary(axes=axes)
    assert labels(found) == [label.replace("params.seed", "seed") for label in expected]
    for variant in found:
        for path, value in variant.cell.values.items():
            if path in variant.recipe.params:
                assert variant.recipe.params[path] == (str(value) if path == "prompt" else value)


def test_an_axis_from_the_command_line_replaces_the_recipes_own(vary: Vary) -> None:
    """In its place; what the recipe excludes stays excluded."""
    found = vary("{seed: [1, 2], steps: [1, 2], exclude: [{seed: 5, steps: 1}]}", axes=["seed=5,6"])
    assert labels(found) == ["seed=5,steps=2", "seed=6,steps=1", "seed=6,steps=2"]


def test_other_changes_hold_for_every_cell(vary: Vary) -> None:
    """Also of what an include adds to some."""
    found = vary("{seed: [1, 2], include: [{seed: 1, cfg: 3}]}", overrides=[Override("set", "cfg=2")], sets=["steps=7"])
    assert [(variant.recipe.params["cfg"], variant.recipe.params["steps"]) for variant in found] == [(3, 7), (2, 7)]


def test_labels_differ_even_where_they_are_cut(vary: Vary) -> None:
    """Two long prompts begin alike."""
    found = vary(axes=[f"prompt={'a' * 50},{'a' * 51}"])
    assert len(set(labels(found))) == 2
    assert max(map(len, labels(found))) < 40


def test_a_matrix_is_laid_over_like_other_maps(tmp_path: Path, kinds: Mapping[str, type[Node]]) -> None:
    """Axes of a base stay unless they are given anew; no matrix, no cells."""
    (tmp_path / "base.yaml").write_text(f"{TEXT}matrix: {{seed: [1, 2], steps: [3]}}\n")
    path = tmp_path / "recipe.yaml"
    path.write_text("s2vflow: 1\nextends: base.yaml\nmatrix: {seed: [5]}\n")
    (variant,) = load_cells(path, kinds=kinds)[1]
    assert variant.cell.label == "seed=5,steps=3"
    assert set(load_recipe(path, kinds=kinds).matrix.axes) == {"seed", "steps"}
    path.write_text("s2vflow: 1\nextends: base.yaml\nmatrix:\n")
    assert len(load_cells(path, kinds=kinds)[1]) == 2


def test_the_mistakes_of_all_cells_come_at_once(vary: Vary) -> None:
    """Each once, however many cells share it, at the value in the matrix."""
    with pytest.raises(RecipeError) as caught:
        vary("{steps: [0, 4], seed: [-1, 1, 2]}")
    assert [diagnostic.message for diagnostic in caught.value.diagnostics] == [
        "steps: must be at least 1, got 0",
        "seed: must be at least 0, got -1",
    ]


@pytest.mark.slow
def test_a_thousand_cells_load_in_seconds(vary: Vary) -> None:
    """The layers are read once."""
    started = time.process_time()
    assert len(vary(axes=["seed=1..1000"])) == 1000
    assert time.process_time() - started < 6


@settings(max_examples=80, derandomize=True, database=None, deadline=None)
@given(
    st.one_of(
        st.text(max_size=20),
        st.builds(
            "{}={}".format,
            st.sampled_from(["seed", "prompt", "nodes.dit.loras", "nodes.first.cfg"]),
            st.text(alphabet='12.,-[]{}"\\ a:', max_size=14),
        ),
    )
)
def test_any_axis_makes_cells_or_a_diagnostic(tmp_path_factory: pytest.TempPathFactory, axis: str) -> None:
    """No text after -m makes anything but cells with different labels, or a RecipeError with places."""
    path = tmp_path_factory.getbasetemp() / "axis.yaml"
    path.write_text(TEXT)
    found: tuple[Variant, ...] = ()
    mistakes: Sequence[Diagnostic] = ()
    try:
        found = load_cells(path, kinds={kind.kind: kind for kind in NODE_KINDS}, axes=[axis])[1]
    except RecipeError as error:
        mistakes = error.diagnostics
    assert bool(found) != bool(mistakes)
    assert len(set(labels(found))) == len(found)
    assert all(diagnostic.place is not None for diagnostic in mistakes)
