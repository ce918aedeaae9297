"""The user's defaults: options of the command line that say where things are, in a file outside all recipes.

`~/.config/s2vflow/defaults.yaml` (where the platform keeps such files), or the file that S2VFLOW_DEFAULTS names; empty,
the variable switches them off. Nothing in the file can change what a recipe makes. The command line wins over the
environment, which wins over the file.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from s2v_flow.cache.budget import parse_size
from s2v_flow.errors import ExitCode, RecipeError, S2VFlowError
from s2v_flow.recipe.problems import Problems, StopReadingError
from s2v_flow.recipe.reader import read_file
from s2v_flow.recipe.tree import ListValue, MapValue, Scalar, Tree, plain
from s2v_flow.wording import did_you_mean, shortened, shown

VARIABLE = "S2VFLOW_DEFAULTS"
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
    problems = Problems()
    try:
        found = _read(read_file(path, str(path), problems), problems)
    except StopReadingError:
        found = {}
    try:
        problems.raise_any(str(path))
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
        if key not in _READERS:
            advice = did_you_mean(key, _READERS)
            problems.add("R010", f"there is no default {shortened(key)}", entry.key_origin, fix=advice)
        else:
            found[key] = _READERS[key](key, entry.value, problems)
    return found


def _folders(key: str, tree: Tree, problems: Problems) -> list[Path]:
    """Read a list of folders (or files); one may stand for a list of one."""
    items = tree.items if isinstance(tree, ListValue) else (tree,)
    return [folder for item in items for folder in [_folder(key, item, problems)] if folder is not None]


def _folder(key: str, tree: Tree, problems: Problems) -> Path | None:
    text = _text(key, tree, problems, "a path")
    return None if text is None else tree.origin.base_dir / os.path.expanduser(text)


def _device(key: str, tree: Tree, problems: Problems) -> str | None:
    return _text(key, tree, problems, "auto, cpu, cuda or cuda:N")


def _size(key: str, tree: Tree, problems: Problems) -> int | None:
    """Read a size: `20G`, a number of bytes, or none; vram may be auto, too."""
    value = tree.value if isinstance(tree, Scalar) else None
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    if key == "vram" and value == "auto":
        return None
    if isinstance(value, str):
        with suppress(S2VFlowError):
            return parse_size(value)
    problems.add("R012", f"{key}: expected a size like 20G, or none, got {shown(plain(tree))}", tree.origin)
    return None


def _text(key: str, tree: Tree, problems: Problems, expected: str) -> str | None:
    if isinstance(tree, Scalar) and isinstance(tree.value, str) and tree.value:
        return tree.value
    value = plain(tree)
    problems.add("R012", f"{key}: expected {expected}, got {shown(value)}", tree.origin)
    return None


_READERS: Mapping[str, Callable[[str, Tree, Problems], Any]] = {
    "models_dirs": _folders,
    "extra_model_paths": _folders,
    "input_dirs": _folders,
    "output_dir": _folder,
    "cache_dir": _folder,
    "cache_limit": _size,
    "device": _device,
    "vram": _size,
}
