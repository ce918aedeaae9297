"""What a report says of a run beside its videos: stages, memory, the graph, LoRAs, drift, and what has changed."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from s2v_flow.history.compare import Difference, inputs_that_differ
from s2v_flow.history.side import of_run
from s2v_flow.runs.manifest import Manifest, NodeRecord
from s2v_flow.wording import duration_text, shown, size_text

BOX_WIDTH, BOX_HEIGHT = 128, 44
_GAP_ACROSS, _GAP_DOWN = 34, 14
_STATES = ("failed", "interrupted", "not_reached", "computed", "stored", "live", "skipped")  # the first one counts
_REFERENCE = re.compile(r"\$(\w[\w-]*)$")
_SHORT = 12  # digits of a digest that people are shown


def stages_of(run: Manifest) -> list[dict[str, Any]]:
    """Return what each kind took in a run: its time, and its largest peak of memory; as text and as shares."""
    kinds: dict[str, list[NodeRecord]] = defaultdict(list)
    for node in run.nodes:
        if node.seconds is not None:
            kinds[node.kind].append(node)
    took = {kind: sum(node.seconds or 0.0 for node in nodes) for kind, nodes in kinds.items()}
    peaks = {kind: max(node.peak_device_bytes or node.peak_bytes or 0 for node in kinds[kind]) for kind in kinds}
    total, largest = sum(took.values()) or 1.0, max(peaks.values(), default=0) or 1
    return [
        {
            "kind": kind,
            "count": len(nodes),
            "time": duration_text(took[kind]),
            "share": took[kind] / total,
            "peak": size_text(peaks[kind], is_memory=True) if peaks[kind] else "unknown",
            "memory": peaks[kind] / largest,
        }
        for kind, nodes in kinds.items()
    ]


class Box(NamedTuple):
    """A recipe's node in the picture of its graph; `num_nodes` plan nodes were made of it."""

    name: str
    kind: str
    state: str
    num_nodes: int
    time: str
    x: int
    y: int


class Graph(NamedTuple):
    """A recipe's graph, from left to right; edges are paths."""

    boxes: list[Box]
    edges: list[str]
    width: int
    height: int


def graph_of(values: Mapping[str, Any], nodes: Sequence[NodeRecord] = ()) -> Graph:
    """Lay a recipe's graph out, from its values by path; a node's chunks and a matrix's cells are one box.

    Args:
        values: As a manifest has them: "nodes.first.model" is "$dit".
        nodes: The run's plan nodes, for what became of them.
    """
    kinds = {
        path.split(".")[1]: str(kind) for path, kind in values.items() if re.fullmatch(r"nodes\.[^.]+\.kind", path)
    }
    sources: dict[str, dict[str, None]] = {name: {} for name in kinds}
    for path, value in values.items():
        name = path.split(".")[1] if path.startswith("nodes.") else ""
        for item in value if isinstance(value, list) else [value]:
            found = _REFERENCE.match(item) if isinstance(item, str) else None
            if name in kinds and found and found[1] in kinds:
                sources[name][found[1]] = None
    ranks: dict[str, int] = {}

    def rank(name: str) -> int:
        if name not in ranks:
            ranks[name] = 0  # a recipe has no circles
            ranks[name] = max((rank(source) + 1 for source in sources[name]), default=0)
        return ranks[name]

    columns: dict[int, list[str]] = defaultdict(list)
    for name in kinds:
        columns[rank(name)].append(name)
    rows: dict[str, float] = {}
    for column in sorted(columns):
        heights = {name: fmean([rows[source] for source in sources[name]] or [0.0]) for name in columns[column]}
        for index, name in enumerate(sorted(columns[column], key=lambda name: heights[name])):
            rows[name] = index - (len(columns[column]) - 1) / 2
    tallest = max(map(len, columns.values()), default=1)
    across, down, top = BOX_WIDTH + _GAP_ACROSS, BOX_HEIGHT + _GAP_DOWN, (tallest - 1) / 2
    places = {name: (ranks[name] * across + 1, round((rows[name] + top) * down) + 1) for name in kinds}
    made: dict[str, list[NodeRecord]] = defaultdict(list)
    for node in nodes:
        made[re.split(r"[.\[]", node.name.rpartition("/")[2])[0]].append(node)
    boxes = []
    for name, kind in kinds.items():
        own = [node for node in made[name] if node.kind == kind] or made[name]
        seconds = [node.seconds for node in own if node.seconds is not None]
        state = next((state for state in _STATES if any(node.status == state for node in own)), "")
        boxes.append(Box(name, kind, state, len(own), duration_text(sum(seconds)) if seconds else "", *places[name]))
    edges = [_edge(places[source], places[name]) for name in kinds for source in sources[name]]
    return Graph(boxes, edges, (max(columns, default=0) + 1) * across - _GAP_ACROSS + 2, tallest * down - _GAP_DOWN + 2)


def _edge(source: tuple[int, int], target: tuple[int, int]) -> str:
    x1, y1, x2, y2 = source[0] + BOX_WIDTH, source[1] + BOX_HEIGHT // 2, target[0], target[1] + BOX_HEIGHT // 2
    return f"M{x1} {y1}C{x1 + _GAP_ACROSS // 2} {y1} {x2 - _GAP_ACROSS // 2} {y2} {x2} {y2}"


def loras_of(run: Manifest) -> list[tuple[str, str, list[tuple[str, int, float]]]]:
    """Return each LoRA of a run once: its id, how much has a home, and by block (name, weights, share of the most)."""
    found = {}
    for lora in run.loras:
        most = max(lora.blocks.values(), default=0) or 1
        blocks = sorted(lora.blocks.items(), key=lambda item: (not item[0].isdigit(), item[0].zfill(4)))
        text = f"{lora.matched} of {lora.total} tensors have a home in the model"
        found[lora.id] = lora.id, text, [(name, count, count / most) for name, count in blocks]
    return list(found.values())


def cues_of(values: Mapping[str, Any]) -> list[tuple[float, str]]:
    """Return when a timeline changes something, and what, by time in seconds."""
    found: dict[tuple[str, str], dict[str, Any]] = defaultdict(dict)
    for path, value in values.items():
        part = re.fullmatch(r"nodes\.([^.]+)\.timeline\[([^]]+)\]\.(.+)", path)
        if part and value is not None:
            found[part[1], part[2]][part[3]] = value
    cues = []
    for entry in found.values():
        at = entry.pop("at", 0.0)
        text = entry.pop("prompt", None) or ", ".join(f"{name} {shown(value)}" for name, value in entry.items())
        if isinstance(at, (int, float)):
            cues.append((float(at), str(text)))
    return sorted(cues)


def changes_of(run: Manifest, runs: Sequence[Manifest]) -> tuple[str, list[tuple[str, str, str]]] | None:
    """Return the run before of the same recipe, and what differs: (name, before, now); None: there is none."""
    older = [item for item in runs if item.recipe.path == run.recipe.path and item.id < run.id]
    if not older:
        return None
    before = max(older, key=lambda item: item.id)
    return before.id, list(rows_of(inputs_that_differ(of_run(before), of_run(run))))


def rows_of(differences: Sequence[Difference]) -> Iterator[tuple[str, str, str]]:
    """Yield differences as (name, one, other)."""
    for item in differences:
        yield item.name, _short(item.a), _short(item.b)


def _short(value: Any) -> str:
    if isinstance(value, dict) and "sha256" in value:
        return f"{value['name']} ({(value['sha256'] or 'unknown')[:_SHORT]})"
    return "nothing" if value is None else str(value) if isinstance(value, list) else shown(value)
