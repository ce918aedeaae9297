"""From a draft to a recipe's sections: newer settings, names, an order, parameters, comments."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from s2v_flow.comfy.graph import Box, Graph, Note, Value
from s2v_flow.comfy.meaning import Draft, DraftNode, NodeRef
from s2v_flow.graph.node import Node
from s2v_flow.recipe.load import Recipe

_MAX = 40

PARAMS: Mapping[tuple[str, str], str] = MappingProxyType(
    {
        ("load_image", "file"): "image",
        ("load_audio", "file"): "audio",
        ("load_video", "file"): "video",
        ("encode_text", "text"): "prompt",
        ("encode_image", "width"): "width",
        ("encode_image", "height"): "height",
        ("sample", "width"): "width",
        ("sample", "height"): "height",
        ("sample", "length"): "length",
        ("sample", "steps"): "steps",
        ("sample", "cfg"): "cfg",
        ("sample", "seed"): "seed",
    }
)
"""What people turn: always a parameter. Of other values only those are that several fields share."""

PARAM_ORDER = ("image", "audio", "video", "prompt", "negative_prompt", "width", "height", "length", "steps", "cfg")


def slug(text: str) -> str:
    """Return a title as a name; empty where nothing of it can stand in one."""
    plain = re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")[:_MAX].strip("_")
    return f"n_{plain}" if plain[:1].isdigit() else plain


def unique(name: str, taken: Collection[str]) -> str:
    """Return the name, with a number behind it where it is taken; `params` is no name for a node."""
    name = "params_node" if name == "params" else name
    number, found = 1, name
    while found in taken:
        number += 1
        found = f"{name}_{number}"
    return found


def lora_id(title: str | None, file: str, taken: Collection[str]) -> str:
    """Return what a LoRA is called: by its title, else by its file."""
    stem = file.rsplit("/", 1)[-1].removesuffix(".safetensors")
    is_lightning = any(word in stem.lower() for word in ("lightning", "lightx2v"))
    return unique(slug(title or "") or ("lightning" if is_lightning else slug(stem)) or "lora", taken)


Kinds = Mapping[str, type[Node]]


def difference(base: Sections, other: Sections, kinds: Kinds) -> dict[str, Any]:
    """Return the profile that makes `other` of `base`: its parameters and nodes, as far as they differ."""
    params = {name: value for name, value in other.params.items() if base.params.get(name, ...) != value}
    nodes: dict[str, Any] = {}
    for name, node in other.nodes.items():
        below = base.nodes.get(name)
        if below is None or below["kind"] != node["kind"]:
            nodes[name] = node
            continue
        changed = {field: value for field, value in node.items() if below.get(field, ...) != value}
        known = kinds[node["kind"]].model_fields
        changed |= {field: known[field].get_default() for field in below if field not in node}
        if changed:
            nodes[name] = changed
    return {key: value for key, value in (("params", params), ("nodes", nodes)) if value}


def profile_name(profile: Mapping[str, Any]) -> str:
    """Return a name that says what the profile is for."""
    steps = profile.get("params", {}).get("steps")
    return f"steps_{steps}" if isinstance(steps, int) else "bypassed"


def meanings(recipe: Recipe) -> dict[str, str]:
    """Return, for every node that writes a file, a digest of all that its result depends on.

    Names, and fields that cannot change the result, do not count; where it is written does.
    """
    digests: dict[str, str] = {}
    for name in recipe.order:
        node = recipe.nodes[name].node
        inputs = {field: digests[ref.node] for field, ref in node.refs().items()}
        content = {"kind": node.kind, "fields": _fields(node), "inputs": inputs}
        digests[name] = hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()
    return {name: digests[name] for name, spec in recipe.nodes.items() if spec.node.is_sink}


def _fields(node: Node) -> dict[str, Any]:
    """Return a node's plain fields; neutral ones only where they name a file to write."""
    neutral = node.neutral_fields()
    written = {name for name, mark in type(node).file_fields().items() if mark.role == "output"}
    skipped = (neutral - written) | node.input_ports().keys()
    fields = {name: value for name, value in node.model_dump(mode="json").items() if name not in skipped}
    if "loras" in fields:
        fields["loras"] = [{key: lora[key] for key in ("file", "strength")} for lora in fields["loras"]]
    return fields


_RANKS = (
    *("load_diffusion_model", "load_text_encoder", "load_audio_encoder", "load_vae"),
    *("load_image", "load_audio", "load_video", "load_latent"),
    *("image_scale", "encode_text", "encode_audio", "encode_image"),
)
_MAX_PLACED = 100  # more notes than that all go to the end
_SHORT_NOTE = 320  # characters; what is longer, or has more than a line, goes to the end of the file


@dataclass(frozen=True)
class Reference:
    """`$node` or `$params.x`: text that is not to be escaped."""

    text: str


@dataclass
class Sections:
    """A recipe's sections as they will be written; `made_from` has the ids of what each node was in ComfyUI."""

    params: dict[str, Any] = field(default_factory=dict)
    nodes: dict[str, dict[str, Any]] = field(default_factory=dict)
    remarks: dict[str, list[str]] = field(default_factory=dict)  # node's name, "params" or "profiles" -> texts
    notes: list[str] = field(default_factory=list)
    made_from: dict[str, list[str]] = field(default_factory=dict)
    changes: list[str] = field(default_factory=list)  # what was modernised, and why


def finish(draft: Draft, *, modernises: bool, as_of: int | None) -> Sections:
    """Name the nodes that the sinks need, sort them and make parameters of what people turn; see `import_workflow`."""
    for node in draft.nodes.values() if as_of == 2025 else ():
        file = str(getattr(node.fields.get("checkpoint"), "value", "")).lower()
        if node.kind == "load_diffusion_model" and "fp8" in file:
            node.fields["fp8_rounding"] = "comfyui_2025"
    changes = _modernised(draft) if modernises else []
    keys = _sorted(draft)
    names: dict[int, str] = {}
    for key in keys:
        node = draft.nodes[key]
        names[key] = unique(slug(node.title or "") or node.usual, set(names.values()))
    sections = Sections(changes=changes)
    params = _Params(draft, keys)
    for key in keys:
        node = draft.nodes[key]
        fields = {name: params.written(node, name, value, names) for name, value in node.fields.items()}
        sections.nodes[names[key]] = {"kind": node.kind, **fields}
        sections.made_from[names[key]] = node.made_from
    order = {name: index for index, name in enumerate(PARAM_ORDER)}
    bases = {name: name.rstrip("0123456789").rstrip("_") for name in params.values}
    sorted_params = sorted(params.values, key=lambda name: order.get(name, order.get(bases[name], len(order))))
    sections.params = {name: params.values[name] for name in sorted_params}
    return sections


def _sorted(draft: Draft) -> list[int]:
    """Return the keys of the nodes that are needed: loaders, encoders, the middle in its order, what is saved."""
    ranks = {kind: rank for rank, kind in enumerate(_RANKS)}
    return sorted(draft.needed(), key=lambda key: (key in draft.sinks, ranks.get(draft.nodes[key].kind, len(ranks))))


def _knobs(value: Any) -> Iterator[str]:
    """Yield the knobs that hold values for a node's fields."""
    if isinstance(value, Value) and value.knob is not None:
        yield value.knob
    for item in value if isinstance(value, list) else value.values() if isinstance(value, dict) else ():
        yield from _knobs(item)


class _Params:
    """Decides which values become parameters, and what they are called."""

    def __init__(self, draft: Draft, keys: list[int]) -> None:
        self.values: dict[str, Any] = {}
        self._names: dict[Any, str] = {}
        self._uses = Counter(knob for key in keys for knob in _knobs(draft.nodes[key].fields))

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
        base = PARAMS.get((node.kind, name), name)
        base = "negative_prompt" if base == "prompt" and node.usual == "negative" else base
        identity = ("knob", value.knob) if value.knob is not None else (base, repr(value.value))
        if identity not in self._names:
            self._names[identity] = unique(base, self.values)
            self.values[self._names[identity]] = value.value
        return Reference(f"$params.{self._names[identity]}")


def annotate(sections: Sections, graph: Graph) -> None:
    """Put the workflow's notes into comments: short ones above the node beside them, long ones at the end."""
    owners = [(owner, name) for owner, names in sections.made_from.items() for name in names]
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


_WHOLE = 4096
_REMOVED = {  # the fields that a kind loses, and why
    "encode_audio": (
        ("conditioning", "warmup_frames"),
        "sound meets the frames as the model was trained (conditioning: official), and a few frames of "
        "warm-up over silence are made and dropped, because a video's first frames are its worst",
    ),
    "encode_image": (("conditioning",), "the portrait is smoothed when it is shrunk (conditioning: official)"),
    "sample": (("conditioning",), ""),
    "extend": (("conditioning",), ""),
    "load_image": (("background",), "transparent parts of the portrait become white instead of showing hidden colours"),
    "load_diffusion_model": (
        ("fp8_rounding",),
        "what fp8 files keep in 16 or 32 bit stays so (fp8_rounding: scaled)",
    ),
}


def _modernised(draft: Draft) -> list[str]:
    """Rewrite a draft in place; return what changed and why."""
    changes = []
    for key in draft.needed():
        node = draft.nodes[key]
        names, why = _REMOVED.get(node.kind, ((), ""))
        removed = [name for name in names if node.fields.pop(name, None) is not None]
        changes += [why] if removed and why else []
    changes += _control_goes_on(draft)
    changes += _whole_videos(draft)
    needed = [draft.nodes[key] for key in draft.needed()]
    for node in (node for node in needed if node.kind == "decode"):
        number = getattr(node.fields["drop_frames"], "value", node.fields["drop_frames"])
        node.fields = {name: node.fields[name] for name in ("vae", "latent")}
        changes.append(
            f"instead of dropping {number} frames, decode drops exactly the warm-up and ends with the sound: frame i "
            "shows the sound at i/16 s; the decoder sees the portrait before the first frame, as with the model's "
            "authors"
        )
    changes += _merged(draft)
    changes.append("the same seeds give other videos than in ComfyUI from now on")
    kinds = sorted({node.kind for node in needed} & {"latent_cut", "latent_concat", "frames_slice"})
    if kinds:
        changes.append(f"left as they are: {', '.join(kinds)}; they count frames by hand, have a look at them")
    return list(dict.fromkeys(changes))


def _whole_videos(draft: Draft) -> list[str]:
    """Take out a slice that is only there because ImageFromBatch has to be told a number."""
    changes = []
    for key in draft.needed():
        for name, value in draft.nodes[key].fields.items():
            given = draft[value] if isinstance(value, NodeRef) else None
            length = getattr(given.fields.get("length"), "value", 0) if given is not None else 0
            if given is not None and given.kind == "frames_slice" and length >= _WHOLE and name == "frames":
                draft.nodes[key].fields[name] = given.fields["frames"]
                changes.append(f"the video is whole, however long: {length} frames were all that ImageFromBatch takes")
    return changes


def _control_goes_on(draft: Draft) -> list[str]:
    """Let the pose video go on from chunk to chunk."""
    changed = False
    for key in draft.needed():
        node = draft.nodes[key]
        given = node.fields.get("control_video")
        if node.kind == "extend" and isinstance(given, NodeRef) and draft[given].kind == "frames_delay":
            node.fields["control_video"] = draft[given].fields["frames"]
            changed = True
            if _inherited(draft, node, "control_video") == node.fields["control_video"]:
                del node.fields["control_video"]
    return ["the pose video goes on from chunk to chunk instead of beginning anew"] if changed else []


def _inherited(draft: Draft, node: DraftNode, name: str) -> Any:
    """Return what a video's node before this one says, from the nearest one that says it."""
    below = node.fields.get("video")
    while isinstance(below, NodeRef):
        found = draft[below].fields
        if name in found:
            return found[name]
        below = found.get("video")
    return None


def _merged(draft: Draft) -> list[str]:
    """Put extends that only repeat each other into one; the last of a video adds as many chunks as the voice needs."""
    changes = []
    while (pair := _repeated(draft)) is not None:
        first, second = pair
        one, two = draft.nodes[first], draft.nodes[second]
        fields: dict[str, Any] = {**one.fields, "chunks": one.fields["chunks"] + two.fields["chunks"]}
        two.fields, two.usual, two.title = fields, one.usual, one.title or two.title
        two.made_from += one.made_from
    users = _users(draft)
    for key in draft.needed():
        node = draft.nodes[key]
        goes_on = any(draft.nodes[user].kind == "extend" for user in users.get(key, ()))
        has_voice = "speech" in node.fields or _inherited(draft, node, "speech") is not None
        if node.kind != "extend" or goes_on or not has_voice:
            continue
        changes.append(
            f"{node.fields['chunks']} copies of Extend became one extend with chunks: auto: as many as the voice needs"
        )
        node.fields["chunks"] = "auto"
        node.fields.pop("seed", None)
        changes.append("each chunk's seed follows from the first one's: one more for every chunk")
    return changes


def _repeated(draft: Draft) -> tuple[int, int] | None:
    """Return an extend and the one that continues it with the same settings, where nothing else uses the first."""
    users = _users(draft)
    for key in draft.needed():
        node = draft.nodes[key]
        below = node.fields.get("video")
        if node.kind != "extend" or not isinstance(below, NodeRef) or draft[below].kind != "extend":
            continue
        if node.fields.keys() <= {"video", "chunks", "seed"} and len(users[below.key]) == 1:
            return below.key, key
    return None


def _users(draft: Draft) -> dict[int, list[int]]:
    users: dict[int, list[int]] = {}
    for key in draft.needed():
        for used in draft.nodes[key].refs():
            users.setdefault(used, []).append(key)
    return users
