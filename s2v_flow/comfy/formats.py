"""A finished sheet of nodes as JSON: the API's format, and the editor's with a layout that can be read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from s2v_flow.comfy.catalog import ComfyClass, classes
from s2v_flow.comfy.graph import ComfyNode, Link, Value

_COLUMN, _GAP, _ROW = 400, 60, 26
_HEIGHTS = {"CLIPTextEncode": 120, "LoadImage": 260, "LoadAudio": 60, "SaveVideo": 240}


def write_prompt(nodes: Sequence[ComfyNode]) -> dict[str, Any]:
    """Return the API format."""
    document: dict[str, Any] = {}
    for node in nodes:
        known = classes()[node.type]
        inputs: dict[str, Any] = {}
        for name, given in node.inputs.items():
            if isinstance(given, Link):
                inputs[name] = [given.node, given.slot]
            elif known.input(name).type != "ANY" or given.value == "auto":  # buttons and players are not sent
                inputs[name] = given.value
        document[node.id] = {"inputs": inputs, "class_type": node.type, "_meta": {"title": node.title or known.title}}
    return document


def write_editor(nodes: Sequence[ComfyNode]) -> dict[str, Any]:
    """Return the editor's format: columns from left to right, each node right of what it takes."""
    places = _places(nodes)
    links: list[list[Any]] = []
    outgoing: dict[Link, list[int]] = {}
    written = []
    for order, node in enumerate(nodes):
        known = classes()[node.type]
        inputs: list[dict[str, Any]] = []
        for item in known.inputs:
            given = node.inputs.get(item.name)
            if item.is_widget and not isinstance(given, Link):
                continue
            entry: dict[str, Any] = {"name": item.name, "type": item.type, "link": None}
            entry |= {"shape": 7} if item.is_optional else {}
            entry |= {"widget": {"name": item.name}} if item.is_widget else {}
            if isinstance(given, Link):
                entry["link"] = len(links) + 1
                links.append([len(links) + 1, int(given.node), given.slot, int(node.id), len(inputs), item.type])
                outgoing.setdefault(given, []).append(len(links))
            inputs.append(entry)
        written.append(_entry(node, known, order, inputs, places[node.id]))
    for entry in written:
        for slot, output in enumerate(entry["outputs"]):
            output["links"] = outgoing.get(Link(str(entry["id"]), slot), [])
    return {
        "revision": 0,
        "last_node_id": len(nodes),
        "last_link_id": len(links),
        "nodes": written,
        "links": links,
        "groups": [],
        "config": {},
        "extra": {},
        "version": 0.4,
    }


def _entry(
    node: ComfyNode, known: ComfyClass, order: int, inputs: list[dict[str, Any]], place: tuple[int, int]
) -> dict[str, Any]:
    entry = {
        "id": int(node.id),
        "type": node.type,
        "pos": list(place),
        "size": [_COLUMN - _GAP, _height(node) - _GAP],
        "flags": {},
        "order": order,
        "mode": 0,
        "inputs": inputs,
        "outputs": [{"name": name, "type": type_} for name, type_ in known.outputs],
        "properties": {"Node name for S&R": node.type},
        "widgets_values": _widgets(node, known),
    }
    return entry if node.title is None else {**entry, "title": node.title}


def _widgets(node: ComfyNode, known: ComfyClass) -> list[Any]:
    values: list[Any] = []
    for item in known.widgets:
        given = node.inputs.get(item.name)
        values.append(given.value if isinstance(given, Value) else item.default)
        values += ["fixed"] if item.has_control else []
    return values


def _height(node: ComfyNode) -> int:
    known = classes()[node.type]
    rows = max(len(known.links), len(known.outputs)) + len(known.widgets) + sum(w.has_control for w in known.widgets)
    return max(_HEIGHTS.get(node.type, 0), rows * _ROW) + 2 * _GAP


def _places(nodes: Sequence[ComfyNode]) -> dict[str, tuple[int, int]]:
    """Return where each node goes: its column is the length of the longest way to it."""
    columns: dict[str, int] = {}
    for node in nodes:  # each stands after those it takes from
        columns[node.id] = max((columns[link.node] + 1 for _, link in node.links()), default=0)
    bottoms: dict[int, int] = {}
    places = {}
    for node in nodes:
        column = columns[node.id]
        top = bottoms.get(column, 0)
        places[node.id] = (column * _COLUMN, top)
        bottoms[column] = top + _height(node)
    return places
