"""The kind `decode`: from a video's chunks to its frames, as a stream."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from itertools import chain as chain_iterables
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from s2v_flow.graph.context import RunContext
from s2v_flow.graph.node import Node, Planner
from s2v_flow.graph.ports import Neutral, Source, Value
from s2v_flow.models.footprint import MOTION_LATENT_FRAMES
from s2v_flow.nodes.chunk_plan import (
    FRAME_RATE_HZ,
    FRAMES_PER_LATENT,
    Chain,
    Part,
    PlannedInputs,
    voice_frames,
    warmup_frames,
)
from s2v_flow.nodes.fields import LatentInput, VaeInput
from s2v_flow.nodes.frames import Frames, warned_of_flat, window

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


Prefix = Literal["reference", "first", "none"]
FramesPerCall = Annotated[int, Field(ge=1, le=64), Neutral()]
Tiles = Annotated[int, Field(ge=1, le=8)]
_LEAD = 3  # frames that the very first latent frame lacks: it decodes to one frame, all others to four


class Decode(Node):
    """Decode a video's latents to frames, a few at a time: memory does not grow with the video's length."""

    kind: ClassVar[str] = "decode"
    outputs: ClassVar = {"frames": "frames"}

    vae: VaeInput = Field(description="The VAE.")
    latent: LatentInput = Field(description="The video: a sample, an extend or a load_latent node.")
    prefix: Prefix = Field(
        "reference",
        description="What the decoder sees before the first latent frame: the portrait, as the authors do; the first "
        "latent frame doubled, as ComfyUI's workflow does; or nothing.",
    )
    drop_frames: Literal["auto"] | Annotated[int, Field(ge=0)] = Field(
        "auto",
        description="Decoded frames to drop at the start; auto drops the prefix and the warm-up, which keeps picture "
        "and sound in time.",
    )
    trim: Literal["audio", "none"] = Field(
        "audio", description="audio: the video is exactly as long as the voice; none: as long as its chunks."
    )
    frames_per_call: FramesPerCall = Field(
        2, description="Latent frames decoded at once: more is faster and takes more memory."
    )
    tiles: Tiles = Field(
        1,
        description="Into how many tiles a side the picture is cut for decoding: 2 means four tiles. It takes less "
        "memory and more time; tiles overlap by 64 pixels and are blended, but the picture is not quite the same.",
    )

    def plan(self, planner: Planner, name: str) -> dict[str, Value]:
        """Resolve what is dropped and how long the video is."""
        video, vae = planner.value(self.latent), planner.value(self.vae)
        if video is None or vae is None:
            return {}
        chain: Chain = video.facts["chain"]
        in_pixels = bool(chain.parts) and all(part.frames for part in chain.parts)
        before, num_before = (None, 0) if in_pixels else self._before(chain)
        own = FRAMES_PER_LATENT * chain.num_latent_frames
        decoded = sum(part.num_frames for part in chain.parts)
        total = decoded if in_pixels else own + FRAMES_PER_LATENT * num_before - _LEAD
        drop = self._dropped(planner, name, chain, total - own, in_pixels=in_pixels)
        frames = voice_frames(chain.settings)
        num_parts = len(chain.parts)
        if frames is not None and self.trim == "audio" and not chain.is_open:
            chain, total = _within(chain, total, drop + frames)
        if len(chain.parts) < num_parts:
            text = f"chunks: {num_parts - len(chain.parts)} of {num_parts} lie past the end of the voice and are left "
            planner.note(name, f"{text}out of {name} (trim: none in {name} keeps them)")
        inputs: PlannedInputs = {"vae": vae, "latent": tuple(part.latent for part in chain.parts), "before": before}
        if in_pixels:
            inputs = {"parts": tuple(part.frames for part in chain.parts if part.frames)}
        available = max(total - drop, 0)
        length = min(available, frames) if frames is not None and self.trim == "audio" else available
        if length == 0 and not chain.is_open:
            message = f"drop_frames: no frame is left, {drop} of {total} are dropped"
            planner.problem(name, "drop_frames", "R111", message, "drop fewer frames, or add chunks")
        if frames is not None and length < frames:
            planner.note(
                name,
                f"{name}: the chunks cover {length / FRAME_RATE_HZ:.2f} s of {frames / FRAME_RATE_HZ:.2f} s of sound; "
                "the rest of the sound is cut (chunks: auto covers all of it)",
            )
        size = dict(zip(("width", "height"), chain.settings.size, strict=True))
        starts = _starts(chain, total - drop, length)
        known: dict[str, Any] = {"frames": length, "chunks": len(chain.parts), "silent_frames": available - length}
        known["chunk_starts"] = starts
        facts = {**size, **(dict.fromkeys(known) if chain.is_open else known)}
        node = DecodeFrames(
            doubles_first=not in_pixels and inputs.get("before") is None and self.prefix != "none",
            drop_frames=drop,
            num_frames=length,
            frames_per_call=self.frames_per_call,
            tiles=self.tiles,
        )
        (value,) = planner.add(name, node, inputs, recipe_node=name, facts=facts).values()
        return {"frames": Value("frames", value.sources, facts)}

    def _before(self, chain: Chain) -> tuple[Source | None, int]:
        """Return what the decoder sees first and how many latent frames that is; a doubled frame has no source."""
        if self.prefix == "none":
            return None, 0
        reference = chain.reference or chain.settings.inputs.get("reference")
        if self.prefix == "first" or (reference is None and chain.start is None):
            return None, 1
        if chain.start is not None and chain.settings.fields.init_first_frame:
            return chain.start, MOTION_LATENT_FRAMES
        return (reference.source, 1) if reference else (None, 1)

    def _dropped(self, planner: Planner, name: str, chain: Chain, num_more: int, *, in_pixels: bool) -> int:
        """Return how many frames are dropped at the start, where there are `num_more` than the chunks are long.

        Below 0, so many are lacking: the warm-up has to stand for them, or picture and sound are out of time.
        """
        if self.drop_frames != "auto":
            return self.drop_frames
        warmup = warmup_frames(chain.settings)
        if "speech" in chain.settings.inputs and warmup + num_more < 0:
            key, what = ("latent", "motion: pixels") if in_pixels else ("prefix", "prefix: none")
            message = f"{what} needs warmup_frames of at least {-num_more} to keep picture and sound in time"
            fix = "set warmup_frames in the encode_audio node, or drop_frames here"
            planner.problem(name, key, "R110", f"{message}, got {warmup}", fix)
        return max(warmup + num_more, 0)


def _within(chain: Chain, num_frames: int, wanted: int) -> tuple[Chain, int]:
    """Leave out the last chunks that the first `wanted` of `num_frames` frames do without; return how many are left."""
    parts = list(chain.parts)
    while len(parts) > 1:
        own = _num_frames(parts[-1])
        if num_frames - own < wanted:
            break
        num_frames -= own
        parts.pop()
    return replace(chain, parts=tuple(parts)), num_frames


def _starts(chain: Chain, end: int, length: int) -> list[int]:
    """Return the first frame of each chunk but the first, of a video whose last chunk ends at `end`."""
    starts = []
    for part in reversed(chain.parts):
        end -= _num_frames(part)
        starts.append(end)
    return [start for start in reversed(starts[:-1]) if 0 < start < length]


def _num_frames(part: Part) -> int:
    return part.num_frames if part.frames else FRAMES_PER_LATENT * part.num_latent_frames


class DecodeFrames(Node):
    """The frames of a planned video, as a stream."""

    kind: ClassVar[str] = "decode_frames"
    stage: ClassVar[int] = 2
    outputs: ClassVar = {"frames": "frames"}
    is_kept: ClassVar[bool] = True
    has_numerics: ClassVar[bool] = True

    doubles_first: bool
    drop_frames: int
    num_frames: int
    frames_per_call: FramesPerCall
    tiles: Tiles

    def run(self, context: RunContext, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the stream, decoded on iteration, or not at all where the frames are stored."""
        import numpy as np

        def groups() -> Iterator[np.ndarray]:
            return warned_of_flat(context, self._frames(context, inputs, is_whole=True))

        def read(start: int, count: int) -> np.ndarray:
            found = list(window(warned_of_flat(context, self._frames(context, inputs)), start, count))
            return np.concatenate(found) if found else np.zeros((0, height, width, 3), np.uint8)

        width, height = context.planned["width"], context.planned["height"]
        return {"frames": Frames(width, height, self.num_frames, groups, read, context.facts)}

    def _frames(
        self, context: RunContext, inputs: Mapping[str, Any], *, is_whole: bool = False
    ) -> Iterator[np.ndarray]:
        """Yield the frames: those that are kept; else they are decoded and, if the whole is asked for, kept."""
        if "parts" in inputs:
            yield from window(self._stored(inputs), self.drop_frames, self.num_frames)
            return
        from s2v_flow.media.writer import LosslessWriter, read_lossless

        done, keep = 0, context.keep
        if keep is not None and (path := keep.find()) is not None:
            with suppress(OSError):  # evicted just now: the rest is decoded
                for frame in read_lossless(path):
                    yield frame
                    done += 1
        decoded = window(self._decode(context, inputs), self.drop_frames, self.num_frames)
        if keep is not None and is_whole and not done:
            width, height = context.planned["width"], context.planned["height"]
            expected = self.num_frames * width * height * 3 // 2  # half of it, as frames with grain take
            decoded = keep.passing(decoded, self.num_frames, expected, lambda path: LosslessWriter(path, width, height))
        if done < self.num_frames:
            yield from window(decoded, done, self.num_frames - done)

    def _stored(self, inputs: Mapping[str, Any]) -> Iterator[np.ndarray]:
        from s2v_flow.nodes.tensors import unpack

        for part in inputs["parts"]:
            yield unpack(part)["frames"].numpy()

    def _decode(self, context: RunContext, inputs: Mapping[str, Any]) -> Iterator[np.ndarray]:
        from s2v_flow.nodes.shortage import StreamDecoder
        from s2v_flow.nodes.tensors import each_to_frames, unpack

        vae = inputs["vae"].get()
        before: Tensor | None = None
        if "before" in inputs:
            tensors = unpack(inputs["before"])
            before = tensors["samples" if "samples" in tensors else "latent"].to(context.device)
        elif self.doubles_first:
            before = unpack(inputs["latent"][0])["samples"][:, :, :1].to(context.device)
        latents = (unpack(part)["samples"].to(context.device) for part in inputs["latent"])
        given = latents if before is None else chain_iterables([before], latents)
        decoder = StreamDecoder(vae, context.way.get("frames_per_call", self.frames_per_call), self.tiles, context)
        for frames in each_to_frames(pixels for latent in given for pixels in decoder.decode(latent)):
            yield frames.numpy()
