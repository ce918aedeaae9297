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
class Estimate:
    """seconds: of everything that must run, or None; unknown: kinds that never ran here in that size, which is why.

    bytes_to_read: the sizes of the files that will be read; num_files: how many they are.
    """

    seconds: float | None
    unknown: tuple[str, ...]
    bytes_to_read: int
    num_files: int


def estimate(plan: Plan, statuses: Mapping[str, NodeStatus], earlier: Sequence[Entry], numerics: Numerics) -> Estimate:
    """Estimate a run.

    Args:
        plan: The plan.
        statuses: What must run.
        earlier: Stored results with the time they took, the newest first.
        numerics: The run's numerics policy.
    """
    seconds = 0.0
    unknown: dict[str, None] = {}
    for node in plan.nodes:
        if statuses[node.name].status in TO_COMPUTE and node.node.is_stored:
            expected = _seconds(node, earlier, numerics)
            if expected is None:
                unknown[node.kind] = None
            else:
                seconds += expected
    reads = [node for node in plan.nodes if statuses[node.name].status == "LOAD"]
    files = {file for node in reads for file in node.files.values() if file.is_file()}
    size = sum(file.stat().st_size for file in files)
    return Estimate(None if unknown else seconds, tuple(unknown), size, len(files))


def _seconds(node: PlanNode, earlier: Sequence[Entry], numerics: Numerics) -> float | None:
    """Return the median time of like nodes: same kind, sizes, settings and device; per frame where frames are known."""
    if any(mark.role != "output" for _, mark, _ in node.node.files()):
        return 0.0  # it copies a file's content
    wanted = _cost_fields(node.node.identity({}, numerics.precision))
    frames = node.facts.get("frames")
    times = []
    for entry in earlier:
        image = entry.preimage
        like = image.get("kind") == type(node.node).kind and _cost_fields(image.get("fields", {})) == wanted
        device = image.get("numerics", numerics.identity()) == numerics.identity()
        took, had = entry.facts.get("seconds"), entry.facts.get("frames")
        if like and device and isinstance(took, (int, float)):
            times.append(took * frames / had if frames and had else took)
    return median(times) if times else None


def _cost_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in _NO_COST}
