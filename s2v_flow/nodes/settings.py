"""What chunks are sampled with: declared once, as it is inherited while planning and as it is run.

A new setting is one field of `ChunkSettings`, and one with a description on `sample`, `extend` and, where it may change
along the voice, on a timeline's entry.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from pydantic import BaseModel, ConfigDict

from s2v_flow.graph.node import Node, Planner
from s2v_flow.graph.ports import Value
from s2v_flow.nodes.fields import Conditioning, Motion, StepCache, StepCacheThreshold
from s2v_flow.sampling.catalog import SamplerName, SchedulerName


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
