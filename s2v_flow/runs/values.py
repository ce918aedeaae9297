"""A recipe's values and a plan's files by path, and the recipe itself as text that can be run again."""

from __future__ import annotations

import os
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from s2v_flow.graph.node import Plan, PlanNode
from s2v_flow.graph.ports import FieldPath
from s2v_flow.recipe.config import config_json
from s2v_flow.recipe.emit import to_yaml
from s2v_flow.recipe.load import Recipe
from s2v_flow.recipe.tree import Entry, MapValue
from s2v_flow.runs.manifest import FileRecord


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


def values_of(recipe: Recipe) -> dict[str, Any]:
    """Return every value of a recipe by its path, parameters put in and defaults included."""
    values = {f"params.{name}": without_home(value) for name, value in recipe.params.items()}
    for spec in recipe.nodes.values():
        values[f"nodes.{spec.name}.kind"] = spec.kind
        for _, text, value in leaves(spec.node.model_dump(mode="json"), (), f"nodes.{spec.name}"):
            values[text] = without_home(value)
    return values


def without_nodes(recipe: Recipe, names: Container[str]) -> Recipe:
    """Return a recipe without some nodes, to which nothing may refer."""
    kept = {name: spec for name, spec in recipe.nodes.items() if name not in names}
    nodes = recipe.document.get("nodes")
    assert isinstance(nodes, MapValue)
    entries = {name: entry for name, entry in nodes.entries.items() if name not in names}
    document = recipe.document.with_entry("nodes", Entry(nodes.origin, replace(nodes, entries=entries)))
    return replace(recipe, nodes=kept, document=document)


def written(recipe: Recipe) -> tuple[str, dict[str, str]]:
    """Return the recipe, all layers applied and parameters put in, as YAML that can be run; and each value's place."""
    found = config_json(recipe, with_origins=True)
    origins = {path: str(without_home(place)) for path, place in found.pop("origins").items()}
    found.pop("recipe")
    return to_yaml(without_home(found)), origins


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


def home_hidden(text: str) -> str:
    """Return a text for people in which paths inside the home folder begin with ~."""
    return text.replace(os.path.expanduser("~") + os.sep, f"~{os.sep}")


@dataclass(frozen=True)
class NamedFile:
    """A file that a plan node reads: the field that names it, the name, and where it was found."""

    node: PlanNode
    path: FieldPath
    role: Literal["model", "input"]
    name: str
    folder: str
    file: Path

    @property
    def at(self) -> str:
        """The field as a person writes it: nodes.dit.checkpoint."""
        return field_text(self.node, self.path)


def files_of(nodes: Iterable[PlanNode]) -> Iterator[NamedFile]:
    """Yield every model and input of some plan nodes that was found."""
    for node in nodes:
        for path, mark, text in node.node.files():
            if mark.role != "output" and path in node.files:
                folder = mark.folders[0] if mark.role == "model" else ""
                yield NamedFile(node, path, mark.role, text, folder, node.files[path])


def file_records(nodes: Iterable[PlanNode], digest: Callable[[Path], str | None]) -> list[FileRecord]:
    """Return a record of every model and input of some plan nodes, each field and file once.

    `digest`: sha256 of a file, or None where it is not known.
    """
    found: dict[tuple[str, Path], FileRecord] = {}  # in a matrix a field may name several files
    for item in files_of(nodes):
        if (item.at, item.file) not in found:
            size = item.file.stat().st_size if item.file.is_file() else None
            name = without_home(item.name)
            record = FileRecord(at=item.at, role=item.role, name=name, sha256=digest(item.file), size=size)
            found[item.at, item.file] = record
    return list(found.values())


def alone(name: str) -> str:
    """Return a plan node's name without the label of a matrix's cell: the cell run alone calls it so."""
    return name.rpartition("/")[2]


def part_of(plan: Plan, name: str) -> Plan:
    """Return the plan of one sink, its nodes named as if its cell were run alone."""
    return Plan(tuple(node.renamed(alone) for node in plan.made_of(name)), plan.missing, ())
