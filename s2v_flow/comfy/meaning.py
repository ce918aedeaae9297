"""What the outputs of ComfyUI's nodes mean in a recipe's words, and how translators get at their inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from s2v_flow.comfy.catalog import Input, as_type, classes
from s2v_flow.comfy.graph import ComfyNode, Graph, Link, Mistakes, Value
from s2v_flow.nodes.scale import ImageScale
from s2v_flow.wording import shown


@dataclass(frozen=True)
class NodeRef:
    """A reference to a draft's node."""

    key: int


@dataclass
class DraftNode:
    """A recipe's node to be. `usual` is the name it gets unless it has a title; `made_from` are ComfyUI's ids."""

    kind: str
    usual: str
    fields: dict[str, Any]
    title: str | None = None
    made_from: list[str] = field(default_factory=list)

    def refs(self) -> list[int]:
        """Return the keys of the nodes it refers to."""
        return [value.key for value in self.fields.values() if isinstance(value, NodeRef)]


@dataclass
class Draft:
    """All nodes by key, each after those it refers to, and which of them write files."""

    nodes: dict[int, DraftNode] = field(default_factory=dict)
    sinks: list[int] = field(default_factory=list)
    _known: dict[str, int] = field(default_factory=dict)

    def add(
        self, kind: str, usual: str, fields: Mapping[str, Any], *sources: ComfyNode, titled: bool = True
    ) -> NodeRef:
        """Add a node, or return the one that is there already and says the same. Fields that are None are left out.

        `sources`: What it is made of, the one whose title it takes first.
        """
        given = {name: value for name, value in fields.items() if value is not None}
        identity = repr((kind, sorted(given.items(), key=lambda item: item[0])))
        key = self._known.get(identity)
        title = sources[0].title if titled else None
        if key is None:
            key = self._known[identity] = len(self.nodes)
            self.nodes[key] = DraftNode(kind, usual, given, title)
        node = self.nodes[key]
        node.made_from += [source.id for source in sources if source.id not in node.made_from]
        return NodeRef(key)

    def add_sink(self, kind: str, usual: str, fields: Mapping[str, Any], source: ComfyNode) -> None:
        """Add a node that writes a file."""
        key = len(self.nodes)
        given = {name: value for name, value in fields.items() if value is not None}
        self.nodes[key] = DraftNode(kind, usual, given, source.title, [source.id])
        self.sinks.append(key)

    def __getitem__(self, ref: NodeRef) -> DraftNode:
        """Return the node that is referred to."""
        return self.nodes[ref.key]

    def needed(self) -> list[int]:
        """Return the keys of the nodes that the sinks need, in the order in which they were added."""
        wanted, pending = set(self.sinks), list(self.sinks)
        while pending:
            new = [key for key in self.nodes[pending.pop()].refs() if key not in wanted]
            wanted.update(new)
            pending += new
        return sorted(wanted)


MeaningT = TypeVar("MeaningT")
_SIZED = ("image", "frames", "first", "latent", "video", "reference")  # fields that lead to what has the same size


@dataclass(frozen=True)
class Made:
    """Something that one recipe node gives; `type` is its port's type."""

    ref: NodeRef
    type: str


@dataclass(frozen=True)
class Model:
    """A diffusion model on its way through LoRAs and settings. A LoRA is its file, its strength and its title."""

    checkpoint: Value
    source: ComfyNode
    loras: tuple[tuple[Value, Value, str | None], ...] = ()
    shift: Value = field(default_factory=lambda: Value(8.0))  # what ComfyUI takes for Wan unless told
    threshold: Value | None = None  # EasyCache's


@dataclass(frozen=True)
class FramesMade:
    """Frames; `total` is their number, where the workflow says it; `is_decoded` if nothing was taken away yet."""

    ref: NodeRef
    total: int | None = None
    is_decoded: bool = False


@dataclass(frozen=True)
class Video:
    """Frames and sound before they are saved."""

    frames: Any
    audio: Made | None
    fps: Value


@dataclass(frozen=True)
class Latent:
    """A video's latent. `settings` is what an `extend` of it inherits.

    `cut_of` tells which latent it is a piece of (ref, axis, index, amount), `doubled` which one it is with the first
    frame doubled, `piece` that it is the last chunk of a video: (what was there before, the video with it).
    """

    ref: NodeRef
    num_frames: int | None = None
    size: tuple[Value, Value] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    cut_of: tuple[NodeRef, str, int, int] | None = None
    doubled: Latent | None = None
    piece: tuple[NodeRef, Latent] | None = None


@dataclass(frozen=True)
class Prepared:
    """What WanSoundImageToVideo or its Extend gives as a chunk's empty latent; `base` is the video it continues."""

    source: ComfyNode
    base: Latent | None
    texts: Mapping[str, Any]
    inputs: Mapping[str, Any]
    length: Value
    size: tuple[Value, Value] | None


@dataclass(frozen=True)
class PreparedText:
    """The conditioning of a prepared chunk."""

    prepared: Prepared
    role: str


@dataclass(frozen=True)
class Zeroed:
    """A conditioning set to zero."""


@dataclass(frozen=True)
class Noise:
    """A seed."""

    seed: Value


@dataclass(frozen=True)
class Solver:
    """A sampler's name."""

    name: Value


@dataclass(frozen=True)
class Sigmas:
    """Noise levels: a scheduler on a model, with a number of steps."""

    scheduler: Value
    steps: Value
    shift: Value


@dataclass(frozen=True)
class Guider:
    """Guidance: a model, its conditionings and the scale."""

    model: Model
    positive: Any
    negative: Any
    cfg: Value


@dataclass(frozen=True)
class UnknownSide:
    """A width or height that depends on a picture which is not at hand; `guess` is what stands in for it."""

    file: str
    guess: int | None


UNKNOWN = object()  # an output that recipes have no word for


class SkipError(Exception):
    """This node cannot be translated; why has been recorded already."""


class Context:
    """What a translator of one node may use."""

    def __init__(self, graph: Graph, draft: Draft, mistakes: Mistakes, folder: Path) -> None:
        self.graph = graph
        self._folder = folder
        self.draft = draft
        self.mistakes = mistakes
        self.meanings: dict[Link, Any] = {}
        self.skipped: set[str] = set()
        self._counts: dict[str, int] = {}

    def refuse(self, node: ComfyNode, message: str, fix: str | None = None) -> SkipError:
        """Record that something in a node cannot be said in a recipe; return what is to be raised."""
        self.mistakes.add("W004", message, node, fix)
        return SkipError()

    def value(self, node: ComfyNode, name: str, type_: str | None = None) -> Value:
        """Return an input's value, as the type that the class asks for; `type_` if only a choice brings it along."""
        item = classes()[node.type].input(name) if type_ is None else Input(name, type_, is_widget=True)
        given = node.inputs.get(name, Value(item.default))
        if isinstance(given, Link):
            found = self._follow(given)
            if isinstance(found, UnknownSide):
                found = self._guessed(node, item, found)
            if not isinstance(found, Value):
                raise self.refuse(node, f"{name} is computed by a node that recipes do not know", "type the value in")
            given = found
        try:
            value = as_type(given.value, item.type)
        except (ValueError, OverflowError):
            raise self.refuse(node, f"{name}: {item.type} expected, got {shown(given.value)}") from None
        return Value(value, given.knob, given.title)

    def _guessed(self, node: ComfyNode, item: Input, found: UnknownSide) -> Value:
        what = f"{item.name} is taken from the size of {found.file}, which is not in the workflow"
        if node.type != "WanSoundImageToVideo":
            raise self.refuse(node, what, f"put {found.file} beside the workflow, or type the number in")
        guess = found.guess or item.default
        self.mistakes.warn(f"{item.name}: {node.described()}: {what}: {guess} stands in the recipe; set it as you want")
        return Value(guess)

    def size_of(self, ref: NodeRef) -> tuple[int, int] | None:
        """Return the width and height of what a draft's node gives, where the workflow or a picture beside it tells."""
        scalers = []
        while True:
            node = self.draft[ref]
            fields = {name: getattr(value, "value", value) for name, value in node.fields.items()}
            if fields.get("width") and fields.get("height"):
                size = int(fields["width"]), int(fields["height"])
                break
            if node.kind == "load_image":
                found = picture_size(self._folder, fields["file"])
                if found is None:
                    return None
                size = found
                break
            if node.kind.endswith("_scale"):
                scalers.append({name: fields[name] for name in fields if name in ImageScale.model_fields})
            below = [fields[name] for name in _SIZED if isinstance(fields.get(name), NodeRef)]
            if not below or fields.get("axis", "t") != "t":
                return None
            ref = below[0]
        for given in reversed(scalers):
            size = ImageScale.model_construct(**given).target(*size)
        return size

    def file_of(self, ref: NodeRef) -> str:
        """Return the file that a picture comes from, for messages."""
        while True:
            fields = self.draft[ref].fields
            if "file" in fields:
                return str(fields["file"].value)
            below = [fields[name] for name in _SIZED if isinstance(fields.get(name), NodeRef)]
            if not below:
                return "a picture"
            ref = below[0]

    def optional(self, node: ComfyNode, name: str) -> Any:
        """Return what a linked input means, or None where it is not linked."""
        given = node.inputs.get(name)
        return self._follow(given) if isinstance(given, Link) else None

    def meaning(self, node: ComfyNode, name: str, type_: type[MeaningT]) -> MeaningT:
        """Return what a linked input means; it must be linked, to something of a type that can stand there."""
        if not isinstance(node.inputs.get(name), Link):
            why = "comes from a node that is switched off" if name in node.lacking else "is not connected"
            raise self.refuse(node, f"{name} {why}", f"connect {name}, or remove the node")
        found = self.optional(node, name)
        if not isinstance(found, type_):
            raise self.refuse(node, f"{name} takes something that recipes cannot express here")
        return found

    def port(self, node: ComfyNode, name: str, type_: str) -> NodeRef:
        """Return the recipe node of a required input, of one port type."""
        return self.typed(node, name, self.meaning(node, name, object), type_)

    def typed(self, node: ComfyNode, name: str, found: Any, type_: str) -> NodeRef:
        """Return the recipe node of a meaning, turning images into frames and back where needed."""
        if isinstance(found, Made) and found.type == type_:
            return found.ref
        if isinstance(found, FramesMade) and type_ == "frames":
            return found.ref
        if isinstance(found, FramesMade) and type_ == "image":
            return self.draft.add("image_from_frames", "still", {"frames": found.ref}, node, titled=False)
        if isinstance(found, Made) and found.type == "image" and type_ == "frames":
            return self.draft.add("frames_from_image", "still_frames", {"image": found.ref}, node, titled=False)
        raise self.refuse(node, f"{name}: a recipe needs {type_.replace('_', ' ')} here")

    def numbered(self, prefix: str) -> int:
        """Return the number that ComfyUI would give the next file of this prefix."""
        self._counts[prefix] = self._counts.get(prefix, 0) + 1
        return self._counts[prefix]

    def _follow(self, link: Link) -> Any:
        if link.node in self.skipped:
            raise SkipError
        return self.meanings.get(link, UNKNOWN)


Translator = Callable[[Context, ComfyNode], tuple[Any, ...]]


def picture_size(folder: Path, file: str) -> tuple[int, int] | None:
    """Return the width and height of a picture beside the workflow or in an `input` folder there; None without one."""
    from PIL import Image

    name = Path(file)
    if name.is_absolute() or ".." in name.parts:
        return None
    for place in (folder, folder / "input", Path(), Path("input")):
        try:
            with Image.open(place / name) as image:
                turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)  # as cameras do
                return (image.height, image.width) if turned else image.size
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            continue
    return None
