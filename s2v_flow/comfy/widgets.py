"""Widgets' values in the editor's format, which keeps them by position: back to names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from s2v_flow.comfy.catalog import CONTROL_WORDS, ComfyClass
from s2v_flow.wording import shown

_PYTHON_TYPES: Mapping[str, tuple[type, ...]] = {
    "STRING": (str,),
    "INT": (int, float),
    "FLOAT": (int, float),
    "BOOLEAN": (bool,),
}


def fits(value: Any, type_: str) -> bool:
    """Tell whether a value may stand in a widget of this type."""
    allowed = _PYTHON_TYPES.get(type_)
    if allowed is None:
        return True
    return isinstance(value, allowed) and (type_ == "BOOLEAN" or not isinstance(value, bool))


def widget_values(known: ComfyClass, given: Any) -> tuple[dict[str, Any], str | None]:
    """Return the values of a known class's widgets by name, and what is wrong with them, if anything.

    Missing values at the end take their defaults; more than are known are left alone, as newer versions add some.
    """
    defaults = {item.name: item.default for item in known.widgets}
    if isinstance(given, Mapping):  # some custom nodes keep names
        return {name: given.get(name, default) for name, default in defaults.items()}, None
    values, rest = dict(defaults), list(given) if isinstance(given, list) else []
    for item in known.widgets:
        if not rest:
            break
        value = rest.pop(0)
        if not fits(value, item.type):
            return values, f"{item.name}: widgets_values has {shown(value)} where {item.type} is expected"
        values[item.name] = value
        if item.has_control and rest and _is_control(rest[0]):
            rest.pop(0)
    return values, None


def instance_values(instance: Mapping[str, Any], definition: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the widgets on a subgraph's node say, by the subgraph's inputs; others keep what is inside."""
    values = instance.get("widgets_values")
    if not isinstance(values, list) or not values:
        return {}
    properties = instance.get("properties")
    proxies = properties.get("proxyWidgets") if isinstance(properties, Mapping) else None
    if isinstance(proxies, list) and proxies:
        pairs = [(pair, value) for pair, value in zip(proxies, values, strict=False) if isinstance(pair, list)]
        return {str(pair[1]): value for pair, value in pairs if len(pair) == 2 and str(pair[0]) == "-1"}
    names = [name for name in _edge_widgets(definition) if name]
    if len(values) > len(names):  # a control word behind a seed
        values = [value for value in values if not _is_control(value)]
    return dict(zip(names, values, strict=False))


def _edge_widgets(definition: Mapping[str, Any]) -> list[str]:
    """Return the names of a subgraph's inputs that feed widgets, in order."""
    nodes, edges = maps_in(definition, "nodes"), maps_in(definition, "inputs")
    fed = {str(item.get("link")) for node in nodes for item in maps_in(node, "inputs") if "widget" in item}
    return [str(edge.get("name")) for edge in edges if fed & set(map(str, list_in(edge, "linkIds")))]


def _is_control(value: Any) -> bool:
    return isinstance(value, str) and value in CONTROL_WORDS


def list_in(source: Mapping[str, Any], key: str) -> list[Any]:
    """Return a list that a map holds; an empty one where it holds none."""
    found = source.get(key)
    return found if isinstance(found, list) else []


def maps_in(source: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    """Return the maps in a list that a map holds."""
    return [item for item in list_in(source, key) if isinstance(item, Mapping)]
