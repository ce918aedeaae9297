"""Kinds that turn prompts, sound and images into what the diffusion model is conditioned on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from s2v_flow.graph.node import Node
from s2v_flow.graph.plan import PlanBuilder, Value
from s2v_flow.nodes.fields import (
    AudioEncoderInput,
    AudioInput,
    Conditioning,
    ImageInput,
    Side,
    TextEncoderInput,
    VaeInput,
)

if TYPE_CHECKING:
    from s2v_flow.graph.run import RunContext

SPEECH_RATE_HZ = 16_000
SAMPLES_PER_FRAME = SPEECH_RATE_HZ // 16


class EncodeText(Node):
    """Encode a prompt. A negative prompt that nothing needs (cfg 1) is never encoded."""

    kind: ClassVar[str] = "encode_text"
    outputs: ClassVar = {"conditioning": "conditioning"}
    is_stored: ClassVar[bool] = True
    has_numerics: ClassVar[bool] = True

    text_encoder: TextEncoderInput = Field(description="The text encoder.")
    text: str = Field(description="The prompt, as it is: no weights, no escapes.", max_length=20_000)

    def plan(self, builder: PlanBuilder, name: str) -> dict[str, Value]:
        """Pass on the encoder: a timeline's prompts need it."""
        encoder = builder.value(self.text_encoder)
        return builder.add_simple(name, self, {"text_encoder": encoder} if encoder else {})

    def run(self, context: RunContext, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Encode the prompt: {"conditioning": {context: [1, S, D], the prompt's own tokens}}."""
        from s2v_flow.nodes.tensors import pack

        return {"conditioning": pack({"context": inputs["text_encoder"].get().encode(self.text)})}


class EncodeAudio(Node):
    """Encode the voice: 25 layers of Wav2Vec2 features at video rate, for the whole length at once."""

    kind: ClassVar[str] = "encode_audio"
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

    def plan(self, builder: PlanBuilder, name: str) -> dict[str, Value]:
        """Pass on how long the voice is and how much silence stands in front of it."""
        audio = builder.value(self.audio)
        return builder.add_simple(name, self, {**(audio.facts if audio else {}), "warmup_frames": self.warmup_frames})

    def run(self, context: RunContext, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Encode the voice: {"speech": {rows: float32 [T, 25, E], num_features_30hz: int64 []}}."""
        import numpy as np
        import torch

        from s2v_flow.media.resample import speech_waveform
        from s2v_flow.models.speech import to_video_rate
        from s2v_flow.nodes.tensors import pack

        voice = speech_waveform(inputs["audio"].read(), self.conditioning)
        silence = np.zeros(self.warmup_frames * SAMPLES_PER_FRAME, np.float32)
        waveform = torch.from_numpy(np.concatenate([silence, voice]))
        encoder = inputs["audio_encoder"].get()
        features = encoder.encode(waveform, self.conditioning, final_norm=self.final_norm)
        table = to_video_rate(features.cpu())
        count = torch.tensor(table.num_features_30hz, dtype=torch.int64)
        return {"speech": pack({"rows": table.rows, "num_features_30hz": count})}


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

    def plan(self, builder: PlanBuilder, name: str) -> dict[str, Value]:
        """Pass on the video's size."""
        return builder.add_simple(name, self, {"width": self.width, "height": self.height})

    def run(self, context: RunContext, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Encode the portrait: {"reference": {latent: [1, 16, 1, H, W], raw; pixels: [1, 3, 1, 8H, 8W] in [-1, 1]}}."""
        import torch

        from s2v_flow.media.image import crop_resize
        from s2v_flow.nodes.tensors import pack, to_pixels

        image = crop_resize(inputs["image"].read(), self.width, self.height, antialias=self.conditioning == "official")
        pixels = to_pixels(torch.from_numpy(image)[None])
        latent = inputs["vae"].get().encode(pixels.to(context.device)).float()
        return {"reference": pack({"latent": latent, "pixels": pixels})}
