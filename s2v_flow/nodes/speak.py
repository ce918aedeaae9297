"""A voice from a text, by an engine whose voice lies in its package: nothing is fetched."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from importlib import import_module, metadata, util
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from s2v_flow.errors import MissingError
from s2v_flow.graph.node import Node, Planner, Precision
from s2v_flow.graph.ports import Value
from s2v_flow.nodes.load_media import sound_facts, with_facts

if TYPE_CHECKING:
    from s2v_flow.graph.context import RunContext

_RATE_HZ = 24_000


class Speak(Node):
    """Speak a text, in English: the voice. It needs `pip install hibari-tts`; nothing is fetched when it runs."""

    kind: ClassVar[str] = "speak"
    outputs: ClassVar = {"audio": "audio"}

    text: str = Field(
        min_length=1,
        max_length=5000,
        description="What is said. Planning speaks a new text once, to learn how long it takes.",
    )
    voice: Literal["heart"] = Field("heart", description="A woman's, American.")
    speed: float = Field(1.0, ge=0.5, le=2.0, description="2 is twice as fast.")

    def plan(self, planner: Planner, name: str) -> dict[str, Value]:
        """Count the samples: the voice's length decides how many chunks there are."""
        found = util.find_spec("hibari")
        if found is None or found.origin is None or util.find_spec("onnxruntime") is None:
            raise MissingError(f"{name}: the engine that speaks is not installed", "pip install hibari-tts")
        values = planner.add_simple(name, self)
        digest = hashlib.sha256(repr((self.text, self.voice, self.speed, _engine())).encode()).hexdigest()
        model = Path(found.origin).parent / "assets" / "hibari.onnx"
        known = planner.remember(f"speech of {digest}", model, lambda: {"num_samples": len(self._spoken())})
        if not known["num_samples"]:
            planner.problem(name, "text", "R130", "there is no word in it that an English voice can say")
            return {}
        return with_facts(values, sound_facts(known["num_samples"], _RATE_HZ, 1))

    def run(self, context: RunContext, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Give out the sound, mono at 24 kHz."""
        from s2v_flow.media.audio import Audio
        from s2v_flow.media.resample import Joined

        return {"audio": Joined((Audio(self._spoken()[None], _RATE_HZ),))}

    def identity(self, digests: Mapping[tuple[str | int, ...], str], precision: Precision) -> dict[str, Any]:
        """Return the fields, and which engine speaks them."""
        return {**super().identity(digests, precision), "engine": _engine()}

    def _spoken(self) -> Any:
        return import_module("hibari").Hibari(self.voice, threads=1)(self.text, self.speed, seed=0)  # float32 [n]


def _engine() -> str:
    return f"hibari-tts {metadata.version('hibari-tts')}"
