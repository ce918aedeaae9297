"""ComfyUI's editor format: subgraphs are unfolded, and what only the editor knows is followed to what runs."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from s2v_flow.comfy.catalog import BROADCASTERS, GETTERS, NOTES, REROUTES, SETTERS, VIRTUAL, classes, own_title
from s2v_flow.comfy.graph import MAX_NODES, Box, ComfyNode, Graph, Link, Mistakes, Note, Value, known_class
from s2v_flow.comfy.widgets import Promoted, list_in, map_in, maps_in, promoted_values, widget_values
from s2v_flow.wording import shortened

MAX_DEPTH = 32
_MAX_STEPS = 500_000  # along links, all together
_MUTED, _BYPASSED = 2, 4
_INPUT_SIDE, _OUTPUT_SIDE = -10, -20  # the ids of a subgraph's own edges


def is_editor(document: Any) -> bool:
    """Tell whether a JSON value is in the editor's format."""
    return isinstance(document, Mapping) and isinstance(document.get("nodes"), list)


@dataclass
class Scope:
    """The root, or one unfolded copy of a subgraph: its nodes and links, and where it stands."""

    name: str  # "" for the root, else "79:" and so on: what ids in it begin with
    nodes: dict[int | str, Mapping[str, Any]]
    links: dict[int | str, tuple[Any, int, Any, int]]  # id -> origin, slot, target, slot
    groups: list[Mapping[str, Any]]
    definition: Mapping[str, Any] = field(default_factory=dict)
    instance: Mapping[str, Any] = field(default_factory=dict)
    promoted: Promoted = field(default_factory=Promoted)
    parent: Scope | None = None
    children: dict[int | str, Scope] = field(default_factory=dict)
    depth: int = 0
    active: frozenset[str] = frozenset()

    def mode(self, node: Mapping[str, Any]) -> int:
        """Return whether a node is muted or bypassed, 0 where it is neither; those that are `active` are not."""
        return 0 if str(node.get("id")) in self.active else _mode(node)


_Next = tuple[Scope, Any] | Link | Value | None  # a link to follow further, or where the way ends


def read_editor(document: Mapping[str, Any], mistakes: Mistakes, active: Collection[str] = ()) -> Graph:
    """Read the editor's format; `active`: ids of bypassed or muted nodes at the root that count as switched on.

    Raises:
        RecipeError: It is damaged, or unfolds to more than a workflow may have.
    """
    scopes = _Unfolder(document, mistakes, frozenset(active)).unfold()
    reader = _Reader(scopes, mistakes)
    nodes = {node.id: node for scope in scopes for node in reader.nodes(scope)}
    mistakes.raise_any()
    notes = tuple(note for scope in scopes for note in _notes(scope))
    groups = tuple(box for scope in scopes for box in _groups(scope))
    off = (_box("", node) for node in scopes[0].nodes.values() if _mode(node) and str(node.get("type")) not in NOTES)
    return Graph(nodes, notes, groups, tuple(box for box in off if box is not None))


def inactive_parts(document: Mapping[str, Any], savers: Collection[str]) -> list[frozenset[str]]:
    """Return the parts of a workflow that are bypassed or muted as a whole: those that would save something.

    A part is what hangs together among the nodes that are switched off at the root.
    """
    import networkx as nx

    off = {str(n["id"]): n for n in document["nodes"] if isinstance(n, Mapping) and "id" in n and _mode(n) != 0}
    joined: nx.Graph[str] = nx.Graph()
    joined.add_nodes_from(off)
    for link in document.get("links") or []:
        ends = (link.get("origin_id"), link.get("target_id")) if isinstance(link, Mapping) else (link[1], link[3])
        one, two = str(ends[0]), str(ends[1])
        if one in off and two in off:
            joined.add_edge(one, two)
    parts = nx.connected_components(joined)
    return [frozenset(part) for part in parts if any(str(off[name].get("type")) in savers for name in part)]


def _mode(node: Mapping[str, Any]) -> int:
    mode = node.get("mode", 0)
    return mode if mode in (_MUTED, _BYPASSED) else 0


class _Unfolder:
    """Makes a scope of every copy of a subgraph that runs."""

    def __init__(self, document: Mapping[str, Any], mistakes: Mistakes, active: frozenset[str]) -> None:
        self._document = document
        self._mistakes = mistakes
        self._active = active
        self._count = 0
        subgraphs = maps_in(map_in(document, "definitions"), "subgraphs")
        self.definitions = {str(item.get("id")): item for item in subgraphs}

    def unfold(self) -> list[Scope]:
        """Return the root and all copies, each after the one it stands in."""
        scopes = [self._scope("", self._document)]
        scopes[0].active = self._active
        pending = [scopes[0]]
        while pending:
            scope = pending.pop()
            for key, node in scope.nodes.items():
                definition = self.definitions.get(str(node.get("type")))
                if definition is None or scope.mode(node):
                    continue
                if scope.depth >= MAX_DEPTH:
                    message = f"subgraphs may nest {MAX_DEPTH} deep, these are deeper or hold themselves"
                    raise self._mistakes.stop("W006", message, f"subgraph {shortened(str(definition.get('name')))}")
                child = self._scope(f"{scope.name}{key}:", definition)
                child.definition, child.instance, child.parent, child.depth = definition, node, scope, scope.depth + 1
                child.promoted = promoted_values(node, definition, scope.promoted)
                scope.children[key] = child
                scopes.append(child)
                pending.append(child)
        return scopes

    def _scope(self, name: str, source: Mapping[str, Any]) -> Scope:
        nodes: dict[int | str, Mapping[str, Any]] = {}
        for node in list_in(source, "nodes"):
            if not isinstance(node, Mapping) or not isinstance(node.get("id"), (int, str)):
                raise self._mistakes.stop("W002", "a node is not a map with an id", name or None)
            if node["id"] in nodes:
                raise self._mistakes.stop("W002", f"two nodes have the id {node['id']}", name or None)
            nodes[node["id"]] = node
        self._count += len(nodes)
        if self._count > MAX_NODES:
            raise self._mistakes.stop("W006", f"with its subgraphs unfolded it has more than {MAX_NODES} nodes")
        links = dict(self._link(link) for link in list_in(source, "links"))
        self._add_broadcast(name, source, nodes, links)
        return Scope(name, nodes, links, maps_in(source, "groups"))

    def _add_broadcast(
        self, name: str, source: Mapping[str, Any], nodes: dict[Any, Mapping[str, Any]], links: dict[Any, Any]
    ) -> None:
        """Link what `Anything Everywhere` and its kin feed without links, as the file's `ue_links` say."""
        extra = map_in(source, "extra")
        for key, node in nodes.items() if not isinstance(extra.get("ue_links"), list) else ():
            if str(node.get("type")) in BROADCASTERS and _mode(node) == 0:
                message = f"{node['type']} feeds nodes without links, and the file does not say which"
                fix = "turn its connections into real links, or export the workflow in the API format"
                self._mistakes.add("W004", message, f"node {name}{key}", fix)
        keys = {str(key): key for key in nodes}
        for item in maps_in(extra, "ue_links"):
            target, slot = keys.get(str(item.get("downstream"))), item.get("downstream_slot")
            inputs = list_in(nodes.get(target, {}), "inputs")
            given = inputs[slot] if isinstance(slot, int) and 0 <= slot < len(inputs) else None
            if isinstance(given, Mapping) and given.get("link") is None:
                number = f"of {item.get('controller')} to {target}, {slot}"
                origin = keys.get(str(item.get("upstream")), item.get("upstream"))
                links[number] = self._link([number, origin, item.get("upstream_slot"), target, slot])[1]
                inputs = [{**given, "link": number} if place == slot else old for place, old in enumerate(inputs)]
                nodes[target] = {**nodes[target], "inputs": inputs}

    def _link(self, link: Any) -> tuple[int | str, tuple[Any, int, Any, int]]:
        if isinstance(link, Mapping):
            link = [link.get(key) for key in ("id", "origin_id", "origin_slot", "target_id", "target_slot")]
        is_whole = isinstance(link, list) and len(link) >= 5 and all(isinstance(part, (int, str)) for part in link[:5])
        if not is_whole or not isinstance(link[2], int) or not isinstance(link[4], int):
            raise self._mistakes.stop("W002", "a link is damaged")
        return link[0], (link[1], link[2], link[3], link[4])


class _Reader:
    """Reads the nodes that run, following every link to what gives its value."""

    def __init__(self, scopes: list[Scope], mistakes: Mistakes) -> None:
        self._mistakes = mistakes
        self._steps = 0
        self._setters: dict[str, tuple[Scope, Mapping[str, Any]]] = {}
        for scope in scopes:
            for node in scope.nodes.values():
                if node.get("type") in SETTERS:  # switched off or not
                    self._setters.setdefault(_first_widget(node), (scope, node))

    def nodes(self, scope: Scope) -> Iterator[ComfyNode]:
        """Yield the nodes of one scope that ComfyUI would run."""
        for key, node in scope.nodes.items():
            type_ = str(node.get("type"))
            if scope.mode(node) or type_ in VIRTUAL or key in scope.children:
                continue
            yield self._node(scope, f"{scope.name}{key}", type_, node)

    def _node(self, scope: Scope, name: str, type_: str, node: Mapping[str, Any]) -> ComfyNode:
        class_type = known_class(type_, self._mistakes)
        made = ComfyNode(name, class_type, {}, own_title(type_, node), _box(scope.name, node))
        inputs: dict[str, Link | Value] = {}
        known = classes().get(made.type)
        if known is not None:
            values, problem = widget_values(known, node)
            if problem:
                self._mistakes.add("W002", problem, made, "save the workflow again with a recent ComfyUI")
            inputs.update({key: Value(value) for key, value in values.items()})
        inputs |= {key: Value(value) for key, value in scope.promoted.of(node).items()}
        lacking = []
        for item in maps_in(node, "inputs"):
            if item.get("link") is None:
                continue
            found = self._trace(scope, item["link"], made)
            if found is not None:
                inputs[str(item.get("name"))] = found
            elif "widget" not in item:
                lacking.append(str(item.get("name")))
        return replace(made, inputs=inputs, lacking=tuple(lacking))

    def _trace(self, scope: Scope, link_id: Any, user: ComfyNode) -> Link | Value | None:
        """Follow a link to a node that runs or to a value; None where it ends in a muted node or nowhere."""
        seen: set[tuple[str, int | str]] = set()
        while True:
            if not isinstance(link_id, (int, str)) or link_id not in scope.links:
                return Link(f"at the other end of link {shortened(str(link_id))}", 0)
            if (scope.name, link_id) in seen:
                raise self._mistakes.stop("W005", "links run in a circle", user)
            seen.add((scope.name, link_id))
            self._steps += 1
            if self._steps > _MAX_STEPS:
                raise self._mistakes.stop("W006", "its links are longer than a workflow's may be")
            origin, slot, _, _ = scope.links[link_id]
            if origin == _INPUT_SIDE and scope.parent is not None:
                following = self._outside(scope, scope.parent, slot, user)
            elif origin in scope.nodes:
                following = self._inside(scope, scope.nodes[origin], slot)
            else:
                return Link(f"{scope.name}{origin}", slot)  # an error if somebody needs it
            if not isinstance(following, tuple):
                return following
            scope, link_id = following

    def _inside(self, scope: Scope, node: Mapping[str, Any], slot: int) -> _Next:
        """Return what stands behind a node's output: a link to follow further, or the end."""
        mode, type_, name = scope.mode(node), node.get("type"), f"{scope.name}{node['id']}"
        if mode == _MUTED:
            return None
        if mode == _BYPASSED:
            return self._further(scope, _passed_through(node, slot))
        if node["id"] in scope.children:
            child = scope.children[node["id"]]
            ends = [key for key, link in child.links.items() if link[2] == _OUTPUT_SIDE and link[3] == slot]
            return (child, ends[0]) if ends else None
        if type_ in REROUTES:
            return self._further(scope, _first_link(node))
        if type_ == "PrimitiveNode":
            held = next(iter(scope.promoted.of(node).values()), _first_widget(node, raw=True))
            return Value(held, name)
        if type_ in GETTERS:
            setter = self._setters.get(_first_widget(node))
            if setter is None:
                return Link(f"Set {shortened(_first_widget(node))}", 0)
            return self._further(setter[0], _first_link(setter[1]))
        if type_ in SETTERS:
            return self._further(scope, _first_link(node))
        return Link(name, slot)

    @staticmethod
    def _further(scope: Scope, link_id: Any) -> tuple[Scope, Any] | None:
        return None if link_id is None else (scope, link_id)

    def _outside(self, scope: Scope, parent: Scope, slot: int, user: ComfyNode) -> _Next:
        """Step out of a subgraph: return the link that feeds its input, or the value of the input's widget."""
        edges = list_in(scope.definition, "inputs")
        if not 0 <= slot < len(edges) or not isinstance(edges[slot], Mapping):
            message = "a link comes from an input that the subgraph does not have"
            raise self._mistakes.stop("W002", message, user)
        name = str(edges[slot].get("name"))
        for item in maps_in(scope.instance, "inputs"):
            if str(item.get("name")) == name and item.get("link") is not None:
                return parent, item["link"]
        return Value(scope.promoted.edges[name]) if name in scope.promoted.edges else None


def _passed_through(node: Mapping[str, Any], slot: int) -> Any:
    """Return the link that a bypassed node passes on: of the input beside the output, else the first that fits best."""
    outputs, inputs = list_in(node, "outputs"), maps_in(node, "inputs")
    type_ = outputs[slot].get("type") if slot < len(outputs) and isinstance(outputs[slot], Mapping) else None
    order = inputs[slot : slot + 1] + sorted(inputs, key=lambda item: item.get("type") != type_)
    return next((item.get("link") for item in order if type_ == "*" or item.get("type") in (type_, "*")), None)


def _first_link(node: Mapping[str, Any]) -> Any:
    inputs = list_in(node, "inputs")
    return inputs[0].get("link") if inputs and isinstance(inputs[0], Mapping) else None


def _first_widget(node: Mapping[str, Any], *, raw: bool = False) -> Any:
    first = next(iter(list_in(node, "widgets_values")), None)
    return first if raw else str(first)


def _box(scope: str, node: Mapping[str, Any]) -> Box | None:
    """Return where a node stands; `pos` and `size` are lists or maps with the keys 0 and 1."""
    numbers = [*_pair(node.get("pos")), *_pair(node.get("size"))]
    if len(numbers) != 4:
        return None
    left, top, width, height = numbers
    return Box(scope, left, top, left + width, top + height)


def _pair(value: Any) -> list[float]:
    pair = [value.get("0"), value.get("1")] if isinstance(value, Mapping) else value
    is_pair = isinstance(pair, list) and len(pair) >= 2 and all(isinstance(part, (int, float)) for part in pair[:2])
    return [float(pair[0]), float(pair[1])] if is_pair and isinstance(pair, list) else []


def _notes(scope: Scope) -> Iterator[Note]:
    for node in scope.nodes.values():
        text = _first_widget(node, raw=True)
        if str(node.get("type")) in NOTES and isinstance(text, str) and text.strip():
            yield Note(text.strip(), own_title(node["type"], node), _box(scope.name, node))


def _groups(scope: Scope) -> Iterator[Box]:
    for group in scope.groups:
        numbers = list_in(group, "bounding")
        if len(numbers) == 4 and all(isinstance(n, (int, float)) for n in numbers):
            yield Box(scope.name, numbers[0], numbers[1], numbers[0] + numbers[2], numbers[1] + numbers[3])
