"""`s2vflow export`: a recipe, as planned, becomes a ComfyUI workflow."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from s2v_flow.comfy.catalog import AUTHORS_SAMPLERS, ComfyClass, classes
from s2v_flow.comfy.graph import ComfyNode, Link, Value
from s2v_flow.comfy.source_export import Sheet, SourceExporter
from s2v_flow.errors import Diagnostic, RecipeError
from s2v_flow.graph.node import Plan, PlanNode
from s2v_flow.nodes.chunk import Chunk
from s2v_flow.nodes.edit import piece
from s2v_flow.nodes.table import NODE_KINDS
from s2v_flow.recipe.load import Recipe
from s2v_flow.recipe.params import whole_reference
from s2v_flow.recipe.tree import plain
from s2v_flow.sampling import SAMPLERS

Format = Literal["api", "editor"]
_ALL_FRAMES = 4096  # ImageFromBatch takes no more
_SAFE_SEED = 2**53  # the editor's numbers are JavaScript's
_KNOBS = {"steps": "PrimitiveInt", "cfg": "PrimitiveFloat", "length": "PrimitiveInt"}
_LATENT_KINDS = ("sample", "extend", "load_latent", "latent_concat", "latent_cut")
_SINKS = ("save_video", "save_images", "save_latent")
_OWN_KINDS = frozenset(kind.kind for kind in NODE_KINDS)
_COLUMN, _GAP, _ROW = 400, 60, 26
_HEIGHTS = {"CLIPTextEncode": 120, "LoadImage": 260, "LoadAudio": 60, "SaveVideo": 240}


def export_workflow(recipe: Recipe, plan: Plan, format_: Format) -> tuple[str, tuple[str, ...]]:
    """Return a workflow's JSON text, and what ComfyUI will do differently; the plan says how many chunks there are.

    Raises:
        RecipeError: With everything that ComfyUI has nothing for.
    """
    exporter = _Exporter(recipe, plan)
    sheet = exporter.export()
    if format_ == "editor" and any(seed >= _SAFE_SEED for seed in exporter.seeds):
        sheet.note("a seed is larger than ComfyUI's editor can hold exactly; the API format keeps it")
    document = write_prompt(sheet.nodes) if format_ == "api" else write_editor(sheet.nodes)
    return json.dumps(document, ensure_ascii=False, indent=2) + "\n", tuple(sheet.notes)


class _Exporter:
    """Walks over the recipe's nodes; what each chunk is sampled with, it takes from the plan."""

    def __init__(self, recipe: Recipe, plan: Plan) -> None:
        self._recipe = recipe
        self._plan = plan
        self._sheet = Sheet()
        self._sources = SourceExporter(plan, self._sheet)
        self._videos: dict[str, tuple[Link, int]] = {}  # recipe node -> its latent and the latent frames
        self._mistakes: list[Diagnostic] = []
        self._written: Mapping[str, Any] = plain(recipe.document)["nodes"]
        self._chunks: dict[str, list[tuple[PlanNode, Chunk]]] = defaultdict(list)  # by recipe node
        for planned in plan.nodes:
            if isinstance(planned.node, Chunk):
                self._chunks[planned.recipe_node].append((planned, planned.node))
        self.seeds = [chunk.seed for chunks in self._chunks.values() for _, chunk in chunks]

    def export(self) -> Sheet:
        """Return the sheet with all nodes."""
        needed = self._needed()
        if not needed:
            message = "the recipe writes no file, so ComfyUI would have nothing to do"
            fix = "add a save_video node"
            raise RecipeError(message, diagnostics=(Diagnostic("W001", message, fix=fix),))
        self._refuse(needed)
        for name in needed:
            node = self._recipe.nodes[name].node
            if node.kind in _LATENT_KINDS:
                self._videos[name] = self._video(name, node)
            elif node.kind == "decode":
                self._sources.frames[name] = self._decoded(name, node)
            elif node.kind in _SINKS:
                self._save(name, node)
        return self._sheet

    def _needed(self) -> list[str]:
        """Return the recipe's nodes that the sinks need, each after those it refers to."""
        import networkx as nx

        nodes = {name: spec.node for name, spec in self._recipe.nodes.items()}
        takes = nx.DiGraph([(name, ref.node) for name, node in nodes.items() for ref in node.refs().values()])
        takes.add_nodes_from(nodes)
        sinks = [name for name, node in nodes.items() if node.is_sink]
        return list(dict.fromkeys(name for sink in sinks for name in nx.dfs_postorder_nodes(takes, sink)))

    def _refuse(self, needed: list[str]) -> None:
        """Refuse what ComfyUI has nothing for, all of it at once."""
        lacks_voice = any(item.kind == "audio" for item in self._plan.missing)
        for name in needed:
            node = self._recipe.nodes[name].node
            if getattr(node, "motion", None) == "pixels":
                self._mistake(name, "motion", "ComfyUI hands motion over as latents only", "set motion: latent")
            if node.kind not in _OWN_KINDS:
                self._mistake(name, "kind", f"ComfyUI has no {node.kind}: it is another package's", "leave it out")
            if node.kind == "speak":
                self._mistake(name, "text", "ComfyUI has no voice from text", "save the voice, and load it instead")
            if getattr(node, "init_first_frame", False):
                self._mistake(name, "init_first_frame", "ComfyUI has no init_first_frame", "set it to false")
            sampler = getattr(node, "sampler", None)
            if sampler is not None and sampler not in SAMPLERS:
                self._mistake(name, "sampler", f"ComfyUI has no {sampler}: it is another package's", "try uni_pc")
            elif sampler in AUTHORS_SAMPLERS:
                self._mistake(name, "sampler", "ComfyUI does not have the authors' samplers", "try uni_pc, shift 8")
            if getattr(node, "chunks", None) == "auto" and not self._chunks[name] and lacks_voice:
                fix = "put the voice's file where it is looked for (--input-dir), or give chunks a number"
                self._mistake(name, "chunks", "chunks: auto needs the voice's length, and its file is missing", fix)
        if self._mistakes:
            raise RecipeError("ComfyUI cannot run this recipe", diagnostics=tuple(self._mistakes))

    def _mistake(self, name: str, field: str, message: str, fix: str) -> None:
        self._mistakes.append(self._recipe.nodes[name].diagnostic(field, "W010", message, fix))

    def _video(self, name: str, node: Any) -> tuple[Link, int]:
        """Export a node that gives a latent."""
        if node.kind == "load_latent":
            return self._sheet.add("LoadLatent", name, latent=node.file), self._loaded_frames(name)
        if node.kind == "latent_concat":
            (first, one), (second, two) = self._videos[node.first.node], self._videos[node.second.node]
            link = self._sheet.add("LatentConcat", name, samples1=first, samples2=second, dim=node.axis)
            return link, one + two if node.axis == "t" else one
        if node.kind == "latent_cut":
            whole, count = self._videos[node.latent.node]
            values = {"dim": node.axis, "index": node.index, "amount": node.amount}
            link = self._sheet.add("LatentCut", name, samples=whole, **values)
            return link, piece(count, node.index, node.amount)[1] if node.axis == "t" else count
        video = None if node.kind == "sample" else self._videos[node.video.node]
        several = len(self._chunks[name]) > 1
        for number, (planned, chunk) in enumerate(self._chunks[name], start=1):
            video = self._chunk(name, f"{name} {number}" if several else name, planned, chunk, video)
        assert video is not None, "a sample has one chunk"
        return video

    def _loaded_frames(self, name: str) -> int:
        """Return a loaded latent's frames, from where the first chunk after it stands; 0 where nothing tells."""
        for spec in self._recipe.nodes.values():
            refs = spec.node.refs()
            if spec.node.kind == "extend" and refs["video"].node == name and self._chunks[spec.name]:
                return self._chunks[spec.name][0][1].audio_offset // 4
        return 0

    def _chunk(
        self, name: str, title: str, planned: PlanNode, chunk: Chunk, video: tuple[Link, int] | None
    ) -> tuple[Link, int]:
        """Export one chunk: its preparation, its sampler, and the joining with what is there."""
        self._sheet.note_lost(chunk)
        sources = self._sources
        inputs: dict[str, Any] = {"positive": sources.one(planned, "positive")}
        inputs["negative"] = self._negative(name, planned) or inputs["positive"]
        inputs["vae"] = sources.vae_of(planned)
        for key, target in (("speech", "audio_encoder_output"), ("reference", "ref_image")):
            if key in planned.inputs:
                inputs[target] = sources.one(planned, key)
        if "control" in planned.inputs:
            inputs["control_video"] = sources.control(planned, chunk.audio_offset, chunk.num_latent_frames)
        length = 4 * (chunk.num_latent_frames - 1) + 1
        inputs["length"] = self._knob(name, "length", length)
        if video is None:
            reference = sources.title(planned, "reference")
            if "motion" in planned.inputs:
                inputs["ref_motion"] = sources.motion(planned)
            size = {"width": chunk.width, "height": chunk.height}
            prepared = self._sheet.add("WanSoundImageToVideo", reference, **inputs, **size, batch_size=1)
        else:
            prepared = self._sheet.add("WanSoundImageToVideoExtend", None, **inputs, video_latent=video[0])
        sampled = self._sheet.add(
            "KSampler",
            title,
            model=sources.model(planned, chunk),
            positive=prepared,
            negative=Link(prepared.node, 1),
            latent_image=Link(prepared.node, 2),
            seed=chunk.seed,
            steps=self._knob(name, "steps", chunk.steps),
            cfg=self._knob(name, "cfg", chunk.cfg),
            sampler_name=chunk.sampler,
            scheduler=chunk.scheduler,
            denoise=1.0,
        )
        if video is None:
            return sampled, chunk.num_latent_frames
        joined = self._sheet.add("LatentConcat", None, samples1=video[0], samples2=sampled, dim="t")
        return joined, video[1] + chunk.num_latent_frames

    def _giver(self, name: str, field: str) -> str:
        """Return the node that says a field: an extend itself, or one before it in the video."""
        while self._recipe.nodes[name].kind == "extend" and field not in self._written[name]:
            name = self._recipe.nodes[name].node.refs()["video"].node
        return name

    def _knob(self, name: str, field: str, value: Any) -> Link | Value:
        """Return a value, or the node that holds it for all chunks where a parameter does so in the recipe."""
        param = whole_reference(self._written[self._giver(name, field)].get(field))
        is_shared = sum(len(chunks) for chunks in self._chunks.values()) > 1
        if param is None or not is_shared or self._recipe.params[param] != value:
            return Value(value)
        return self._sheet.shared(_KNOBS[field], param, value=value)

    def _negative(self, name: str, planned: PlanNode) -> Link | None:
        """Return the negative prompt; the plan leaves it out where cfg is 1, ComfyUI wants one connected."""
        if "negative" in planned.inputs:
            return self._sources.one(planned, "negative")
        ref = self._recipe.nodes[self._giver(name, "negative")].node.refs().get("negative")
        return None if ref is None else self._sources.text(self._recipe.nodes[ref.node])

    def _decoded(self, name: str, node: Any) -> Link:
        """Export `decode`: the first latent frame doubled where that is wanted, and frames dropped at the start."""
        planned: Any = self._plan.node(name)
        latent, count = self._videos[node.latent.node]
        is_doubled = node.prefix != "none"
        if node.prefix == "reference":
            self._sheet.note("prefix: reference has no equivalent: the first latent frame is doubled instead")
        if is_doubled:
            first = self._sheet.add("LatentCut", None, samples=latent, dim="t", index=0, amount=1)
            latent = self._sheet.add("LatentConcat", None, samples1=first, samples2=latent, dim="t")
        frames = self._sheet.add("VAEDecode", name, samples=latent, vae=self._sources.one(planned, "vae"))
        drop = planned.node.drop_frames
        if node.drop_frames == "auto":
            drop = 1 if is_doubled else 0  # the warm-up over silence is not exported
        total = 4 * (count + is_doubled) - 3 - drop if count else None
        takes_all = node.trim == "none" or planned.facts["frames"] is None
        wanted = _ALL_FRAMES if takes_all else min(planned.node.num_frames, _ALL_FRAMES)
        if takes_all and (total or 0) > _ALL_FRAMES:
            self._sheet.note(f"ImageFromBatch takes {_ALL_FRAMES} frames at most: the video will be cut")
        if drop == 0 and (takes_all or wanted == total):
            return frames
        return self._sheet.add("ImageFromBatch", name, image=frames, batch_index=drop, length=wanted)

    def _save(self, name: str, node: Any) -> None:
        if node.kind == "save_latent":
            samples = self._videos[node.latent.node][0]
            self._sheet.add("SaveLatent", name, samples=samples, filename_prefix=_prefix(node.file, ".latent"))
            return
        planned = self._plan.node(name)
        images = self._sources.one(planned, "frames")
        if node.kind == "save_images":
            self._sheet.add("SaveImage", name, images=images, filename_prefix=_prefix(node.file, ".png"))
            return
        self._sheet.note_lost(node)
        quality = {} if node.crf == type(node).model_fields["crf"].default else _quality(node.crf)
        audio = {"audio": self._sources.one(planned, "audio")} if "audio" in planned.inputs else {}
        video = self._sheet.add("CreateVideo", None, images=images, **audio, fps=node.fps)
        self._sheet.add("SaveVideo", name, video=video, filename_prefix=_prefix(node.file, ".mp4"), **quality)


def _quality(crf: int) -> dict[str, Any]:
    """Return SaveVideo's choices within choices (ComfyUI 0.38 and later; earlier ones take what they know)."""
    encoding = {"format.codec.encoding": "re-encode", "format.codec.encoding.crf": float(crf)}
    return {"format": "mp4", "format.codec": "h264", **encoding}


def _prefix(file: str, suffix: str) -> str:
    """Return an output's name without what ComfyUI puts behind it."""
    stem = file.removesuffix(suffix)
    return stem[:-7] if stem.endswith("_00001_") else stem


def write_prompt(nodes: Sequence[ComfyNode]) -> dict[str, Any]:
    """Return the API format."""
    document: dict[str, Any] = {}
    for node in nodes:
        known = classes()[node.type]
        inputs: dict[str, Any] = {}
        for name, given in node.inputs.items():
            if isinstance(given, Link):
                inputs[name] = [given.node, given.slot]
            elif "." in name or known.input(name).type != "ANY" or given.value in ("auto", "mp4"):
                inputs[name] = given.value  # buttons and players are not sent
        document[node.id] = {"inputs": inputs, "class_type": node.type, "_meta": {"title": node.title or known.title}}
    return document


def write_editor(nodes: Sequence[ComfyNode]) -> dict[str, Any]:
    """Return the editor's format: columns from left to right, each node right of what it takes."""
    places = _places(nodes)
    links: list[list[Any]] = []
    outgoing: dict[Link, list[int]] = {}
    written = []
    for order, node in enumerate(nodes):
        known = classes()[node.type]
        inputs: list[dict[str, Any]] = []
        for item in known.inputs:
            given = node.inputs.get(item.name)
            if item.is_widget and not isinstance(given, Link):
                continue
            entry: dict[str, Any] = {"name": item.name, "type": item.type, "link": None}
            entry |= {"shape": 7} if item.is_optional else {}
            entry |= {"widget": {"name": item.name}} if item.is_widget else {}
            if isinstance(given, Link):
                entry["link"] = len(links) + 1
                links.append([len(links) + 1, int(given.node), given.slot, int(node.id), len(inputs), item.type])
                outgoing.setdefault(given, []).append(len(links))
            inputs.append(entry)
        written.append(_entry(node, known, order, inputs, places[node.id]))
    for entry in written:
        for slot, output in enumerate(entry["outputs"]):
            output["links"] = outgoing.get(Link(str(entry["id"]), slot), [])
    return {
        "revision": 0,
        "last_node_id": len(nodes),
        "last_link_id": len(links),
        "nodes": written,
        "links": links,
        "groups": [],
        "config": {},
        "extra": {},
        "version": 0.4,
    }


def _entry(
    node: ComfyNode, known: ComfyClass, order: int, inputs: list[dict[str, Any]], place: tuple[int, int]
) -> dict[str, Any]:
    entry = {
        "id": int(node.id),
        "type": node.type,
        "pos": list(place),
        "size": [_COLUMN - _GAP, _height(node) - _GAP],
        "flags": {},
        "order": order,
        "mode": 0,
        "inputs": inputs,
        "outputs": [{"name": name, "type": type_} for name, type_ in known.outputs],
        "properties": {"Node name for S&R": node.type},
        "widgets_values": _widgets(node, known),
    }
    return entry if node.title is None else {**entry, "title": node.title}


def _widgets(node: ComfyNode, known: ComfyClass) -> list[Any]:
    values: list[Any] = []
    for item in known.widgets:
        if item.type == "READ":
            continue
        given = node.inputs.get(item.name)
        values.append(given.value if isinstance(given, Value) else item.default)
        values += ["fixed"] if item.has_control else []
        parts = (part for name, part in node.inputs.items() if name.startswith(f"{item.name}."))
        values += [part.value for part in parts if isinstance(part, Value)]
    return values


def _height(node: ComfyNode) -> int:
    known = classes()[node.type]
    rows = max(len(known.links), len(known.outputs)) + len(known.widgets) + sum(w.has_control for w in known.widgets)
    return max(_HEIGHTS.get(node.type, 0), rows * _ROW) + 2 * _GAP


def _places(nodes: Sequence[ComfyNode]) -> dict[str, tuple[int, int]]:
    """Return where each node goes: its column is the length of the longest way to it."""
    columns: dict[str, int] = {}
    for node in nodes:  # each stands after those it takes from
        columns[node.id] = max((columns[link.node] + 1 for _, link in node.links()), default=0)
    bottoms: dict[int, int] = {}
    places = {}
    for node in nodes:
        column = columns[node.id]
        top = bottoms.get(column, 0)
        places[node.id] = (column * _COLUMN, top)
        bottoms[column] = top + _height(node)
    return places
