"""The models and inputs of a plan, by the fields that name them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from s2v_flow.graph.node import Plan, PlanNode
from s2v_flow.graph.ports import FieldPath
from s2v_flow.runs.manifest import FileRecord
from s2v_flow.runs.values import field_text, without_home


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
