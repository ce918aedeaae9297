"""The demo: tiny models of the real architecture, a portrait and a spoken sentence.

Its model files, trained ones, and untrained ones for tests, are made on first use in the cache folder. The number of
that folder changes whenever a file in it does.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

DEMO_VERSION = 2
DEMO_FILES = (
    "diffusion_models/demo_s2v.safetensors",
    "vae/demo_vae.safetensors",
    "audio_encoders/demo_wav2vec2.safetensors",
    "diffusion_models/tiny_s2v.safetensors",
    "diffusion_models/tiny_s2v_fp8_scaled.safetensors",
    "vae/tiny_vae.safetensors",
    "text_encoders/tiny_umt5.safetensors",
    "text_encoders/tiny_umt5_fp8_scaled.safetensors",
    "audio_encoders/tiny_wav2vec2.safetensors",
    "loras/tiny_lightning_lora.safetensors",
    "loras/tiny_lightning_lora_peft.safetensors",
)


def demo_root(cache_dir: Path) -> Path:
    """Return the models folder in which the demo's files stand, or will stand."""
    return cache_dir / "demo-models" / str(DEMO_VERSION)


@lru_cache(maxsize=4)
def demo_paths(cache_dir: Path) -> Mapping[str, Path]:
    """Return where each of the demo's files stands, or will stand, by file name."""
    return {Path(file).name: demo_root(cache_dir) / file for file in DEMO_FILES}
