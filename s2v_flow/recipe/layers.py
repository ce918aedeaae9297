"""Layers, later wins: the chain of `extends`, the recipe, profiles, override files.

Maps merge; lists and scalars replace what was there. `null` is a value like any other: an optional field becomes none.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from s2v_flow.errors import Origin, Place
from s2v_flow.graph.ports import NAME
from s2v_flow.quality import GATES
from s2v_flow.recipe.argument import Changes
from s2v_flow.recipe.objects import tree_of
from s2v_flow.recipe.problems import Problems
from s2v_flow.recipe.reader import Source, read_file, read_yaml
from s2v_flow.recipe.tree import Entry, MapValue, Scalar, Tree, origins_of, plain
from s2v_flow.wording import did_you_mean, shortened, shown

LANGUAGE_VERSION = 1
TOP_KEYS = ("s2vflow", "description", "extends", "params", "nodes", "profiles", "matrix", "require")
PROFILE_KEYS = ("description", "params", "nodes")
_NAME = re.compile(NAME)
_RESERVED = frozenset({"params"})  # `$params.x` is a parameter
Written = Path | Mapping[str, Any]
"""A recipe as it is given: a file, or a dict of its shape."""


@dataclass(frozen=True)
class Body:
    """What layers are merged of: parameters and nodes."""

    params: MapValue
    nodes: MapValue


@dataclass(frozen=True)
class Layer:
    """One file: a recipe, a base that it extends, or an override file."""

    file: str
    body: Body
    require: MapValue
    description: str | None = None
    extends: Scalar | None = None
    profiles: Mapping[str, Body] = field(default_factory=dict)
    matrix: MapValue | None = None


def read_layer(tree: Tree, file: str, problems: Problems, *, is_recipe: bool) -> Layer:
    """Check a file's top level and take its sections apart; what is wrong is collected and left out.

    `is_recipe`: whether `s2vflow: 1` is required; bases and override files may leave it out.

    Raises:
        StopReadingError: The file is no map at all.
    """
    if not isinstance(tree, MapValue) and plain(tree) is not None:
        message = f"a recipe is a map, got {shown(plain(tree))}"
        raise problems.stop("R012", message, tree.origin, fix="begin with `s2vflow: 1`")
    top = _as_map(tree, "a recipe", problems)
    for key, entry in top.entries.items():
        if key not in TOP_KEYS:
            message = f"unknown key {shortened(key)}"
            problems.add("R010", message, entry.key_origin, fix=did_you_mean(key, TOP_KEYS))
    _check_version(top, problems, is_recipe)
    profiles = {
        name: _read_profile(name, entry.value, problems)
        for name, entry in _section(top, "profiles", problems).entries.items()
    }
    description = _text(top, "description", "text", problems)
    return Layer(
        file=file,
        body=_read_body(top, problems),
        description=None if description is None else str(description.value),
        extends=_text(top, "extends", "a file's name", problems),
        profiles=profiles,
        matrix=None if "matrix" not in top.entries else _as_map(top.entries["matrix"].value, "matrix", problems),
        require=_read_require(top, problems),
    )


def _read_require(top: MapValue, problems: Problems) -> MapValue:
    """Return what the figures of videos must be, by name: numbers; what is wrong is collected and left out."""
    good: dict[str, Entry] = {}
    for name, entry in _as_map(top.get("require") or MapValue({}, top.origin), "require", problems).entries.items():
        value = plain(entry.value)
        if name not in GATES:
            message = f"there is no figure {shortened(name)} to require"
            problems.add("R014", message, entry.key_origin, inside="require", fix=did_you_mean(name, GATES, "figures"))
        elif isinstance(value, bool) or not isinstance(value, int | float):
            message, fix = f"{name}: expected a number, got {shown(value)}", f"it is {GATES[name]}"
            problems.add("R012", message, entry.value.origin, inside=f"require.{name}", fix=fix)
        elif value < 0:
            message, fix = f"{name}: must be at least 0, got {shown(value)}", f"it is {GATES[name]}"
            problems.add("R013", message, entry.value.origin, inside=f"require.{name}", fix=fix)
        else:
            good[name] = entry
    return MapValue(good, top.origin)


def _as_map(tree: Tree, what: str, problems: Problems) -> MapValue:
    """Return the tree if it is a map; nothing at all counts as an empty one."""
    if isinstance(tree, MapValue):
        return tree
    if not (isinstance(tree, Scalar) and tree.value is None):
        problems.add("R012", f"{what} is a map, got {shown(plain(tree))}", tree.origin, fix="write `name: value` lines")
    return MapValue({}, tree.origin)


def _section(parent: MapValue, key: str, problems: Problems) -> MapValue:
    """Return a section with its badly named entries left out."""
    tree = parent.get(key)
    if tree is None:
        return MapValue({}, parent.origin)
    section = _as_map(tree, key, problems)
    singular = key.removesuffix("s")
    good: dict[str, Entry] = {}
    for name, entry in section.entries.items():
        if name in _RESERVED and key == "nodes":
            fix = "choose another name: $params.x is a parameter"
            problems.add("R017", f"no node may be called {name}", entry.key_origin, fix=fix)
        elif _NAME.fullmatch(name):
            good[name] = entry
        else:
            message = f"'{shortened(name)}' is no name for a {singular}"
            fix = "names begin with a letter or _, and have letters, digits, _ and - in them"
            problems.add("R017", message, entry.key_origin, fix=fix)
    return MapValue(good, section.origin)


def _read_body(parent: MapValue, problems: Problems) -> Body:
    return Body(_section(parent, "params", problems), _section(parent, "nodes", problems))


def _read_profile(name: str, tree: Tree, problems: Problems) -> Body:
    profile = _as_map(tree, f"profile {name}", problems)
    for key, entry in profile.entries.items():
        if key not in PROFILE_KEYS:
            fix = did_you_mean(key, PROFILE_KEYS)
            message = f"unknown key {shortened(key)} in a profile"
            problems.add("R010", message, entry.key_origin, inside=f"profiles.{name}", fix=fix)
    return _read_body(profile, problems)


def _check_version(top: MapValue, problems: Problems, is_recipe: bool) -> None:
    entry = top.entries.get("s2vflow")
    if entry is None:
        if is_recipe:
            fix = f"begin the recipe with `s2vflow: {LANGUAGE_VERSION}`"
            problems.add("R015", "s2vflow is missing: the version of the recipe language", top.origin, fix=fix)
        return
    version = plain(entry.value)
    if isinstance(version, bool) or version != LANGUAGE_VERSION or not isinstance(version, int):
        message = f"s2vflow: this program reads version {LANGUAGE_VERSION} of the recipe language, got {shown(version)}"
        problems.add("R019", message, entry.value.origin, fix=f"write `s2vflow: {LANGUAGE_VERSION}`")


def _text(top: MapValue, key: str, expected: str, problems: Problems) -> Scalar | None:
    tree = top.get(key)
    if tree is None or (isinstance(tree, Scalar) and tree.value is None):
        return None
    if not isinstance(tree, Scalar) or not isinstance(tree.value, str):
        problems.add("R012", f"{key}: expected {expected}, got {shown(plain(tree))}", tree.origin)
        return None
    return tree


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
    require: MapValue
    profiles: Mapping[str, Body]
    description: str | None
    files: tuple[str, ...]
    profile_places: Mapping[Place, str]


def name_of(recipe: Written) -> str:
    """Return how messages call a recipe: as the user did, or <dict>."""
    return "<dict>" if isinstance(recipe, Mapping) else str(recipe)


def merge_layers(recipe: Written, changes: Changes, problems: Problems) -> Merged:
    """Read a recipe, a file or a dict, and the profiles and files that are laid over it.

    A profile may live in any layer; profiles of the same name are merged, in the order of the layers, before they are
    applied.

    Raises:
        StopReadingError: A file cannot be read.
    """
    if changes.inside is None:
        chain = read_chain(recipe, problems, is_recipe=True)
    else:
        source = Source(str(recipe), changes.inside[1], ())
        tree = read_yaml(changes.inside[0].encode(errors="surrogatepass"), source, problems)
        chain = [read_layer(tree, str(recipe), problems, is_recipe=True)]
    overrides = [layer for file in changes.files for layer in read_chain(file, problems, is_recipe=False)]
    known: dict[str, Body] = {}
    for layer in (*chain, *overrides):
        for name, body in layer.profiles.items():
            known[name] = merge_bodies(known[name], body) if name in known else body
    chosen = _chosen(changes, known, problems)
    body = chain[0].body
    for layer in chain[1:]:
        body = merge_bodies(body, layer.body)
    recipe_params = body.params
    for over in (*(profile for _, profile in chosen), *(layer.body for layer in overrides)):
        body = merge_bodies(body, over)
    matrix = require = MapValue({}, body.nodes.origin)
    for layer in (*chain, *overrides):
        if layer.matrix is not None:
            matrix = replace(_merge_maps(matrix, layer.matrix), origin=layer.matrix.origin)
        require = replace(_merge_maps(require, layer.require), origin=layer.require.origin)
    descriptions = [layer.description for layer in chain if layer.description is not None]
    files = tuple(dict.fromkeys(layer.file for layer in (*chain, *overrides)))
    places = {
        origin.place: name
        for name, profile in chosen
        for section in (profile.params, profile.nodes)
        for origin in origins_of(section).values()
    }
    description = descriptions[-1] if descriptions else None
    return Merged(body, recipe_params, matrix, require, known, description, files, places)


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


def read_chain(recipe: Written, problems: Problems, *, is_recipe: bool) -> list[Layer]:
    """Read a file, or a dict, and what it extends, the innermost base first.

    Raises:
        StopReadingError: A file cannot be read, or the chain is too long or runs in a circle.
    """
    layers: list[Layer] = []
    seen: dict[str, str] = {}  # real path -> name
    name, named_at = name_of(recipe), None
    while True:
        seen[os.path.realpath(name)] = name
        if isinstance(recipe, Mapping) and not layers:
            tree = _dict_tree(recipe, problems)
        else:
            tree = read_file(Path(name), name, problems, named_at, is_recipe=True)
        layers.append(read_layer(tree, name, problems, is_recipe=is_recipe))
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


def _dict_tree(recipe: Mapping[str, Any], problems: Problems) -> Tree:
    """Return a recipe that is a dict; its values stand at places like `<dict>:nodes.first.steps`."""
    here = Path.cwd()
    return tree_of(recipe, lambda path: Origin(Place(f"<dict>:{path}" if path else "<dict>", 0, 0), "", here), problems)


def _base_name(extends: Scalar, name: str, problems: Problems) -> str:
    """Return the name of the file that `extends` means, from the name of the file where it stands."""
    text = str(extends.value)
    is_absolute = PurePosixPath(text).is_absolute() or PureWindowsPath(text).drive or text.startswith("~")
    if not text or is_absolute or "://" in text:
        message = f"extends: expected a path relative to this file, got '{shortened(text)}'"
        raise problems.stop("R040", message, extends.origin, fix="write it as seen from here: base.yaml, ../base.yaml")
    return posixpath.normpath(posixpath.join(Path(name).parent.as_posix(), text))


def _chosen(changes: Changes, known: Mapping[str, Body], problems: Problems) -> list[tuple[str, Body]]:
    for number, name in enumerate(changes.profiles, start=1):
        if name not in known:
            origin = Origin(Place("--profile", number), name, changes.start, len(name))
            fix = did_you_mean(name, known) or "the recipe has no profiles"
            problems.add("R043", f"there is no profile {shortened(name)}", origin, fix=fix)
    return [(name, known[name]) for name in changes.profiles if name in known]


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
