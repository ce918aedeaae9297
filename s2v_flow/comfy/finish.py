"""From a draft to a recipe's sections: names, an order, parameters, comments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from s2v_flow.comfy.draft import Draft, DraftNode, NodeRef
from s2v_flow.comfy.graph import Box, Graph, Note, Value
from s2v_flow.comfy.names import PARAM_ORDER, PARAMS, param_name, slug, unique

_RANKS = (
    "load_diffusion_model",
    "load_text_encoder",
    "load_audio_encoder",
    "load_vae",
    "load_image",
    "load_audio",
    "load_video",
    "load_latent",
    "image_scale",
    "encode_text",
    "encode_audio",
    "encode_image",
)
_MAX_PLACED = 100  # more notes than that all go to the end
_SHORT_NOTE = 320  # characters; what is longer, or has more than a line, goes to the end of the file


@dataclass(frozen=True)
class Reference:
    """`$node` or `$params.x`: text that is not to be escaped."""

    text: str


@dataclass
class Sections:
    """A recipe's sections as they will be written; `sinks` are the names of the nodes that write files."""

    params: dict[str, Any] = field(default_factory=dict)
    nodes: dict[str, dict[str, Any]] = field(default_factory=dict)
    sinks: list[str] = field(default_factory=list)
    remarks: dict[str, list[str]] = field(default_factory=dict)  # node's name, "params" or "profiles" -> texts
    notes: list[str] = field(default_factory=list)


def finish(draft: Draft) -> Sections:
    """Name the nodes that the sinks need, sort them and make parameters of what people turn."""
    keys = _sorted(draft)
    names: dict[int, str] = {}
    for key in keys:
        node = draft.nodes[key]
        names[key] = unique(slug(node.title or "") or node.usual, set(names.values()))
    sections = Sections(sinks=[names[key] for key in keys if key in draft.sinks])
    params = _Params(draft, keys)
    for key in keys:
        node = draft.nodes[key]
        fields = {name: params.written(node, name, value, names) for name, value in node.fields.items()}
        sections.nodes[names[key]] = {"kind": node.kind, **fields}
    order = {name: index for index, name in enumerate(PARAM_ORDER)}
    bases = {name: name.rstrip("0123456789").rstrip("_") for name in params.values}
    sorted_params = sorted(params.values, key=lambda name: order.get(name, order.get(bases[name], len(order))))
    sections.params = {name: params.values[name] for name in sorted_params}
    return sections


def _sorted(draft: Draft) -> list[int]:
    """Return the keys of the nodes that are needed: loaders, encoders, the middle in its order, what is saved."""

    def rank(key: int) -> int:
        kind = draft.nodes[key].kind
        if key in draft.sinks:
            return len(_RANKS) + 1
        return _RANKS.index(kind) if kind in _RANKS else len(_RANKS)

    return sorted(draft.needed(), key=rank)


class _Params:
    """Decides which values become parameters, and what they are called."""

    def __init__(self, draft: Draft, keys: list[int]) -> None:
        self.values: dict[str, Any] = {}
        self._names: dict[Any, str] = {}
        self._uses: dict[str, int] = {}
        for key in keys:
            for value in draft.nodes[key].fields.values():
                self._count(value)

    def _count(self, value: Any) -> None:
        if isinstance(value, Value) and value.knob is not None:
            self._uses[value.knob] = self._uses.get(value.knob, 0) + 1
        for item in value if isinstance(value, list) else value.values() if isinstance(value, dict) else ():
            self._count(item)

    def written(self, node: DraftNode, name: str, value: Any, names: Mapping[int, str]) -> Any:
        """Return a field's value as it is to be written."""
        if isinstance(value, NodeRef):
            return Reference(f"${names[value.key]}")
        if isinstance(value, list):
            return [self.written(node, name, item, names) for item in value]
        if isinstance(value, dict):
            return {key: self.written(node, key, item, names) for key, item in value.items()}
        return self._value(node, name, value) if isinstance(value, Value) else value

    def _value(self, node: DraftNode, name: str, value: Value) -> Any:
        is_shared = value.knob is not None and self._uses[value.knob] > 1
        if not is_shared and (node.kind, name) not in PARAMS:
            return value.value
        base = param_name(node.kind, name, node.usual)
        identity = ("knob", value.knob) if value.knob is not None else (base, repr(value.value))
        if identity not in self._names:
            self._names[identity] = unique(base, self.values)
            self.values[self._names[identity]] = value.value
        return Reference(f"$params.{self._names[identity]}")


def annotate(sections: Sections, draft: Draft, graph: Graph) -> None:
    """Put the workflow's notes into comments: short ones above the node beside them, long ones at the end."""
    names = dict(zip(_sorted(draft), sections.nodes, strict=True))
    owners = [(names[key], name) for key in names for name in draft.nodes[key].made_from]
    primitives = [name for name, node in graph.nodes.items() if node.type.startswith("Primitive")]
    owners += [("params", name) for name in primitives if sections.params]
    seen: set[str] = set()
    for note in graph.notes:
        if note.text in seen:
            continue
        seen.add(note.text)
        text = note.text if note.title is None else f"{note.title}: {note.text}"
        is_short = len(seen) <= _MAX_PLACED and len(text) <= _SHORT_NOTE and "\n" not in text
        owner = _owner(note, owners, graph) if is_short else None
        if owner is None:
            sections.notes.append(note.text if note.title is None else f"{note.title}\n{note.text}")
        else:
            sections.remarks.setdefault(owner, []).append(text)


def _owner(note: Note, owners: list[tuple[str, str]], graph: Graph) -> str | None:
    """Return the recipe's node made of what stands nearest to a note, in its group if it stands in one."""
    placed = [(owner, graph.nodes[name].box) for owner, name in owners if name in graph.nodes]
    placed += [("profiles", box) for box in graph.off]
    boxes = [(owner, box) for owner, box in placed if box is not None and note.box and box.scope == note.box.scope]
    if note.box is None or not boxes:
        return None
    around = [group for group in graph.groups if group.holds(note.box)]
    if around:
        group = min(around, key=lambda box: box.area)
        boxes = [(owner, box) for owner, box in boxes if group.holds(box)] or boxes
    here: Box = note.box
    return min(boxes, key=lambda pair: here.distance(pair[1]))[0]
