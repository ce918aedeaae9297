"""A timeline: what changes in an `extend` node's chunks as the voice goes on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from pydantic import BaseModel, ConfigDict, Field

from s2v_flow.graph.node import Planner
from s2v_flow.graph.ports import Value
from s2v_flow.nodes.chunk_plan import FRAME_RATE_HZ
from s2v_flow.nodes.encode import EncodeText
from s2v_flow.nodes.fields import Cfg, Seconds, Seed, Shift, Steps
from s2v_flow.nodes.remarks import remark_on_prompt, remark_on_settings
from s2v_flow.nodes.settings import Settings, own_settings


class TimelineEntry(BaseModel):
    """What changes at a time; what is not given goes on as before."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    at: Seconds = Field(
        description="When, on the voice's clock: seconds, or text like 12.5s. It takes effect where two chunks meet, "
        "at the nearest such place."
    )
    prompt: str | None = Field(
        None,
        description="The prompt from here on, in the prompt_syntax of the video's positive prompt.",
        max_length=20_000,
    )
    negative_prompt: str | None = Field(None, description="The negative prompt from here on.", max_length=20_000)
    seed: Seed | None = Field(None, description="The seed of the first chunk from here on; one more for each further.")
    steps: Steps | None = Field(None, description="Denoising steps from here on.")
    cfg: Cfg | None = Field(None, description="Guidance scale from here on.")
    shift: Shift | None = Field(None, description="Shift of the noise schedule from here on.")


def check_timeline(entries: list[TimelineEntry]) -> list[TimelineEntry]:
    """Refuse a timeline that is out of order.

    Raises:
        ValueError: Naming the first entry that does not come after the one before.
    """
    for before, after in pairwise(entries):
        if after.at <= before.at:
            raise ValueError(f"times must rise: {after.at:g} s stands after {before.at:g} s")
    return entries


@dataclass(frozen=True)
class Cue:
    """What a chunk is sampled with: its settings, its seed if the timeline gives one, and since when."""

    settings: Settings
    seed: int | None = None
    since: float | None = None


class Timeline:
    """Walks along an `extend` node's chunks; prompts are planned where they are first used."""

    def __init__(self, planner: Planner, name: str, entries: Sequence[TimelineEntry], settings: Settings) -> None:
        self._builder = planner
        self._name = name
        self._waiting = list(enumerate(entries, start=1))
        self._cue = Cue(settings)

    def cue(self, first_frame: int, num_frames: int) -> Cue:
        """Return what the next chunk is sampled with.

        `first_frame`: the chunk's first frame on the voice's clock; negative in the warm-up.
        """
        self._cue = replace(self._cue, seed=None if self._cue.seed is None else self._cue.seed + 1)
        middle = (first_frame + num_frames / 2) / FRAME_RATE_HZ
        while self._waiting and self._waiting[0][1].at <= middle:
            number, entry = self._waiting.pop(0)
            if self._waiting and self._waiting[0][1].at <= middle:
                text = (
                    f"{self._name}: the timeline's entry at {entry.at:g} s has no chunk of its own; the next one counts"
                )
                self._builder.note(self._name, text)
            self._cue = self._after(number, entry)
        return self._cue

    def close(self) -> None:
        """Say which entries come after the last chunk."""
        for _, entry in self._waiting:
            text = f"{self._name}: the timeline's entry at {entry.at:g} s comes after the last chunk and has no effect"
            self._builder.note(self._name, text)

    def _after(self, number: int, entry: TimelineEntry) -> Cue:
        settings = self._cue.settings
        inputs = dict(settings.inputs)
        for key, text in (("positive", entry.prompt), ("negative", entry.negative_prompt)):
            if text is not None:
                inputs[key] = self._encode(f"{self._name}.{key}[{number}]", text, settings.inputs)
        own = own_settings(entry)
        settings = Settings(inputs, settings.fields.model_copy(update=own))
        given = own.keys() if entry.negative_prompt is None else {*own, "negative"}
        remark_on_settings(self._builder, self._name, settings, given)
        seed = self._cue.seed if entry.seed is None else entry.seed
        return Cue(settings, seed, entry.at)

    def _encode(self, name: str, text: str, inputs: Mapping[str, Value]) -> Value:
        """Plan a prompt: by the encoder, and in the syntax, of the video's own."""
        facts = inputs["positive"].facts
        node = EncodeText.model_construct(text_encoder=None, text=text, prompt_syntax=facts["prompt_syntax"])
        try:
            parts = [words for words, _ in node.parts()]
        except ValueError as error:
            self._builder.problem(self._name, "timeline", "R106", f"{name}: {error}")
            parts = []
        encoder: Value = facts["text_encoder"]
        remark_on_prompt(self._builder, self._name, encoder, parts, node=name)
        (value,) = self._builder.add(name, node, {"text_encoder": encoder}, recipe_node=self._name).values()
        return replace(value, facts=facts)
