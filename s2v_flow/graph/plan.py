"""The plan: the recipe's graph unrolled, every chunk a node of its own, in an order in which it can run.

Planning runs the nodes' `plan` methods in order. What a port means there is a `Value`: where its parts will come from
and the facts that are known beforehand (sizes, seconds, settings that later nodes inherit).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from s2v_flow.errors import Place
from s2v_flow.graph.locations import Missing
from s2v_flow.graph.node import Node
from s2v_flow.graph.ports import Source

Inputs = Mapping[str, Source | tuple[Source, ...]]


@dataclass(frozen=True)
class PlanNode:
    """One vertex of the plan.

    `name` is unique ("talk[2]", "talk[2].pixels"), `recipe_node` and `kind` are the recipe's words for it, `node` is
    what runs, `files` maps field paths to the files found for them, `facts` are for people (chunk, frames, seconds),
    `place` is where the recipe has it.
    """

    name: str
    recipe_node: str
    kind: str
    node: Node
    inputs: Inputs
    files: Mapping[tuple[str | int, ...], Path]
    facts: Mapping[str, Any]
    place: Place | None = None

    def sources(self) -> Iterator[Source]:
        """Yield every part of every input."""
        for given in self.inputs.values():
            yield from (given,) if isinstance(given, Source) else given


@dataclass(frozen=True)
class Plan:
    """What is to be done, in order; `missing` lists the files that are not there."""

    nodes: tuple[PlanNode, ...]
    missing: tuple[Missing, ...]
    notes: tuple[str, ...]

    def node(self, name: str) -> PlanNode:
        """Return the plan node of that name."""
        return self._by_name[name]

    @cached_property
    def _by_name(self) -> dict[str, PlanNode]:
        return {node.name: node for node in self.nodes}
