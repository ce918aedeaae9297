"""A ComfyUI workflow as both formats mean it: nodes that run, their inputs by name, notes; and the API format."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from s2v_flow.comfy.catalog import base_class, own_title
from s2v_flow.errors import Diagnostic, RecipeError
from s2v_flow.wording import shortened

MAX_NODES = 20_000
_MAX_DOTS = 8  # choices in choices


@dataclass(frozen=True)
class Link:
    """One output of a node."""

    node: str
    slot: int


@dataclass(frozen=True)
class Value:
    """A number, a text or a truth value; `knob` names the node that holds it, where one holds it for others."""

    value: Any
    knob: str | None = None


@dataclass(frozen=True)
class Box:
    """Where something stands in the editor, in which subgraph (`scope`), with what around it."""

    scope: str
    left: float
    top: float
    right: float
    bottom: float

    def distance(self, other: Box) -> float:
        """Return how far two boxes are apart."""
        across = max(other.left - self.right, self.left - other.right, 0.0)
        down = max(other.top - self.bottom, self.top - other.bottom, 0.0)
        return math.hypot(across, down)  # which does not overflow

    def holds(self, other: Box) -> bool:
        """Tell whether the other's corner lies in this box."""
        inside = self.left <= other.left <= self.right and self.top <= other.top <= self.bottom
        return inside and self.scope == other.scope

    @property
    def area(self) -> float:
        """The box's area."""
        return (self.right - self.left) * (self.bottom - self.top)


@dataclass(frozen=True)
class ComfyNode:
    """A node that ComfyUI would run. `title` is what a person called it; `lacking` are inputs from muted nodes."""

    id: str
    type: str
    inputs: Mapping[str, Link | Value]
    title: str | None = None
    box: Box | None = None
    lacking: tuple[str, ...] = ()

    def links(self) -> Iterator[tuple[str, Link]]:
        """Yield the linked inputs."""
        for name, given in self.inputs.items():
            if isinstance(given, Link):
                yield name, given

    def described(self) -> str:
        """Return how messages call the node."""
        title = f" '{shortened(self.title)}'" if self.title else ""
        return f"node {shortened(self.id)} ({shortened(self.type)}{title})"


@dataclass(frozen=True)
class Note:
    """A text that a person put beside the nodes."""

    text: str
    title: str | None
    box: Box | None


@dataclass(frozen=True)
class Graph:
    """The whole workflow: nodes by id, notes, the groups' boxes and those of nodes that are switched off."""

    nodes: Mapping[str, ComfyNode]
    notes: tuple[Note, ...] = ()
    groups: tuple[Box, ...] = ()
    off: tuple[Box, ...] = ()


_FIXES: Mapping[str, str] = {
    "W002": "open the workflow in ComfyUI and save it again",
    "W004": "change it in ComfyUI and save the workflow again",
    "W005": "cut the circle in ComfyUI and save the workflow again",
    "W006": "save only the part that makes the video as a workflow of its own",
}


@dataclass
class Mistakes:
    """Collects everything that keeps a workflow from becoming a recipe, and what a person should know."""

    file: str
    found: list[Diagnostic] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def add(self, code: str, message: str, node: ComfyNode | str | None = None, fix: str | None = None) -> None:
        """Record a mistake, at a node if it has one."""
        where = node.described() if isinstance(node, ComfyNode) else node
        inside = self.file if where is None else f"{self.file}, {where}"
        mistake = Diagnostic(code, message, inside=inside, fix=fix or _FIXES.get(code))
        if mistake not in self.found:
            self.found.append(mistake)

    def note(self, text: str) -> None:
        """Record something a person should know, once."""
        if text not in self.notes:
            self.notes.append(text)

    def warn(self, text: str) -> None:
        """Record that the recipe's result will not be what a person expects; `text` begins with the field."""
        if text not in self.warnings:
            self.warnings.append(text)

    def raise_any(self) -> None:
        """Stop if there are mistakes.

        Raises:
            RecipeError: With all of them.
        """
        if self.found:
            raise RecipeError(f"{self.file} cannot become a recipe", diagnostics=tuple(self.found))

    def stop(self, code: str, message: str, node: ComfyNode | str | None = None, fix: str | None = None) -> RecipeError:
        """Return the error of a mistake after which nothing more can be said, to be raised."""
        self.add(code, message, node, fix)
        return RecipeError(f"{self.file} cannot become a recipe", diagnostics=tuple(self.found))


def known_class(class_type: str, mistakes: Mistakes) -> str:
    """Return the class that a node is a copy of, and note what is lost: on which device its model is kept."""
    plain = base_class(class_type)
    if plain != class_type:
        mistakes.note(f"{class_type} is read as {plain}: where a model is kept, placement says here")
    return plain


def needed_order(graph: Graph, targets: list[str], mistakes: Mistakes) -> list[str]:
    """Return the nodes that feed the targets, each after what it takes from.

    Raises:
        RecipeError: Links lead nowhere, or in a circle.
    """
    import networkx as nx

    takes: nx.DiGraph[Any] = nx.DiGraph()
    start = object()  # takes from all targets
    takes.add_edges_from((start, target) for target in targets)
    for name, node in graph.nodes.items():
        takes.add_edges_from((name, link.node) for _, link in node.links())
    order = [name for name in nx.dfs_postorder_nodes(takes, start) if name in graph.nodes]
    for node in (graph.nodes[name] for name in order):
        for key, link in node.links():
            if link.node not in graph.nodes:
                mistakes.add("W002", f"{key} is linked to node {shortened(link.node)}, which is not there", node)
    with suppress(nx.NetworkXNoCycle):
        taker, giver, *_ = nx.find_cycle(takes, start)[-1]
        key = next(key for key, link in graph.nodes[taker].links() if link.node == giver)
        raise mistakes.stop("W005", f"{key} depends on its own result: a circle", graph.nodes[taker])
    mistakes.raise_any()
    return order


def is_prompt(document: Any) -> bool:
    """Tell whether a JSON value is in the API format."""
    return isinstance(document, Mapping) and any(map(_is_node, document.values()))


def _is_node(entry: Any) -> bool:
    return isinstance(entry, Mapping) and "class_type" in entry


def read_prompt(document: Mapping[str, Any], mistakes: Mistakes) -> Graph:
    """Read the API format.

    Raises:
        RecipeError: It is damaged.
    """
    if len(document) > MAX_NODES:
        raise mistakes.stop("W006", f"a workflow may have {MAX_NODES} nodes, this has {len(document)}")
    nodes = {}
    for name, entry in document.items():
        if not _is_node(entry):  # of the tool that wrote the file: `_meta`, `extra`
            mistakes.note(f"{shortened(name)} is left out: it has no class_type, so it is no node")
            continue
        class_type, inputs = entry.get("class_type"), entry.get("inputs", {})
        if not isinstance(class_type, str) or not isinstance(inputs, Mapping):
            mistakes.add("W002", "class_type must be text and inputs a map", f"node {name}")
            continue
        meta = entry.get("_meta")
        title = own_title(class_type, meta) if isinstance(meta, Mapping) else None
        given = {name: _input(part) for key, value in inputs.items() for name, part in _flat(str(key), value)}
        nodes[name] = ComfyNode(name, known_class(class_type, mistakes), given, title)
    mistakes.raise_any()
    return Graph(nodes)


def _flat(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield an input; a choice that stands with what it brings along ({"format": {"format": ...}}) by dotted names."""
    key = name.rpartition(".")[2]
    is_choice = isinstance(value, Mapping) and bool(value) and name.count(".") <= _MAX_DOTS
    if not is_choice or not (key in value or all(isinstance(_input(item), Link) for item in value.values())):
        yield name, value
        return
    for part, item in value.items():
        yield from [(name, item)] if part == key else _flat(f"{name}.{part}", item)


def _input(value: Any) -> Link | Value:
    """Read an input: `["12", 0]` is a link; text in a list of one (`{"__value__": [...]}`) is a value."""
    is_pair = isinstance(value, list) and len(value) == 2
    if is_pair and isinstance(value[0], (str, int)) and type(value[1]) is int and not isinstance(value[0], bool):
        return Link(str(value[0]), value[1])
    if isinstance(value, Mapping) and set(value) == {"__value__"}:
        return Value(value["__value__"])
    return Value(value)
