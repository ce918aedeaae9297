"""The numerics policy: what besides fields and inputs decides a result's bits."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Numerics:
    """The class of device ("cpu", "cuda"; never its index) and the attention backend of a run."""

    device_class: str
    attention: str = "sdpa"

    def precision(self, kind: str, asked: str) -> str:
        """Resolve a loader's precision.

        Args:
            kind: The loader's kind.
            asked: "auto", "fp32", "bf16" or "fp16".

        Returns:
            "fp32", "bf16" or "fp16": what is asked for; for auto, fp32 on CPU and for the (small) audio encoder, else
            bf16.
        """
        if asked != "auto":
            return asked
        return "fp32" if self.device_class == "cpu" or kind == "load_audio_encoder" else "bf16"

    def identity(self) -> dict[str, str]:
        """Return the part of a fingerprint's pre-image that stands for this policy."""
        return {"device": self.device_class, "attention": self.attention}
