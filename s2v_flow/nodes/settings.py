"""What a chunk is sampled with: as it is planned, and as it is run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel

from s2v_flow.graph.node import Node, Planner
from s2v_flow.graph.ports import Value
from s2v_flow.nodes.fields import Conditioning
from s2v_flow.sampling.catalog import SamplerName, SchedulerName


class SamplingSettings(BaseModel):
    """What the sampling of one chunk depends on beside its inputs and its place in the video."""

    width: int
    height: int
    steps: int
    cfg: float
    seed: int
    sampler: SamplerName
    scheduler: SchedulerName
    shift: float
    conditioning: Conditioning


@dataclass(frozen=True)
class Settings:
    """What a chunk is sampled with: values of its inputs, and its plain fields. `extend` inherits it."""

    inputs: Mapping[str, Value] = field(default_factory=dict)
    fields: Mapping[str, Any] = field(default_factory=dict)

    def updated(self, planner: Planner, node: Node, names: tuple[str, ...]) -> Settings:
        """Return these settings with what `node` gives itself laid over them."""
        refs = node.refs()
        given = {key: planner.value(ref) for key, ref in refs.items() if key in INPUTS}
        inputs = {**self.inputs, **{key: value for key, value in given.items() if value is not None}}
        own = {name: getattr(node, name) for name in names if name in type(node).model_fields}
        return Settings(inputs, {**self.fields, **{name: value for name, value in own.items() if value is not None}})


INPUTS = ("model", "positive", "negative", "speech", "reference", "control_video", "motion_video", "vae")


FIELDS = ("width", "height", "length", "steps", "cfg", "sampler", "scheduler", "shift", "conditioning", "motion")
