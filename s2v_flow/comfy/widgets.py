"""Values on the editor's nodes, by name: of widgets, which it keeps by place, and of subgraphs that promote some."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

from s2v_flow.comfy.catalog import BRANCHES, CONTROL_WORDS, ComfyClass, as_type
from s2v_flow.wording import shown


def widget_values(known: ComfyClass, node: Mapping[str, Any]) -> tuple[dict[str, Any], str | None]:
    """Return the values of a known class's widgets by name, and what is wrong with them, if anything.

    Newer files name all widgets among the inputs, in an order that may be that in which a person made them inputs: the
    values are in the class's. In older files their places tell, missing values at the end take their defaults, and more
    than are known are left alone.
    """
    types = {item.name: item.type for item in known.widgets}
    order = {name: place for place, name in enumerate(types)}
    values = {item.name: item.default for item in known.widgets}
    given = node.get("widgets_values")
    if isinstance(given, Mapping):  # some custom nodes keep names
        return values | {str(name): value for name, value in given.items()}, None
    given = list_in(node, "widgets_values")
    loras = [value for value in given if isinstance(value, Mapping) and "lora" in value]
    values |= {f"lora_{number}": value for number, value in enumerate(loras, start=1)}
    inputs = [item["widget"] for item in maps_in(node, "inputs") if isinstance(item.get("widget"), Mapping)]
    names = [str(widget.get("name")) for widget in inputs]
    ours = iter(sorted(filter(order.__contains__, names), key=order.__getitem__))
    names = [next(ours) if name in order else name for name in names]
    pairs = _paired(names, given, known)
    if pairs is None:
        pairs = _paired(_names_by_place(known, given), given, known, is_loose=True) or []
    for name, value in pairs:
        try:
            values[name] = as_type(value, types.get(name, "ANY"))
        except (ValueError, OverflowError):
            return values, f"{name}: widgets_values has {shown(value)} where {types[name]} is expected"
    return values, None


def _paired(
    names: list[str], given: list[Any], known: ComfyClass, *, is_loose: bool = False
) -> list[tuple[str, Any]] | None:
    """Pair names with values, without the control words behind seeds; None where one of them is left over."""
    has_control = {item.name for item in known.widgets if item.has_control}
    pairs: list[tuple[str, Any]] = []
    rest = iter(given)
    value = next(rest, ...)
    for name in names:
        if value is ...:
            return pairs if is_loose else None
        pairs.append((name, value))
        value = next(rest, ...)
        if name in has_control and _is_control(value):
            value = next(rest, ...)
    return pairs if is_loose or value is ... else None


def _names_by_place(known: ComfyClass, given: list[Any]) -> list[str]:
    """Return a class's widgets in order, with those that a choice among them brings along behind it."""
    branches = BRANCHES.get(known.name, {}) if len(given) > len(known.widgets) else {}
    names: list[str] = []
    pending = [item.name for item in known.widgets]
    while pending:
        name = pending.pop(0)
        choice = given[len(names)] if len(names) < len(given) else None
        pending[:0] = [f"{name}.{part}" for part in branches.get(choice, ())] if isinstance(choice, str) else []
        names.append(name)
    return names


@dataclass(frozen=True)
class Promoted:
    """What the widgets on a subgraph's node say: by the subgraph's inputs, and by node and widget inside."""

    edges: Mapping[str, Any] = field(default_factory=dict)
    inside: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def of(self, node: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the values for a node inside, by its widgets' names."""
        return self.inside.get(str(node.get("id")), {})


def promoted_values(instance: Mapping[str, Any], definition: Mapping[str, Any], outer: Promoted) -> Promoted:
    """Return the values on a subgraph's node, where the node around it does not promote and so replace them."""
    values = list_in(instance, "widgets_values")
    found = list_in(map_in(instance, "properties"), "proxyWidgets")
    proxies = [pair for pair in found if isinstance(pair, list) and len(pair) > 1]
    names = [name for name in _edge_widgets(definition) if name]
    pairs = proxies or [["-1", name] for name in names]
    if len(values) > len(pairs):  # a control word behind a seed
        values = [value for value in values if not _is_control(value)]
    replaced = dict(outer.of(instance))
    edges: dict[str, Any] = {}
    inside: dict[str, dict[str, Any]] = {}
    for (node, name, *more), value in zip_longest(pairs, values[: len(pairs)]):
        for key in (*(f"{part}: {name}" for part in more), f"{node}: {name}", str(name)):
            if key in replaced:
                value = replaced.pop(key)
                break
        if value is not None and str(node) == "-1":
            edges[str(name)] = value
        elif value is not None and not _is_control(value):
            inside.setdefault(str(node), {})[": ".join(map(str, (*more, name)))] = value
    return Promoted(edges, inside)


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


def map_in(source: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """Return a map that a map holds; an empty one where it holds none."""
    found = source.get(key)
    return found if isinstance(found, Mapping) else {}


def maps_in(source: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    """Return the maps in a list that a map holds."""
    return [item for item in list_in(source, key) if isinstance(item, Mapping)]
