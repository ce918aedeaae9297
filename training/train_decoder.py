"""Teach the VAE's decoder to draw each frame of a latent frame: `python -m training.train_decoder --state DIR`.

After `clips`. The decoder draws single pictures well; so its first half, up to where frames part for the second time, is
trained until it gives for each of four frames what it gives for that frame's picture alone, and for the first latent
frame, which holds one frame, what it gave before. That is at low resolution, and cheap. The encoder and the second half
stay as they are, and so do the clips.
"""

from __future__ import annotations

import argparse
import random

import torch
from torch import Tensor

from training import loop, state
from training.clips import EXCERPT, NUM_VOICES, clip_frames, load_clips, voice
from training.detail import add_detail, directions
from training.faces import render
from training.train_vae import FIRST_HALF
from training.vae import TrainableVAE

SEED = 41
HELD_OUT = 10  # the first clips judge
SIDE = 7  # of the excerpt, in latent places


def main() -> None:
    """Train until `--steps` are done or `--minutes` are over; every call goes on where the last one stopped."""
    reader = loop.long_parser(__doc__, steps=800, rate=1e-3, save_every=25)
    reader.add_argument("--batch", type=int, default=6)
    reader.add_argument("--clips", type=int, default=150)
    loop.start(reader, train)


def train(options: argparse.Namespace) -> list[float]:
    """Train and return the loss of every step."""
    weights_path, state_path = options.state / "vae.safetensors", options.state / "decoder.pt"
    saved = state.load_state(state_path)
    teacher = saved["teacher"] if saved else state.load_weights(weights_path)
    weights = saved["weights"] if saved else teacher
    trained = {key: torch.nn.Parameter(value.clone(), requires_grad=_is_trained(key)) for key, value in weights.items()}
    groups = loop.time_apart(trained, factor=2.0)
    run = loop.Loop(options, state_path, saved, trained, groups, memory=0.98)
    vae = TrainableVAE(trained)
    lessons = _lessons(options, teacher)
    scale = torch.stack([wanted.float().std((0, 2, 3)) for _, wanted in lessons]).mean(0)[None, None, :, None, None]
    rng, generator = random.Random(SEED + run.step), torch.Generator().manual_seed(SEED + run.step)
    held, used = lessons[:HELD_OUT], lessons[HELD_OUT:]
    within = []
    for _ in run.steps():
        # the mouth, or anywhere
        near = rng.randrange(5, 8), rng.randrange(3, 6)
        row, column = near if rng.random() < 0.8 else (rng.randrange(10), rng.randrange(10))
        latents, wanted = (torch.stack(part) for part in zip(*rng.sample(used, options.batch), strict=True))
        loss, inner, _ = _compare(vae, latents, wanted, row, column, scale, generator)
        run.learn(loss)
        within.append(inner)
        if run.is_due:
            with torch.no_grad():
                latents, wanted = (torch.stack(part) for part in zip(*held, strict=True))
                judged = _compare(
                    TrainableVAE(run.average), latents, wanted, 6, 4, scale, torch.Generator().manual_seed(0)
                )
            print(
                f"{run.step} {run.minutes:.1f} min loss {run.recent(run.losses):.4f}, within latent frames "
                f"{run.recent(within):.3f} of what moves; held out {judged[0].item():.4f}, {judged[1]:.3f}, "
                f"first frame {judged[2]:.3f}",
                flush=True,
            )
            state.save_weights(run.average, weights_path)
            run.save(teacher=teacher)
    return run.losses


def _is_trained(key: str) -> bool:
    return key.startswith(("conv2.", *FIRST_HALF))


def _compare(
    vae: TrainableVAE, latents: Tensor, wanted: Tensor, row: int, column: int, scale: Tensor, generator: torch.Generator
) -> tuple[Tensor, float, float]:
    """Return the loss in an excerpt, the error of what differs within latent frames, over what differs, and the first frame's."""
    part = latents[..., row : row + SIDE, column : column + SIDE].float()
    found = vae.halfway(part + 0.08 * torch.randn(part.shape, generator=generator))  # [B, T, C, h, w]
    goal = wanted[..., 2 * row : 2 * (row + SIDE), 2 * column : 2 * (column + SIDE)].float()
    error = (found - goal) / scale
    inner, moving = _inner(error[:, 1:]).square().mean(), _inner(goal[:, 1:] / scale).square().mean()
    first = error[:, 0].square().mean()
    loss: Tensor = error[:, 1:].square().mean() + 0.5 * inner / (moving + 1e-9) + 0.5 * first
    return loss, inner.item() / (moving.item() + 1e-9), first.item()


@torch.no_grad()
def _lessons(options: argparse.Namespace, teacher: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Return pairs: latents as the DiT shall make them, [16, 4, 16, 16], and features of every frame, [13, C, 32, 32]."""
    clips: dict[str, dict[str, Tensor]] = {}
    load_clips(options.state, clips)
    along = directions(options.state, list(clips.values()))
    voices = [voice(index, options.state / "voices") for index in range(NUM_VOICES)]
    vae = TrainableVAE(teacher)
    folder = options.state / "pictures"
    folder.mkdir(exist_ok=True)
    lessons = []
    names = [name for name in sorted(clips) if not clips[name]["is_long"]]
    for name in names[: options.clips]:
        content = clips[name]
        latent = add_detail(content["latent"].float(), content["opening"], along)
        latent = torch.cat([content["reference"].float()[:, None], latent], 1)
        path = folder / name
        if not path.exists():
            who, motion = clip_frames(int(name.split(".")[0]), voices)
            pictures = render(who, motion)[-4 * EXCERPT :]
            alone = vae.encode(pictures[:, :, None] * 2 - 1)  # [12, 16, 1, 16, 16]
            state.save_weights({"features": vae.halfway(alone, parts=False)[:, 0]}, path)
        first = vae.halfway(latent[None, :, :1], parts=False)[0]
        lessons.append((latent, torch.cat([first, state.load_weights(path)["features"]]).half()))
    return lessons


def _inner(video: Tensor) -> Tensor:
    """Take from each frame [B, T, C, h, w] the mean of its four."""
    groups = video.unflatten(1, (-1, 4))
    return groups - groups.mean(2, keepdim=True)


if __name__ == "__main__":
    main()
