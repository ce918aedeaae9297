"""Run the demo's recipe and measure what it shows: `python -m training.show --folder DIR`.

Writes the strip of frames and the small animation of the README, from the video as it was written.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import soundfile
import soxr
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from s2v_flow import api
from training.clips import portrait
from training.faces import SIZE, Character
from training.measure import best_lag, correlation, mean_colors, mouth_bend, mouth_opening, sharpness
from training.portrait import character
from training.voices import SAMPLE_RATE_HZ, SAMPLES_PER_FRAME, loudness

RECIPE = Path(__file__).parents[1] / "recipes" / "demo.yaml"
SPEECH = Path(__file__).parents[1] / "recipes" / "inputs" / "speech.mp3"
CHUNK_FRAMES, WARMUP_FRAMES = 40, 3
SILENCE = 0.1  # of the clip's loudness


@dataclass(frozen=True)
class Shown:
    """A video's frames [T, 3, 128, 128] in 0..1, and the loudness of each [T]."""

    frames: Tensor
    loudness: Tensor


def speech(path: Path, chunks: int, pause: int = 0) -> Path:
    """Write a voice for so many chunks: the bundled sentence, cut or repeated, `pause` frames silent after 2 s."""
    sound, rate = soundfile.read(SPEECH, dtype="float32", always_2d=True)
    mono = soxr.resample(sound.mean(1), rate, SAMPLE_RATE_HZ)
    wanted = (chunks * CHUNK_FRAMES - WARMUP_FRAMES) * SAMPLES_PER_FRAME
    voice = np.tile(mono, -(-wanted // len(mono)))
    voice = np.insert(voice, [2 * SAMPLE_RATE_HZ] * (pause * SAMPLES_PER_FRAME), 0)
    soundfile.write(path, voice[:wanted], SAMPLE_RATE_HZ)
    return path


def shown(folder: Path, voice: Path = SPEECH, **sets: object) -> Shown:
    """Run the recipe with parameters or fields set, and read the video that it wrote.

    Args:
        folder: Where the video and everything computed goes.
        voice: The voice.
        sets: Values of recipe paths, with `__` for a dot.
    """
    folder.mkdir(parents=True, exist_ok=True)
    video = folder / "demo.mp4"
    given = {"params.audio": voice.resolve(), "nodes.video.file": video.resolve()}
    given |= {key.replace("__", "."): value for key, value in sets.items()}
    texts = [f"{key}={value}" for key, value in given.items()]
    result = api.run(RECIPE, api.Options(sets=texts, cache_dir=folder / "cache", device="cpu"))
    return Shown(read(result.videos["video"]), heard(voice))


def read(video: Path) -> Tensor:
    """Read a video at the size that it was made in: [T, 3, 128, 128]."""
    pixels = torch.from_numpy(iio.imread(video, plugin="pyav")).permute(0, 3, 1, 2).float() / 255
    return F.interpolate(pixels, size=(SIZE, SIZE), mode="area")


def heard(voice: Path) -> Tensor:
    """Return the loudness of every frame of a voice."""
    sound, rate = soundfile.read(voice, dtype="float32", always_2d=True)
    return loudness(soxr.resample(sound.mean(1), rate, SAMPLE_RATE_HZ))


def figures(video: Shown, who: Character) -> dict[str, float]:
    """Measure a video."""
    count = min(len(video.frames), len(video.loudness))
    frames, loud = video.frames[:count], video.loudness[:count]
    opening = mouth_opening(frames, who)
    colors = mean_colors(frames, who)
    edges = sharpness(frames)
    part = min(CHUNK_FRAMES, count // 2)
    around = F.max_pool1d(loud[None], 5, 1, 2)[0]  # a mouth opens before a sound, and closes after it
    drift = {
        f"drift of {name}": (color[-part:].mean(0) - color[:part].mean(0)).abs().max().item()
        for name, color in colors.items()
    }
    return {
        "correlation": correlation(opening, loud),
        "lag": best_lag(opening, loud),
        "opening in silence": opening[around < SILENCE].mean().item(),
        "opening at rest, as drawn": mouth_opening(portrait(who), who).item(),
        "opening when loud": opening[loud > loud.quantile(0.9)].mean().item(),
        "sharpness of the last chunk": (edges[-part:].mean() / edges[:part].mean()).item(),
        **drift,
    }


def decibel(first: Tensor, second: Tensor) -> float:
    """Return the peak signal-to-noise ratio of values in 0..1."""
    return float(-10 * (first - second).square().mean().log10())


def strip(frames: Tensor, numbers: list[int], path: Path, scale: int = 2) -> None:
    """Write frames side by side, as they are but larger."""
    row = torch.cat([frames[number] for number in numbers], 2)
    row = F.interpolate(row[None], scale_factor=scale, mode="bicubic")[0].clamp(0, 1)
    Image.fromarray((row * 255).round().byte().permute(1, 2, 0).numpy()).save(path, optimize=True)


def main() -> None:
    """Print the figures of the recipe as it is, and write the pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--images", type=Path)
    options = parser.parse_args()
    who = character()
    video = shown(options.folder)
    for name, value in figures(video, who).items():
        print(f"{name}: {value:.3f}")
    bend = mouth_bend(video.frames, who)
    print(f"bend of the mouth: {bend[:34].mean():.4f} plain, {bend[42:74].mean():.4f} smiling")
    images = options.images or options.folder
    strip(video.frames, [0, 6, 13, 25, 47, 55, 66, 80, 88], images / "demo-strip.png", scale=1)
    pictures = [Image.fromarray((frame * 255).round().byte().permute(1, 2, 0).numpy()) for frame in video.frames]
    pictures[0].save(
        images / "demo.webp", save_all=True, append_images=pictures[1:], duration=62.5, loop=0, quality=60, method=6
    )


if __name__ == "__main__":
    main()
