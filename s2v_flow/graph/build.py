"""Building a plan: the recipe's nodes plan themselves, in order; what the outputs need is kept and sorted.

Several plans become one: what they have in common stands there once, so that a matrix shares models and results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import networkx as nx

from s2v_flow.errors import Diagnostic, Place, RecipeError
from s2v_flow.graph.locations import Locations, Missing
from s2v_flow.graph.node import Node
from s2v_flow.graph.plan import Plan, PlanNode
from s2v_flow.graph.ports import FieldPath, Ref, Source, Value
from s2v_flow.wording import WARNING, worded


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


Remember = Callable[[str, Path, Callable[[], dict[str, Any]]], dict[str, Any]]
"""`remember(what, file, compute)`: a small fact about a file's content, computed if it is not remembered."""


def compute_anew(what: str, file: Path, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Remember nothing."""
    return compute()


class PlanBuilder:
    """Collects plan nodes, values, missing files and mistakes while the recipe's nodes plan themselves."""

    def __init__(self, specs: Mapping[str, Spec], locations: Locations, remember: Remember) -> None:
        self._locations = locations
        self._remember = remember
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
        place = self._specs[recipe_node].origin(()).place
        self._nodes[name] = PlanNode(name, recipe_node, kind, node, sources, files, dict(facts or {}), place)
        return {port: Value(type_, (Source(name, port),)) for port, type_ in node.outputs.items()}

    def add_simple(self, name: str, node: Node, facts: Mapping[str, Any] | None = None) -> dict[str, Value]:
        """Add a node that is one vertex with its references as inputs; `facts` go with its outputs."""
        inputs = {key: self.value(ref) for key, ref in node.refs().items()}
        values = self.add(name, node, inputs, recipe_node=name)
        return {port: replace(value, facts=dict(facts or {})) for port, value in values.items()}

    def problem(self, name: str, field_name: str, code: str, message: str, fix: str | None = None) -> None:
        """Record a mistake that only planning can see, at a field of a recipe's node."""
        self._diagnostics.append(self._specs[name].diagnostic(field_name, code, message, fix))

    def describe(self, name: str, **facts: Any) -> None:
        """Add facts to a plan node."""
        node = self._nodes[name]
        self._nodes[name] = replace(node, facts={**node.facts, **facts})

    def note(self, name: str, text: str, *, is_warning: bool = False) -> None:
        """Record something a person should know before running, about a recipe's node."""
        self._notes.setdefault(name, []).append(f"{WARNING}{text}" if is_warning else text)

    def miss(self, name: str, missing: Missing) -> None:
        """Record that a plan node lacks a file."""
        self._missing.setdefault(name, []).append(missing)

    def file(self, name: str, *field_path: str | int) -> Path | None:
        """Return the file found for a field of a plan node, or None where it is missing."""
        return self._nodes[name].files.get(field_path)

    def made_model(self, name: str) -> Path | None:
        """Return where a model of that name will stand that is made on first use, None if it is not of that sort."""
        return self._locations.made_models.get(name)

    def remember(self, what: str, file: Path, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return a small fact about a file's content, computed if it is not remembered."""
        return self._remember(what, file, compute)

    def _find_files(self, name: str, recipe_node: str, node: Node) -> Iterator[tuple[tuple[str | int, ...], Path]]:
        spec = self._specs[recipe_node]
        for path, mark, text in node.files():
            if mark.role == "output":
                origin = spec.origin(path)
                yield path, self._locations.output(text, origin.base_dir, typed_by_user=_is_typed(origin))
                continue
            found = self._locations.find(mark, text, spec.origin(path).base_dir)
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
            raise worded(RecipeError("", diagnostics=sorted(self._diagnostics, key=Diagnostic.sort_key)))
        graph = _graph(self._nodes.values())
        targets = [node.name for node in self._nodes.values() if node.node.is_sink]
        targets = targets or [name for name in self._nodes if graph.out_degree(name) == 0]
        needed = set(targets).union(*(nx.ancestors(graph, name) for name in targets))
        nodes = tuple(self._nodes[name] for name in _sorted(graph.subgraph(needed)))
        missing = dict.fromkeys(item for node in nodes for item in self._missing.get(node.name, []))
        notes = dict.fromkeys(note for node in nodes for note in self._notes.get(node.recipe_node, []))
        return Plan(nodes, tuple(missing), tuple(notes))


def _is_typed(origin: Origin) -> bool:
    """Tell whether a value was given with --set or its like. A recipe may extend a file so named: then it was not."""
    option = origin.place.file
    is_given = option in ("--set", "--set-json", "-m") or option.startswith("<params>:")
    return is_given and not (origin.base_dir / option).exists()


def build_plan(
    specs: Mapping[str, Spec], order: Sequence[str], locations: Locations, remember: Remember = compute_anew
) -> Plan:
    """Unroll a checked recipe.

    Args:
        order: Their names, each after what it refers to.
        remember: Keeps small facts about files' contents between plans.

    Raises:
        RecipeError: With every mistake that planning found.
    """
    return PlanBuilder(specs, locations, remember).build(order)


def _graph(nodes: Iterable[PlanNode]) -> nx.DiGraph[str]:
    """Return the graph of plan nodes, an edge from each to those that use it."""
    graph: nx.DiGraph[str] = nx.DiGraph()
    for position, node in enumerate(nodes):
        graph.add_node(node.name, order=(node.node.stage, position))
        graph.add_edges_from((source.node, node.name) for source in node.sources())
    return graph


def _sorted(graph: nx.DiGraph[str]) -> Iterator[str]:
    """Yield the names in an order in which they can run: by stage where the graph leaves a choice, else as given."""
    yield from nx.lexicographical_topological_sort(graph, key=lambda name: graph.nodes[name]["order"])


def merge_plans(plans: Sequence[tuple[str, Plan]], *, by_stage: bool = False) -> tuple[Plan, dict[str, str]]:
    """Join plans that were made with labels.

    Args:
        plans: Each with its label; labels differ.
        by_stage: Run a stage of all plans before the next, so that fewer models are live at once. Else one plan after
            the other, behind the encoders of all: each plan's files are there as soon as they can be.

    Returns:
        The joined plan: equal nodes of equal inputs are one node, files that are written never are. In both orders a
        model stays live until its last use, so that it is loaded once. And the label of every node that belongs to one
        plan alone.
    """
    made: dict[object, PlanNode] = {}
    taken: set[str] = set()
    users: dict[str, set[str]] = {}
    for label, plan in plans:
        names: dict[str, str] = {}
        for node in plan.nodes:
            inputs = {key: _renamed(given, names) for key, given in node.inputs.items()}
            own = label if node.node.is_sink else ""
            identity = (own, type(node.node), repr(node.node), repr(inputs), repr(node.files))
            if identity not in made:
                name = f"{label}/{node.name}" if node.name in taken or node.node.is_sink else node.name
                taken.add(name)
                made[identity] = replace(node, name=name, inputs=inputs)
            names[node.name] = made[identity].name
            users.setdefault(names[node.name], set()).add(label)
    alone = {name: next(iter(labels)) for name, labels in users.items() if len(labels) == 1}
    full = {name: name if name.startswith(f"{label}/") else f"{label}/{name}" for name, label in alone.items()}
    by_name = {(node := _with_names(each, full)).name: node for each in made.values()}
    graph = _graph(by_name.values())
    if not by_stage:
        turns = {label: turn for turn, (label, _) in enumerate(plans, 1)}
        first = {full.get(name, name): min(turns[label] for label in labels) for name, labels in users.items()}
        for name, data in graph.nodes.items():
            data["order"] = (first[name] if by_name[name].node.stage else 0, *data["order"])
    nodes = [by_name[name] for name in _sorted(graph)]
    missing = dict.fromkeys(item for _, plan in plans for item in plan.missing)
    notes = dict.fromkeys(note for _, plan in plans for note in plan.notes)
    return Plan(tuple(nodes), tuple(missing), tuple(notes)), {full[name]: label for name, label in alone.items()}


def _with_names(node: PlanNode, full: Mapping[str, str]) -> PlanNode:
    """Put the label before the names of nodes that belong to one plan alone."""
    names = _Names(full)
    inputs = {key: _renamed(given, names) for key, given in node.inputs.items()}
    return replace(node, name=names[node.name], inputs=inputs)


class _Names(dict[str, str]):
    def __missing__(self, name: str) -> str:
        return name


def _renamed(given: Source | tuple[Source, ...], names: Mapping[str, str]) -> Source | tuple[Source, ...]:
    if isinstance(given, Source):
        return Source(names[given.node], given.port)
    return tuple(Source(names[source.node], source.port) for source in given)
