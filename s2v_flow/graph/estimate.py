"""What a run will cost: time from past runs on this machine, bytes to be read from what the files' sizes say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from s2v_flow.cache.store import Entry
from s2v_flow.graph.numerics import Numerics
from s2v_flow.graph.plan import Plan, PlanNode
from s2v_flow.graph.status import TO_COMPUTE, NodeStatus

_NO_COST = frozenset({"seed", "text", "audio_offset", "offset"})  # fields that do not change how long a node takes


@dataclass(frozen=True)
class NodeCost:
    """What a plan node took in past runs on this machine: seconds (median), bytes stored, the process's peak memory."""

    seconds: float
    disk_bytes: int
    peak_bytes: int


@dataclass(frozen=True)
class Estimate:
    """What must run, by plan node, as far as the like of it ran before; `unknown` are the kinds that never did.

    bytes_to_read: the sizes of the files that will be read; num_files: how many they are.
    """

    nodes: Mapping[str, NodeCost]
    unknown: tuple[str, ...]
    bytes_to_read: int
    num_files: int

    @property
    def seconds(self) -> float | None:
        """How long the run will take; None where something never ran."""
        return None if self.unknown else sum(cost.seconds for cost in self.nodes.values())

    @property
    def disk_bytes(self) -> int | None:
        """How much will be stored; None where something never ran."""
        return None if self.unknown else sum(cost.disk_bytes for cost in self.nodes.values())

    @property
    def peak_bytes(self) -> int | None:
        """The most memory that the like of these nodes was seen with; None where something never ran."""
        return None if self.unknown else max((cost.peak_bytes for cost in self.nodes.values()), default=0)


def estimate(plan: Plan, statuses: Mapping[str, NodeStatus], earlier: Sequence[Entry], numerics: Numerics) -> Estimate:
    """Estimate a run.

    Args:
        plan: The plan.
        statuses: What must run.
        earlier: Stored results with what they took, the newest first.
        numerics: The run's numerics policy.
    """
    known: dict[str, NodeCost] = {}
    unknown: dict[str, None] = {}
    for node in plan.nodes:
        if statuses[node.name].status in TO_COMPUTE and node.node.is_stored:
            cost = _cost(node, earlier, numerics)
            if cost is None:
                unknown[node.kind] = None
            else:
                known[node.name] = cost
    reads = [node for node in plan.nodes if statuses[node.name].status == "LOAD"]
    files = {file for node in reads for file in node.files.values() if file.is_file()}
    size = sum(file.stat().st_size for file in files)
    return Estimate(known, tuple(unknown), size, len(files))


def _cost(node: PlanNode, earlier: Sequence[Entry], numerics: Numerics) -> NodeCost | None:
    """Take the figures of like nodes: same kind, sizes, settings and device; per frame where frames are known."""
    sources = [path for path, mark, _ in node.node.files() if mark.role != "output"]
    if sources:  # it copies a file's content
        return NodeCost(0.0, sum(node.files[path].stat().st_size for path in sources if path in node.files), 0)
    wanted = _cost_fields(node.node.identity({}, numerics.precision))
    frames = node.facts.get("frames")
    found: list[NodeCost] = []
    for entry in earlier:
        image = entry.preimage
        is_like = image.get("kind") == type(node.node).kind and _cost_fields(image.get("fields", {})) == wanted
        is_here = image.get("numerics", numerics.identity()) == numerics.identity()
        took, had = entry.facts.get("seconds"), entry.facts.get("frames")
        if is_like and is_here and isinstance(took, (int, float)):
            share = frames / had if frames and had else 1.0
            size = sum(item.size for item in entry.outputs.values())
            found.append(NodeCost(took * share, int(size * share), int(entry.facts.get("peak_bytes", 0))))
    if not found:
        return None
    return NodeCost(
        median(cost.seconds for cost in found),
        int(median(cost.disk_bytes for cost in found)),
        max(cost.peak_bytes for cost in found),
    )


def _cost_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in _NO_COST}
