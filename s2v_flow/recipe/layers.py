"""Layers, later wins: the chain of `extends`, the recipe, profiles, override files.

Maps merge; lists and scalars replace what was there. `null` is a value like any other: an optional field becomes none.
"""

from __future__ import annotations

import os
import posixpath
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath, PureWindowsPath

from s2v_flow.errors import Place
from s2v_flow.recipe.problems import Problems
from s2v_flow.recipe.reader import read_file
from s2v_flow.recipe.sections import Body, Layer, read_layer
from s2v_flow.recipe.tree import Entry, MapValue, Origin, Scalar, Tree, origins_of
from s2v_flow.wording import did_you_mean, shortened

MAX_CHAIN = 8


@dataclass(frozen=True)
class Merged:
    """All layers as one, before `--set`: the bodies merged, and which files were read.

    `recipe_params` are the parameters without profiles and override files; `profile_places` says which of the chosen
    profiles a value at a place belongs to.
    """

    body: Body
    recipe_params: MapValue
    matrix: MapValue
    profiles: Mapping[str, Body]
    description: str | None
    files: tuple[str, ...]
    profile_places: Mapping[Place, str]


def merge_layers(
    path: Path, profiles: Sequence[str], override_files: Sequence[Path], base_dir: Path, problems: Problems
) -> Merged:
    """Read a recipe and everything that is laid over it.

    A profile may live in any layer; profiles of the same name are merged, in the order of the layers, before they are
    applied.

    Raises:
        StopReadingError: A file cannot be read.
    """
    chain = read_chain(path, problems, is_recipe=True)
    overrides = [layer for file in override_files for layer in read_chain(file, problems, is_recipe=False)]
    known: dict[str, Body] = {}
    for layer in (*chain, *overrides):
        for name, body in layer.profiles.items():
            known[name] = merge_bodies(known[name], body) if name in known else body
    chosen = _chosen(profiles, known, base_dir, problems)
    body = chain[0].body
    for layer in chain[1:]:
        body = merge_bodies(body, layer.body)
    recipe_params = body.params
    for over in (*(profile for _, profile in chosen), *(layer.body for layer in overrides)):
        body = merge_bodies(body, over)
    matrix = MapValue({}, body.nodes.origin)
    for layer in (*chain, *overrides):
        if layer.matrix is not None:
            matrix = replace(_merge_maps(matrix, layer.matrix), origin=layer.matrix.origin)
    descriptions = [layer.description for layer in chain if layer.description is not None]
    files = tuple(dict.fromkeys(layer.file for layer in (*chain, *overrides)))
    places = {
        origin.place: name
        for name, profile in chosen
        for section in (profile.params, profile.nodes)
        for origin in origins_of(section).values()
    }
    return Merged(body, recipe_params, matrix, known, descriptions[-1] if descriptions else None, files, places)


def merge_bodies(base: Body, over: Body) -> Body:
    """Lay one body over another. A node whose kind changes is replaced whole."""
    nodes = base.nodes
    for name, entry in over.nodes.entries.items():
        below = nodes.entries.get(name)
        if below is None or _changes_kind(below.value, entry.value):
            nodes = nodes.with_entry(name, entry)
        else:
            nodes = nodes.with_entry(name, _merge_entries(below, entry))
    return Body(_merge_maps(base.params, over.params), nodes)


def read_chain(path: Path, problems: Problems, *, is_recipe: bool) -> list[Layer]:
    """Read a file and what it extends, the innermost base first.

    Raises:
        StopReadingError: A file cannot be read, or the chain is too long or runs in a circle.
    """
    layers: list[Layer] = []
    seen: dict[str, str] = {}  # real path -> name
    name, named_at = str(path), None
    while True:
        seen[os.path.realpath(name)] = name
        layers.append(read_layer(read_file(Path(name), name, problems, named_at), name, problems, is_recipe=is_recipe))
        is_recipe = False
        extends = layers[-1].extends
        if extends is None:
            return layers[::-1]
        name, named_at = _base_name(extends, name, problems), extends.origin
        if os.path.realpath(name) in seen:
            names = [*seen.values(), name]
            circle = " -> ".join(names[names.index(seen[os.path.realpath(name)]) :])
            raise problems.stop("R041", f"files extend each other in a circle: {circle}", named_at)
        if len(seen) >= MAX_CHAIN:
            raise problems.stop("R042", f"a chain of extends may have {MAX_CHAIN} files", named_at)


def _base_name(extends: Scalar, name: str, problems: Problems) -> str:
    """Return the name of the file that `extends` means, from the name of the file where it stands."""
    text = str(extends.value)
    is_absolute = PurePosixPath(text).is_absolute() or PureWindowsPath(text).drive or text.startswith("~")
    if not text or is_absolute or "://" in text:
        message = f"extends: expected a path relative to this file, got '{shortened(text)}'"
        raise problems.stop("R040", message, extends.origin)
    return posixpath.normpath(posixpath.join(Path(name).parent.as_posix(), text))


def _chosen(
    names: Sequence[str], known: Mapping[str, Body], base_dir: Path, problems: Problems
) -> list[tuple[str, Body]]:
    """Return the profiles of these names."""
    for number, name in enumerate(names, start=1):
        if name not in known:
            origin = Origin(Place("--profile", number), name, base_dir, len(name))
            fix = did_you_mean(name, known) or "the recipe has no profiles"
            problems.add("R043", f"there is no profile {shortened(name)}", origin, fix=fix)
    return [(name, known[name]) for name in names if name in known]


def _changes_kind(base: Tree, over: Tree) -> bool:
    if not isinstance(base, MapValue) or not isinstance(over, MapValue):
        return True
    kinds = base.get("kind"), over.get("kind")
    values = [kind.value if isinstance(kind, Scalar) else None for kind in kinds]
    return kinds[1] is not None and values[0] != values[1]


def _merge_maps(base: MapValue, over: MapValue) -> MapValue:
    entries = dict(base.entries)
    for key, entry in over.entries.items():
        entries[key] = _merge_entries(entries[key], entry) if key in entries else entry
    return MapValue(entries, base.origin)


def _merge_entries(base: Entry, over: Entry) -> Entry:
    """Merge two values of the same key; a map that stays a map keeps the place where it was first written."""
    if isinstance(base.value, MapValue) and isinstance(over.value, MapValue):
        return Entry(base.key_origin, _merge_maps(base.value, over.value))
    return over
