"""Several plans as one: what they have in common stands there once, so that a matrix shares models and results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import networkx as nx

from s2v_flow.graph.plan import Plan, PlanNode, Source


def merge_plans(plans: Sequence[tuple[str, Plan]]) -> tuple[Plan, dict[str, str]]:
    """Join plans that were made with labels.

    Args:
        plans: Each with its label; labels differ.

    Returns:
        The joined plan: equal nodes of equal inputs are one node, files that are written never are. Its order keeps to
        the stages of all plans, so that a model is loaded once for all that use it. And the label of every node that
        belongs to one plan alone.
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
    nodes = _ordered([_with_names(node, full) for node in made.values()])
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


def _ordered(nodes: list[PlanNode]) -> list[PlanNode]:
    graph: nx.DiGraph[str] = nx.DiGraph()
    for position, node in enumerate(nodes):
        graph.add_node(node.name, order=(node.node.stage, position))
        graph.add_edges_from((source.node, node.name) for source in node.sources())
    by_name = {node.name: node for node in nodes}
    return [by_name[name] for name in nx.lexicographical_topological_sort(graph, key=lambda n: graph.nodes[n]["order"])]
