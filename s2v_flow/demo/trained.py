"""The demo's trained models: what was learned lies beside this file, the rest follows from rules.

How they were trained: the folder `training/` of the repository. Weights are stored in half precision.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from s2v_flow.demo import plan
from s2v_flow.demo.weights import fill_all
from s2v_flow.models.audio_encoder import build_wav2vec2
from s2v_flow.models.vae import VAEConfig, WanVAE

FOLDER = Path(__file__).with_name("learned")

CONVOLUTION_WIDTH = 32
WAV2VEC2_SIZES = {
    **{
        f"feature_extractor.conv_layers.{index}.conv.weight": (CONVOLUTION_WIDTH, channels, kernel)
        for index, (channels, kernel) in enumerate(
            [(1, 10), *[(CONVOLUTION_WIDTH, 3)] * 4, *[(CONVOLUTION_WIDTH, 2)] * 2]
        )
    },
    "encoder.pos_conv_embed.conv.parametrizations.weight.original1": (64, 4, 128),
    "encoder.layers.0.feed_forward.intermediate_dense.weight": (256, 64),
    **{f"encoder.layers.{index}.layer_norm.weight": (64,) for index in range(24)},
}
WAV2VEC2_SEED = 11
QUIET = ("attention.out_proj.", "feed_forward.output_dense.")  # what a layer adds to its input
QUIET_SCALE = 0.03


def trained_files() -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Make each trained file's path below the models folder and its float32 weights."""
    yield (
        "diffusion_models/demo_s2v.safetensors",
        plan.built_in() | _stored("dit") | _stored("text") | _stored("hearing"),
    )
    yield "vae/demo_vae.safetensors", vae_with_time(_stored("vae"))
    yield "audio_encoders/demo_wav2vec2.safetensors", generated_wav2vec2() | _stored("wav2vec2")


def generated_wav2vec2() -> dict[str, Tensor]:
    """Return an untrained Wav2Vec2 whose layers hardly change what goes through them."""
    module = build_wav2vec2(WAV2VEC2_SIZES)
    weights = fill_all({key: tuple(value.shape) for key, value in module.state_dict().items()}, WAV2VEC2_SEED)
    return {key: value * QUIET_SCALE if any(part in key for part in QUIET) else value for key, value in weights.items()}


def vae_with_time(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Put zeros where kernels see earlier frames; stored is what sees the newest."""
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in WanVAE(VAEConfig(width=16)).state_dict().items()}
    full = {}
    for key, value in weights.items():
        full[key] = value
        if len(shapes[key]) == 5 and value.ndim == 4:
            full[key] = value.new_zeros(shapes[key])
            full[key][:, :, -1] = value
    return full


def _stored(name: str) -> dict[str, Tensor]:
    """Read one file of learned weights, as float32."""
    return {key: value.float() for key, value in load_file(FOLDER / f"{name}.safetensors").items()}
