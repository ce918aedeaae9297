"""Building a plan: the recipe's nodes plan themselves, in order; what the outputs need is kept and sorted.

Several plans become one: what they have in common stands there once, so that a matrix shares models and results.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from heapq import heapify, heappop, heappush
from pathlib import Path

import networkx as nx

from s2v_flow.errors import Diagnostic, RecipeError
from s2v_flow.graph.locations import Locations
from s2v_flow.graph.node import NodeSpec, Plan, Planner, PlanNode, Remember
from s2v_flow.wording import worded

_MAX_NAME_BYTES = 255  # on every usual file system


def build_plan(
    specs: Mapping[str, NodeSpec],
    order: Sequence[str],
    locations: Locations,
    remember: Remember = lambda what, file, compute: compute(),
) -> Plan:
    """Unroll a checked recipe: its nodes plan themselves in `order`, each after what it refers to.

    `remember` keeps small facts about files' contents between plans.

    Raises:
        RecipeError: With every mistake that planning found.
    """
    planner = Planner(specs, locations, remember)
    for name in order:
        planner.values[name] = specs[name].node.plan(planner, name)
    _check_outputs(planner)
    if planner.diagnostics:
        raise worded(RecipeError("", diagnostics=sorted(planner.diagnostics, key=Diagnostic.sort_key)))
    graph = _graph(planner.nodes.values())
    targets = [node.name for node in planner.nodes.values() if node.node.is_sink]
    targets = targets or [name for name in planner.nodes if graph.out_degree(name) == 0]
    needed = set(targets).union(*(nx.ancestors(graph, name) for name in targets))
    nodes = tuple(planner.nodes[name] for name in sort(graph) if name in needed)
    missing = dict.fromkeys(item for node in nodes for item in planner.missing.get(node.name, []))
    notes = dict.fromkeys(note for node in nodes for note in planner.notes.get(node.recipe_node, []))
    return Plan(nodes, tuple(missing), tuple(notes))


def _check_outputs(planner: Planner) -> None:
    """Refuse a file that two nodes write, and one that cannot be written under its name."""
    writers: dict[Path, str] = {}
    for node in planner.nodes.values():
        for path, mark, _ in node.node.files():
            if mark.role == "output" and path in node.files:
                target = next(iter(node.node.targets(node.files).values()))
                above = next(folder for folder in target.parents if os.path.lexists(folder))
                wrong = "a folder has this name" if os.path.isdir(target) else ""
                wrong = wrong if os.path.isdir(above) else f"{above} is no folder"
                wrong = "its name is too long" if len(os.fsencode(target.name)) > _MAX_NAME_BYTES else wrong
                if wrong:
                    message, fix = f"{path[-1]}: {target} cannot be written: {wrong}", "give it another name"
                    planner.problem(node.recipe_node, str(path[-1]), "R136", message, fix)
                first = writers.setdefault(node.files[path], node.name)
                if first != node.name:
                    message, fix = f"{path[-1]}: {first} writes the same file", "give each node a file of its own"
                    planner.problem(node.recipe_node, str(path[-1]), "R131", message, fix)


def sort(graph: nx.DiGraph[str]) -> Iterator[str]:
    """Yield the nodes of a graph without cycles, each after those that it uses.

    Where there is a choice, their attributes `order` say which goes first, different for each; else as in the graph.
    """
    orders = {name: data.get("order", index) for index, (name, data) in enumerate(graph.nodes.items())}
    waits_for = dict(graph.in_degree())
    ready = [(orders[name], name) for name, count in waits_for.items() if not count]
    heapify(ready)
    while ready:
        _, name = heappop(ready)
        yield name
        for user in graph[name]:
            waits_for[user] -= 1
            if not waits_for[user]:
                heappush(ready, (orders[user], user))


def _graph(nodes: Iterable[PlanNode]) -> nx.DiGraph[str]:
    graph: nx.DiGraph[str] = nx.DiGraph()
    for position, node in enumerate(nodes):
        graph.add_node(node.name, order=(node.node.stage, position))
        graph.add_edges_from((source.node, node.name) for source in node.sources())
    return graph


def merge_plans(plans: Sequence[tuple[str, Plan]], *, by_stage: bool = False) -> tuple[Plan, dict[str, str]]:
    """Join plans that were made with labels, each another one.

    `by_stage`: run a stage of all plans before the next, so that fewer models are live at once. Else one plan after the
    other, behind the encoders of all: each plan's files are there as soon as they can be.

    Returns the joined plan: equal nodes of equal inputs are one node, files that are written never are. In both orders
    a model stays live until its last use, so that it is loaded once. And the label of every node that belongs to one
    plan alone.
    """
    made: dict[object, PlanNode] = {}
    taken: set[str] = set()
    users: dict[str, set[str]] = {}
    for label, plan in plans:
        names: dict[str, str] = {}
        for node in plan.nodes:
            names[node.name] = node.name
            renamed = node.renamed(names.__getitem__)
            own = label if node.node.is_sink else ""
            identity = (own, type(node.node), repr(node.node), repr(renamed.inputs), repr(node.files))
            if identity not in made:
                name = f"{label}/{node.name}" if node.name in taken or node.node.is_sink else node.name
                taken.add(name)
                made[identity] = replace(renamed, name=name)
            names[node.name] = made[identity].name
            users.setdefault(names[node.name], set()).add(label)
    alone = {name: next(iter(labels)) for name, labels in users.items() if len(labels) == 1}
    full = {name: name if name.startswith(f"{label}/") else f"{label}/{name}" for name, label in alone.items()}
    by_name = {(node := each.renamed(lambda name: full.get(name, name))).name: node for each in made.values()}
    graph = _graph(by_name.values())
    if not by_stage:
        turns = {label: turn for turn, (label, _) in enumerate(plans, 1)}
        first = {full.get(name, name): min(turns[label] for label in labels) for name, labels in users.items()}
        for name, data in graph.nodes.items():
            data["order"] = (first[name] if by_name[name].node.stage else 0, *data["order"])
    nodes = [by_name[name] for name in sort(graph)]
    missing = dict.fromkeys(item for _, plan in plans for item in plan.missing)
    notes = dict.fromkeys(note for _, plan in plans for note in plan.notes)
    return Plan(tuple(nodes), tuple(missing), tuple(notes)), {full[name]: label for name, label in alone.items()}
