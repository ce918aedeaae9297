"""Kinds that write files: what a run is for."""

from __future__ import annotations

import errno
import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from s2v_flow.errors import S2VFlowError
from s2v_flow.files.atomic import writing
from s2v_flow.graph.context import Artifact, RunContext
from s2v_flow.graph.node import Node, Planner
from s2v_flow.graph.ports import FileField, Neutral, Value
from s2v_flow.nodes.chunk_plan import FRAME_RATE_HZ
from s2v_flow.nodes.fields import AudioInput, FramesInput, LatentInput
from s2v_flow.nodes.frames import beside

if TYPE_CHECKING:
    import numpy as np


Preset = Literal["ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower", "veryslow"]
Files = Mapping[tuple[str | int, ...], Path]


class Sink(Node):
    """A kind that writes its stored result to a file."""

    stage: ClassVar[int] = 2
    outputs: ClassVar = {}
    is_sink: ClassVar[bool] = True
    is_stored: ClassVar[bool] = True

    def check(self, files: Files) -> None:
        """Refuse a folder that cannot be written to, before anything is computed for it.

        Raises:
            CannotWriteError: Its permissions do not allow it.
        """
        path = next(iter(self.targets(files).values()))
        folder = next(folder for folder in path.absolute().parents if folder.exists())
        with writing(path):
            if not path.exists() and not os.access(folder, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


class SaveVideo(Sink):
    """Write an mp4 (H.264, yuv420p) with sound (AAC), frame by frame; nothing half-written stands under the name."""

    kind: ClassVar[str] = "save_video"

    frames: FramesInput = Field(description="The frames.")
    audio: AudioInput | None = Field(None, description="The sound, from its start; without one the video is silent.")
    file: Annotated[str, FileField("output", "video"), Neutral()] = Field(
        description="Where to write, ending in .mp4.", pattern=r"\.mp4$"
    )
    fps: float = Field(16.0, ge=0.001, le=240, description="Frames a second. The model's own rate is 16.")
    crf: int = Field(18, ge=0, le=51, description="Quality: lower is better and larger.")
    preset: Preset = Field("medium", description="How hard the encoder tries.")
    quality: Annotated[Literal["auto", "off"], Neutral()] = Field(
        "auto",
        description="auto: measure lips, drift and seams as the frames pass, for the run's manifest; off: do not.",
    )

    def plan(self, planner: Planner, name: str) -> dict[str, Value]:
        """Plan the file; its length is that of the frames."""
        _refuse_odd_sides(planner, name, planner.facts(self.frames))
        if self.fps != FRAME_RATE_HZ:
            speed = f"everything moves {self.fps / FRAME_RATE_HZ:.3g} times as fast"
            parts = "" if self.audio is None else ", and lips and sound part"
            planner.note(
                name, f"warning: fps: {name} plays {self.fps:g} frames a second, the model makes 16: {speed}{parts}"
            )
        return plan_sink(planner, name, self, self.fps)

    def run(self, context: RunContext, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Write the video into the scratch folder: {"file": path}."""
        from s2v_flow.media.writer import VideoWriter

        frames = inputs["frames"]
        require_frames(context, frames.num_frames)
        audio = None
        if "audio" in inputs:
            clip = inputs["audio"]
            audio = replace(clip, limit=round(frames.num_frames * clip.sample_rate_hz / self.fps))
        path = context.scratch / "video.mp4"
        digest = hashlib.sha256()  # of the frames as they are before encoding: what `reproduce` compares
        options: dict[str, Any] = {
            "fps": Fraction(str(self.fps)),
            "crf": self.crf,
            "preset": self.preset,
            "audio": audio,
        }
        is_measured, starts = self.quality == "auto", context.planned.get("chunk_starts") or []
        if is_measured:
            from s2v_flow.quality.figures import Measure

            measure = Measure(audio, self.fps, frames.num_frames)

        def write(groups: Iterator[np.ndarray]) -> None:
            with VideoWriter(path, frames.width, frames.height, **options) as writer:
                for group in groups:
                    digest.update(group.tobytes())
                    writer.write(group)
                    if is_measured:
                        measure.add(group)

        beside(reported(context, frames), write)
        if is_measured:
            context.record(quality=measure.figures(starts))
        size = {"width": context.planned.get("width"), "height": context.planned.get("height")}
        context.record(
            frames_sha256=digest.hexdigest(), frames=frames.num_frames, chunk_starts=starts, **size, **frames.facts
        )
        return {"file": path}

    def deliver(self, files: Files, artifacts: Mapping[str, Artifact], note: bytes) -> list[tuple[Path, bool]]:
        """Copy the stored video to its place, with what it was made of behind the film."""
        return [(files["file",], artifacts["file"].copy_to(files["file",], note))]


class SaveImages(Sink):
    """Write every frame as a PNG file."""

    kind: ClassVar[str] = "save_images"

    frames: FramesInput = Field(description="The frames.")
    file: Annotated[str, FileField("output", "image"), Neutral()] = Field(
        description="Where to write; _00001 and so on is put before .png.", pattern=r"\.png$"
    )

    def plan(self, planner: Planner, name: str) -> dict[str, Value]:
        """Plan the files."""
        return plan_sink(planner, name, self, 16.0)

    def run(self, context: RunContext, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Write the images into the scratch folder: a port for each, by its number."""
        from s2v_flow.media.writer import write_images

        frames = inputs["frames"]
        require_frames(context, frames.num_frames)
        folder = context.scratch

        def write(groups: Iterator[np.ndarray]) -> list[Path]:
            return write_images(folder, (frame for group in groups for frame in group))

        return {f"{index:05}": path for index, path in enumerate(beside(reported(context, frames), write), 1)}

    def targets(self, files: Files, ports: Iterable[str] | None = None) -> dict[str, Path]:
        """Return where the images go, by number."""
        pattern = files["file",]
        return {number: pattern.with_name(f"{pattern.stem}_{number}{pattern.suffix}") for number in ports or ["00001"]}

    def surplus(self, files: Files, ports: Iterable[str] | None = None) -> list[Path]:
        """Return the images of other numbers: a sequence on the disk is one result."""
        pattern, own, names = files["file",], set(self.targets(files, ports).values()), list[str]()
        with suppress(OSError):  # there is no such folder yet
            names = os.listdir(pattern.parent)
        numbered = re.compile(rf"{re.escape(pattern.stem)}_[0-9]{{5,}}{re.escape(pattern.suffix)}")
        return sorted({pattern.with_name(name) for name in names if numbered.fullmatch(name)} - own)


class SaveLatent(Sink):
    """Write a video's latent as one safetensors file, as ComfyUI's SaveLatent does."""

    kind: ClassVar[str] = "save_latent"

    latent: LatentInput = Field(description="The video: a sample, an extend or a load_latent node.")
    file: Annotated[str, FileField("output", "latent"), Neutral()] = Field(description="Where to write.", min_length=1)

    def run(self, context: RunContext, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Join the chunks: {"file": {latent_tensor: [1, 16, F, H, W], raw}}."""
        import torch

        from s2v_flow.nodes.tensors import pack, unpack

        joined = torch.cat([unpack(part)["samples"] for part in inputs["latent"]], dim=2)
        return {"file": pack({"latent_tensor": joined, "latent_format_version_0": torch.empty(0)})}


def plan_sink(planner: Planner, name: str, node: SaveVideo | SaveImages, fps: float) -> dict[str, Value]:
    """Plan a node that writes frames, with how many there are and how long they last."""
    known = planner.facts(node.frames)
    inputs = {key: planner.value(ref) for key, ref in node.refs().items()}
    count = known.get("frames")
    facts = {"frames": count, "seconds": None if count is None else count / fps}
    facts |= {key: known.get(key) for key in ("width", "height", "chunk_starts")}
    return planner.add(name, node, inputs, recipe_node=name, facts=facts)


def _refuse_odd_sides(planner: Planner, name: str, frames: Mapping[str, Any]) -> None:
    """Record sides that H.264 with yuv420p does not take, where the frames' size was chosen."""
    size = {side: frames.get(side) or 0 for side in ("width", "height")}
    even = " and ".join(f"{side}: {value + value % 2}" for side, value in size.items())
    for side, value in size.items():
        if value % 2:
            node = frames.get("scaled_by", name)
            message = f"{side}: {value} pixels, where the mp4 that {name} writes needs an even number"
            fix = f"set {even}" if node != name else f"put a frames_scale node in front of it, with {even}"
            planner.problem(node, side if node != name else "frames", "R132", message, fix)


def reported(context: RunContext, frames: Any) -> Iterator[np.ndarray]:
    """Pass frames through in groups, reporting how many have passed."""
    count = 0
    for group in frames:
        yield group
        count += len(group)
        context.step(count, frames.num_frames, "frame")


def require_frames(context: RunContext, count: int) -> None:
    """Refuse to write a video without frames.

    Raises:
        S2VFlowError: There are none.
    """
    if count < 1:
        raise S2VFlowError(f"{context.name}: there are no frames to write", fix="drop fewer frames, or add chunks")
