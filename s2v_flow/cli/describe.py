"""The kinds of nodes as text and as data, taken from their classes: docstrings, ports and fields."""

from __future__ import annotations

import json
from typing import Any

from s2v_flow.errors import ExitCode, S2VFlowError
from s2v_flow.graph.node import Node
from s2v_flow.nodes.table import NODE_KINDS
from s2v_flow.recipe.fields import accepts
from s2v_flow.recipe.schema import recipe_schema
from s2v_flow.runs.manifest import manifest_schema
from s2v_flow.runs.stream import events_schema
from s2v_flow.wording import did_you_mean


def schema_text(what: str) -> str:
    """Return a JSON Schema as text: of a "recipe", of a run's "manifest", or of a line of its "events"."""
    if what == "recipe":
        schema = recipe_schema({kind.kind: kind for kind in NODE_KINDS})
    else:
        schema = dict(manifest_schema()) if what == "manifest" else events_schema()
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


def describe_kinds(kind: str | None = None) -> list[dict[str, Any]]:
    """Describe all kinds, or one.

    Returns:
        One object per kind: kind, summary, outputs (port to type), fields (name, type, required, default, description).

    Raises:
        S2VFlowError: There is no such kind.
    """
    chosen = [item for item in NODE_KINDS if kind in (None, item.kind)]
    if not chosen:
        names = [item.kind for item in NODE_KINDS]
        hint = did_you_mean(kind or "", names, "kinds")
        raise S2VFlowError(f"there is no kind {kind!r}", fix=hint, exit_code=ExitCode.USAGE)
    return [_describe(item) for item in chosen]


def kinds_text(described: list[dict[str, Any]], *, in_full: bool) -> str:
    """Return descriptions as text: a line each, or with all fields."""
    width = max(len(item["kind"]) for item in described)
    if not in_full:
        lines = [f"{item['kind']:<{width}}  {item['summary']}" for item in described]
        return "\n".join([*lines, "", "s2vflow nodes KIND shows a kind's fields."])
    lines = []
    for item in described:
        gives = ", ".join(f"{port} ({type_})" for port, type_ in item["outputs"].items()) or "a file"
        lines += [f"{item['kind']}: {item['summary']}", f"gives: {gives}", ""]
        for field in item["fields"]:
            need = "required" if field["required"] else f"default {json.dumps(field['default'])}"
            lines += [f"  {field['name']}: {field['type']}, {need}", f"      {field['description']}"]
    return "\n".join(lines)


def _describe(kind: type[Node]) -> dict[str, Any]:
    ports = kind.input_ports()
    fields = []
    for name, info in kind.model_fields.items():
        type_ = f"${ports[name][0].type}" if name in ports else accepts(info.annotation).described()
        default = None if info.is_required() else info.get_default(call_default_factory=True)
        fields.append(
            {
                "name": name,
                "type": type_,
                "required": info.is_required(),
                "default": default,
                "description": info.description or "",
            }
        )
    return {
        "kind": kind.kind,
        "summary": " ".join((kind.__doc__ or "").split()),
        "outputs": dict(kind.outputs),
        "fields": fields,
    }
