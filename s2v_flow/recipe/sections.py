"""The shape of one file: its top-level keys, checked, and its sections, taken apart."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from s2v_flow.graph.node import NAME
from s2v_flow.recipe.problems import Problems
from s2v_flow.recipe.tree import Entry, MapValue, Origin, Scalar, Tree, plain
from s2v_flow.wording import did_you_mean, shortened, shown

LANGUAGE_VERSION = 1
TOP_KEYS = ("s2vflow", "description", "extends", "params", "nodes", "profiles", "matrix")
PROFILE_KEYS = ("description", "params", "nodes")
_NAME = re.compile(NAME)
_RESERVED = frozenset({"params"})  # `$params.x` is a parameter


@dataclass(frozen=True)
class Body:
    """What layers are merged of: parameters and nodes."""

    params: MapValue
    nodes: MapValue


@dataclass(frozen=True)
class Layer:
    """One file: a recipe, a base that it extends, or an override file."""

    file: str
    origin: Origin
    body: Body
    description: str | None = None
    extends: Scalar | None = None
    profiles: Mapping[str, Body] = field(default_factory=dict)
    matrix: MapValue | None = None


def read_layer(tree: Tree, file: str, problems: Problems, *, is_recipe: bool) -> Layer:
    """Check a file's top level and take its sections apart; what is wrong is collected and left out.

    Args:
        tree: What the file says.
        file: Its name.
        problems: Takes what is wrong.
        is_recipe: Whether `s2vflow: 1` is required; bases and override files may leave it out.

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
    return Layer(
        file=file,
        origin=top.origin,
        body=_read_body(top, problems),
        description=_read_description(top, problems),
        extends=_read_extends(top, problems),
        profiles=profiles,
        matrix=None if "matrix" not in top.entries else _as_map(top.entries["matrix"].value, "matrix", problems),
    )


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


def _read_description(top: MapValue, problems: Problems) -> str | None:
    tree = top.get("description")
    if tree is None or (isinstance(tree, Scalar) and tree.value is None):
        return None
    if not isinstance(tree, Scalar) or not isinstance(tree.value, str):
        problems.add("R012", f"description: expected text, got {shown(plain(tree))}", tree.origin)
        return None
    return tree.value


def _read_extends(top: MapValue, problems: Problems) -> Scalar | None:
    tree = top.get("extends")
    if tree is None or (isinstance(tree, Scalar) and tree.value is None):
        return None
    if not isinstance(tree, Scalar) or not isinstance(tree.value, str):
        problems.add("R012", f"extends: expected a file's name, got {shown(plain(tree))}", tree.origin)
        return None
    return tree
