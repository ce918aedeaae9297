from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from s2v_flow.recipe.emit import scalar_text, to_yaml
from s2v_flow.recipe.problems import Problems
from s2v_flow.recipe.reader import FORBIDDEN, Source, read_yaml
from s2v_flow.recipe.tree import plain

DATA: dict[str, Any] = {
    "s2vflow": 1,
    "params": {"prompt": "She speaks, calmly.", "size": [192, 192], "seed": 7},
    "nodes": {
        "dit": {"kind": "load_diffusion_model", "loras": [{"id": "fast", "file": "a.safetensors", "strength": 0.5}]},
        "voice": {"kind": "load_audio", "file": "$params.audio"},
        "empty": {"loras": [], "more": {}, "nothing": None},
    },
}


def read(text: str) -> Any:
    """Read as recipes are read: YAML 1.2 core."""
    problems = Problems()
    tree = read_yaml(text.encode(), Source("r.yaml", Path(), ()), problems)
    problems.raise_any("r.yaml")
    return plain(tree)


def test_short_values_stand_on_one_line_and_sections_apart() -> None:
    """This is what people see in `s2vflow config` and in imported workflows."""
    assert to_yaml(DATA, above={(): "made by hand"}, comments={("params", "seed"): "chosen by lot"}) == (
        "# made by hand\n"
        "s2vflow: 1\n"
        "\n"
        "params:\n"
        "  prompt: She speaks, calmly.\n"
        "  size: [192, 192]\n"
        "  seed: 7  # chosen by lot\n"
        "\n"
        "nodes:\n"
        "  dit: {kind: load_diffusion_model, loras: [{id: fast, file: a.safetensors, strength: 0.5}]}\n"
        "  voice: {kind: load_audio, file: $params.audio}\n"
        "  empty: {loras: [], more: {}, nothing: null}\n"
    )


def test_a_value_with_a_comment_gets_a_line_of_its_own() -> None:
    """Also inside lists; what stands above an entry is indented with it."""
    loras = ("nodes", "dit", "loras")
    text = to_yaml(
        {"nodes": {"dit": DATA["nodes"]["dit"]}},
        comments={(*loras, 0, "file"): "two\nlines", ("nodes", "dit"): "here"},
        above={(*loras, 0): "first\n\nsecond", ("nodes", "dit", "kind"): "what"},
    )
    assert text == (
        "nodes:\n"
        "  dit:  # here\n"
        "    # what\n"
        "    kind: load_diffusion_model\n"
        "    loras:\n"
        "      # first\n"
        "      #\n"
        "      # second\n"
        "      - id: fast\n"
        "        file: a.safetensors  # two lines\n"
        "        strength: 0.5\n"
    )


def test_long_text_is_folded_and_text_with_line_breaks_stands_as_it_is() -> None:
    """Prompts stay readable; a comment stands behind the marker."""
    data = {"a": "one two three four five six seven eight nine ten eleven", "b": "x\n  y\nz\n", "c": "x\ny"}
    assert to_yaml(data, comments={("a",): "why"}, width=44) == (
        "a: >-  # why\n"
        "  one two three four five six seven eight\n"
        "  nine ten eleven\n"
        "b: |\n"
        "  x\n"
        "    y\n"
        "  z\n"
        "c: |-\n"
        "  x\n"
        "  y\n"
    )


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("no", "'no'"),
        ("Yes", "'Yes'"),
        ("null", "'null'"),
        ("12", "'12'"),
        ("1e-4", "'1e-4'"),
        ("1:30", "'1:30'"),
        ("2024-01-01", "'2024-01-01'"),
        ("", "''"),
        ("~", "'~'"),
        (".inf", "'.inf'"),
        ("it's: so", '"it\'s: so"'),
        ("it's", "it's"),
        ("a # b", "'a # b'"),
        ("a#b", "a#b"),
        ("- a", "'- a'"),
        ("$params.x", "$params.x"),
        ("色调艳丽，过曝", "色调艳丽，过曝"),
        ("a\u202eb", '"a\\u202eb"'),
        ("\xa0", '"\\xa0"'),
        (1e-5, "1.0e-05"),
        (1e16, "1.0e+16"),
        (0.1, "0.1"),
        (True, "true"),
        (None, "null"),
        (18446744073709551615, "18446744073709551615"),
    ],
)
def test_a_scalar_is_quoted_where_some_reader_would_take_it_for_something_else(value: Any, text: str) -> None:
    """YAML 1.1 and 1.2 read it back as the same value of the same type."""
    assert scalar_text(value) == text
    for found in (read(f"a: {text}")["a"], yaml.safe_load(f"a: {text}")["a"]):
        assert found == value
        assert type(found) is type(value)


def test_what_yaml_cannot_say_is_refused() -> None:
    """Infinity and objects have no place in a recipe."""
    with pytest.raises(ValueError, match="inf"):
        to_yaml({"a": math.inf})
    with pytest.raises(TypeError, match="set"):
        to_yaml({"a": {1}})


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**30), 10**30),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=40),
    st.lists(st.sampled_from([*"a'\"[}%|\\\t \n", "- ", "# ", ": ", "word "])).map("".join),
)
TREES = st.dictionaries(
    st.text(min_size=1, max_size=8),
    st.recursive(
        SCALARS,
        lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=6), inner, max_size=4)),
        max_leaves=12,
    ),
    max_size=4,
)


def is_allowed(value: Any) -> bool:
    """Return whether a recipe may hold this: no control characters, no merge keys."""
    if isinstance(value, str):
        return FORBIDDEN.search(value) is None
    if isinstance(value, dict):
        return all(is_allowed(key) and key != "<<" and is_allowed(item) for key, item in value.items())
    return all(map(is_allowed, value)) if isinstance(value, list) else True


@settings(max_examples=40, derandomize=True, database=None, deadline=None)
@given(TREES.filter(is_allowed), st.integers(1, 4), st.sampled_from([20, 60, 120]), st.booleans())
def test_any_data_reads_back_the_same_by_both_versions_of_yaml(
    data: dict[str, Any], flow_depth: int, width: int, has_comments: bool
) -> None:
    """Whatever the layout, with a comment at every value or without."""
    comments = dict.fromkeys(paths_of(data), "a # b: 'c") if has_comments else {}
    text = to_yaml(data, flow_depth=flow_depth, width=width, comments=comments)
    assert repr(read(text)) == repr(data)
    assert repr(yaml.safe_load(text)) == repr(data)


def paths_of(value: Any, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """Return the paths of all values inside."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, item in items for found in ((*path, key), *paths_of(item, (*path, key)))]


def test_a_thousand_nodes_are_written_in_a_moment() -> None:
    """The time grows with the text."""
    nodes = {f"n{index}": {"kind": "extend", "video": f"$n{index - 1}", "seed": index} for index in range(1000)}
    comments = {("nodes", name, key): "r.yaml:1" for name, node in nodes.items() for key in node}
    started = time.process_time()
    assert to_yaml({"nodes": nodes}, comments=comments).count("\n") == 4001
    assert time.process_time() - started < 10
