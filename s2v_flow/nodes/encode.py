"""Kinds that turn prompts, sound and images into what the diffusion model is conditioned on."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from itertools import accumulate, chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator

from s2v_flow.graph.context import RunContext
from s2v_flow.graph.node import Node, Planner
from s2v_flow.graph.node import Precision as Resolve
from s2v_flow.graph.ports import FieldPath, Source, Value
from s2v_flow.models.speech_rate import SAMPLE_RATE_HZ, SAMPLES_PER_FRAME, STATES_HZ, num_segments, segment_port
from s2v_flow.nodes.fields import (
    AudioEncoderInput,
    AudioInput,
    Conditioning,
    ImageInput,
    Side,
    TextEncoderInput,
    VaeInput,
)
from s2v_flow.nodes.frames import require_cut
from s2v_flow.nodes.remarks import remark_on_prompt

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from s2v_flow.media.audio import Sound
    from s2v_flow.models.encoders import AudioEncoder
    from s2v_flow.models.speech import SpeechTable

WHOLE_SECONDS = 600.0
LONG_WINDOW_SECONDS = 120.0


class EncodeText(Node):
    """Encode a prompt. A negative prompt that nothing needs (cfg 1) is never encoded."""

    kind: ClassVar[str] = "encode_text"
    slow_imports: ClassVar = ("transformers.models.umt5.modeling_umt5",)
    outputs: ClassVar = {"conditioning": "conditioning"}
    is_stored: ClassVar[bool] = True
    has_numerics: ClassVar[bool] = True

    text_encoder: TextEncoderInput = Field(description="The text encoder.")
    text: str = Field(description="The prompt.", max_length=20_000)
    prompt_syntax: Literal["plain", "comfyui"] = Field(
        "plain",
        description="plain: the text as it is. comfyui: `(words:1.3)` weighs words, `(words)` by 1.1, nested, and "
        "`\\(` is a bracket, as in ComfyUI's prompts. It counts for the prompts of a timeline too.",
    )

    @field_validator("prompt_syntax")
    @classmethod
    def check_weights(cls, syntax: str, info: ValidationInfo) -> str:
        """Refuse weights that cannot be computed."""
        if syntax == "comfyui":
            weighted_parts(info.data.get("text", ""))
        return syntax

    def identity(self, digests: Mapping[FieldPath, str], precision: Resolve) -> dict[str, Any]:
        """Leave out a syntax that changes nothing: it is younger than results in caches."""
        fields = super().identity(digests, precision)
        return {key: value for key, value in fields.items() if (key, value) != ("prompt_syntax", "plain")}

    def parts(self) -> list[tuple[str, float]]:
        """Return the words and their weights."""
        return [(self.text, 1.0)] if self.prompt_syntax == "plain" else weighted_parts(self.text)

    def plan(self, planner: Planner, name: str) -> dict[str, Value]:
        """Pass on the encoder and the syntax: a timeline's prompts need them."""
        encoder = planner.value(self.text_encoder)
        if encoder is not None:
            remark_on_prompt(planner, name, encoder, [text for text, _ in self.parts()], node=name)
        facts = {"text_encoder": encoder, "prompt_syntax": self.prompt_syntax}
        return planner.add_simple(name, self, facts if encoder else {})

    def run(self, context: RunContext, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Encode the prompt: {"conditioning": {context: [1, S, D], the prompt's own tokens}}."""
        from s2v_flow.nodes.tensors import pack_finite

        return {"conditioning": pack_finite({"context": inputs["text_encoder"].get().encode_parts(self.parts())})}


class EncodeAudio(Node):
    """Encode the voice: 25 layers of Wav2Vec2 features at video rate; a long voice in windows, stored in segments."""

    kind: ClassVar[str] = "encode_audio"
    version: ClassVar[int] = 2
    slow_imports: ClassVar = ("transformers.models.wav2vec2.modeling_wav2vec2",)
    outputs: ClassVar = {"speech": "speech"}
    is_stored: ClassVar[bool] = True
    has_numerics: ClassVar[bool] = True

    audio_encoder: AudioEncoderInput = Field(description="The audio encoder.")
    audio: AudioInput = Field(description="The voice.")
    conditioning: Conditioning = Field(
        "official", description="How sound is resampled and normalised: as the model's authors do, or as ComfyUI does."
    )
    warmup_frames: int = Field(
        3,
        ge=0,
        le=77,
        description="So many frames of silence are put in front of the voice and dropped again after decoding, because "
        "a video's first frames are its worst.",
    )

    final_norm: bool = Field(
        True,
        description="Whether the last layer's features are normed, as with the transformers 4 of the model's authors. "
        "false is what their code gives with transformers 5.",
    )

    window_seconds: Literal["auto"] | Annotated[float, Field(ge=20, le=86_400)] = Field(
        "auto",
        description="A voice longer than this is encoded in windows of this length, each with 10 s of sound before and "
        "after it; a shorter one as a whole. auto: as a whole up to 10 minutes, else in windows of 120 s. In windows "
        "the time grows evenly with the voice, not with its square, and a change late in it leaves what comes before.",
    )

    def plan(self, planner: Planner, name: str) -> dict[str, Value]:
        """Pass on how long the voice is, how much silence stands in front of it, and its segments."""
        audio = planner.value(self.audio)
        known = planner.facts(self.audio)
        own, count = {}, 1  # where the voice's file is missing
        if "num_samples" in known:
            own = {"num_samples": self.num_samples(known["num_samples"], known["sample_rate_hz"])}
            count = num_segments(own["num_samples"])
        inputs = {"audio_encoder": planner.value(self.audio_encoder), "audio": audio}
        (value,) = planner.add(name, self, inputs, recipe_node=name, facts=own).values()
        sources = tuple(Source(name, segment_port(index)) for index in range(count))
        return {"speech": replace(value, sources=sources, facts={**known, "warmup_frames": self.warmup_frames})}

    def run(self, context: RunContext, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Encode the voice: a port for each segment.

        Each is {rows: float32 [up to 320, 25, E], first_row: int64 []}; the last has num_features_30hz: int64 [] too.
        """
        from s2v_flow.models.encoders import require_state
        from s2v_flow.nodes.tensors import pack_finite

        num_samples = context.planned["num_samples"]
        context.record(num_samples=num_samples)
        require_state(num_samples)
        window = self.window_states(num_samples)
        found: dict[str, Any] = {}
        for index, table in enumerate(self._tables(inputs["audio"], inputs["audio_encoder"].get(), context, window)):
            found[segment_port(index)] = context.scratch / f"{segment_port(index)}.safetensors"
            found[segment_port(index)].write_bytes(pack_finite(table.to_tensors()))
        return found

    def _tables(
        self, sound: Sound, encoder: AudioEncoder, context: RunContext, window: int | None
    ) -> Iterator[SpeechTable]:
        """Encode a voice, as a whole or in windows of so many states; yield its segments as they come."""
        import numpy as np
        import torch

        from s2v_flow.media.resample import speech_blocks
        from s2v_flow.models import speech

        silence = np.zeros(self.warmup_frames * SAMPLES_PER_FRAME, np.float32)
        blocks = chain([silence], speech_blocks(sound, self.conditioning))  # as the encoder hears it: mono, 16 kHz
        if window is None:
            mono = encoder.mono(torch.from_numpy(np.concatenate([*blocks])), self.conditioning)
            yield from speech.to_video_rate(encoder.states(mono, final_norm=self.final_norm)).segments()
        else:
            read, count = _normalised(blocks, context.scratch / "waveform")
            yield from speech.windowed_video_rate(encoder, read, count, window, final_norm=self.final_norm)

    def num_samples(self, of_voice: int, sample_rate_hz: int) -> int:
        """Count what the encoder hears of a voice, at 16 kHz, with the silence in front."""
        return self.warmup_frames * SAMPLES_PER_FRAME + -(-of_voice * SAMPLE_RATE_HZ // sample_rate_hz)

    def window_states(self, num_samples: int) -> int | None:
        """Return a window's length in states, or None for a voice that is encoded as a whole."""
        given = self.window_seconds
        longest, window = (WHOLE_SECONDS, LONG_WINDOW_SECONDS) if given == "auto" else (given, given)
        return None if num_samples <= longest * SAMPLE_RATE_HZ else round(window * STATES_HZ)


def _normalised(blocks: Iterable[np.ndarray], path: Path) -> tuple[Callable[[int, int], Tensor], int]:
    """Put a waveform into a file at `path`, so that memory does not grow with its length.

    Returns:
        What reads samples from start to stop, float32 [n], normalised by the whole waveform's loudness; and how many
        there are.
    """
    import numpy as np
    import torch

    from s2v_flow.models.speech import Loudness

    loudness = Loudness()
    with path.open("wb") as file:
        for block in blocks:
            loudness.add(torch.from_numpy(block))
            file.write(np.ascontiguousarray(block).tobytes())

    def read(start: int, stop: int) -> Tensor:
        samples = np.fromfile(path, np.float32, stop - start, offset=start * 4)
        return loudness.normalise(torch.from_numpy(samples))

    return read, loudness.count


class EncodeImage(Node):
    """Crop and scale the portrait to the video's size and encode it."""

    kind: ClassVar[str] = "encode_image"
    outputs: ClassVar = {"reference": "reference"}
    is_stored: ClassVar[bool] = True
    has_numerics: ClassVar[bool] = True

    vae: VaeInput = Field(description="The VAE.")
    image: ImageInput = Field(description="The portrait.")
    width: Side = Field(description="The video's width in pixels, a multiple of 16.")
    height: Side = Field(description="The video's height in pixels, a multiple of 16.")
    conditioning: Conditioning = Field(
        "official",
        description="How the portrait is scaled: smoothed when shrunk, or as ComfyUI does, without smoothing.",
    )

    def plan(self, planner: Planner, name: str) -> dict[str, Value]:
        """Pass on the video's size."""
        require_cut(name, planner.value(self.image), self.width, self.height)
        return planner.add_simple(name, self, {"width": self.width, "height": self.height})

    def run(self, context: RunContext, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Encode the portrait: {"reference": {latent: [1, 16, 1, H, W], raw; pixels: [1, 3, 1, 8H, 8W] in [-1, 1]}}."""
        import torch

        from s2v_flow.media.image import crop_resize
        from s2v_flow.nodes.shortage import encoded
        from s2v_flow.nodes.tensors import pack_finite, to_pixels

        image = crop_resize(inputs["image"].read(), self.width, self.height, antialias=self.conditioning == "official")
        pixels = to_pixels(torch.from_numpy(image)[None])
        latent = encoded(inputs["vae"].get(), pixels, context)
        return {"reference": pack_finite({"latent": latent, "pixels": pixels})}


MAX_DEPTH = 50
_BRACKET_WEIGHT = 1.1
_OPEN, _CLOSE = "\x02", "\x03"  # stand for escaped brackets while others are looked for


def weighted_parts(text: str) -> list[tuple[str, float]]:
    """Take a prompt apart as ComfyUI does: the words with their weights, in order; none are empty.

    A number after the last colon in brackets is their weight, whatever stands around them; brackets without one
    multiply the weight around them by 1.1. Square brackets mean nothing. After a `)` too many, brackets are text.

    Raises:
        ValueError: Brackets are nested more than 50 deep, or a weight is not finite.
    """
    hidden = text.replace("\\(", _OPEN).replace("\\)", _CLOSE)
    if max(accumulate({"(": 1, ")": -1}.get(character, 0) for character in hidden), default=0) > MAX_DEPTH:
        raise ValueError(f"brackets in a prompt may be nested {MAX_DEPTH} deep, these are deeper")
    return [(part.replace(_OPEN, "(").replace(_CLOSE, ")"), weight) for part, weight in _parts(hidden, 1.0)]


def _parts(text: str, weight: float) -> Iterator[tuple[str, float]]:
    for part in _top_level(text):
        if not (len(part) > 1 and part[0] == "(" and part[-1] == ")"):
            yield part, weight
            continue
        inner, own = part[1:-1], weight * _BRACKET_WEIGHT
        words, _, number = inner.rpartition(":")
        if words:
            with suppress(ValueError):  # else the colon is text
                own, inner = float(number), words
        if not math.isfinite(own):
            raise ValueError(f"the weight {number.strip()} in a prompt is not finite")
        yield from _parts(inner, own)


def _top_level(text: str) -> Iterator[str]:
    """Split a text at its outermost brackets, which stay around what is in them."""
    level = start = 0
    for match in re.finditer(r"[()]", text):
        if match[0] == "(":
            if level == 0:
                yield from filter(None, [text[start : match.start()]])
                start = match.start()
            level += 1
        else:
            level -= 1
            if level == 0:
                yield text[start : match.end()]
                start = match.end()
    yield from filter(None, [text[start:]])
