"""Kinds that scale pictures before they are used, with ComfyUI's methods and its rounding of sizes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from s2v_flow.graph.context import RunContext
from s2v_flow.graph.node import Node, Planner
from s2v_flow.graph.ports import Value
from s2v_flow.media import centre_cut
from s2v_flow.nodes.fields import FramesInput, ImageInput
from s2v_flow.nodes.frames import Frames, require_cut
from s2v_flow.nodes.load_media import Lazy

if TYPE_CHECKING:
    import numpy as np


Method = Literal["nearest-exact", "bilinear", "area", "bicubic", "lanczos"]
Side = Annotated[int, Field(ge=1, le=16384)]


class _Scale(Node):
    """The fields that both kinds of scaling have. Exactly one way of saying the size is given."""

    width: Side | None = Field(None, description="The new width; without height it follows the proportions.")
    height: Side | None = Field(None, description="The new height; without width it follows the proportions.")
    factor: float | None = Field(None, gt=0, le=8, description="How many times larger, instead of a size.")
    megapixels: float | None = Field(None, gt=0, le=16, description="The new area in 1024 x 1024, instead of a size.")
    longest_side: Side | None = Field(None, description="The new length of the longer side, instead of a size.")
    multiple_of: int = Field(1, ge=1, le=256, description="With megapixels: round both sides to multiples of it.")
    method: Method = Field("lanczos", description="How pixels are mixed; bilinear and bicubic do not smooth.")
    crop: Literal["disabled", "center"] = Field(
        "disabled", description="center: cut to the new proportions first; disabled: stretch."
    )

    @model_validator(mode="after")
    def _one_size(self) -> _Scale:
        given = [
            self.width is not None or self.height is not None,
            self.factor is not None,
            self.megapixels is not None,
            self.longest_side is not None,
        ]
        if sum(given) != 1:
            raise ValueError("give width and height, or factor, or megapixels, or longest_side")
        return self

    def target(self, width: int, height: int) -> tuple[int, int]:
        """Return the new width and height of a picture."""
        if self.factor is not None:
            return max(round(width * self.factor), 1), max(round(height * self.factor), 1)
        if self.longest_side is not None:
            longest = max(width, height)
            return round(width / longest * self.longest_side), round(height / longest * self.longest_side)
        if self.megapixels is not None:
            factor, step = math.sqrt(self.megapixels * 1024 * 1024 / (width * height)), self.multiple_of
            sides = (max(round(side * factor / step), 1) * step for side in (width, height))
            return next(sides), next(sides)
        new_width = self.width or max(round(width * (self.height or 1) / height), 1)
        return new_width, self.height or max(round(height * new_width / width), 1)

    def resized(self, planner: Planner, name: str, given: Value | None) -> dict[str, Any]:
        """Return what is known of a picture or a video once it is scaled."""
        facts = dict(given.facts) if given else {}
        if not facts.get("width") or not facts.get("height"):
            return facts
        width, height = self.target(facts["width"], facts["height"])
        if width < 1 or height < 1:
            message = f"longest_side: {facts['width']}x{facts['height']} pixels become {width}x{height}"
            planner.problem(name, "longest_side", "R133", message, "make it larger, or give width and height")
        elif self.crop == "center":
            require_cut(name, given, width, height)
        return {**facts, "width": width, "height": height, "scaled_by": name}

    def scaled(self, image: np.ndarray) -> np.ndarray:
        """Scale float32 [H, W, 3] in [0, 1] to its new size."""
        height, width = image.shape[:2]
        return resize(image, *self.target(width, height), self.method, crops=self.crop == "center")


class ImageScale(_Scale):
    """Scale an image, as ComfyUI's ImageScale nodes do. `encode_image` scales by itself: this is seldom needed."""

    kind: ClassVar[str] = "image_scale"
    outputs: ClassVar = {"image": "image"}

    image: ImageInput = Field(description="The image.")

    def plan(self, planner: Planner, name: str) -> dict[str, Value]:
        """Pass on the new size."""
        return planner.add_simple(name, self, self.resized(planner, name, planner.value(self.image)))

    def run(self, context: RunContext, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Give out the scaled image, to be made when it is needed: float32 [H, W, 3] in [0, 1]."""
        given = inputs["image"]
        return {"image": Lazy(lambda: self.scaled(given.read()))}


class FramesScale(_Scale):
    """Scale a video's frames, as ComfyUI's ImageScale nodes do."""

    kind: ClassVar[str] = "frames_scale"
    outputs: ClassVar = {"frames": "frames"}

    frames: FramesInput = Field(description="The frames.")

    def plan(self, planner: Planner, name: str) -> dict[str, Value]:
        """Pass on how many frames there are, and their new size."""
        return planner.add_simple(name, self, self.resized(planner, name, planner.value(self.frames)))

    def run(self, context: RunContext, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Give out the scaled frames as a stream."""
        import numpy as np

        given: Frames = inputs["frames"]
        width, height = self.target(given.width, given.height)

        def scaled(frames: np.ndarray) -> np.ndarray:
            made = [self.scaled(frame.astype(np.float32) / 255) for frame in frames]
            stacked = np.stack(made) if made else np.zeros((0, height, width, 3), np.float32)
            rounded: np.ndarray = np.rint(stacked.clip(0, 1) * 255).astype(np.uint8)
            return rounded

        def groups() -> Iterator[np.ndarray]:
            return (scaled(group) for group in given.groups())

        return {
            "frames": Frames(width, height, given.num_frames, groups, lambda start, n: scaled(given.read(start, n)))
        }


def resize(image: np.ndarray, width: int, height: int, method: Method, *, crops: bool) -> np.ndarray:
    """Scale an image, float32 [H, W, 3] in [0, 1], with one of ComfyUI's methods: float32 [height, width, 3].

    Lanczos goes through 8 bits, as in ComfyUI; the others are torch's, without smoothing. `crops`: cut about the centre
    to the new proportions first.

    Source: Pillow, Image.resize; torch.nn.functional.interpolate (align_corners=False).
    """
    import numpy as np

    if crops:
        rows, columns = image.shape[:2]
        cut_x, cut_y = centre_cut(columns, rows, width / height)
        image = image[cut_y : rows - cut_y, cut_x : columns - cut_x]
    if method == "lanczos":
        from PIL import Image

        picture = Image.fromarray((image * 255).clip(0, 255).astype(np.uint8))
        small: np.ndarray = np.asarray(picture.resize((width, height), Image.Resampling.LANCZOS), dtype=np.float32)
        unit: np.ndarray = small / np.float32(255)
        return unit
    import torch

    pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None]  # [1, 3, H, W]
    resized = torch.nn.functional.interpolate(pixels, size=(height, width), mode=method)
    array: np.ndarray = resized[0].permute(1, 2, 0).numpy()  # [height, width, 3]
    return array
