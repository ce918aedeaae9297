"""A plan as a picture in text: Mermaid for pull requests, dot for Graphviz, ASCII for the terminal."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from s2v_flow.graph.node import Plan, PlanNode
from s2v_flow.graph.status import NodeStatus

_COLOURS = {"HIT": "#cfe8cf", "RUN": "#ffe0b0", "RESUME": "#fff0a0", "LOAD": "#d5e3f5", "SKIP": "#eeeeee"}


def draw_mermaid(plan: Plan, statuses: Mapping[str, NodeStatus]) -> str:
    """Return the plan as a Mermaid flow chart, coloured by status."""
    ids = {node.name: f"n{index}" for index, node in enumerate(plan.nodes)}
    lines = ["flowchart TD"]
    for node in plan.nodes:
        label = f"{node.name}<br/>{node.kind}".replace('"', "#quot;")
        lines.append(f'  {ids[node.name]}["{label}"]:::{statuses[node.name].status}')
    lines += [f"  {ids[source]} --> {ids[node.name]}" for node in plan.nodes for source in _sources(node)]
    lines += [f"  classDef {status} fill:{colour},stroke:#888" for status, colour in _COLOURS.items()]
    return "\n".join(lines)


def draw_dot(plan: Plan, statuses: Mapping[str, NodeStatus]) -> str:
    """Return the plan in Graphviz's language, coloured by status."""
    lines = ["digraph plan {", "  rankdir=LR; node [shape=box, style=filled];"]
    for node in plan.nodes:
        colour = _COLOURS[statuses[node.name].status]
        lines.append(f'  "{node.name}" [label="{node.name}\\n{node.kind}", fillcolor="{colour}"];')
    lines += [f'  "{source}" -> "{node.name}";' for node in plan.nodes for source in _sources(node)]
    return "\n".join([*lines, "}"])


def draw_ascii(plan: Plan, statuses: Mapping[str, NodeStatus]) -> str:
    """Return the plan as a list in running order, each node with what it takes."""
    width = max((len(node.name) for node in plan.nodes), default=0)
    lines = []
    for node in plan.nodes:
        takes = ", ".join(_sources(node))
        arrow = f" <- {takes}" if takes else ""
        lines.append(f"{statuses[node.name].status:<4}  {node.name:<{width}}{arrow}".rstrip())
    return "\n".join(lines)


def _sources(node: PlanNode) -> list[str]:
    return list(dict.fromkeys(source.node for source in node.sources()))


DRAWERS: Mapping[str, Callable[[Plan, Mapping[str, NodeStatus]], str]] = {
    "ascii": draw_ascii,
    "mermaid": draw_mermaid,
    "dot": draw_dot,
}
