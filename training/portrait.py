"""Draw the demo's character, who is in no training set: `python -m training.portrait FILE.png`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from PIL import Image

from training.clips import portrait
from training.faces import Character, draw_character

SEED = 1024


def character() -> Character:
    """Return the demo's character."""
    return draw_character(torch.Generator().manual_seed(SEED))


def save(who: Character, path: Path) -> None:
    """Write a portrait as a PNG."""
    pixels = (portrait(who)[0].clamp(0, 1) * 255).round().byte().permute(1, 2, 0)
    Image.fromarray(pixels.numpy()).save(path, optimize=True)


if __name__ == "__main__":
    save(character(), Path(sys.argv[1]))
