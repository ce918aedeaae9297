"""Field types that several kinds share."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import AfterValidator, Field

from s2v_flow.graph.ports import FileField, Port, Ref

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
