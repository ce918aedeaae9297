"""Field types that several kinds share, and the settings that chunks are sampled with.

A new setting is one field of `ChunkSettings`, and one with a description on `sample`, `extend` and, where it may change
along the voice, on a timeline's entry.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from s2v_flow.graph.node import Node, Planner
from s2v_flow.graph.ports import FileField, Port, Ref, Value
from s2v_flow.sampling import SamplerName, SchedulerName

ModelInput = Annotated[Ref, Port("diffusion_model")]
TextEncoderInput = Annotated[Ref, Port("text_encoder")]
AudioEncoderInput = Annotated[Ref, Port("audio_encoder")]
VaeInput = Annotated[Ref, Port("vae")]
ImageInput = Annotated[Ref, Port("image")]
AudioInput = Annotated[Ref, Port("audio")]
FramesInput = Annotated[Ref, Port("frames")]
ConditioningInput = Annotated[Ref, Port("conditioning")]
SpeechInput = Annotated[Ref, Port("speech")]
ReferenceInput = Annotated[Ref, Port("reference")]
LatentInput = Annotated[Ref, Port("latent")]

Precision = Literal["auto", "fp32", "bf16", "fp16"]
DitPrecision = Literal["auto", "fp32", "bf16", "fp16", "fp8_fast"]
Attention = Literal["auto", "sdpa", "cudnn", "flash", "efficient", "sage"]
Conditioning = Literal["official", "comfyui"]
Motion = Literal["latent", "pixels"]
StepCache = Literal["off", "easy", "velocity"]
StepCacheThreshold = Annotated[float, Field(gt=0, le=3)]
Steps = Annotated[int, Field(ge=1, le=500)]  # more would repeat levels of the 1000 that there are
Cfg = Annotated[float, Field(ge=0, le=100)]
Shift = Annotated[float, Field(gt=0, le=1000)]
Seed = Annotated[int, Field(ge=0, le=2**64 - 1)]


def check_length(length: int) -> int:
    """Refuse a length that is not 4n+1 pixel frames: the VAE takes no other.

    Raises:
        ValueError: With the two nearest lengths.
    """
    if length % 4 != 1:
        lower = (length - 1) // 4 * 4 + 1
        raise ValueError(f"must be 4n+1, like {max(lower, 1)} or {lower + 4}")
    return length


def read_seconds(value: float | str) -> float:
    """Turn a time, seconds as a number or text like "12.5s", into seconds.

    Raises:
        ValueError: The text is no time, or the time is negative or longer than a day.
    """
    if isinstance(value, str):
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*s", value)
        if match is None:
            raise ValueError("must be seconds, like 12.5 or 12.5s")
        value = float(match[1])
    if not 0 <= value <= 86_400:
        raise ValueError("must be from 0 to 86400 seconds")
    return float(value)


if TYPE_CHECKING:
    Seconds = float  # what it is after validation
else:
    Seconds = Annotated[float | str, AfterValidator(read_seconds)]

Length = Annotated[int, Field(ge=1, le=1001), AfterValidator(check_length)]
Side = Annotated[int, Field(ge=32, le=4096, multiple_of=16)]


def model_file(what: str, *folders: str) -> FileField:
    """Mark a model file: its usual folder under the models root first, older names after it."""
    return FileField("model", what, folders)


class ChunkSettings(BaseModel):
    """What the sampling of a chunk depends on beside its inputs, its seed and its place in the video."""

    model_config = ConfigDict(frozen=True)

    width: int
    height: int
    steps: int
    cfg: float
    sampler: SamplerName
    scheduler: SchedulerName
    shift: float
    conditioning: Conditioning
    step_cache: StepCache = "off"
    step_cache_threshold: StepCacheThreshold = 0.2


class SamplingSettings(ChunkSettings):
    """What the sampling of one chunk depends on beside its inputs."""

    seed: int
    num_latent_frames: int
    audio_offset: int


class VideoSettings(ChunkSettings):
    """What further chunks inherit; fields that nothing gave are not set, see `Settings.missing`."""

    length: int
    motion: Motion
    init_first_frame: bool = False


@dataclass(frozen=True)
class Settings:
    """What a chunk is sampled with, at planning: values of its inputs, and plain fields. `extend` inherits it."""

    inputs: Mapping[str, Value] = field(default_factory=dict)
    fields: VideoSettings = field(default_factory=VideoSettings.model_construct)

    def updated(self, planner: Planner, node: Node) -> Settings:
        """Return these settings with what a node gives itself laid over them."""
        given = {key: planner.value(ref) for key, ref in node.refs().items() if key != "video"}
        inputs = {**self.inputs, **{key: value for key, value in given.items() if value is not None}}
        return Settings(inputs, self.fields.model_copy(update=own_settings(node)))

    @property
    def size(self) -> tuple[int | None, int | None]:
        """Width and height; None where they are not known."""
        return getattr(self.fields, "width", None), getattr(self.fields, "height", None)

    def with_size(self, width: int, height: int) -> Settings:
        """Return these settings for another size."""
        return Settings(self.inputs, self.fields.model_copy(update={"width": width, "height": height}))

    def missing(self) -> list[str]:
        """Name the fields that nothing gave."""
        required = (name for name, info in VideoSettings.model_fields.items() if info.is_required())
        return [name for name in required if name not in self.fields.model_fields_set]


def own_settings(record: BaseModel) -> dict[str, object]:
    """Return the settings that a node, or a timeline's entry, gives itself."""
    given = {name: getattr(record, name, None) for name in VideoSettings.model_fields}
    return {name: value for name, value in given.items() if value is not None}
