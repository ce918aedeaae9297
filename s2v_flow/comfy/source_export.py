"""What stands before the chunks, and between frames, as ComfyUI's nodes: taken from the plan."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from s2v_flow.comfy.catalog import classes
from s2v_flow.comfy.graph import ComfyNode, Link, Value
from s2v_flow.comfy.scaling import SCALERS
from s2v_flow.comfy.sources import WHOLE_SECONDS
from s2v_flow.graph.node import Node, NodeSpec, Plan, PlanNode
from s2v_flow.graph.ports import Source
from s2v_flow.nodes.chunk import Chunk

# Kinds that are one node there: its class, and what each of its inputs takes: a port's source, or a field.
_PLAIN: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "load_text_encoder": ("CLIPLoader", {"clip_name": "checkpoint"}),
    "load_audio_encoder": ("AudioEncoderLoader", {"audio_encoder_name": "checkpoint"}),
    "load_vae": ("VAELoader", {"vae_name": "checkpoint"}),
    "load_image": ("LoadImage", {"image": "file"}),
    "encode_audio": ("AudioEncoderEncode", {"audio_encoder": "audio_encoder", "audio": "audio"}),
    "image_from_frames": ("ImageFromBatch", {"image": "frames", "batch_index": "index"}),
    "frames_from_image": ("RepeatImageBatch", {"image": "image", "amount": "count"}),
    "frames_concat": ("ImageBatch", {"image1": "first", "image2": "second"}),
    "audio_concat": ("AudioConcat", {"audio1": "first", "audio2": "second"}),
}
_PRECISION = ("precision", "auto", "precision has no equivalent: ComfyUI chooses by its own options")
# Fields by kind, with the value that ComfyUI has, and what to say of any other.
_LOST: Mapping[str, tuple[tuple[str, Any, str], ...]] = {
    **dict.fromkeys(("load_text_encoder", "load_audio_encoder", "load_vae"), (_PRECISION,)),
    "load_diffusion_model": (
        _PRECISION,
        ("fp8_rounding", "scaled", "ComfyUI of today does not round the biases of fp8-scaled files any more"),
    ),
    "load_image": (
        ("background", "ignore", "background has no equivalent: ComfyUI shows the colours under transparent parts"),
    ),
    "load_audio": (("fade", 0, "fade has no equivalent"),),
    "encode_audio": (
        ("warmup_frames", 0, "warmup_frames has no equivalent: the video begins with the sound's first frame"),
        ("final_norm", True, "final_norm: false has no equivalent"),
    ),
    "encode_image": (("conditioning", "comfyui", "the portrait is shrunk without smoothing in ComfyUI"),),
    "chunk": (("conditioning", "comfyui", "conditioning: official has no equivalent: numbers are as in ComfyUI"),),
    "save_video": (("preset", "medium", "preset has no equivalent: SaveVideo chooses"),),
}


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
            if value is None and item.is_widget and item.type != "READ":
                value = item.default
            if value is not None:
                inputs[item.name] = value if isinstance(value, (Link, Value)) else Value(value)
        inputs |= {name: Value(value) for name, value in given.items() if "." in name}  # what a choice brings along
        assert inputs.keys() >= given.keys(), f"{class_type} has no {', '.join(given)}"
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

    def note_lost(self, node: Node) -> None:
        """Record which of a node's fields ComfyUI has nothing for."""
        for field, usual, text in _LOST.get(node.kind, ()):
            if getattr(node, field) != usual:
                self.note(text)


class SourceExporter:
    """Exports a plan's nodes when something asks for them, each once."""

    def __init__(self, plan: Plan, sheet: Sheet) -> None:
        self._plan = plan
        self._sheet = sheet
        self._done: dict[str, Link] = {}
        self._models: dict[tuple[str, float, float], Link] = {}
        self.frames: dict[str, Link] = {}  # of `decode` nodes
        self._writers: Mapping[str, Callable[[PlanNode, Any], Link]] = {
            "load_audio": self._audio,
            "load_video": self._clip,
            "encode_text": lambda planned, node: self._add(
                planned, "CLIPTextEncode", clip=self.one(planned, "text_encoder"), text=_escaped(node)
            ),
            # the chunk's own node scales and encodes it
            "encode_image": lambda planned, node: self.one(planned, "image"),
            **dict.fromkeys(("image_scale", "frames_scale"), self._scaled),
            "frames_slice": self._slice,
            "frames_delay": self._delay,
            "decode_frames": lambda planned, node: self.frames[planned.name],
            **dict.fromkeys(_PLAIN, self._plain),
        }

    def one(self, planned: PlanNode, key: str) -> Link:
        """Return the link to one input of a plan node."""
        return self._link(self._source(planned, key))

    def title(self, planned: PlanNode, key: str) -> str | None:
        """Return the name of the node that gives an input, unless it is what an import calls it anyway."""
        name = self._source(planned, key).node if key in planned.inputs else key
        return None if name == key else name

    def _giver(self, planned: PlanNode, key: str) -> PlanNode:
        return self._plan.node(self._source(planned, key).node)

    def _source(self, planned: PlanNode, key: str) -> Source:
        given = planned.inputs[key]
        if key == "speech" and not isinstance(given, Source):
            return given[0]  # its segments are of one node
        assert isinstance(given, Source), f"{key} is a list"
        return given

    def _link(self, source: Source) -> Link:
        pending = [source.node]
        while source.node not in self._done:  # what it takes comes first, however long the way
            planned = self._plan.node(pending[-1])
            before = [part.node for part in planned.sources() if self._is_ours(part.node)]
            if planned.node.kind != "decode_frames" and before:
                pending.append(before[0])
                continue
            self._sheet.note_lost(planned.node)
            self._done[planned.name] = self._writers[planned.node.kind](planned, planned.node)
            pending.pop()
        return self._done[source.node]

    def _is_ours(self, name: str) -> bool:
        return name not in self._done and self._plan.node(name).node.kind in self._writers

    def text(self, spec: NodeSpec) -> Link:
        """Export a prompt that the plan leaves out because nothing reads it."""
        if spec.name not in self._done:
            node: Any = spec.node
            loader = next(item for item in self._plan.nodes if item.node.kind == "load_text_encoder")
            clip = self._link(Source(loader.name, "text_encoder"))
            self._done[spec.name] = self._sheet.add("CLIPTextEncode", spec.name, clip=clip, text=_escaped(node))
        return self._done[spec.name]

    def model(self, planned: PlanNode, chunk: Chunk) -> Link:
        """Return a chunk's model with its LoRAs, its shift and its step cache."""
        loader = self._giver(planned, "model")
        key = loader.name, chunk.shift, chunk.step_cache_threshold if chunk.step_cache != "off" else 0.0
        if key not in self._models:
            node: Any = loader.node
            link = self._done.get(loader.name)
            if link is None:
                link = self._sheet.add("UNETLoader", loader.name, unet_name=node.checkpoint)
                for lora in node.loras:
                    values = {"lora_name": lora.file, "strength_model": lora.strength}
                    link = self._sheet.add("LoraLoaderModelOnly", lora.id, model=link, **values)
                self._done[loader.name] = link
            self._sheet.note_lost(node)
            link = self._sheet.add("ModelSamplingSD3", None, model=link, shift=chunk.shift)
            if chunk.step_cache == "velocity":
                self._sheet.note("step_cache: velocity has no equivalent: EasyCache stands for it")
            if chunk.step_cache != "off":
                link = self._sheet.add("EasyCache", None, model=link, reuse_threshold=chunk.step_cache_threshold)
            self._models[key] = link
        return self._models[key]

    def vae_of(self, planned: PlanNode) -> Link:
        """Return the VAE that a chunk's inputs were encoded with, or any: ComfyUI wants one connected."""
        for key in ("reference", "control", "motion"):
            if key in planned.inputs:
                return self.one(self._giver(planned, key), "vae")
        loader = next((item for item in self._plan.nodes if item.node.kind == "load_vae"), None)
        if loader is None:
            return self._sheet.shared("VAELoader", "vae", vae_name="wan_2.1_vae.safetensors")
        return self._link(Source(loader.name, "vae"))

    def control(self, planned: PlanNode, offset: int, num_latent_frames: int) -> Link | None:
        """Return a chunk's pose frames. ComfyUI takes the first ones of what it gets: later ones are cut out."""
        encoder = self._giver(planned, "control")
        given = self._giver(encoder, "control_video")
        node: Any = given.node
        if given.node.kind == "frames_slice" and offset and node.length == 1 and node.start == 0:
            return None  # its one frame is long past
        if given.node.kind == "frames_delay" and node.count == offset:
            return self.one(given, "frames")
        link = self.one(encoder, "control_video")
        if not offset:
            return link
        length = 4 * (num_latent_frames - 1) + 1
        return self._sheet.add("ImageFromBatch", None, image=link, batch_index=offset, length=length)

    def motion(self, planned: PlanNode) -> Link:
        """Return the clip whose motion the first chunk continues."""
        return self.one(self._giver(planned, "motion"), "motion_video")

    def _add(self, planned: PlanNode, class_type: str, **given: Any) -> Link:
        return self._sheet.add(class_type, planned.name, **given)

    def _plain(self, planned: PlanNode, node: Any) -> Link:
        class_type, takes = _PLAIN[node.kind]
        given = {
            name: self.one(planned, key) if key in planned.inputs else getattr(node, key) for name, key in takes.items()
        }
        return self._add(planned, class_type, **given)

    def _audio(self, planned: PlanNode, node: Any) -> Link:
        """Export a sound with its part, its volume, and the silence around it."""
        link = self._trimmed(planned, node)
        if node.volume != round(node.volume):
            self._sheet.note(f"volume {node.volume:g} is rounded: AudioAdjustVolume takes whole decibels")
        if round(node.volume):
            link = self._add(planned, "AudioAdjustVolume", audio=link, volume=round(node.volume))
        for seconds, direction in ((node.lead, "before"), (node.tail, "after")):
            if seconds:
                silent = self._sheet.add("EmptyAudio", None, duration=float(seconds))
                link = self._sheet.add("AudioConcat", None, audio1=link, audio2=silent, direction=direction)
        return link

    def _trimmed(self, planned: PlanNode, node: Any) -> Link:
        link = self._add(planned, "LoadAudio", audio=node.file)
        if not node.start and node.end is None and node.max_duration is None:
            return link
        lengths = [WHOLE_SECONDS if node.max_duration is None else node.max_duration]
        lengths += [] if node.end is None else [node.end - node.start]
        values = {"start_index": float(node.start), "duration": float(min(lengths))}
        return self._add(planned, "TrimAudioDuration", audio=link, **values)

    def _clip(self, planned: PlanNode, node: Any) -> Link:
        self._sheet.note("ComfyUI takes a video's frames one by one, load_video 16 a second")
        video = self._add(planned, "LoadVideo", file=node.file)
        return self._sheet.add("GetVideoComponents", None, video=video)

    def _scaled(self, planned: PlanNode, node: Any) -> Link:
        image = self.one(planned, "frames" if node.kind == "frames_scale" else "image")
        values: dict[str, Any] = {"image": image, "upscale_method": node.method}
        for class_type, (widget, field) in SCALERS.items():
            if getattr(node, field) is not None:
                values |= {"resolution_steps": node.multiple_of} if field == "megapixels" else {}
                return self._add(planned, class_type, **values, **{widget: getattr(node, field)})
        sides = {"width": node.width or 0, "height": node.height or 0}
        return self._add(planned, "ImageScale", **values, **sides, crop=node.crop)

    def _slice(self, planned: PlanNode, node: Any) -> Link:
        image = self.one(planned, "frames")
        return self._add(planned, "ImageFromBatch", image=image, batch_index=node.start, length=node.length or 4096)

    def _delay(self, planned: PlanNode, node: Any) -> Link:
        self._sheet.note("frames_delay has no equivalent but in an extend's control_video: it is left out")
        return self.one(planned, "frames")


def _escaped(node: Any) -> str:
    """Return a prompt as ComfyUI reads it: a plain one's brackets escaped, so that they are no weights."""
    text: str = node.text
    return text if node.prompt_syntax == "comfyui" else re.sub(r"([()])", r"\\\1", text)
