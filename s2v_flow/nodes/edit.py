"""Small kinds for what stands between the others in an unusual graph: joining, cutting, scaling."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from s2v_flow.errors import S2VFlowError
from s2v_flow.graph.context import RunContext
from s2v_flow.graph.node import Node, Planner
from s2v_flow.graph.ports import Value
from s2v_flow.nodes.chunk_plan import Chain, Part
from s2v_flow.nodes.fields import FramesInput, ImageInput, LatentInput, Settings
from s2v_flow.nodes.frames import Frames, concatenated, still, window

if TYPE_CHECKING:
    import numpy as np


Axis = Literal["t", "x", "y"]
_AXES: dict[str, int] = {"t": 2, "y": 3, "x": 4}  # of [1, 16, F, H, W]
_SIDES = {"x": "width", "y": "height"}
_PIXELS_PER_CELL = 8


class LatentConcat(Node):
    """Join two videos' latents: one after the other, or side by side."""

    kind: ClassVar[str] = "latent_concat"
    outputs: ClassVar = {"latent": "latent"}
    is_stored: ClassVar[bool] = True

    first: LatentInput = Field(description="What comes first: earlier, left or above.")
    second: LatentInput = Field(description="What comes second.")
    axis: Axis = Field("t", description="t: one after the other; x: side by side; y: one above the other.")

    def plan(self, planner: Planner, name: str) -> dict[str, Value]:
        """Plan the joined video. In time nothing is computed: it has the parts of both."""
        first, second = planner.value(self.first), planner.value(self.second)
        if first is None or second is None:
            return {}
        one, two = first.facts["chain"], second.facts["chain"]
        is_open = one.is_open or two.is_open
        own = _SIDES.get(self.axis, "frames")
        unequal = [key for key, size in _sizes(one).items() if size != _sizes(two)[key] and key != own]
        if unequal and not is_open:
            sizes = ", ".join(f"{key} {_sizes(one)[key]} and {_sizes(two)[key]}" for key in unequal)
            planner.problem(name, "second", "R105", f"second: these videos cannot be joined along {self.axis}: {sizes}")
            return {}
        if self.axis == "t":
            parts = tuple(Part(part.latent, part.num_latent_frames) for part in (*one.parts, *two.parts))
            return Chain(parts, one.settings, one.seed, one.start, is_open).value()
        values = planner.add(name, self, {"first": first, "second": second}, recipe_node=name)
        side = _SIDES[self.axis]
        size = {side: _sizes(one)[side] + _sizes(two)[side]}
        return _single(values["latent"], one, one.num_latent_frames, size, is_open=is_open)

    def run(self, context: RunContext, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Join along x or y: {"latent": {samples: [1, 16, F, H, W], raw}}."""
        import torch

        from s2v_flow.nodes.tensors import pack

        both = [_joined(inputs["first"]), _joined(inputs["second"])]
        return {"latent": pack({"samples": torch.cat(both, dim=_AXES[self.axis])})}


class LatentCut(Node):
    """Cut a piece out of a video's latent, in time or in space."""

    kind: ClassVar[str] = "latent_cut"
    outputs: ClassVar = {"latent": "latent"}
    is_stored: ClassVar[bool] = True

    latent: LatentInput = Field(description="The video.")
    axis: Axis = Field("t", description="t: latent frames; x, y: cells of 8 pixels.")
    index: int = Field(0, ge=-16384, le=16384, description="Where the piece begins; below 0 counted from the end.")
    amount: int = Field(1, ge=1, le=16384, description="How much of it; less where there is no more.")

    def plan(self, planner: Planner, name: str) -> dict[str, Value]:
        """Plan the piece, with its length where the video's is known."""
        video = planner.value(self.latent)
        if video is None:
            return {}
        chain: Chain = video.facts["chain"]
        values = planner.add(name, self, {"latent": video}, recipe_node=name)
        if self.axis == "t":
            _, amount = piece(chain.num_latent_frames, self.index, self.amount)
            return _single(values["latent"], chain, amount, {}, is_open=chain.is_open)
        side = _SIDES[self.axis]
        _, cells = piece((_sizes(chain)[side] or 0) // _PIXELS_PER_CELL, self.index, self.amount)
        size = {side: cells * _PIXELS_PER_CELL}
        return _single(values["latent"], chain, chain.num_latent_frames, size, is_open=chain.is_open)

    def run(self, context: RunContext, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Cut: {"latent": {samples: [1, 16, F, H, W], raw}}."""
        from s2v_flow.nodes.tensors import pack

        whole = _joined(inputs["latent"])
        dim = _AXES[self.axis]
        start, amount = piece(whole.shape[dim], self.index, self.amount)
        return {"latent": pack({"samples": whole.narrow(dim, start, amount)})}


class FramesSlice(Node):
    """Take some of a video's frames."""

    kind: ClassVar[str] = "frames_slice"
    outputs: ClassVar = {"frames": "frames"}

    frames: FramesInput = Field(description="The frames.")
    start: int = Field(0, ge=0, description="The first frame to take; the last one where there are not so many.")
    length: int | None = Field(None, ge=1, description="How many; all the rest unless given.")

    def plan(self, planner: Planner, name: str) -> dict[str, Value]:
        """Pass on what is known of the frames, with their new number."""
        frames = planner.value(self.frames)
        if frames is None:
            return {}
        known = frames.facts.get("frames")
        start, length = (0, None) if known is None else self._part(known)
        starts = [at - start for at in frames.facts.get("chunk_starts") or () if at > start]
        return planner.add_simple(name, self, {**frames.facts, "frames": length, "chunk_starts": starts})

    def run(self, context: RunContext, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Give out the stream of the frames taken."""
        given: Frames = inputs["frames"]
        start, length = self._part(given.num_frames)

        def groups() -> Iterator[np.ndarray]:
            return window(given.groups(), start, length)

        def read(first: int, count: int) -> np.ndarray:
            return given.read(start + first, max(min(count, length - first), 0))

        return {"frames": Frames(given.width, given.height, length, groups, read)}

    def _part(self, total: int) -> tuple[int, int]:
        start = min(self.start, max(total - 1, 0))
        return start, min(total - start, total if self.length is None else self.length)


class FramesDelay(Node):
    """Let a video begin later: its first frame stands still for a while."""

    kind: ClassVar[str] = "frames_delay"
    outputs: ClassVar = {"frames": "frames"}

    frames: FramesInput = Field(description="The frames.")
    count: int = Field(ge=0, le=1_000_000, description="How many frames are put in front.")

    def plan(self, planner: Planner, name: str) -> dict[str, Value]:
        """Pass on what is known of the frames, with their new number."""
        facts = planner.facts(self.frames)
        frames = None if facts.get("frames") is None else facts["frames"] + self.count
        starts = [at + self.count for at in facts.get("chunk_starts") or ()]
        return planner.add_simple(name, self, {**facts, "frames": frames, "chunk_starts": starts})

    def run(self, context: RunContext, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Give out the longer stream."""
        given: Frames = inputs["frames"]
        before = still(lambda: given.read(0, 1), given.width, given.height, self.count)
        return {"frames": concatenated(before, given)}


class FramesConcat(Node):
    """Put the frames of two videos one after the other."""

    kind: ClassVar[str] = "frames_concat"
    outputs: ClassVar = {"frames": "frames"}

    first: FramesInput = Field(description="What comes first.")
    second: FramesInput = Field(description="What comes after it, in the same size.")

    def plan(self, planner: Planner, name: str) -> dict[str, Value]:
        """Pass on the size, and how many frames there are together."""
        facts = [planner.facts(ref) for ref in (self.first, self.second)]
        sizes = [(fact.get("width"), fact.get("height")) for fact in facts]
        if sizes[0] != sizes[1] and all(map(all, sizes)):
            named = " and ".join(f"{width} x {height}" for width, height in sizes)
            message = f"second: these videos cannot be put one after the other: {named}"
            planner.problem(name, "second", "R105", message, "scale one of them with frames_scale")
        counts = [fact["frames"] for fact in facts if fact.get("frames") is not None]
        total = sum(counts) if len(counts) == 2 else None
        later = [at + counts[0] for at in facts[1].get("chunk_starts") or ()] if total is not None else []
        starts = [*(facts[0].get("chunk_starts") or ()), *later]
        return planner.add_simple(name, self, {**facts[0], "frames": total, "chunk_starts": starts})

    def run(self, context: RunContext, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Give out both streams, one after the other."""
        first, second = inputs["first"], inputs["second"]
        if (first.width, first.height) != (second.width, second.height):
            sizes = f"{first.width} x {first.height} and {second.width} x {second.height}"
            fix = "scale one of them with frames_scale"
            raise S2VFlowError(f"{context.name}: the videos must have one size, these have {sizes}", fix)
        return {"frames": concatenated(first, second)}


class ImageFromFrames(Node):
    """Take one frame of a video as an image."""

    kind: ClassVar[str] = "image_from_frames"
    outputs: ClassVar = {"image": "image"}

    frames: FramesInput = Field(description="The frames.")
    index: int = Field(0, ge=0, description="Which one, counted from 0; the last where there are not so many.")

    def plan(self, planner: Planner, name: str) -> dict[str, Value]:
        """Pass on how large the frame is."""
        return planner.add_simple(name, self, planner.facts(self.frames))

    def run(self, context: RunContext, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Give out the image, to be read when it is needed: float32 [H, W, 3] in [0, 1]."""
        import numpy as np

        from s2v_flow.nodes.load_media import Lazy

        given: Frames = inputs["frames"]
        index = min(self.index, max(given.num_frames - 1, 0))
        return {"image": Lazy(lambda: given.read(index, 1)[0].astype(np.float32) / 255)}


class FramesFromImage(Node):
    """Make a video of an image: the same frame, as often as wanted."""

    kind: ClassVar[str] = "frames_from_image"
    outputs: ClassVar = {"frames": "frames"}

    image: ImageInput = Field(description="The image.")
    count: int = Field(1, ge=1, le=4096, description="How many frames.")

    def plan(self, planner: Planner, name: str) -> dict[str, Value]:
        """Pass on how many frames there are, and how large."""
        return planner.add_simple(name, self, {**planner.facts(self.image), "frames": self.count, "chunk_starts": []})

    def run(self, context: RunContext, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Give out the frames."""
        import numpy as np

        image = inputs["image"].read()
        frame = np.rint(image * 255).astype(np.uint8)[None]  # [1, H, W, 3]
        return {"frames": still(lambda: frame, image.shape[1], image.shape[0], self.count)}


def piece(total: int, index: int, amount: int) -> tuple[int, int]:
    """Return where a piece begins in `total` and how long it is; an index below 0 counts from the end."""
    start = min(index, max(total - 1, 0)) if index >= 0 else max(total + index, 0)
    return start, min(amount, total - start)


def _single(
    value: Value, chain: Chain, num_latent_frames: int, size: Mapping[str, int], *, is_open: bool
) -> dict[str, Value]:
    """Return a computed latent as a video of one part, with what the video before it was sampled with."""
    settings = chain.settings
    if size:  # the portrait does not fit any more
        inputs = {key: given for key, given in settings.inputs.items() if key != "reference"}
        settings = Settings(inputs, settings.fields.model_copy(update=size))
    return Chain((Part(value.source, num_latent_frames),), settings, chain.seed, None, is_open).value()


def _sizes(chain: Chain) -> dict[str, Any]:
    width, height = chain.settings.size
    return {"width": width, "height": height, "frames": chain.num_latent_frames}


def _joined(parts: Any) -> Any:
    """Return a video's latent whole: [1, 16, F, H, W]."""
    import torch

    from s2v_flow.nodes.tensors import unpack

    return torch.cat([unpack(part)["samples"] for part in parts], dim=2)
