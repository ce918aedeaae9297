"""A recipe's values by path, and the recipe itself as text that can be run again."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

from s2v_flow.graph.plan import PlanNode
from s2v_flow.recipe.document import Recipe
from s2v_flow.recipe.emit import to_yaml
from s2v_flow.recipe.sections import LANGUAGE_VERSION
from s2v_flow.recipe.tree import MapValue, Origin, plain

FieldPath = tuple[str | int, ...]


def leaves(value: Any, path: FieldPath = (), text: str = "") -> Iterator[tuple[FieldPath, str, Any]]:
    """Yield every value inside maps and lists of maps: (path, path as a person writes it, value).

    Lists of scalars, empty lists and empty maps are values; an item of a list goes by its id where it has one.
    """
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from leaves(item, (*path, key), f"{text}.{key}" if text else key)
    elif isinstance(value, list) and any(isinstance(item, (Mapping, list)) for item in value):
        for index, item in enumerate(value):
            name = item.get("id", index) if isinstance(item, Mapping) else index
            yield from leaves(item, (*path, index), f"{text}[{name}]")
    else:
        yield path, text, value


def field_text(node: PlanNode, path: FieldPath) -> str:
    """Return a field's path as a person writes it: nodes.dit.loras[lightning].file."""
    prefix = f"nodes.{node.recipe_node}"
    known = {found: text for found, text, _ in leaves(node.node.model_dump(mode="json"), (), prefix)}
    return known[path]


def values_of(recipe: Recipe) -> tuple[dict[str, Any], dict[str, str]]:
    """Return every value of a recipe, parameters put in and defaults included, and where those that are written stand.

    Returns:
        path -> value, and path -> "file:line:column"; a default has no place.
    """
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    params = recipe.document.get("params")
    for name, value in recipe.params.items():
        values[f"params.{name}"] = without_home(value)
        tree = params.get(name) if isinstance(params, MapValue) else None
        if tree is not None:
            origins[f"params.{name}"] = _place(tree.origin)
    for spec in recipe.nodes.values():
        values[f"nodes.{spec.name}.kind"] = spec.kind
        for path, text, value in leaves(spec.node.model_dump(mode="json"), (), f"nodes.{spec.name}"):
            values[text] = without_home(value)
            if path in spec.origins:
                origins[text] = _place(spec.origins[path])
    return values, origins


def recipe_text(recipe: Recipe, *, without: frozenset[str] = frozenset()) -> str:
    """Return the recipe with all its layers applied, as YAML that says the same.

    Args:
        recipe: The recipe.
        without: Names of nodes to leave out.
    """
    body = plain(recipe.document)
    nodes = {name: fields for name, fields in body["nodes"].items() if name not in without}
    head = {"s2vflow": LANGUAGE_VERSION}
    about = {} if recipe.description is None else {"description": recipe.description}
    params = {"params": body["params"]} if body["params"] else {}
    return to_yaml({**head, **about, **without_home(params), "nodes": without_home(nodes)})


def without_home(value: Any) -> Any:
    """Return a value whose texts that are paths inside the home folder begin with ~: no user's name stands in them."""
    if isinstance(value, Mapping):
        return {key: without_home(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_home(item) for item in value]
    if isinstance(value, str):
        home = os.path.expanduser("~") + os.sep
        return f"~{os.sep}{value[len(home) :]}" if value.startswith(home) else value
    return value


def _place(origin: Origin) -> str:
    return f"{without_home(origin.place.file)}:{origin.place.line}:{origin.place.column}"
