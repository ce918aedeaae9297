"""The plan: the recipe's graph unrolled, every chunk a node of its own, in an order in which it can run.

Planning runs the nodes' `plan` methods in order. What a port means there is a `Value`: where its parts will come from
and the facts that are known beforehand (sizes, seconds, settings that later nodes inherit).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import networkx as nx

from s2v_flow.errors import Diagnostic, Place, RecipeError
from s2v_flow.graph.locations import Locations, Missing
from s2v_flow.graph.node import Node, PortType, Ref

FieldPath = tuple[str | int, ...]


class Origin(Protocol):
    """Where a value was written."""

    @property
    def place(self) -> Place:
        """File, line and column."""

    @property
    def base_dir(self) -> Path:
        """The folder at which relative paths start."""


class Spec(Protocol):
    """A recipe's node as planning needs it: the checked node, and how to place what is found later."""

    @property
    def node(self) -> Node:
        """The validated node."""

    def origin(self, field: str | FieldPath) -> Origin:
        """Return where a field's value was written."""

    def diagnostic(self, field: str | FieldPath, code: str, message: str, fix: str | None = None) -> Diagnostic:
        """Place a mistake at a field's value."""


@dataclass(frozen=True)
class Source:
    """One output of one plan node."""

    node: str
    port: str


@dataclass(frozen=True)
class Value:
    """What an output port means at planning: its parts (one; for a video's latent one per chunk) and known facts."""

    type: PortType
    sources: tuple[Source, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def source(self) -> Source:
        """The only part."""
        (source,) = self.sources
        return source


Inputs = Mapping[str, Source | tuple[Source, ...]]


@dataclass(frozen=True)
class PlanNode:
    """One vertex of the plan.

    `name` is unique ("talk[2]", "talk[2].pixels"), `recipe_node` and `kind` are the recipe's words for it, `node` is
    what runs, `files` maps field paths to the files found for them, `facts` are for people (chunk, frames, seconds).
    """

    name: str
    recipe_node: str
    kind: str
    node: Node
    inputs: Inputs
    files: Mapping[tuple[str | int, ...], Path]
    facts: Mapping[str, Any]

    def sources(self) -> Iterator[Source]:
        """Yield every part of every input."""
        for given in self.inputs.values():
            yield from (given,) if isinstance(given, Source) else given


@dataclass(frozen=True)
class Plan:
    """What is to be done, in order; `missing` lists the files that are not there."""

    nodes: tuple[PlanNode, ...]
    missing: tuple[Missing, ...]
    notes: tuple[str, ...]

    def node(self, name: str) -> PlanNode:
        """Return the plan node of that name."""
        return self._by_name[name]

    @cached_property
    def _by_name(self) -> dict[str, PlanNode]:
        return {node.name: node for node in self.nodes}


Remember = Callable[[str, Path, Callable[[], dict[str, Any]]], dict[str, Any]]
"""`remember(what, file, compute)`: a small fact about a file's content, computed if it is not remembered."""


def compute_anew(what: str, file: Path, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Remember nothing."""
    return compute()


class PlanBuilder:
    """Collects plan nodes, values, missing files and mistakes while the recipe's nodes plan themselves."""

    def __init__(self, specs: Mapping[str, Spec], locations: Locations, remember: Remember) -> None:
        self.locations = locations
        self.remember = remember
        self._specs = specs
        self._values: dict[str, dict[str, Value]] = {}
        self._nodes: dict[str, PlanNode] = {}
        self._missing: dict[str, list[Missing]] = {}
        self._notes: dict[str, list[str]] = {}
        self._diagnostics: list[Diagnostic] = []

    def value(self, ref: Ref | None) -> Value | None:
        """Return what a reference means; None for no reference, or where planning its node failed."""
        if ref is None:
            return None
        values = self._values.get(ref.node, {})
        return values.get(ref.port) if ref.port is not None else next(iter(values.values()), None)

    def add(
        self,
        name: str,
        node: Node,
        inputs: Mapping[str, Value | Source | tuple[Source, ...] | None],
        *,
        recipe_node: str,
        facts: Mapping[str, Any] | None = None,
    ) -> dict[str, Value]:
        """Add one plan node and return a value for each of its ports. Inputs that are None are left out."""
        sources: dict[str, Source | tuple[Source, ...]] = {}
        for key, given in inputs.items():
            if isinstance(given, Value):
                sources[key] = given.sources if given.type == "latent" else given.source
            elif given is not None:
                sources[key] = given
        kind = node.kind if name.startswith(f"{recipe_node}.") else self._specs[recipe_node].node.kind
        files = dict(self._find_files(name, recipe_node, node))
        self._nodes[name] = PlanNode(name, recipe_node, kind, node, sources, files, dict(facts or {}))
        return {port: Value(type_, (Source(name, port),)) for port, type_ in node.outputs.items()}

    def add_simple(self, name: str, node: Node, facts: Mapping[str, Any] | None = None) -> dict[str, Value]:
        """Add a node that is one vertex with its references as inputs; `facts` go with its outputs."""
        inputs = {key: self.value(ref) for key, ref in node.refs().items()}
        values = self.add(name, node, inputs, recipe_node=name)
        return {port: replace(value, facts=dict(facts or {})) for port, value in values.items()}

    def problem(self, name: str, field_name: str, code: str, message: str, fix: str | None = None) -> None:
        """Record a mistake that only planning can see, at a field of a recipe's node."""
        self._diagnostics.append(self._specs[name].diagnostic(field_name, code, message, fix))

    def note(self, name: str, text: str) -> None:
        """Record something a person should know before running, about a recipe's node."""
        self._notes.setdefault(name, []).append(text)

    def miss(self, name: str, missing: Missing) -> None:
        """Record that a plan node lacks a file."""
        self._missing.setdefault(name, []).append(missing)

    def file(self, name: str, *field_path: str | int) -> Path | None:
        """Return the file found for a field of a plan node, or None where it is missing."""
        return self._nodes[name].files.get(field_path)

    def _find_files(self, name: str, recipe_node: str, node: Node) -> Iterator[tuple[tuple[str | int, ...], Path]]:
        spec = self._specs[recipe_node]
        for path, mark, text in node.files():
            if mark.role == "output":
                origin = spec.origin(path)
                yield path, self.locations.output(text, origin.base_dir, typed_by_user=_is_typed(origin))
                continue
            found = self.locations.find(mark, text, spec.origin(path).base_dir)
            if isinstance(found, Missing):
                self.miss(name, found)
            else:
                yield path, found

    def _refuse_shared_outputs(self) -> None:
        """Record nodes that would overwrite each other's file."""
        writers: dict[Path, str] = {}
        for node in self._nodes.values():
            for path, mark, _ in node.node.files():
                if mark.role == "output" and path in node.files:
                    first = writers.setdefault(node.files[path], node.name)
                    if first != node.name:
                        message = f"{path[-1]}: {first} writes the same file"
                        self.problem(
                            node.recipe_node, str(path[-1]), "R131", message, "give each node a file of its own"
                        )

    def build(self, order: Sequence[str]) -> Plan:
        """Plan the recipe's nodes in `order`, keep what the outputs need, and sort it.

        Raises:
            RecipeError: With every mistake that planning found.
        """
        for name in order:
            self._values[name] = self._specs[name].node.plan(self, name)
        self._refuse_shared_outputs()
        if self._diagnostics:
            raise RecipeError(
                "the recipe cannot be planned", diagnostics=sorted(self._diagnostics, key=Diagnostic.sort_key)
            )
        graph: nx.DiGraph[str] = nx.DiGraph()
        for position, node in enumerate(self._nodes.values()):
            graph.add_node(node.name, order=(node.node.stage, position))
            graph.add_edges_from((source.node, node.name) for source in node.sources())
        targets = [node.name for node in self._nodes.values() if node.node.is_sink]
        targets = targets or [name for name in self._nodes if graph.out_degree(name) == 0]
        needed = set(targets).union(*(nx.ancestors(graph, name) for name in targets))
        kept = graph.subgraph(needed)
        ordered = nx.lexicographical_topological_sort(kept, key=lambda name: kept.nodes[name]["order"])
        nodes = tuple(self._nodes[name] for name in ordered)
        missing = dict.fromkeys(item for node in nodes for item in self._missing.get(node.name, []))
        notes = dict.fromkeys(note for node in nodes for note in self._notes.get(node.recipe_node, []))
        return Plan(nodes, tuple(missing), tuple(notes))


def _is_typed(origin: Origin) -> bool:
    """Tell whether a value was given with --set or its like. A recipe may extend a file so named: then it was not."""
    option = origin.place.file
    return option in ("--set", "--set-json", "-m") and not (origin.base_dir / option).exists()


def build_plan(
    specs: Mapping[str, Spec], order: Sequence[str], locations: Locations, remember: Remember = compute_anew
) -> Plan:
    """Unroll a checked recipe.

    Args:
        specs: The recipe's nodes by name.
        order: Their names, each after what it refers to.
        locations: Where files are looked for.
        remember: Keeps small facts about files' contents between plans.

    Raises:
        RecipeError: With every mistake that planning found.
    """
    return PlanBuilder(specs, locations, remember).build(order)
