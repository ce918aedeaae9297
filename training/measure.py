"""Measure a talking face in its frames, from where a character's features are known to be. T frames, 0..1."""

from __future__ import annotations

import torch
from torch import Tensor

from training.faces import SIZE, Character


def mouth_opening(frames: Tensor, who: Character) -> Tensor:
    """Return how high the mouth stands open, lips included, in picture heights / 2: [T].

    Counts what is not skin in a strip through the middle of the mouth.

    Args:
        frames: [T, 3, 128, 128].
        who: Who is shown, about at rest.
    """
    rows = slice(_pixel(who.mouth_y - 0.16), _pixel(who.mouth_y + 0.34))
    columns = slice(_pixel(-0.05), _pixel(0.05) + 1)
    strip = frames[:, :, rows, columns]
    distance = (strip - who.skin.view(1, 3, 1, 1)).square().sum(1).sqrt()  # [T, rows, columns]
    away = ((distance - 0.10) / 0.12).clamp(0, 1)
    return away.mean(2).sum(1) * 2 / SIZE


def mouth_bend(frames: Tensor, who: Character) -> Tensor:
    """Return how much higher the corners of the mouth stand than its middle, in picture heights / 2: [T]."""
    rows = slice(_pixel(who.mouth_y - 0.14), _pixel(who.mouth_y + 0.20))
    band = frames[:, :, rows]
    darkness = (who.skin.view(1, 3, 1, 1) - band).clamp(min=0).sum(1).square()  # [T, rows, columns]
    places = torch.arange(darkness.shape[1]).float()[None, :, None] * 2 / SIZE
    centers = (darkness * places).sum(1) / darkness.sum(1).clamp(min=1e-3)  # [T, columns]
    side = who.mouth_width * 0.8
    middle = centers[:, _pixel(-0.03) : _pixel(0.03) + 1].mean(1)
    corners = [centers[:, _pixel(x - 0.02) : _pixel(x + 0.02) + 1].mean(1) for x in (-side, side)]
    return middle - (corners[0] + corners[1]) / 2


def mean_colors(frames: Tensor, who: Character) -> dict[str, Tensor]:
    """Return mean colours [T, 3] of skin (the cheeks' inner side and the nose), hair, and background."""
    hair = slice(_pixel(-who.face_height - 0.06), _pixel(-who.face_height + who.hairline * 0.3))
    places = {
        "skin": (slice(_pixel(0.18), _pixel(0.26)), slice(_pixel(-0.10), _pixel(0.10))),
        "hair": (hair, slice(_pixel(-0.10), _pixel(0.10))),
        "background": (slice(2, 30), slice(2, 18)),
    }
    return {name: frames[:, :, rows, columns].mean((2, 3)) for name, (rows, columns) in places.items()}


def sharpness(frames: Tensor) -> Tensor:
    """Return the mean size of differences between neighbouring pixels: [T]."""
    return frames.diff(dim=-1).abs().mean((1, 2, 3)) + frames.diff(dim=-2).abs().mean((1, 2, 3))


def correlation(first: Tensor, second: Tensor) -> float:
    """Return the correlation of two series."""
    return torch.corrcoef(torch.stack([first, second]))[0, 1].item()


def best_lag(opening: Tensor, loudness: Tensor, largest: int = 6) -> int:
    """Return by how many frames the mouth is late, where the correlation is largest."""
    count = len(loudness)

    def at(lag: int) -> float:
        late, early = opening[max(lag, 0) : count + min(lag, 0)], loudness[max(-lag, 0) : count - max(lag, 0)]
        return correlation(late, early)

    return max(range(-largest, largest + 1), key=at)


def _pixel(place: float) -> int:
    return round((place + 1) * SIZE / 2 - 0.5)
