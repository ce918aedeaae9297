"""The lock: a file beside the recipe with the digests of its models and inputs, and the refusal of any drift."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from s2v_flow.errors import Diagnostic, ExitCode, MissingError, Origin, RecipeError, S2VFlowError
from s2v_flow.graph.node import Plan
from s2v_flow.recipe.emit import to_yaml
from s2v_flow.recipe.load import Recipe
from s2v_flow.recipe.problems import Problems, collecting
from s2v_flow.recipe.reader import read_file
from s2v_flow.recipe.tree import MapValue, Scalar, Tree, plain
from s2v_flow.runs.environment import packages_of
from s2v_flow.runs.values import NamedFile, files_of, without_home
from s2v_flow.wording import shown, worded

VERSION = 1
_SECTIONS = ("models", "inputs")
_PACKAGES = "packages"
_PREFIX = "sha256:"
_DIGEST = re.compile("sha256:[0-9a-f]{64}")
_MAX_FAULTS = 50


def lock_path(recipe: Path) -> Path:
    """Return where a recipe's lock stands: talk.lock.yaml beside talk.yaml."""
    return recipe.with_name(f"{recipe.stem}.lock.yaml")


def lock_text(recipe: Recipe, plan: Plan, digest: Callable[[Path], str], *, kept: Mapping[str, Any]) -> str:
    """Return the lock of a recipe's models and inputs, and of the packages whose kinds or samplers it uses.

    `kept`: sections of an earlier lock; what they say of other files stays.

    Raises:
        S2VFlowError: Two different files have the same name.
    """
    sections: dict[str, dict[str, Any]] = {section: dict(kept.get(section, {})) for section in _SECTIONS}
    seen: dict[tuple[str, str], str] = {}
    for item in files_of(plan.nodes):
        section, name = _name(item)
        sha256 = digest(item.file)
        if seen.setdefault((section, name), sha256) != sha256:
            text = f"two different files are called {name}: a lock could not tell them apart"
            raise S2VFlowError(text, fix="give one of them another name", exit_code=ExitCode.RECIPE)
        sections[section][name] = f"{_PREFIX}{sha256}"
    sections[_PACKAGES] = kept.get(_PACKAGES, {}) | packages_of(recipe, plan)
    above = f"The models and inputs of {recipe.path.name}; `s2vflow run --locked` refuses any others.\n"
    above += "Written by `s2vflow lock`."
    found = {section: dict(sorted(files.items())) for section, files in sections.items() if files}
    return to_yaml({"lock": VERSION, **found}, above={(): above})


def read_lock(path: Path) -> dict[str, Any]:
    """Return a lock's sections, {} where there is no lock.

    Raises:
        RecipeError: It is not written as a lock is.
    """
    if not path.exists():
        return {}
    tree = _read(path)
    return {section: plain(tree).get(section, {}) for section in (*_SECTIONS, _PACKAGES)}


def check_lock(path: Path, recipe: Recipe, plan: Plan, digest: Callable[[Path], str]) -> None:
    """Compare a plan's models and inputs, and the packages that it uses, with the lock.

    Raises:
        MissingError: There is no lock.
        RecipeError: It is not written as a lock is, or a file or package is not the one that was locked: all of them.
    """
    again = f"s2vflow lock {recipe.path}"
    if not path.exists():
        raise MissingError(f"{path}: there is no lock", fix=f"`{again}` writes one")
    tree = _read(path)
    faults: dict[tuple[str, str], Diagnostic] = {}
    for item in files_of(plan.nodes):
        section, name = _name(item)
        files = tree.get(section)
        entry = files.get(name) if isinstance(files, MapValue) else None
        if not isinstance(entry, Scalar):
            origin = recipe.nodes[item.node.recipe_node].origin(item.path)
            message = f"{item.name} is not in {path.name}"
            fault = origin.diagnostic("L002", message, inside=item.at, fix=f"`{again}` writes the lock anew")
            faults.setdefault((section, name), fault)
            continue
        found = f"{_PREFIX}{digest(item.file)}"
        if found != entry.value:
            message = f"{item.name} is not the file that was locked: expected {entry.value}, got {found}"
            fix = f"put the locked file back; or, if this one is meant, `{again}`"
            faults[section, name] = entry.origin.diagnostic("L003", message, inside=item.at, fix=fix)
    locked = tree.get(_PACKAGES)
    for package, version in packages_of(recipe, plan).items():
        entry = locked.get(package) if isinstance(locked, MapValue) else None
        wanted = None if entry is None else plain(entry)
        if wanted != version:
            message = f"{package} {version} is installed, {wanted or 'no version of it'} was locked"
            fix = f"pip install '{package}=={wanted}'; or, if this one is meant, `{again}`"
            fix = fix if wanted else f"`{again}` writes the lock anew"
            faults[_PACKAGES, package] = (entry or tree).origin.diagnostic("L004", message, fix=fix)
    if faults:
        found_all = sorted(faults.values(), key=Diagnostic.sort_key)
        raise worded(RecipeError("", diagnostics=found_all[:_MAX_FAULTS], exit_code=ExitCode.MISSING))


def _name(item: NamedFile) -> tuple[str, str]:
    """Return a file's section and its name there; a model's has the folder: names are unique in one."""
    name = str(without_home(item.name)).replace("\\", "/")
    return ("models", f"{item.folder}/{name}") if item.role == "model" else ("inputs", name)


def _read(path: Path) -> MapValue:
    tree: Tree | None = None
    with collecting(str(path)) as problems:
        tree = read_file(path, str(path), problems)
        if isinstance(tree, MapValue):
            _check(tree, problems)
        else:
            problems.add("L001", f"a lock is a map, got {shown(plain(tree))}", tree.origin)
    assert isinstance(tree, MapValue)
    return tree


def _check(tree: MapValue, problems: Problems) -> None:
    fix = "`s2vflow lock` writes it anew"

    def wrong(text: str, origin: Origin) -> None:
        problems.add("L001", text, origin, fix=fix)

    version = tree.get("lock")
    if not isinstance(version, Scalar) or version.value != VERSION or isinstance(version.value, bool):
        wrong(f"expected `lock: {VERSION}`", tree.origin if version is None else version.origin)
    for key, entry in tree.entries.items():
        if key not in ("lock", *_SECTIONS, _PACKAGES):
            wrong(f"a lock has models, inputs and packages, not {shown(key)}", entry.key_origin)
        elif key != "lock" and not isinstance(entry.value, MapValue):
            wrong(f"{key}: expected a map", entry.value.origin)
        elif isinstance(entry.value, MapValue):
            for name, file in entry.value.entries.items():
                text = file.value.value if isinstance(file.value, Scalar) else None
                if key != _PACKAGES and (not isinstance(text, str) or _DIGEST.fullmatch(text) is None):
                    wrong(f"{name}: expected its digest, sha256: and 64 hexadecimal digits", file.value.origin)
