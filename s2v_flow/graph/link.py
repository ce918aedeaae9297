"""Links: from references by name to a graph, and everything that can be wrong with them, at once."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING, Any

from s2v_flow.graph.node import Node
from s2v_flow.graph.ports import Port, Ref
from s2v_flow.wording import did_you_mean, nearest, shortened

if TYPE_CHECKING:
    import networkx as nx


_MAX_ADVISED = 100  # looking for the nearest name among hundreds takes milliseconds


@dataclass(frozen=True)
class LinkProblem:
    """A reference that leads nowhere, to the wrong thing, or back to where it stands."""

    node: str
    field: str
    code: str
    message: str
    fix: str | None = None


def link(nodes: Mapping[str, Node], unchecked: Collection[str] = ()) -> tuple[nx.DiGraph[str], list[LinkProblem]]:
    """Link nodes to a graph.

    `unchecked`: names of nodes that exist but are too wrong to be linked: references to them are left alone.

    Returns:
        The graph, an edge from each node to those that use it, with the attribute `fields`: a tuple of pairs (input
        field, output port); and what is wrong. Faulty references make no edges, except those that close a cycle.
    """
    import networkx as nx

    graph: nx.DiGraph[str] = nx.DiGraph()
    graph.add_nodes_from(nodes)
    problems: list[LinkProblem] = []
    linker = _Linker(nodes)
    for name, node in nodes.items():
        ports = node.input_ports()
        for field, ref in node.refs().items():
            if ref.node in unchecked:
                continue
            found = linker.check(name, field, ports[field][0], ref, advises=len(problems) < _MAX_ADVISED)
            if isinstance(found, LinkProblem):
                problems.append(found)
            else:
                fields = graph.edges[ref.node, name]["fields"] if graph.has_edge(ref.node, name) else ()
                graph.add_edge(ref.node, name, fields=(*fields, (field, found)))
    problems += _cycles(graph)
    return graph, problems


def sort(graph: nx.DiGraph[str], orders: Mapping[str, Any] | None = None) -> Iterator[str]:
    """Yield the nodes of a graph without cycles, each after those that it uses.

    `orders`: which goes first where there is a choice, different for each; else as in the graph.
    """
    orders = orders or {name: index for index, name in enumerate(graph)}
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


class _Linker:
    """Finds what a reference means among the nodes, and advises on those that mean nothing."""

    def __init__(self, nodes: Mapping[str, Node]) -> None:
        self._nodes = nodes
        self._givers: dict[str, list[str]] = {}  # port type -> nodes that give it
        for name, node in nodes.items():
            for port_type in dict.fromkeys(node.outputs.values()):
                self._givers.setdefault(port_type, []).append(name)

    def check(self, name: str, field: str, wanted: Port, ref: Ref, *, advises: bool) -> LinkProblem | str:
        """Return the output port that a reference means, or what is wrong with it."""
        if ref.node not in self._nodes:
            fix = self._advise_node(name, wanted, ref) if advises else None
            return LinkProblem(name, field, "R020", f"{field}: there is no node {shortened(ref.node)}", fix)
        node = self._nodes[ref.node]
        fitting = self._fitting(name, wanted) if advises else None
        if not node.outputs:
            message = f"{field}: ${ref.node} ({node.kind}) writes a file and has no output"
            return LinkProblem(name, field, "R021", message, fitting)
        port = next(iter(node.outputs)) if ref.port is None else ref.port
        if port not in node.outputs:
            fix = did_you_mean(port, node.outputs, "its ports")
            return LinkProblem(name, field, "R021", f"{field}: ${ref.node} has no port {shortened(port)}", fix)
        if node.outputs[port] != wanted.type:
            message = f"{field}: {_words(wanted.type)} expected, {ref} is {_with_article(node.outputs[port])}"
            return LinkProblem(name, field, "R022", message, fitting)
        if ref.node == name:
            return LinkProblem(name, field, "R023", f"{field}: {name} refers to itself", fitting)
        return port

    def _advise_node(self, name: str, wanted: Port, ref: Ref) -> str:
        """Suggest a node of the right type: one with a similar name, or all."""
        givers = [other for other in self._givers.get(wanted.type, ()) if other != name]
        match = nearest(ref.node, givers)
        return f"did you mean ${match}?" if match is not None else self._fitting(name, wanted)

    def _fitting(self, name: str, wanted: Port) -> str:
        fitting = [f"${other}" for other in self._givers.get(wanted.type, ())[:6] if other != name]
        what = _words(wanted.type)
        return f"nodes that give {what}: {', '.join(fitting[:5])}" if fitting else f"no other node gives {what}"


def _words(port_type: str) -> str:
    return port_type.replace("_", " ")


def _with_article(port_type: str) -> str:
    words = _words(port_type)
    if port_type in ("frames", "audio", "speech", "conditioning"):  # not counted in English
        return words
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _cycles(graph: nx.DiGraph[str]) -> Iterator[LinkProblem]:
    """Yield one problem per knot of nodes that depend on each other: a shortest way round, from its first node."""
    import networkx as nx

    order = {name: index for index, name in enumerate(graph)}
    knots = [knot for knot in nx.strongly_connected_components(graph) if len(knot) > 1]
    for knot in sorted(knots, key=lambda names: min(order[name] for name in names)):
        first = min(knot, key=order.__getitem__)
        inner = graph.subgraph(knot)
        ways = nx.single_source_shortest_path(inner, first)
        last = min(inner.predecessors(first), key=lambda name: (len(ways[name]), order[name]))
        path = [*ways[last], first]
        field = graph.edges[last, first]["fields"][0][0]
        names = " -> ".join(path if len(path) <= 20 else [*path[:10], "...", *path[-10:]])
        fix = "give one of these inputs another node"
        yield LinkProblem(first, field, "R023", f"{field}: nodes depend on themselves: {names}", fix)
