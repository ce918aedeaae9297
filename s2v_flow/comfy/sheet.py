"""A workflow in the making: nodes of known classes, numbered as they come."""

from __future__ import annotations

from typing import Any

from s2v_flow.comfy.catalog import classes
from s2v_flow.comfy.graph import ComfyNode, Link, Value


class Sheet:
    """Collects nodes and what a person should know about them."""

    def __init__(self) -> None:
        self.nodes: list[ComfyNode] = []
        self.notes: list[str] = []
        self._shared: dict[tuple[str, str], Link] = {}

    def add(self, class_type: str, title: str | None, **given: Any) -> Link:
        """Add a node and return its first output. Inputs are links or plain values; others take their defaults."""
        known = classes()[class_type]
        inputs: dict[str, Link | Value] = {}
        for item in known.inputs:
            value = given.pop(item.name, None)
            if value is None and item.is_widget:
                value = item.default
            if value is not None:
                inputs[item.name] = value if isinstance(value, (Link, Value)) else Value(value)
        assert not given, f"{class_type} has no {', '.join(given)}"
        name = str(len(self.nodes) + 1)
        self.nodes.append(ComfyNode(name, class_type, inputs, title))
        return Link(name, 0)

    def shared(self, class_type: str, title: str, **given: Any) -> Link:
        """Add a node, or return the one of this class and title that is there."""
        if (class_type, title) not in self._shared:
            self._shared[class_type, title] = self.add(class_type, title, **given)
        return self._shared[class_type, title]

    def note(self, text: str) -> None:
        """Record something a person should know, once."""
        if text not in self.notes:
            self.notes.append(text)
