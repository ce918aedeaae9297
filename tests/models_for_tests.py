"""Narrower ones of the demo's untrained models, whose convolutions are most of what a small run computes."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from s2v_flow.demo.models import WAV2VEC2_SIZES
from s2v_flow.demo.plan import fill_all
from s2v_flow.models.conditioning import Conditioning
from s2v_flow.models.encoders import AudioEncoder, build_wav2vec2
from s2v_flow.models.vae import VAEConfig, WanVAE

CHANNELS = 32
WIDTH = 8


def features(encoder: AudioEncoder, waveform: Tensor, conditioning: Conditioning, *, final_norm: bool = True) -> Tensor:
    """Encode a clip, [L] or [channels, L], in one go: [A, T, E], float32."""
    states = encoder.states(encoder.mono(waveform, conditioning), final_norm=final_norm)
    return torch.cat([state[None] for state in states]).float()


def make_narrow_models(root: Path, demo_models: Path) -> None:
    """Copy the demo's models to the new folder `root`, but for the VAE and the audio encoder."""
    shutil.copytree(demo_models, root)
    sizes = {
        key: (CHANNELS, min(shape[1], CHANNELS), shape[2]) if "conv_layers" in key else shape
        for key, shape in WAV2VEC2_SIZES.items()
    }
    with torch.device("meta"):
        vae = WanVAE(VAEConfig(width=WIDTH))
    for name, module in (("vae/tiny_vae", vae), ("audio_encoders/tiny_wav2vec2", build_wav2vec2(sizes))):
        shapes = {key: tuple(value.shape) for key, value in module.state_dict().items()}
        save_file(fill_all(shapes, 0), root / f"{name}.safetensors")
