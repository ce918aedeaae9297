"""A recipe in the making: nodes that refer to each other by key, without names yet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from s2v_flow.comfy.graph import ComfyNode


@dataclass(frozen=True)
class NodeRef:
    """A reference to a draft's node."""

    key: int


@dataclass
class DraftNode:
    """A recipe's node to be. `usual` is the name it gets unless it has a title; `made_from` are ComfyUI's ids."""

    kind: str
    usual: str
    fields: dict[str, Any]
    title: str | None = None
    made_from: list[str] = field(default_factory=list)

    def refs(self) -> list[int]:
        """Return the keys of the nodes it refers to."""
        return [value.key for value in self.fields.values() if isinstance(value, NodeRef)]


@dataclass
class Draft:
    """All nodes by key, each after those it refers to, and which of them write files."""

    nodes: dict[int, DraftNode] = field(default_factory=dict)
    sinks: list[int] = field(default_factory=list)
    _known: dict[str, int] = field(default_factory=dict)

    def add(
        self, kind: str, usual: str, fields: Mapping[str, Any], source: ComfyNode, *, titled: bool = True
    ) -> NodeRef:
        """Add a node, or return the one that is there already and says the same. Fields that are None are left out."""
        given = {name: value for name, value in fields.items() if value is not None}
        identity = repr((kind, sorted(given.items(), key=lambda item: item[0])))
        key = self._known.get(identity)
        title = source.title if titled else None
        if key is None:
            key = self._known[identity] = len(self.nodes)
            self.nodes[key] = DraftNode(kind, usual, given, title)
        node = self.nodes[key]
        if source.id not in node.made_from:
            node.made_from.append(source.id)
        return NodeRef(key)

    def add_sink(self, kind: str, usual: str, fields: Mapping[str, Any], source: ComfyNode) -> None:
        """Add a node that writes a file."""
        key = len(self.nodes)
        given = {name: value for name, value in fields.items() if value is not None}
        self.nodes[key] = DraftNode(kind, usual, given, source.title, [source.id])
        self.sinks.append(key)

    def __getitem__(self, ref: NodeRef) -> DraftNode:
        """Return the node that is referred to."""
        return self.nodes[ref.key]

    def needed(self) -> list[int]:
        """Return the keys of the nodes that the sinks need, in the order in which they were added."""
        wanted, pending = set(self.sinks), list(self.sinks)
        while pending:
            new = [key for key in self.nodes[pending.pop()].refs() if key not in wanted]
            wanted.update(new)
            pending += new
        return sorted(wanted)
