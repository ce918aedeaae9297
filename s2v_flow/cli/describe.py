"""The kinds of nodes as text and as data, from their classes; a plan as a picture in text.

Mermaid is for pull requests, dot for Graphviz, ASCII for the terminal.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from s2v_flow.errors import S2VFlowError, UsageError
from s2v_flow.graph.node import Node, Plan, PlanNode
from s2v_flow.graph.status import NodeStatus
from s2v_flow.nodes.table import KINDS
from s2v_flow.recipe.fields import accepts
from s2v_flow.recipe.schema import recipe_schema, summary
from s2v_flow.runs.manifest import manifest_schema
from s2v_flow.runs.stream import events_schema
from s2v_flow.wording import did_you_mean


def schema_text(what: str) -> str:
    """Return a JSON Schema as text: of a "recipe", of a run's "manifest", or of a line of its "events"."""
    if what == "recipe":
        usable = KINDS.usable()
        schema = recipe_schema({name: kind for name, kind in usable.items() if not isinstance(kind, S2VFlowError)})
    else:
        schema = dict(manifest_schema()) if what == "manifest" else events_schema()
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


def describe_kinds(kind: str | None = None) -> list[dict[str, Any]]:
    """Describe all kinds, or one: an object for each.

    It has kind, package ("name version", null for s2vflow's own), summary, outputs (port to type), fields (name, type,
    required, default, description); error where a package's kind cannot be imported.

    Raises:
        S2VFlowError: There is no such kind.
    """
    if kind is not None and kind not in KINDS:
        raise UsageError(f"there is no kind {kind!r}", did_you_mean(kind, KINDS, "kinds"))
    chosen = KINDS.usable() if kind is None else {kind: KINDS[kind]}
    return [_describe(name, item) for name, item in chosen.items()]


def kinds_text(described: list[dict[str, Any]], *, in_full: bool) -> str:
    """Return descriptions as text: a line each, or with all fields."""
    width = max(len(item["kind"]) for item in described)
    if not in_full:
        lines = [f"{item['kind']:<{width}}  {item['summary']}" for item in described]
        lines = [
            f"{line} [{item['package']}]" if item["package"] else line
            for line, item in zip(lines, described, strict=True)
        ]
        return "\n".join([*lines, "", "s2vflow nodes KIND shows a kind's fields."])
    lines = []
    for item in described:
        gives = ", ".join(f"{port} ({type_})" for port, type_ in item["outputs"].items()) or "a file"
        lines += [f"{item['kind']}: {item['summary']}", f"gives: {gives}", ""]
        for field in item["fields"]:
            need = "required" if field["required"] else f"default {json.dumps(field['default'])}"
            lines += [f"  {field['name']}: {field['type']}, {need}", f"      {field['description']}"]
    return "\n".join(lines)


def _describe(name: str, kind: type[Node] | S2VFlowError) -> dict[str, Any]:
    plugin = KINDS.plugins.get(name)
    package = None if plugin is None else str(plugin)
    if isinstance(kind, S2VFlowError):
        text = f"cannot be used: {kind}"
        return {"kind": name, "package": package, "summary": text, "outputs": {}, "fields": [], "error": str(kind)}
    ports = kind.input_ports()
    fields = [
        {
            "name": name,
            "type": f"${ports[name][0].type}" if name in ports else accepts(info.annotation).described(),
            "required": info.is_required(),
            "default": None if info.is_required() else info.get_default(call_default_factory=True),
            "description": info.description or "",
        }
        for name, info in kind.model_fields.items()
    ]
    outputs = dict(kind.outputs)
    return {"kind": kind.kind, "package": package, "summary": summary(kind), "outputs": outputs, "fields": fields}


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
