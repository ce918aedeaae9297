"""The user's defaults: options of the command line that say where things are, in a file outside all recipes.

`~/.config/s2vflow/defaults.yaml` (where the platform keeps such files), or the file that S2VFLOW_DEFAULTS names; empty,
the variable switches them off. Nothing in the file can change what a recipe makes. The command line wins over the
environment, which wins over the file.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from s2v_flow.cache.budget import parse_size
from s2v_flow.errors import ExitCode, RecipeError, S2VFlowError
from s2v_flow.recipe.problems import Problems, collecting
from s2v_flow.recipe.reader import read_file
from s2v_flow.recipe.tree import ListValue, MapValue, Scalar, Tree, plain
from s2v_flow.wording import did_you_mean, shortened, shown

VARIABLE = "S2VFLOW_DEFAULTS"
_LISTS = ("models_dirs", "extra_model_paths", "input_dirs")
_SIZE = "a size like 20G, or none"
_EXPECTED = {
    **dict.fromkeys((*_LISTS, "output_dir", "cache_dir"), "a path"),
    "cache_limit": _SIZE,
    "device": "auto, cpu, cuda or cuda:N",
    "vram": _SIZE,
}
_IN_ENVIRONMENT = {
    "models_dirs": "S2VFLOW_MODELS_DIR",
    "extra_model_paths": "S2VFLOW_EXTRA_MODEL_PATHS",
    "cache_dir": "S2VFLOW_CACHE_DIR",
    "cache_limit": "S2VFLOW_CACHE_LIMIT",
}


def defaults_path() -> Path | None:
    """Return where the user's defaults are looked for; None where they are switched off."""
    named = os.environ.get(VARIABLE)
    if named is not None:
        return Path(os.path.expanduser(named)) if named else None
    from platformdirs import user_config_path

    return user_config_path("s2vflow") / "defaults.yaml"


def read_defaults() -> dict[str, Any]:
    """Read the user's defaults: option (`models_dirs`, `device`) -> value; empty where there is no file.

    Relative folders start at the file's own.

    Raises:
        RecipeError: The file is wrong, or is named by S2VFLOW_DEFAULTS and cannot be read; the exit code is that of a
            wrong command line.
    """
    path = defaults_path()
    if path is None or (VARIABLE not in os.environ and not os.path.exists(path)):
        return {}
    found = {}
    try:
        with collecting(str(path)) as problems:
            found = _read(read_file(path, str(path), problems), problems)
    except RecipeError as error:
        error.exit_code = ExitCode.USAGE
        raise
    return found


def with_defaults(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the command line's options, with the user's defaults for those that are not given.

    Raises:
        RecipeError: See `read_defaults`.
    """
    options = dict(given)
    for name, value in read_defaults().items():
        is_set = name in _IN_ENVIRONMENT and bool(os.environ.get(_IN_ENVIRONMENT[name]))
        if name in options and not options[name] and not is_set:
            options[name] = value
    return options


def _read(tree: Tree, problems: Problems) -> dict[str, Any]:
    if plain(tree) is None:
        return {}
    if not isinstance(tree, MapValue):
        fix = "write `device: cuda` or `models_dirs: [~/models]`"
        raise problems.stop("R012", f"defaults are a map, got {shown(plain(tree))}", tree.origin, fix=fix)
    found: dict[str, Any] = {}
    for key, entry in tree.entries.items():
        if key not in _EXPECTED:
            advice = did_you_mean(key, _EXPECTED)
            problems.add("R010", f"there is no default {shortened(key)}", entry.key_origin, fix=advice)
        else:
            found[key] = _value(key, entry.value, problems)
    return found


def _value(key: str, tree: Tree, problems: Problems) -> Any:
    """Read a path, a size or a device; of what may be several, one may stand for a list of one."""
    if key in _LISTS:
        items = tree.items if isinstance(tree, ListValue) else (tree,)
        return [value for item in items if (value := _one(key, item, problems)) is not None]
    return _one(key, tree, problems)


def _one(key: str, tree: Tree, problems: Problems) -> Any:
    value = tree.value if isinstance(tree, Scalar) else None
    if _EXPECTED[key] == _SIZE:
        if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
            return value
        if key == "vram" and value == "auto":
            return None
        if isinstance(value, str):
            with suppress(S2VFlowError):
                return parse_size(value)
    elif isinstance(value, str) and value:
        return value if key == "device" else tree.origin.base_dir / os.path.expanduser(value)
    problems.add("R012", f"{key}: expected {_EXPECTED[key]}, got {shown(plain(tree))}", tree.origin)
    return None
