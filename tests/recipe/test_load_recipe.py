from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import model_validator

from s2v_flow.cli import report
from s2v_flow.errors import Diagnostic, RecipeError
from s2v_flow.graph.node import Node
from s2v_flow.nodes.table import NODE_KINDS
from s2v_flow.options import Options
from s2v_flow.recipe.argument import Changes
from s2v_flow.recipe.fields import field_at
from s2v_flow.recipe.load import Recipe, load_recipe
from s2v_flow.wording import format_diagnostic

Load = Callable[..., Recipe]
MANY = "{} mistakes (the first 50 are shown); nothing was run"
DESIGN = Path(__file__).parent / "good" / "design.yaml"


def test_the_recipe_of_the_design_page_is_valid(kinds: Mapping[str, type[Node]]) -> None:
    """Nodes come in the order of the file, with typed fields, and profiles change them."""
    recipe = load_recipe(DESIGN, kinds=kinds)
    assert list(recipe.nodes)[:3] == ["dit", "umt5", "wav2vec2"]
    assert len(recipe.nodes) == 14
    first: Any = recipe.nodes["first"].node
    assert (first.steps, first.cfg, first.seed, first.shift) == (4, 1.0, 20, 8.0)
    assert recipe.description == "Talking portrait, Lightning LoRA, four steps."
    quality: Any = load_recipe(DESIGN, kinds=kinds, changes=Changes(["quality", "bf16"])).nodes
    assert quality["first"].node.cfg == 6.0
    assert quality["dit"].node.loras == []
    assert quality["dit"].node.checkpoint == "wan2.2_s2v_14B_bf16.safetensors"


def test_loading_a_recipe_takes_a_tenth_of_a_second_at_most(kinds: Mapping[str, type[Node]]) -> None:
    """`check` is quick."""
    load_recipe(DESIGN, kinds=kinds)
    times = []
    for _ in range(3):
        started = time.process_time()
        load_recipe(DESIGN, kinds=kinds, changes=Options(profiles=["quality"], sets=["steps=8"]).changes)
        times.append(time.process_time() - started)
    assert min(times) < 0.1


def test_reading_recipes_imports_neither_torch_nor_numpy() -> None:
    """The language stands on PyYAML, pydantic and networkx alone."""
    code = (
        "import sys; import s2v_flow.recipe.load, s2v_flow.recipe.schema, s2v_flow.graph.build, networkx;"
        "print(sorted({'torch', 'numpy', 's2v_flow.nodes'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_a_later_mistake_can_be_marked_at_a_field(load: Load) -> None:
    """The planner points at the value, or at the node where a default is used."""
    spec = load("s2vflow: 1\nnodes:\n  voice: {kind: load_audio, file: a.wav}\n").nodes["voice"]
    found = spec.diagnostic("file", "P001", "there is no such file", fix="put it there")
    assert format_diagnostic(found).splitlines()[1:] == [
        "    3 |   voice: {kind: load_audio, file: a.wav}",
        "      |                                   ^^^^^",
        "  in:  nodes.voice.file (kind: load_audio)",
        "  fix: put it there",
    ]
    assert spec.origin("missing").place == spec.place
    assert (spec.place.line, spec.place.column) == (3, 3)
    assert spec.origin("kind").place.column == 17


def test_all_mistakes_come_in_order_of_place_and_not_without_end(
    load: Load, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fifty are shown, more are counted; a reader stops at two hundred."""
    nodes = "\n".join(f"  n{index}: {{kind: load_audio, fil: a}}" for index in range(80))
    with pytest.raises(RecipeError) as caught:
        load(f"s2vflow: 1\nnodes:\n{nodes}\n")
    lines = [diagnostic.place.line for diagnostic in caught.value.diagnostics if diagnostic.place]
    assert lines == list(range(3, 83))
    report.print_error(caught.value)
    said = capsys.readouterr().err
    assert (said.count("error[R011]"), said.splitlines()[-1]) == (50, MANY.format(80))

    with pytest.raises(RecipeError) as caught:
        load("s2vflow: 1\nnodes:\n" + "".join(f"  n{index}: {{kind: load_audio, fil: a}}\n" for index in range(999)))
    report.print_error(caught.value)
    assert capsys.readouterr().err.splitlines()[-1] == MANY.format("more than 200")


def test_a_thousand_nodes_load_in_seconds(load: Load) -> None:
    """The time grows with the number of nodes, not with its square."""
    nodes = "  n0: {kind: load_latent, file: a}\n" + "".join(
        f"  n{index}: {{kind: extend, video: $n{index - 1}}}\n" for index in range(1, 1000)
    )
    started = time.process_time()
    assert len(load(f"s2vflow: 1\nnodes:\n{nodes}").nodes) == 1000
    assert time.process_time() - started < 3


def test_a_rule_about_several_fields_is_marked_at_the_node(tmp_path: Path) -> None:
    """A kind's own validator speaks for the whole node."""

    class Pair(Node):
        """Two numbers."""

        kind: ClassVar[str] = "pair"
        low: int = 0
        high: int = 1

        @model_validator(mode="after")
        def check_order(self) -> Pair:
            if self.low > self.high:
                raise ValueError("low must not be above high")
            return self

    path = tmp_path / "r.yaml"
    path.write_text("s2vflow: 1\nnodes:\n  two: {kind: pair, low: 2}\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, kinds={"pair": Pair})
    (found,) = caught.value.diagnostics
    assert (found.code, found.message) == ("R016", "two: low must not be above high")
    assert found.place is not None
    assert (found.place.line, found.place.column) == (3, 3)


def test_every_field_of_every_kind_can_be_read_from_a_recipe(kinds: Mapping[str, type[Node]]) -> None:
    """No field has a type for which the language has no words."""
    for kind in kinds.values():
        for name in kind.model_fields:
            taken = field_at(kind, (name,))
            assert taken is not None
            assert taken.described() != "null"


PIECES = st.sampled_from(
    [
        *("$", "${", "$params.", "${params.steps}", "[", "]", "{", "}", ": ", "\n", "\n  ", "&a ", "*a", "<<: ", "!!"),
        *("|\n", "- ", "? ", "#", "'", '"', "%", "null", "1e999", ".inf", "-1", "\t", "\x00", "\u2028", "\u202e"),
        *("nodes:", "kind: ", "extends: r.yaml", "profiles:", "params:", "\ufeff", "017", "ä", "\\x41"),
    ]
)


@settings(max_examples=150, derandomize=True, database=None, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 40), PIECES), min_size=1, max_size=4))
def test_a_damaged_recipe_is_read_or_refused_with_diagnostics(
    tmp_path_factory: pytest.TempPathFactory, edits: list[tuple[int, int, str]]
) -> None:
    """Wherever the design's recipe is cut and pasted, the result is a recipe or a list of printable mistakes."""
    text = DESIGN.read_text()
    for start, length, piece in edits:
        start %= len(text) or 1
        text = text[:start] + piece + text[start + length :]
    check_bytes(tmp_path_factory, text.encode())


@settings(max_examples=100, derandomize=True, database=None, deadline=None)
@given(
    st.one_of(
        st.binary(max_size=60), st.text(max_size=60).map(str.encode), st.lists(PIECES).map("".join).map(str.encode)
    )
)
def test_any_bytes_are_read_or_refused_with_diagnostics(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    """No file content leads to anything but a recipe or a RecipeError."""
    check_bytes(tmp_path_factory, data)


def check_bytes(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "r.yaml"
    path.write_bytes(data)
    found: Sequence[Diagnostic] | None = None
    started = time.process_time()
    try:
        load_recipe(path, kinds={kind.kind: kind for kind in NODE_KINDS})
    except RecipeError as error:
        found = error.diagnostics
    assert time.process_time() - started < 10
    assert found is None or len(found) > 0
    for diagnostic in found or ():
        assert diagnostic.place is not None
        printed = format_diagnostic(diagnostic)
        assert all(character.isprintable() or character == "\n" for character in printed)
