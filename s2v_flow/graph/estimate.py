"""What a run will cost: time from past runs on this machine, memory from them or computed, bytes from files' sizes.

Where the like of a node never ran, its time is scaled from the nearest run of the same kind, with the same weights on
the same hardware, by what both compute (FLOP, counted from headers); else by speeds that were measured alone, if any.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf, log
from statistics import median
from typing import Any, Literal

from s2v_flow.cache.store import Entry
from s2v_flow.graph.context import Numerics, Way
from s2v_flow.graph.node import Plan, PlanNode
from s2v_flow.graph.status import TO_COMPUTE, NodeStatus

Flops = tuple[float, float, float]  # in matrix products, in attention, in convolutions
Source = Literal["measured", "scaled", "calibrated"]
_NO_COST = frozenset({"seed", "text", "audio_offset", "offset"})  # fields that do not change how long a node takes


@dataclass(frozen=True)
class NodeCost:
    """What a plan node will take by past runs on this machine: seconds (median), bytes stored, peak memory.

    That is the process's, and on a GPU the device's; 0: not known. source: whether its like ran ("measured"), or the
    time is scaled, from what `scaled_from` says, or comes from speeds that were measured alone ("calibrated").
    """

    seconds: float
    disk_bytes: int
    peak_bytes: int
    source: Source = "measured"
    scaled_from: str | None = None


@dataclass(frozen=True)
class Needs:
    """What a plan node is computed to need before the like of it ran: memory, stored bytes, FLOP; None: unknown.

    weights: what models it uses, by their bytes and the size of a number: alike for one model in one precision.
    work_bytes: of the peak all but models. way: what is done otherwise for lack of memory, with the same result.
    """

    peak_bytes: int | None = None
    disk_bytes: int | None = None
    flops: Flops | None = None
    weights: str = ""
    work_bytes: int = 0
    way: Way = field(default_factory=dict)

    @property
    def item_bytes(self) -> int:
        """The size of the numbers that the models compute with."""
        return int(self.weights.rpartition("/")[2] or 4)

    def facts(self) -> dict[str, Any]:
        """Return what a result keeps of it, for the estimates of later runs."""
        way = {"way": dict(self.way)} if self.way else {}
        return {"flops": self.flops, "weights": self.weights, **way} if self.flops else way


@dataclass(frozen=True)
class Memory:
    """The most memory that a plan node takes, and how that is known; None: unknown."""

    peak_bytes: int | None
    source: Literal["computed", "measured", "unknown"]


@dataclass(frozen=True)
class Estimate:
    """What must run, by plan node, as far as past runs show; `unknown` are the kinds where it cannot.

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
    def basis(self) -> NodeCost | None:
        """The node whose cost is the least sure, and of these the longest: what the estimate as a whole rests on."""
        order = ("measured", "scaled", "calibrated")
        return max(self.nodes.values(), key=lambda cost: (order.index(cost.source), cost.seconds), default=None)

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
    hardware: str = "",
    speeds: Mapping[int, Flops] | None = None,
) -> Estimate:
    """Estimate a run.

    Args:
        earlier: Stored results with what they took, the newest first.
        needs: What nodes are computed to need; figures of past runs go before them where they mean the same memory.
        hardware: What the run computes on; past runs on something else do not count.
        speeds: What that does in a second, by the bytes of a number, where it was measured.
    """
    earlier = [entry for entry in earlier if entry.facts.get("hardware", hardware) == hardware]
    loads: dict[str, float] = {}  # of models that no node has loaded yet
    for entry in earlier:
        weights = entry.facts.get("weights", "")
        loads[weights] = max(loads.get(weights, 0.0), entry.facts.get("load_seconds") or 0.0)
    known: dict[str, NodeCost] = {}
    unknown: dict[str, None] = {}
    memory: dict[str, Memory] = {}
    alike: dict[str, NodeCost | None] = {}
    disk = 0
    for node in plan.nodes:
        if statuses[node.name].status in TO_COMPUTE and node.node.is_stored:
            computed = (needs or {}).get(node.name, Needs())
            fields = _cost_fields(dict(node.node))
            shape = repr((node.kind, fields, node.facts.get("frames"), node.files, computed.flops, computed.weights))
            if shape not in alike:
                alike[shape] = _cost(node, earlier, numerics, computed) or _calibrated(computed, speeds or {})
            cost = alike[shape]
            if cost is not None and loads.get(computed.weights):
                cost = replace(cost, seconds=cost.seconds + loads.pop(computed.weights))
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
    if cost is not None and cost.peak_bytes:
        return Memory(cost.peak_bytes, "measured")
    return Memory(computed.peak_bytes, "unknown" if computed.peak_bytes is None else "computed")


def _cost(node: PlanNode, earlier: Sequence[Entry], numerics: Numerics, computed: Needs) -> NodeCost | None:
    """Take the figures of like nodes: same kind, weights, sizes, settings and device; else scale the nearest one's."""
    sources = [path for path, mark, _ in node.node.files() if mark.role != "output"]
    if sources:  # it copies a file's content
        return NodeCost(0.0, sum(node.files[path].stat().st_size for path in sources if path in node.files), 0)
    wanted = _cost_fields(node.node.identity({}, numerics.precision))
    found: dict[float, list[NodeCost]] = {}  # by how far away they are
    for entry in earlier:
        image, facts = entry.preimage, entry.facts
        is_here = image.get("numerics", numerics.identity()) == numerics.identity()
        is_kind = image.get("kind") == type(node.node).kind and facts.get("weights", "") == computed.weights
        if not (is_here and is_kind and isinstance(facts.get("seconds"), (int, float))):
            continue
        is_as_large = all(facts.get(side) == node.facts.get(side) for side in ("width", "height"))
        is_like = is_as_large and _cost_fields(image.get("fields", {})) == wanted
        if not is_like and "step_cache" in image.get("fields", {}):
            continue  # some of its steps took next to no time
        then = facts.get("flops")
        ratio = _share(node.facts, facts)
        if computed.flops and then and sum(then):
            ratio = sum(computed.flops) / sum(then)
        elif not is_like:
            continue
        size = computed.disk_bytes or int(ratio * sum(item.size for item in entry.outputs.values()))
        peak = facts.get("peak_bytes" if numerics.device_class == "cpu" else "peak_device_bytes") if is_like else 0
        peak = peak if facts.get("way", {}) == computed.way else 0
        cost = NodeCost(_seconds(entry, ratio), size, int(peak or 0))
        if not is_like:
            cost = replace(cost, source="scaled", scaled_from=_described(image.get("fields", {}) | facts))
        found.setdefault(-1.0 if is_like else abs(log(ratio)) if ratio else inf, []).append(cost)
    if not found:
        return None
    costs = found[min(found)]
    seconds, disk_bytes = median(cost.seconds for cost in costs), int(median(cost.disk_bytes for cost in costs))
    return replace(costs[0], seconds=seconds, disk_bytes=disk_bytes, peak_bytes=max(cost.peak_bytes for cost in costs))


def _seconds(entry: Entry, ratio: float) -> float:
    """Scale what a result took: of a chunk the steps, not what comes before them; loading its model stands apart."""
    facts, took = entry.facts, float(entry.facts["seconds"])
    if not facts.get("steps_taken"):
        return took * ratio
    sampling = float(facts.get("sampling_seconds") or 0)
    before = max(took - float(facts.get("load_seconds") or 0) - sampling, 0.0)
    return before + sampling / int(facts["steps_taken"]) * int(entry.preimage["fields"]["steps"]) * ratio


def _calibrated(computed: Needs, speeds: Mapping[int, Flops]) -> NodeCost | None:
    if computed.flops is None or computed.item_bytes not in speeds:
        return None
    seconds = sum(count / speed for count, speed in zip(computed.flops, speeds[computed.item_bytes], strict=True))
    return NodeCost(seconds, computed.disk_bytes or 0, 0, "calibrated")


def _described(of: Mapping[str, Any]) -> str | None:
    """Return "192x256, 4 steps", as far as that is known."""
    size = f"{of['width']}x{of['height']}" if of.get("width") and of.get("height") else ""
    steps = f"{of['steps']} steps" if "steps" in of else ""
    return ", ".join(filter(None, (size, steps))) or None


def _share(facts: Mapping[str, Any], earlier: Mapping[str, Any]) -> float:
    """Return how many times as long a node's work is as an earlier one's, by frames or by samples of sound."""
    for name in ("frames", "num_samples"):
        if facts.get(name) and earlier.get(name):
            return float(facts[name] / earlier[name])
    return 1.0


def _cost_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in _NO_COST}
