"""Make what the DiT learns from: characters that speak for one chunk, as latents: `python -m training.clips --state DIR`.

A chunk is 40 frames, 10 latent frames. Sway and blink follow the place in the chunk, so that the chunks of a video join;
an expression comes within the first frames of a chunk. A long clip is a chunk and the eight frames in front; a short one
is three latent frames from anywhere in a chunk: for the same work more characters.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from training import state
from training.faces import EXPRESSIONS, Character, Motion, draw_character, render
from training.vae import TrainableVAE
from training.voices import mouth, speak

CHUNK_FRAMES = 40
HISTORY_FRAMES = 8
RAMP_FRAMES = 6
EXCERPT = 3  # latent frames of a short clip
LONG_CLIPS = 60
NUM_VOICES = 24
VOICE_SECONDS = 20.0
EXPRESSION_SHARES = (0.38, 0.24, 0.16, 0.11, 0.11)  # none, then as in EXPRESSIONS
SEED = 77


@dataclass(frozen=True)
class Voice:
    """A waveform at 16 kHz and what a mouth does with it, frame by frame."""

    waveform: np.ndarray
    opening: Tensor
    roundness: Tensor


def voice(index: int, folder: Path) -> Voice:
    """Make a training voice, the same for every call; it is kept in `folder`."""
    path = folder / f"voice{index}.npy"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        np.save(path, speak(VOICE_SECONDS, random.Random(SEED * 1000 + index)))
    waveform = np.load(path)
    return Voice(waveform, *mouth(waveform))


def pose(frame: Tensor) -> dict[str, Tensor]:
    """Return how the head stands at frames of a chunk (negative ones belong to the chunk before): sway and lids."""
    turn = 2 * math.pi * frame / CHUNK_FRAMES
    place = frame.remainder(CHUNK_FRAMES)
    lids = torch.ones(len(frame))
    for closing, value in ((16, 0.55), (17, 0.0), (18, 0.0), (19, 0.55)):
        lids[place == closing] = value
    return {
        "x": 0.030 * turn.sin(),
        "y": 0.006 * (1 - (2 * turn).cos()),
        "tilt": 0.035 * turn.sin() + 0.012 * (2 * turn).sin(),
        "lids": lids,
    }


def talk(opening: Tensor, roundness: Tensor, before: int, now: int) -> Motion:
    """Return the motion of a chunk and the eight frames in front; `before` and `now` number expressions, 0 for none."""
    frame = torch.arange(-HISTORY_FRAMES, CHUNK_FRAMES).float()
    ramp = ((frame + 1) / RAMP_FRAMES).clamp(0, 1)
    ramp = ramp * ramp * (3 - 2 * ramp)
    strength = {name: torch.zeros(len(frame)) for name in EXPRESSIONS}
    for number, share in ((before, 1 - ramp), (now, ramp)):
        if number:
            strength[EXPRESSIONS[number - 1]] += share
    return Motion(opening=opening, roundness=roundness, **strength, **pose(frame))


def portrait(who: Character) -> Tensor:
    """Draw a character at rest: [1, 3, 128, 128]."""
    return render(who, Motion.still())


def main() -> None:
    """Make clips until there are `--clips`; `--worker i/n` shares them out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--state", type=Path, default=state.DEFAULT)
    parser.add_argument("--clips", type=int, default=2000)
    parser.add_argument("--begin", type=int, default=0)
    parser.add_argument("--worker", default="0/1")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    make(options)


@torch.no_grad()
def make(options: argparse.Namespace) -> None:
    """Draw, encode and store clips that are not there yet."""
    folder = options.state / "clips"
    folder.mkdir(parents=True, exist_ok=True)
    vae = TrainableVAE(state.load_weights(options.state / "vae.safetensors"))
    voices = [voice(index, options.state / "voices") for index in range(NUM_VOICES)]
    worker, workers = map(int, options.worker.split("/"))
    start = time.monotonic()
    for index in range(options.begin + worker, options.clips, workers):
        path = folder / f"{index:05}.safetensors"
        if path.exists():
            continue
        save_file(clip(index, voices, vae), path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)
        if index // workers % 20 == 0:
            print(f"{index} {(time.monotonic() - start) / 60:.1f} min", flush=True)


def clip_frames(index: int, voices: list[Voice]) -> tuple[Character, Motion]:
    """Return who a clip shows, and how the head moves: without the first frame twice where it is long."""
    who, motion, _ = _invented(index, voices)
    return who, motion


def _invented(index: int, voices: list[Voice]) -> tuple[Character, Motion, dict[str, int]]:
    rng = random.Random(SEED * 100_000 + index)
    who = draw_character(torch.Generator().manual_seed(rng.getrandbits(40)))
    number = rng.randrange(len(voices))
    start = rng.randrange(HISTORY_FRAMES, len(voices[number].opening) - CHUNK_FRAMES)
    span = slice(start - HISTORY_FRAMES, start + CHUNK_FRAMES)
    (now,) = rng.choices(range(5), EXPRESSION_SHARES)
    (before,) = rng.choices(range(5), EXPRESSION_SHARES) if rng.random() < 0.5 else (0,)
    is_long = index < LONG_CLIPS
    motion = talk(voices[number].opening[span], voices[number].roundness[span], before if is_long else 0, now)
    first = 0
    if not is_long:
        first = rng.randrange(CHUNK_FRAMES // 4 - EXCERPT + 1)
        begin = HISTORY_FRAMES + 4 * first
        motion = motion.cut(begin - 1, begin + 4 * EXCERPT)
    numbers = {"first": first, "expression_before": before if is_long else now, "expression": now, "is_long": is_long}
    return who, motion, numbers


def clip(index: int, voices: list[Voice], vae: TrainableVAE) -> dict[str, Tensor]:
    """Make one clip.

    Returns:
        latent: [16, F, 16, 16], from latent frame `first` of the chunk on; before: [16, 16, 16], the latent frame in front
        of the chunk, or in a short clip its own last, as if it were that; reference: [16, 16, 16]; expression and
        expression_before: their numbers; opening and roundness: [4 F]; is_long.
    """
    who, motion, numbers = _invented(index, voices)
    is_long = numbers["is_long"]
    frames = render(who, motion)
    stream = (torch.cat([frames[:1], frames]) if is_long else frames).transpose(0, 1)[None] * 2 - 1
    latent = vae.encode(stream)[0]
    reference = vae.encode(portrait(who).transpose(0, 1)[None] * 2 - 1)[0, :, 0]
    skip = HISTORY_FRAMES if is_long else 1
    result = {
        "latent": latent[:, 3 if is_long else 1 :],
        "before": latent[:, 2] if is_long else latent[:, -1],
        "reference": reference,
    }
    return {
        **{name: value.half().contiguous() for name, value in result.items()},
        "opening": motion.opening[skip:].clone(),
        "roundness": motion.roundness[skip:].clone(),
        **{name: torch.tensor(int(value)) for name, value in numbers.items()},
    }


def load_clips(folder: Path, known: dict[str, dict[str, Tensor]]) -> None:
    """Read the clips that are not `known` yet."""
    for path in sorted((folder / "clips").glob("*.safetensors")):
        if path.name not in known:
            known[path.name] = load_file(path)


if __name__ == "__main__":
    main()
