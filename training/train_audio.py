"""Train the small Wav2Vec2's ears: `python -m training.train_audio --state DIR --steps N`.

The convolutions and the position embedding learn to say how far the mouth opens and how round it is; the layers after
them are generated and change little. So all 25 states tell it, and the DiT's audio encoder finds it at once.
"""

from __future__ import annotations

import argparse
import random
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from s2v_flow.demo.plan import WAV2VEC2_SIZES, generated_wav2vec2, uniform
from s2v_flow.models.encoders import build_wav2vec2
from training import loop, state
from training.voices import mouth, speak

TRAINED = ("feature_extractor.", "feature_projection.", "encoder.pos_conv_embed.")
STATE_HOP = 320
SECONDS = 6.0
EXCERPT_STATES = 80
SEED = 11


def main() -> None:
    """Train; it takes a few minutes and starts anew with every call."""
    reader = loop.parser(__doc__, steps=1500)
    reader.add_argument("--clips", type=int, default=160)
    loop.start(reader, train)


def target_directions() -> Tensor:
    """Return the directions [2, 64] in which a state says opening and roundness."""
    return torch.linalg.qr(uniform(SEED, "directions", (64, 2))).Q.T * 8


def train(options: argparse.Namespace) -> list[float]:
    """Train and return the loss of every step."""
    rng = random.Random(SEED)
    start = time.monotonic()
    clips = [_clip(rng) for _ in range(options.clips)]
    print(f"{len(clips)} clips in {time.monotonic() - start:.0f} s", flush=True)
    module = build_wav2vec2(WAV2VEC2_SIZES)
    module.load_state_dict(generated_wav2vec2(), assign=True)
    named = {key: value for key, value in module.named_parameters() if key.startswith(TRAINED)}
    for key, value in module.named_parameters():
        value.requires_grad_(key in named)
    with torch.no_grad():  # loudness shows where a constant and the sound are of one size
        module.get_parameter("feature_extractor.conv_layers.0.conv.bias").mul_(8)
        module.get_parameter("encoder.pos_conv_embed.conv.parametrizations.weight.original0").mul_(0.3)
    optimizer = torch.optim.AdamW(named.values(), lr=3e-3, betas=(0.9, 0.98), weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, options.steps, pct_start=0.05)
    directions = target_directions()
    losses = []
    for step in range(options.steps):
        picked = [_excerpt(clips[rng.randrange(len(clips))], rng) for _ in range(4)]
        wave, target = (torch.stack(part) for part in zip(*picked, strict=True))
        said = first_state(module, wave)
        loss = (said - (target - 0.3) @ directions).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(named.values(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if (step + 1) % 50 == 0 or step + 1 == options.steps:
            read = (said.detach() @ directions.T / 64 + 0.3).flatten(0, 1).T
            wanted = target.flatten(0, 1).T
            found = [torch.corrcoef(torch.stack(pair))[0, 1].item() for pair in zip(read, wanted, strict=True)]
            minutes = (time.monotonic() - start) / 60
            print(f"{step + 1} {minutes:.1f} min loss {np.mean(losses[-100:]):.4f} correlation {found}", flush=True)
            state.save_weights(dict(named), options.state / "wav2vec2.safetensors")
    return losses


def first_state(module: nn.Module, wave: Tensor) -> Tensor:
    """Compute the input of the first layer, [B, T, 64], for normalised sound [B, L]."""
    model: Any = module
    hidden = model.feature_projection(model.feature_extractor(wave).transpose(1, 2))[0]
    result: Tensor = hidden + model.encoder.pos_conv_embed(hidden)
    return result


def _excerpt(clip: tuple[Tensor, Tensor], rng: random.Random) -> tuple[Tensor, Tensor]:
    """Cut 1.6 seconds out of a clip."""
    wave, target = clip
    first = rng.randrange(len(target) - EXCERPT_STATES + 1)
    samples = (EXCERPT_STATES - 1) * STATE_HOP + 400
    return wave[first * STATE_HOP :][:samples], target[first : first + EXCERPT_STATES]


def _clip(rng: random.Random) -> tuple[Tensor, Tensor]:
    """Make sound, normalised [L], and what each state shall say of it [T, 2]."""
    wave = speak(SECONDS, rng)
    if rng.random() < 0.5:  # a duller or sharper microphone
        tilt = rng.uniform(-0.6, 0.6)
        wave = wave + tilt * np.concatenate([[0], wave[:-1]]).astype(np.float32)
    if rng.random() < 0.5:
        wave[: rng.randrange(3000, 40_000)] *= 0
    opening, roundness = mouth(wave, STATE_HOP)
    count = (len(wave) - 400) // STATE_HOP + 1
    lack = count - len(opening)
    target = torch.stack([opening, roundness], 1)
    target = torch.cat([target, target[-1:].expand(lack, -1)])
    normal = (wave - wave.mean()) / np.sqrt(wave.var() + 1e-7)
    return torch.from_numpy(normal).float(), target


if __name__ == "__main__":
    main()
