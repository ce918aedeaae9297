"""A second recipe as a profile of the first: what is different, by name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from s2v_flow.comfy.finish import Sections
from s2v_flow.graph.node import Node
from s2v_flow.recipe.document import Recipe

Kinds = Mapping[str, type[Node]]


def difference(base: Sections, other: Sections, kinds: Kinds) -> dict[str, Any]:
    """Return the profile that makes `other` of `base`: its parameters and nodes, as far as they differ."""
    params = {name: value for name, value in other.params.items() if base.params.get(name, ...) != value}
    nodes: dict[str, Any] = {}
    for name, node in other.nodes.items():
        below = base.nodes.get(name)
        if below is None or below["kind"] != node["kind"]:
            nodes[name] = node
            continue
        changed = {field: value for field, value in node.items() if below.get(field, ...) != value}
        changed |= {field: _default(kinds[node["kind"]], field) for field in below if field not in node}
        if changed:
            nodes[name] = changed
    return {key: value for key, value in (("params", params), ("nodes", nodes)) if value}


def profile_name(profile: Mapping[str, Any]) -> str:
    """Return a name that says what the profile is for."""
    steps = profile.get("params", {}).get("steps")
    return f"steps_{steps}" if isinstance(steps, int) else "bypassed"


def _default(kind: type[Node], field: str) -> Any:
    return kind.model_fields[field].get_default()


def meanings(recipe: Recipe) -> dict[str, str]:
    """Return, for every node that writes a file, a digest of all that its result depends on.

    Names, and fields that cannot change the result, do not count; where it is written does.
    """
    digests: dict[str, str] = {}
    pending = [name for name, spec in recipe.nodes.items() if spec.node.is_sink]
    sinks = list(pending)
    while pending:
        name = pending[-1]
        node = recipe.nodes[name].node
        missing = [ref.node for ref in node.refs().values() if ref.node not in digests]
        if missing:
            pending += missing
            continue
        pending.pop()
        inputs = {field: digests[ref.node] for field, ref in node.refs().items()}
        content = {"kind": node.kind, "fields": _fields(node), "inputs": inputs}
        digests[name] = hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()
    return {name: digests[name] for name in sinks}


def _fields(node: Node) -> dict[str, Any]:
    """Return a node's plain fields; neutral ones only where they name a file to write."""
    neutral = node.neutral_fields()
    written = {name for name, mark in type(node).file_fields().items() if mark.role == "output"}
    skipped = (neutral - written) | node.input_ports().keys()
    fields = {name: value for name, value in node.model_dump(mode="json").items() if name not in skipped}
    if "loras" in fields:
        fields["loras"] = [{key: lora[key] for key in ("file", "strength")} for lora in fields["loras"]]
    return fields
