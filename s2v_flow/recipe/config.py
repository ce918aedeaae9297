"""A recipe as one text: all layers merged, parameters put in, and where each value was written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from s2v_flow.errors import Origin
from s2v_flow.graph.node import NodeSpec
from s2v_flow.graph.ports import FieldPath
from s2v_flow.recipe.emit import to_yaml
from s2v_flow.recipe.layers import LANGUAGE_VERSION
from s2v_flow.recipe.load import Recipe
from s2v_flow.recipe.params import Parameters, escaped, whole_reference
from s2v_flow.recipe.problems import Problems
from s2v_flow.recipe.tree import Entry, ListValue, MapValue, Scalar, Tree, absolute_dir, children, path_text, plain


def config_text(recipe: Recipe, *, resolved: bool = True, with_origins: bool = False) -> str:
    """Return the recipe as YAML that can be loaded again; `with_origins`: comments say `# talk.yaml:14`, `# --set`.

    Resolved, it gives the same nodes: values stand in the place of their references, and inputs' relative paths are
    rewritten where they do not start at the recipe's folder (outputs stay as they are: a recipe writes below itself). A
    matrix is left out then, for what it varies is referred to no more. Else it keeps `$params.x` as it is written.
    """
    tree = _tree(recipe, resolved)
    comments = {path: _said(origin, recipe) for path, origin in _leaves(tree)} if with_origins else {}
    return to_yaml(_data(recipe, tree, resolved), comments=comments)


def portable_text(recipe: Recipe) -> str:
    """Return a recipe without its matrix, references kept, inputs' relative paths as seen from its folder."""
    tree = _tree(replace(recipe, matrix_text=None), resolved=False)
    data = _data(recipe, tree, resolved=False)
    for name, spec in recipe.nodes.items():
        for path, text in _moved_inputs(spec, recipe):
            param = whole_reference(_get(data["nodes"][name], path))
            if param is not None:
                data["params"][param] = escaped(text)
            else:
                _put(data["nodes"][name], path, escaped(text))
    return to_yaml(data)


def config_json(recipe: Recipe, *, resolved: bool = True, with_origins: bool = False) -> dict[str, Any]:
    """Return the same as an object: the recipe's name, its sections, and `origins` by path."""
    tree = _tree(recipe, resolved)
    found: dict[str, Any] = {"recipe": str(recipe.path), **_data(recipe, tree, resolved)}
    if with_origins:
        found["origins"] = {path_text(tree, path): _said(origin, recipe) for path, origin in _leaves(tree)}
    return found


def _tree(recipe: Recipe, resolved: bool) -> MapValue:
    tree = recipe.document
    if resolved:
        tree = _resolved(recipe)
    elif recipe.matrix_text is not None:
        tree = tree.with_entry("matrix", Entry(recipe.matrix_text.origin, recipe.matrix_text))
    sections = {key: entry for key, entry in tree.entries.items() if plain(entry.value)}
    return MapValue(sections, tree.origin)


def _data(recipe: Recipe, tree: MapValue, resolved: bool) -> dict[str, Any]:
    data: dict[str, Any] = {"s2vflow": LANGUAGE_VERSION}
    if recipe.description is not None:
        data["description"] = recipe.description
    if recipe.require:
        data["require"] = dict(recipe.require)
    data.update(plain(tree))
    if resolved:
        for name, spec in recipe.nodes.items():
            for path, text in _moved_inputs(spec, recipe):
                _put(data["nodes"][name], path, escaped(text))
    return data


def _resolved(recipe: Recipe) -> MapValue:
    """Return the document with its references to parameters replaced."""
    params, nodes = recipe.document.entries["params"], recipe.document.entries["nodes"]
    assert isinstance(params.value, MapValue)
    parameters = Parameters(params.value, Problems())
    values = {
        name: Entry(params.value.entries[name].key_origin, tree) for name, tree in parameters.resolve_all().items()
    }
    written = parameters.substitute(nodes.value, "nodes")
    assert written is not None, "the recipe has been checked"
    sections = {"params": MapValue(values, params.value.origin), "nodes": written}
    return MapValue({key: Entry(tree.origin, _literal(tree)) for key, tree in sections.items()}, recipe.document.origin)


def _literal(tree: Tree) -> Tree:
    """Return a resolved value as a recipe writes it: what looks like a reference is none."""
    if isinstance(tree, ListValue):
        return ListValue(tuple(map(_literal, tree.items)), tree.origin)
    if isinstance(tree, MapValue):
        entries = {key: Entry(entry.key_origin, _literal(entry.value)) for key, entry in tree.entries.items()}
        return MapValue(entries, tree.origin)
    return Scalar(escaped(tree.value), tree.origin) if isinstance(tree.value, str) else tree


def _moved_inputs(spec: NodeSpec, recipe: Recipe) -> Iterator[tuple[FieldPath, str]]:
    """Yield the input files whose relative path starts at another folder than the recipe's, as seen from there."""
    home = recipe.folder or absolute_dir(recipe.path)
    for path, mark, text in spec.node.files():
        base_dir = spec.base_dir(path)
        if mark.role == "input" and base_dir != home and not os.path.isabs(os.path.expanduser(text)):
            yield path, os.path.relpath(base_dir / text, home)


def _get(data: Any, path: FieldPath) -> Any:
    for part in path:
        data = data[part]
    return data


def _put(data: Any, path: FieldPath, value: str) -> None:
    _get(data, path[:-1])[path[-1]] = value


def _leaves(tree: Tree, path: FieldPath = ()) -> Iterator[tuple[FieldPath, Origin]]:
    """Yield the places of the values that hold no others; a list of scalars from one line counts as one value."""
    inner = children(tree)
    is_list = isinstance(tree, ListValue)
    if not inner or (is_list and all(_line(x) == _line(tree) and isinstance(x, Scalar) for x in inner.values())):
        yield path, tree.origin
        return
    for key, child in inner.items():
        yield from _leaves(child, (*path, key))


def _line(tree: Tree) -> tuple[str, int]:
    return tree.origin.place.file, tree.origin.place.line


def _said(origin: Origin, recipe: Recipe) -> str:
    place = origin.place
    if place.file.startswith("-") and not (origin.base_dir / place.file).exists():
        return place.file
    profile = recipe.profile_places.get(place)
    said = f"{place.file}:{place.line}" if place.line else place.file
    return said + (f" (profile {profile})" if profile is not None else "")
