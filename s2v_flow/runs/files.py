"""The models and inputs of a plan, by the fields that name them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from s2v_flow.graph.plan import Plan, PlanNode
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

    Args:
        nodes: The plan nodes.
        digest: sha256 of a file, or None where it is not known.
    """
    found: dict[tuple[str, Path], FileRecord] = {}  # in a matrix a field may name several files
    for item in files_of(nodes):
        if (item.at, item.file) not in found:
            size = item.file.stat().st_size if item.file.is_file() else None
            name = without_home(item.name)
            record = FileRecord(at=item.at, role=item.role, name=name, sha256=digest(item.file), size=size)
            found[item.at, item.file] = record
    return list(found.values())


def ancestors(plan: Plan, name: str) -> list[PlanNode]:
    """Return a plan node and all that it depends on, in the plan's order."""
    wanted = {name}
    for node in reversed(plan.nodes):
        if node.name in wanted:
            wanted.update(source.node for source in node.sources())
    return [node for node in plan.nodes if node.name in wanted]
