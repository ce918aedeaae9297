"""One chunk on a bench: run with a model that is a formula, or with any other; stopped, or short of memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from s2v_flow.cache.resume_point import ResumePoints
from s2v_flow.graph.context import Artifact, Numerics, ResumePoint, RunContext, Watch
from s2v_flow.graph.events import Event, Noted, StepDone
from s2v_flow.models.registry import ModelKey, ModelRegistry
from s2v_flow.nodes.chunk import Chunk
from s2v_flow.nodes.handle import ModelHandle, never_stream
from s2v_flow.sampling import SamplerName

STEPS = 6
KEY = "ab" + "0" * 62
FIELDS = {"width": 64, "height": 64, "num_latent_frames": 2, "audio_offset": 0, "steps": STEPS, "cfg": 3.0, "seed": 7}
SAMPLERS = get_args(SamplerName)


class CurvedModel(nn.Module):
    """A velocity that is no straight line, and differs between the branches; `spoil` puts something into it."""

    def __init__(self, spoil: Callable[[int], float] = lambda call: 0.0) -> None:
        super().__init__()
        self.calls = 0
        self._spoil = spoil

    def prepare_text(self, context: Tensor, **_: Any) -> Tensor:
        return context.sum()

    def prepare_audio(self, audio_embed: Tensor | None, **_: Any) -> None:
        return None

    def prepare_chunk(self, *, num_latent_frames: int, height: int, width: int, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(latent_shape=(1, 16, num_latent_frames, height, width))

    def forward(self, x: Tensor, timestep: Tensor, chunk: Any, branches: Sequence[Any]) -> list[Tensor]:
        self.calls += 1
        shift = timestep / 1000 + self._spoil(self.calls)
        return [torch.tanh(x * 1.3 + branch.text) * 0.7 + torch.sin(x * 5) * shift for branch in branches]


class Bench:
    """One chunk with a fake model: runs it, stopping where a test wants, and remembers what happened."""

    def __init__(self, folder: Path, sampler: str = "uni_pc", **fields: Any) -> None:
        self.folder = ResumePoints(folder)
        given = {**FIELDS, "sampler": sampler, "scheduler": "simple", "shift": 8.0, "conditioning": "official"}
        self.chunk = Chunk(**{**given, **fields})
        self.events: list[Event] = []
        self.facts: dict[str, Any] = {}
        self.inputs: dict[str, Any] = {"positive": text(0.1), "negative": text(-0.2)}

    def run(
        self,
        stop_after: int | None = None,
        *,
        model: nn.Module | None = None,
        load_model: Callable[[bool], nn.Module] | None = None,
        key: str = KEY,
        is_fresh: bool = False,
        watch: Watch | None = None,
    ) -> Tensor:
        """Run the chunk and return its latent; ask it to stop at the end of step `stop_after`."""
        self.events.clear()
        self.facts = {}
        should_stop = lambda: stop_after is not None and self.steps()[-1:] == [stop_after]  # noqa: E731
        resume_point = ResumePoint(self.folder, key, "talk[1]", self.events.append, should_stop, is_fresh)
        registry = ModelRegistry()
        load_now = load_model or (lambda streams: model or CurvedModel())
        name = ModelKey("dit", ("sha256:0",), "float32", "cpu")
        handle = ModelHandle(registry, name, load_now, 0, {}, "fp32", never_stream, "cpu")
        try:
            inputs = {"model": handle, **self.inputs}
            return load(self.chunk.run(self.context(registry, resume_point, watch), inputs)["latent"])["samples"]
        finally:
            handle.close()

    def context(
        self, registry: ModelRegistry | None = None, resume_point: ResumePoint | None = None, watch: Watch | None = None
    ) -> RunContext:
        """Return the chunk's context."""
        return RunContext(
            *(
                "talk[1]",
                "extend",
                {},
                "cpu",
                Numerics("cpu"),
                lambda: registry,
                {},
                {},
                Path(),
                self.events.append,
            ),
            facts=self.facts,
            resume_point=resume_point,
            watch=watch,
        )

    def steps(self) -> list[int]:
        """The steps that the last run took."""
        return [event.step for event in self.events if isinstance(event, StepDone)]

    def notes(self) -> list[Noted]:
        return [event for event in self.events if isinstance(event, Noted)]


def text(value: float, width: int = 8) -> Artifact:
    return artifact(context=torch.full((1, 3, width), value))


def artifact(**tensors: Tensor) -> Artifact:
    payload = save(tensors)
    return Artifact(f"sha256:{hash(payload)}", lambda: payload, lambda path, trailer=b"": False)
