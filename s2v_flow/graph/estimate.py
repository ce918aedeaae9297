"""What a run will cost: time from past runs on this machine, memory from them or computed, bytes from files' sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Literal

from s2v_flow.cache.store import Entry
from s2v_flow.graph.numerics import Numerics
from s2v_flow.graph.plan import Plan, PlanNode
from s2v_flow.graph.status import TO_COMPUTE, NodeStatus

_NO_COST = frozenset({"seed", "text", "audio_offset", "offset"})  # fields that do not change how long a node takes


@dataclass(frozen=True)
class NodeCost:
    """What a plan node took in past runs on this machine: seconds (median), bytes stored, peak memory.

    That is the process's, and on a GPU the device's.
    """

    seconds: float
    disk_bytes: int
    peak_bytes: int


@dataclass(frozen=True)
class Needs:
    """What a plan node is computed to need before the like of it ran: memory and stored bytes, None: unknown."""

    peak_bytes: int | None = None
    disk_bytes: int | None = None


@dataclass(frozen=True)
class Memory:
    """The most memory that a plan node takes, and how that is known; None: unknown."""

    peak_bytes: int | None
    source: Literal["computed", "measured", "unknown"]


@dataclass(frozen=True)
class Estimate:
    """What must run, by plan node, as far as the like of it ran before; `unknown` are the kinds that never did.

    bytes_to_read: the sizes of the files that will be read; num_files: how many they are. memory: of every node that
    must run, the process's (on a GPU the device's); known_disk_bytes: what is sure to be stored.
    """

    nodes: Mapping[str, NodeCost]
    unknown: tuple[str, ...]
    bytes_to_read: int
    num_files: int
    memory: Mapping[str, Memory] = field(default_factory=dict)
    known_disk_bytes: int = 0

    @property
    def largest(self) -> tuple[str, Memory] | None:
        """The node that takes the most memory, of those where it is known; None where it is known of none."""
        known = [(name, memory) for name, memory in self.memory.items() if memory.peak_bytes is not None]
        return max(known, key=lambda item: item[1].peak_bytes or 0, default=None)

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
        """The most memory that one of these nodes takes; None where that is not known of all."""
        found = [memory.peak_bytes for memory in self.memory.values()]
        return None if None in found else max((peak or 0 for peak in found), default=0)


def estimate(
    plan: Plan,
    statuses: Mapping[str, NodeStatus],
    earlier: Sequence[Entry],
    numerics: Numerics,
    needs: Mapping[str, Needs] | None = None,
) -> Estimate:
    """Estimate a run.

    Args:
        plan: The plan.
        statuses: What must run.
        earlier: Stored results with what they took, the newest first.
        numerics: The run's numerics policy.
        needs: What nodes are computed to need; figures of past runs go before them where they mean the same memory.
    """
    known: dict[str, NodeCost] = {}
    unknown: dict[str, None] = {}
    memory: dict[str, Memory] = {}
    alike: dict[str, NodeCost | None] = {}
    disk = 0
    for node in plan.nodes:
        if statuses[node.name].status in TO_COMPUTE and node.node.is_stored:
            shape = repr((type(node.node).kind, _cost_fields(dict(node.node)), node.facts.get("frames"), node.files))
            if shape not in alike:
                alike[shape] = _cost(node, earlier, numerics)
            cost = alike[shape]
            computed = (needs or {}).get(node.name, Needs())
            memory[node.name] = _memory(cost, computed)
            disk += computed.disk_bytes or (cost.disk_bytes if cost else 0)
            if cost is None:
                unknown[node.kind] = None
            else:
                known[node.name] = cost
    reads = [node for node in plan.nodes if statuses[node.name].status == "LOAD"]
    files = {file for node in reads for file in node.files.values() if file.is_file()}
    size = sum(file.stat().st_size for file in files)
    return Estimate(known, tuple(unknown), size, len(files), memory, disk)


def _memory(cost: NodeCost | None, computed: Needs) -> Memory:
    """Choose between figures: what a past run had goes before what is computed."""
    if cost is not None and cost.peak_bytes:
        return Memory(cost.peak_bytes, "measured")
    return Memory(computed.peak_bytes, "unknown" if computed.peak_bytes is None else "computed")


def _cost(node: PlanNode, earlier: Sequence[Entry], numerics: Numerics) -> NodeCost | None:
    """Take the figures of like nodes: same kind, sizes, settings and device; per frame where frames are known."""
    sources = [path for path, mark, _ in node.node.files() if mark.role != "output"]
    if sources:  # it copies a file's content
        return NodeCost(0.0, sum(node.files[path].stat().st_size for path in sources if path in node.files), 0)
    wanted = _cost_fields(node.node.identity({}, numerics.precision))
    found: list[NodeCost] = []
    for entry in earlier:
        image = entry.preimage
        is_like = image.get("kind") == type(node.node).kind and _cost_fields(image.get("fields", {})) == wanted
        is_here = image.get("numerics", numerics.identity()) == numerics.identity()
        is_as_large = all(entry.facts.get(side) == node.facts.get(side) for side in ("width", "height"))
        took = entry.facts.get("seconds")
        if is_like and is_here and is_as_large and isinstance(took, (int, float)):
            share = _share(node.facts, entry.facts)
            size = sum(item.size for item in entry.outputs.values())
            peak = entry.facts.get("peak_bytes" if numerics.device_class == "cpu" else "peak_device_bytes")
            found.append(NodeCost(took * share, int(size * share), int(peak or 0)))
    if not found:
        return None
    return NodeCost(
        median(cost.seconds for cost in found),
        int(median(cost.disk_bytes for cost in found)),
        max(cost.peak_bytes for cost in found),
    )


def _share(facts: Mapping[str, Any], earlier: Mapping[str, Any]) -> float:
    """Return how many times as long a node's work is as an earlier one's, by frames or by samples of sound."""
    for name in ("frames", "num_samples"):
        if facts.get(name) and earlier.get(name):
            return float(facts[name] / earlier[name])
    return 1.0


def _cost_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in _NO_COST}
