"""How a recipe is written does not matter, what it says does: held against the fingerprints of a recipe that ran."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from runs_for_tests import Place

from s2v_flow import api
from s2v_flow.errors import S2VFlowError
from s2v_flow.graph.node import Node

SAME_HERE = {"precision": "fp32", "chunks": "auto"}  # what `auto` is on a CPU; how many chunks the voice needs
Nodes = dict[str, dict[str, Any]]


def fingerprints(place: Place, recipe: Path) -> list[str]:
    """Return the identity of every plan node, as far as it is known without computing."""
    options = api.Options(models_dirs=[Path(place.where[1])], cache_dir=place.cache, device="cpu")
    return sorted(str(status.fingerprint) for status in api.plan(recipe, options).statuses.values())


def nodes_of(place: Place) -> Nodes:
    nodes: Nodes = yaml.safe_load(place.recipe.read_text(encoding="utf-8"))["nodes"]
    return nodes


def rewritten(nodes: Nodes, chance: random.Random) -> str:
    """Write nodes in another way: order, names, defaults, parameters, quotes, layout and comments."""
    nodes = {name: dict(fields) for name, fields in nodes.items()}
    for fields in nodes.values():
        _spell_defaults(fields, chance)
    params: dict[str, Any] = {}
    for fields in nodes.values():
        for field, value in fields.items():
            is_plain = field != "kind" and not isinstance(value, (list, dict)) and not str(value).startswith("$")
            if is_plain and chance.random() < 0.2:
                name = f"p{len(params)}"
                params[name], fields[field] = value, f"$params.{name}"
    names = {name: f"{name}_{chance.randrange(100)}" if chance.random() < 0.5 else name for name in nodes}
    lines = [_noise(chance), f"s2vflow: {chance.choice(('1', '0x1', '+1'))}"]
    sections = [["params:", *(f"  {name}: {_scalar(value, chance)}" for name, value in params.items())], ["nodes:"]]
    for name, fields in _shuffled(nodes, chance):
        sections[1] += _node(names[name], {key: _renamed(value, names) for key, value in fields.items()}, chance)
    chance.shuffle(sections)
    lines += [line for section in sections if len(section) > 1 for line in section]
    return "\n".join(lines) + "\n"


def _node(name: str, fields: dict[str, Any], chance: random.Random) -> Iterator[str]:
    yield _noise(chance, "  ")
    if chance.random() < 0.5:
        inner = ", ".join(f"{key}: {_scalar(value, chance)}" for key, value in _shuffled(fields, chance))
        yield f"  {_key(name, chance)}: {{{inner}}}"
        return
    yield f"  {_key(name, chance)}:{_noise(chance, ' ')}"
    indent = " " * chance.choice((3, 4, 8))
    for key, value in _shuffled(fields, chance):
        yield f"{indent}{_key(key, chance)}:{' ' * chance.choice((1, 5))}{_scalar(value, chance)}{_noise(chance, ' ')}"


def _shuffled(fields: Mapping[str, Any], chance: random.Random) -> list[tuple[str, Any]]:
    return chance.sample(list(fields.items()), len(fields))


def _noise(chance: random.Random, before: str = "") -> str:
    return before + chance.choice(("", "", "# a comment: {x: [1", "#"))


def _key(name: str, chance: random.Random) -> str:
    return chance.choice((name, name, f'"{name}"', f"'{name}'"))


def _scalar(value: Any, chance: random.Random) -> str:
    if isinstance(value, str):
        is_simple = value.replace("$", "").replace("_", "").replace(".", "").isalpha()
        quoted = [json.dumps(value, ensure_ascii=chance.random() < 0.5), "'" + value.replace("'", "''") + "'"]
        return chance.choice(
            [*quoted, value] if is_simple and value not in ("none", "null", "true", "false") else quoted
        )
    if isinstance(value, float) and value.is_integer():
        return chance.choice((f"{value:.1f}", f"{value:.3e}", f"{int(value)}"))
    if isinstance(value, int) and not isinstance(value, bool):
        return chance.choice((str(value), f"+{value}", f"{value:#x}", f"{value:#o}")) if value >= 0 else str(value)
    return json.dumps(value)


def _renamed(value: Any, names: Mapping[str, str]) -> Any:
    if not isinstance(value, str) or not value.startswith("$") or value.startswith("$params."):
        return value
    name, dot, port = value[1:].partition(".")
    return f"${names[name]}{dot}{port}"


def _spell_defaults(fields: dict[str, Any], chance: random.Random) -> None:
    """Write out what is the default anyway; an extend inherits what it does not say, so there it would matter."""
    if fields["kind"] == "extend":
        return
    for name, field in api.KINDS[fields["kind"]].model_fields.items():
        if name not in fields and isinstance(field.default, (bool, int, float, str)) and chance.random() < 0.3:
            fields[name] = field.default


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32))
def test_another_way_to_write_a_recipe_changes_no_fingerprint(quick_run: Place, seed: int) -> None:
    """Order, names of nodes, defaults, parameters, quotes, spelling of numbers, layout and comments."""
    text = rewritten(nodes_of(quick_run), random.Random(seed))
    recipe = quick_run.folder / "rewritten.yaml"
    recipe.write_text(text, encoding="utf-8")
    try:
        assert fingerprints(quick_run, recipe) == fingerprints(quick_run, quick_run.recipe), text
    finally:
        recipe.unlink()


def other_values(kind: type[Node], field: str, value: Any) -> list[Any]:
    """Return other values that a field might take, the first that passes the check is used."""
    schema = kind.model_json_schema()["properties"][field]
    parts = [schema, *schema.get("anyOf", ())]
    words = [word for part in parts for word in part.get("enum", [part["const"]] if "const" in part else [])]
    others: list[Any] = [word for word in words if word not in (value, SAME_HERE.get(field))]
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, (int, float)):
        others += [value + 1, value + 4, value + 16, value + 0.25, value / 2]
    if isinstance(value, str) and not words:
        others += [value + "x", "12:00", "1.5"]
    return [*others, 3, 0.5, 0.25, 5]


@pytest.mark.slow
def test_every_field_that_matters_changes_a_fingerprint_and_no_other_does(quick_run: Place) -> None:
    """Each field of each node in turn; files and links are left out."""
    before, nodes, tried = fingerprints(quick_run, quick_run.recipe), nodes_of(quick_run), {True: 0, False: 0}
    recipe = quick_run.folder / "changed.yaml"
    for name, fields in nodes.items():
        kind = api.KINDS[fields["kind"]]
        fixed = kind.input_ports().keys() | kind.file_fields().keys() | {"kind"}
        for field in sorted(kind.model_fields.keys() - fixed):
            value_now = fields.get(field, kind.model_fields[field].default)
            if value_now is None and fields["kind"] == "extend":
                value_now = nodes["first"].get(field, api.KINDS["sample"].model_fields[field].default)
            for value in other_values(kind, field, value_now):
                changed = {**nodes, name: {**fields, field: value}}
                recipe.write_text(json.dumps({"s2vflow": 1, "nodes": changed}), encoding="utf-8")
                try:
                    after = fingerprints(quick_run, recipe)
                except S2VFlowError:
                    continue
                idle = name == "negative" or field == "step_cache_threshold"  # while cfg is 1, and step_cache off
                matters = field not in kind.neutral_fields() and not idle
                assert (after != before) == matters, f"{name}.{field}: {value_now} -> {value}"
                tried[matters] += 1
                break
    recipe.unlink()
    assert tried[True] > 25
    assert tried[False] >= 2


@pytest.mark.parametrize("name", ["nodes.first.seed=21", "nodes.talk.seed=9", "nodes.positive.text=She sings."])
def test_a_change_on_the_command_line_is_the_same_as_in_the_file(quick_run: Place, name: str) -> None:
    """The same fingerprints either way."""
    path, _, value = name.partition("=")
    _, node, field = path.split(".")
    nodes = nodes_of(quick_run)
    nodes[node][field] = int(value) if value.isdecimal() else value
    recipe = quick_run.folder / "edited.yaml"
    recipe.write_text(json.dumps({"s2vflow": 1, "nodes": nodes}), encoding="utf-8")
    options = api.Options(models_dirs=[Path(quick_run.where[1])], cache_dir=quick_run.cache, device="cpu", sets=[name])
    by_option = {key: item.fingerprint for key, item in api.plan(quick_run.recipe, options).statuses.items()}
    by_file = api.plan(recipe, api.Options(models_dirs=options.models_dirs, cache_dir=quick_run.cache, device="cpu"))
    recipe.unlink()
    assert by_option == {key: item.fingerprint for key, item in by_file.statuses.items()}
