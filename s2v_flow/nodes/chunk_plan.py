"""How a video's chunks are planned: what later chunks inherit, where each one stands, how many there are."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from s2v_flow.graph.node import Planner
from s2v_flow.graph.ports import Source, Value
from s2v_flow.models.footprint import MOTION_LATENT_FRAMES
from s2v_flow.models.speech_rate import segments_of
from s2v_flow.nodes.chunk import Chunk, DecodeChunk, EncodeControl, EncodeMotion
from s2v_flow.nodes.fields import ChunkSettings, Settings
from s2v_flow.nodes.frames import require_cut

FRAMES_PER_LATENT = 4
FRAME_RATE_HZ = 16
FIRST_FRAMES_DROPPED = 3  # what the authors drop from the first chunk
PlannedInputs = dict[str, "Value | Source | tuple[Source, ...] | None"]


@dataclass(frozen=True)
class Part:
    """One chunk of a video: its latent, its latent frames, and in pixel mode its decoded frames and their number."""

    latent: Source
    num_latent_frames: int
    frames: Source | None = None
    num_frames: int = 0


@dataclass(frozen=True)
class DecodedSources:
    """In pixel mode, what a chunk's decoding leaves for the next: its motion latent and its last pixel frames."""

    motion: Source
    tail: Source


@dataclass(frozen=True)
class Chain:
    """A video at planning: its parts in order, the settings of the last one, the first chunk's seed.

    `start` is the motion latent in front of the first chunk, where there is one, and `reference` that chunk's portrait;
    `pixels` is what pixel mode hands on; `is_open` tells that the video's length is not known, because the voice's or
    the latent's file is missing.
    """

    parts: tuple[Part, ...] = ()
    settings: Settings = field(default_factory=Settings)
    seed: int = 0
    start: Source | None = None
    is_open: bool = False
    reference: Value | None = None
    pixels: DecodedSources | None = None

    @property
    def num_latent_frames(self) -> int:
        """Latent frames so far."""
        return sum(part.num_latent_frames for part in self.parts)

    def history(self) -> tuple[Source, ...]:
        """Return the latents of the last parts that together hold the motion frames (or all there are)."""
        wanted, count = MOTION_LATENT_FRAMES, len(self.parts)
        while count > 0 and wanted > 0:
            count -= 1
            wanted -= self.parts[count].num_latent_frames
        return tuple(part.latent for part in self.parts[count:])

    def value(self, port: str = "latent") -> dict[str, Value]:
        """Return this video as what a latent port means."""
        return {port: Value("latent", tuple(part.latent for part in self.parts), {"chain": self})}


def add_chunk(
    planner: Planner,
    name: str,
    recipe_node: str,
    chain: Chain,
    settings: Settings,
    seed: int,
    *,
    since: float | None = None,
) -> Chain:
    """Plan one more chunk (in pixel mode also its decoding) and return the video that it continues.

    `recipe_node` asks for the chunk; `since`: the time of the timeline's entry that it is sampled with.
    """
    fields = settings.fields
    num_latent_frames = latent_frames(fields.length)
    offset = FRAMES_PER_LATENT * chain.num_latent_frames
    inputs: PlannedInputs = {key: settings.inputs.get(key) for key in ("model", "positive", "reference")}
    if "speech" in settings.inputs:
        segments = settings.inputs["speech"].sources
        indices = segments_of(offset, FRAMES_PER_LATENT * num_latent_frames, len(segments))
        inputs["speech"] = segments[indices.start : indices.stop]
    if fields.cfg != 1:
        inputs["negative"] = settings.inputs.get("negative")
    if not chain.parts:
        start = _add_start(planner, f"{name}.motion", recipe_node, settings)
        chain = replace(chain, start=start, reference=settings.inputs.get("reference"))
        inputs["motion"] = chain.start
    elif chain.pixels is not None:
        inputs["motion"] = chain.pixels.motion
    else:
        inputs["history"] = chain.history()
    if "control_video" in settings.inputs:
        inputs["control"] = _add_control(planner, f"{name}.control", recipe_node, settings, offset, num_latent_frames)
    chunk = Chunk(
        num_latent_frames=num_latent_frames,
        audio_offset=offset,
        seed=seed,
        **{name: getattr(fields, name) for name in ChunkSettings.model_fields},
    )
    facts: dict[str, Any] = {
        "chunk": len(chain.parts) + 1,
        "seed": seed,
        "steps": fields.steps,
        "latent_frames": num_latent_frames,
    }
    facts |= {} if since is None else {"since": since}
    latent = planner.add(name, chunk, inputs, recipe_node=recipe_node, facts=facts)["latent"].source
    if fields.motion == "latent":
        return replace(chain, parts=(*chain.parts, Part(latent, num_latent_frames)), settings=settings)
    part, pixels = _add_decoding(planner, f"{name}.pixels", recipe_node, chain, settings, latent, num_latent_frames)
    return replace(chain, parts=(*chain.parts, part), settings=settings, pixels=pixels)


def _add_start(planner: Planner, name: str, recipe_node: str, settings: Settings) -> Source | None:
    """Plan the motion latent in front of the first chunk, where something asks for one."""
    from_reference = settings.fields.init_first_frame
    if not from_reference and "motion_video" not in settings.inputs:
        return None
    inputs: PlannedInputs = {"vae": settings.inputs.get("vae")}
    inputs |= {"reference": settings.inputs.get("reference")} if from_reference else {}
    inputs |= {} if from_reference else {"motion_video": settings.inputs["motion_video"]}
    require_cut(recipe_node, settings.inputs.get("motion_video"), **_size(settings))
    node = EncodeMotion(**_size(settings), conditioning=settings.fields.conditioning)
    return planner.add(name, node, inputs, recipe_node=recipe_node)["motion"].source


def _add_control(
    planner: Planner, name: str, recipe_node: str, settings: Settings, offset: int, num_latent_frames: int
) -> Source:
    inputs: PlannedInputs = {"vae": settings.inputs.get("vae"), "control_video": settings.inputs["control_video"]}
    require_cut(recipe_node, settings.inputs["control_video"], **_size(settings))
    node = EncodeControl(
        **_size(settings),
        offset=offset,
        warmup_frames=warmup_frames(settings),
        num_latent_frames=num_latent_frames,
        conditioning=settings.fields.conditioning,
    )
    return planner.add(name, node, inputs, recipe_node=recipe_node)["control"].source


def latent_frames(length: int) -> int:
    """Return how many latent frames a chunk of `length` pixel frames has."""
    return (length - 1) // FRAMES_PER_LATENT + 1


def warmup_frames(settings: Settings) -> int:
    """Return how many frames of silence stand in front of the voice; 0 without a voice."""
    speech = settings.inputs.get("speech")
    return int(speech.facts.get("warmup_frames", 0)) if speech else 0


def voice_frames(settings: Settings) -> int | None:
    """Return how many frames the voice lasts, rounded up; None without one, or where its file is missing."""
    speech = settings.inputs.get("speech")
    frames = speech.facts.get("frames") if speech else None
    return None if frames is None else int(frames)


def _size(settings: Settings) -> dict[str, int]:
    return {"width": settings.fields.width, "height": settings.fields.height}


def _add_decoding(
    planner: Planner,
    name: str,
    recipe_node: str,
    chain: Chain,
    settings: Settings,
    latent: Source,
    num_latent_frames: int,
) -> tuple[Part, DecodedSources]:
    """Plan the decoding of one chunk behind what came before it, and the next chunk's motion from its pixels."""
    begins = not chain.parts
    inputs: PlannedInputs = {"vae": settings.inputs.get("vae"), "latent": latent}
    if begins:
        inputs |= {"before": chain.start or settings.inputs.get("reference")}
        inputs |= {"reference": settings.inputs.get("reference")} if chain.start else {}
    elif chain.pixels is not None:
        inputs |= {"before": chain.pixels.motion, "tail": chain.pixels.tail}
    dropped = FIRST_FRAMES_DROPPED if begins and chain.start is None else 0
    node = DecodeChunk(num_latent_frames=num_latent_frames, drop_frames=dropped)
    num_frames = FRAMES_PER_LATENT * num_latent_frames - dropped
    values = planner.add(
        name, node, inputs, recipe_node=recipe_node, facts={"chunk_frames": num_frames, **_size(settings)}
    )
    part = Part(latent, num_latent_frames, values["frames"].source, num_frames)
    return part, DecodedSources(values["motion"].source, values["tail"].source)
