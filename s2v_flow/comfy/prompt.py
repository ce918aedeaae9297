"""ComfyUI's API format: nodes by id, each with its class and its inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from s2v_flow.comfy.catalog import is_stock_title
from s2v_flow.comfy.graph import ComfyNode, Graph, Link, Mistakes, Value

MAX_NODES = 20_000


def is_prompt(document: Any) -> bool:
    """Tell whether a JSON value is in the API format."""
    return (
        isinstance(document, Mapping)
        and bool(document)
        and all(isinstance(node, Mapping) and "class_type" in node for node in document.values())
    )


def read_prompt(document: Mapping[str, Any], mistakes: Mistakes) -> Graph:
    """Read the API format.

    Raises:
        RecipeError: It is damaged.
    """
    if len(document) > MAX_NODES:
        raise mistakes.stop("W006", f"a workflow may have {MAX_NODES} nodes, this has {len(document)}")
    nodes = {}
    for name, entry in document.items():
        class_type, inputs = entry.get("class_type"), entry.get("inputs", {})
        if not isinstance(class_type, str) or not isinstance(inputs, Mapping):
            mistakes.add("W002", "class_type must be text and inputs a map", f"node {name}")
            continue
        meta = entry.get("_meta")
        title = meta.get("title") if isinstance(meta, Mapping) else None
        is_own = isinstance(title, str) and not is_stock_title(class_type, title)
        given = {str(key): _input(value) for key, value in inputs.items()}
        nodes[name] = ComfyNode(name, class_type, given, title if is_own else None)
    mistakes.raise_any()
    return Graph(nodes)


def _input(value: Any) -> Link | Value:
    """Read an input: `["12", 0]` is a link; text in a list of one (`{"__value__": [...]}`) is a value."""
    is_pair = isinstance(value, list) and len(value) == 2
    if is_pair and isinstance(value[0], (str, int)) and type(value[1]) is int and not isinstance(value[0], bool):
        return Link(str(value[0]), value[1])
    if isinstance(value, Mapping) and set(value) == {"__value__"}:
        return Value(value["__value__"])
    return Value(value)
