"""Train the VAE on drawn characters: `python -m training.train_vae --state DIR --steps N`.

`--part decoder` leaves the encoder, and so the latent space that the DiT knows, as it is; `--part end`, after
`train_decoder`, the decoder's first half too, which tells frames apart, and weighs squared errors more.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from s2v_flow.demo.plan import FOLDER
from training import loop, state
from training.faces import SIZE, draw_character, mouth_box, render
from training.motions import random_motion
from training.vae import TrainableVAE, flat, forget_time, rescale_latents

# of the decoder: up to where frames part for the second time
FIRST_HALF = (
    "decoder.conv1.",
    "decoder.middle.",
    *(f"decoder.upsamples.{index}." for index in range(7)),
    "decoder.upsamples.7.time_conv.",
)
CROP = 64
CLIP_FRAMES = 9
SEED = 5


def main() -> None:
    """Train until `--steps` are done or `--minutes` are over; every call goes on where the last one stopped."""
    reader = loop.long_parser(__doc__, steps=6000, rate=6e-4, save_every=25)
    reader.add_argument("--start", type=Path, default=FOLDER / "vae.safetensors", help="weights to begin with")
    reader.add_argument("--part", choices=("all", "decoder", "end"), default="all")
    loop.start(reader, train)


def train(options: argparse.Namespace) -> list[float]:
    """Train and return the loss of every step."""
    weights_path, state_path = options.state / "vae.safetensors", options.state / f"vae_{options.part}.pt"
    saved = state.load_state(state_path)
    if saved is not None:
        weights = saved["weights"]
    elif weights_path.exists():
        weights = state.load_weights(weights_path)
    else:
        weights = state.load_weights(options.start)
        if any(value.ndim == 5 for key, value in weights.items() if "time_conv" not in key):
            weights = flat(weights)
            forget_time(weights)
            _normalise_latents(weights)
    trained = {key: _parameter(key, value, options.part) for key, value in weights.items()}
    groups = loop.time_apart(trained, factor=4.0)
    run = loop.Loop(options, state_path, saved, trained, groups, beta=0.99, memory=0.99, least=0.05)
    vae = TrainableVAE(trained)
    generator = torch.Generator().manual_seed(SEED + 1000 * run.step)
    errors = []
    for step in run.steps():
        pixels, weight = _batch(generator, clip=step % 6 != 5)
        with torch.set_grad_enabled(options.part == "all"):
            latent = vae.encode(pixels)
        noisy = latent + 0.06 * torch.randn(latent.shape, generator=generator)
        decoded = vae.decode(noisy)
        loss = _loss(decoded, pixels, weight)
        if options.part == "end":
            loss = loss + 20 * (decoded - pixels).square().mean()
        if options.part == "all":
            loss = loss + 0.01 * _spread(latent)
        run.learn(loss)
        errors.append((decoded.detach() - pixels).square().mean().item())
        if run.is_due:
            decibel = -10 * math.log10(run.recent(errors) / 4)
            loss_text = f"loss {run.recent(run.losses):.4f} psnr {decibel:.2f}"
            print(f"{run.step} {run.minutes:.1f} min {loss_text}", flush=True)
            state.save_weights(run.average, weights_path)
            run.save()
    return run.losses


def _parameter(key: str, value: Tensor, part: str) -> torch.nn.Parameter:
    """Make a weight that is trained, or not: the encoder's first levels are good as they are, and dear."""
    is_early = key.startswith(("encoder.conv1.", *(f"encoder.downsamples.{index}." for index in range(5))))
    is_trained = key.startswith(("decoder.", "conv2.")) or (part == "all" and not is_early)
    if part == "end":
        is_trained = key.startswith("decoder.") and not key.startswith(FIRST_HALF)
    if value.ndim == 4:
        value = value.contiguous(memory_format=torch.channels_last)
    return torch.nn.Parameter(value.clone(), requires_grad=is_trained)


def _batch(generator: torch.Generator, *, clip: bool) -> tuple[Tensor, Tensor]:
    """Draw crops [B, 3, T, 64, 64] in -1..1, and how much each pixel counts [B, 1, 1, 64, 64]."""
    num_frames, num_characters, per_character = (CLIP_FRAMES, 3, 1) if clip else (1, 8, 2)
    crops, weights = [], []
    for _ in range(num_characters):
        who = draw_character(generator)
        video = render(who, random_motion(num_frames, generator))
        weight = torch.ones(SIZE, SIZE)
        top, bottom, left, right = mouth_box(who)
        weight[top:bottom, left:right] = 3
        eyes = round((1 - who.eye_y) * SIZE / 2)
        weight[eyes - 14 : eyes + 10, 42:86] = 2.5
        for _ in range(per_character):
            row, column = (int(torch.randint(SIZE - CROP + 1, (1,), generator=generator)) for _ in range(2))
            if torch.rand(1, generator=generator) < 0.7:  # the face
                row, column = (
                    int(low + torch.randint(width, (1,), generator=generator)) for low, width in ((32, 24), (22, 20))
                )
            crops.append(video[..., row : row + CROP, column : column + CROP])
            weights.append(weight[row : row + CROP, column : column + CROP])
    return torch.stack(crops).transpose(1, 2) * 2 - 1, torch.stack(weights)[:, None, None]


def _loss(decoded: Tensor, pixels: Tensor, weight: Tensor) -> Tensor:
    """Compare pixels, edges, and colours at low resolution."""
    error = decoded - pixels
    loss = (weight * (error.abs() + 2 * error.square())).mean()
    for axis in (-1, -2):
        loss = loss + 0.6 * (weight.narrow(axis, 1, weight.shape[axis] - 1) * error.diff(dim=axis).abs()).mean()
    if error.shape[2] > 1:
        loss = loss + 0.7 * (weight * error.diff(dim=2).abs()).mean()
    for size in (4, 16):
        loss = loss + 0.5 * F.avg_pool3d(error, (1, size, size)).abs().mean()
    chroma = torch.stack([error[:, 0] - error[:, 1], error[:, 2] - error[:, 1]], 1)
    for size in (2, 8):
        loss = loss + 0.7 * F.avg_pool3d(chroma, (1, size, size)).abs().mean()
    return loss


def _spread(latent: Tensor) -> Tensor:
    """Pull every channel to zero mean and unit variance."""
    mean, variance = latent.mean((0, 2, 3, 4)), latent.var((0, 2, 3, 4))
    return mean.square().mean() + (variance - 1).square().mean() + F.relu(latent.abs() - 4).square().mean()


def _normalise_latents(weights: dict[str, Tensor]) -> None:
    """Measure the latents of drawn clips and make them unit normal."""
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        found = []
        for _ in range(12):
            clip = render(draw_character(generator), random_motion(9, generator)).transpose(0, 1)[None] * 2 - 1
            found.append(TrainableVAE(weights).encode(clip))
        latent = torch.cat(found)
    rescale_latents(weights, latent.mean((0, 2, 3, 4)), latent.std((0, 2, 3, 4)))


if __name__ == "__main__":
    main()
