"""What the outputs of ComfyUI's nodes mean in a recipe's words, and how translators get at their inputs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
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
        key = self._known.setdefault(identity, len(self.nodes))
        node = self.nodes.setdefault(key, DraftNode(kind, usual, given, sources[0].title if titled else None))
        node.made_from += [source.id for source in sources if source.id not in node.made_from]
        return NodeRef(key)

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
    """Something that one recipe node gives; `type` is its port's type.

    Of frames, `total` is their number, where the workflow says it, and `is_decoded` if nothing was taken away yet.
    """

    ref: NodeRef
    type: str
    total: int | None = None
    is_decoded: bool = False


@dataclass(frozen=True)
class Model:
    """A diffusion model on its way through LoRAs and settings. A LoRA is its file, its strength and its title."""

    checkpoint: Value
    source: ComfyNode
    loras: tuple[tuple[Value, Value, str | None], ...] = ()
    shift: Value = field(default_factory=lambda: Value(8.0))  # what ComfyUI takes for Wan unless told
    threshold: Value | None = None  # EasyCache's


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
ZEROED = object()  # a conditioning set to zero


class SkipError(Exception):
    """This node cannot be translated; why has been recorded already."""


@dataclass(frozen=True)
class AtNode:
    """What the translator of a node may use: the node, what those before it mean, and the draft that it adds to."""

    node: ComfyNode
    graph: Graph
    mistakes: Mistakes
    folder: Path
    draft: Draft
    meanings: dict[Link, Any]
    skipped: set[str]
    counts: Counter[str]

    @property
    def class_type(self) -> str:
        """The node's class."""
        return self.node.type

    @property
    def widgets(self) -> list[str]:
        """The names of its class's widgets."""
        return [item.name for item in classes()[self.class_type].widgets]

    def add(self, kind: str, usual: str, fields: Mapping[str, Any], *more: ComfyNode, titled: bool = True) -> NodeRef:
        """Add a recipe's node that is made of this one, and of `more`; see `Draft.add`."""
        return self.draft.add(kind, usual, fields, self.node, *more, titled=titled)

    def add_sink(self, kind: str, usual: str, fields: Mapping[str, Any]) -> None:
        """Add a node that writes a file."""
        self.draft.sinks.append(self.add(kind, usual, fields).key)

    def made(self, kind: str, usual: str, fields: Mapping[str, Any], type_: str, total: int | None = None) -> Made:
        """Add a node, and return what it gives."""
        return Made(self.add(kind, usual, fields), type_, total)

    def note(self, text: str) -> None:
        """Record what a person should know of this node."""
        self.mistakes.note(f"{self.node.described()}: {text}")

    def refuse(self, message: str, fix: str | None = None) -> SkipError:
        """Record that something in the node cannot be said in a recipe; return what is to be raised."""
        self.mistakes.add("W004", message, self.node, fix)
        return SkipError()

    def value(self, name: str, type_: str | None = None) -> Value:
        """Return an input's value, as the type that the class asks for; `type_` if only a choice brings it along."""
        item = classes()[self.class_type].input(name) if type_ is None else Input(name, type_, is_widget=True)
        given = self.node.inputs.get(name, Value(item.default))
        if isinstance(given, Link):
            found = self._follow(given)
            if isinstance(found, UnknownSide):
                found = self._guessed(item, found)
            if not isinstance(found, Value):
                raise self.refuse(f"{name} is computed by a node that recipes do not know", "type the value in")
            given = found
        try:
            value = as_type(given.value, item.type)
        except (ValueError, OverflowError):
            raise self.refuse(f"{name}: {item.type} expected, got {shown(given.value)}") from None
        return Value(value, given.knob)

    def _guessed(self, item: Input, found: UnknownSide) -> Value:
        what = f"{item.name} is taken from the size of {found.file}, which is not in the workflow"
        if self.class_type != "WanSoundImageToVideo":
            raise self.refuse(what, f"put {found.file} beside the workflow, or type the number in")
        guess = found.guess or item.default
        text = f"{self.node.described()}: {what}: {guess} stands in the recipe; set it as you want"
        self.mistakes.warn(f"{item.name}: {text}")
        return Value(guess)

    def size_of(self, ref: NodeRef) -> tuple[int, int] | None:
        """Return the width and height of what a draft's node gives, where the workflow or a picture beside it tells."""
        scalers = []
        for node, fields in self._trail(ref):
            if fields.get("width") and fields.get("height"):
                size: tuple[int, int] | None = (int(fields["width"]), int(fields["height"]))
            elif node.kind == "load_image":
                size = picture_size(self.folder, fields["file"])
            elif fields.get("axis", "t") != "t":
                return None
            else:
                scalers += [fields] if node.kind.endswith("_scale") else []
                continue
            for given in reversed(scalers):
                known = {name: given[name] for name in given if name in ImageScale.model_fields}
                size = size and ImageScale.model_construct(**known).target(*size)
            return size
        return None

    def file_of(self, ref: NodeRef) -> str:
        """Return the file that a picture comes from, for messages."""
        return next((str(fields["file"]) for _, fields in self._trail(ref) if "file" in fields), "a picture")

    def _trail(self, ref: NodeRef) -> Iterator[tuple[DraftNode, dict[str, Any]]]:
        """Yield a draft's node and those before it that have its size, each with its fields as plain values."""
        pending = [ref]
        while pending:
            node = self.draft[pending[0]]
            fields = {name: getattr(value, "value", value) for name, value in node.fields.items()}
            yield node, fields
            pending = [fields[name] for name in _SIZED if isinstance(fields.get(name), NodeRef)]

    def optional(self, name: str) -> Any:
        """Return what a linked input means, or None where it is not linked."""
        given = self.node.inputs.get(name)
        if name in self.node.lacking:
            self.note(f"{name} is left out: it comes from a node that is switched off")
        return self._follow(given) if isinstance(given, Link) else None

    def meaning(self, name: str, type_: type[MeaningT]) -> MeaningT:
        """Return what a linked input means; it must be linked, to something of a type that can stand there."""
        if not isinstance(self.node.inputs.get(name), Link):
            why = "comes from a node that is switched off" if name in self.node.lacking else "is not connected"
            raise self.refuse(f"{name} {why}", f"connect {name}, or remove the node")
        found = self.optional(name)
        if not isinstance(found, type_):
            raise self.refuse(f"{name} takes something that recipes cannot express here")
        return found

    def port(self, name: str, type_: str) -> NodeRef:
        """Return the recipe node of a required input, of one port type."""
        return self.typed(name, self.meaning(name, object), type_)

    def optional_port(self, name: str, type_: str) -> NodeRef | None:
        """Return the recipe node of an input, of one port type; None where it is not linked."""
        found = self.optional(name)
        return None if found is None else self.typed(name, found, type_)

    def typed(self, name: str, found: Any, type_: str) -> NodeRef:
        """Return the recipe node of a meaning, turning images into frames and back where needed."""
        if isinstance(found, Made) and found.type == type_:
            return found.ref
        if isinstance(found, Made) and (found.type, type_) == ("frames", "image"):
            return self.add("image_from_frames", "still", {"frames": found.ref}, titled=False)
        if isinstance(found, Made) and (found.type, type_) == ("image", "frames"):
            return self.add("frames_from_image", "still_frames", {"image": found.ref}, titled=False)
        raise self.refuse(f"{name}: a recipe needs {type_.replace('_', ' ')} here")

    def numbered(self, prefix: str) -> int:
        """Return the number that ComfyUI would give the next file of this prefix."""
        self.counts[prefix] += 1
        return self.counts[prefix]

    def _follow(self, link: Link) -> Any:
        if link.node in self.skipped:
            raise SkipError
        return self.meanings.get(link, UNKNOWN)


Translator = Callable[[AtNode], Any]  # what the node's only output means, or a tuple for several


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
