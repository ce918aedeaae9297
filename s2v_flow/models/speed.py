"""How fast a device computes: what a model's arithmetic is made of, each measured alone for a third of a second."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_SECONDS = 0.3


def measure(device: str, item_bytes: int) -> dict[str, float]:
    """Measure a device: FLOP a second, in "matrices", "attention" and "convolutions" of sizes at which it is busy.

    `item_bytes`: 4 for float32, 2 for bfloat16.
    """
    rows, tokens, side = (8192, 8192, 256) if device != "cpu" else (512, 1024, 16)
    options: Any = {"device": device, "dtype": torch.float32 if item_bytes == 4 else torch.bfloat16}
    x, weight = torch.randn(rows, 4096, **options), torch.randn(4096, 4096, **options)
    heads = torch.randn(1, 16, tokens, 128, **options)
    clip = torch.randn(1, 96, 4, side, side, **options)
    kernel = torch.randn(96, 96, 3, 3, 3, **options)
    with torch.inference_mode():
        attention = _per_second(lambda: F.scaled_dot_product_attention(heads, heads, heads))
        return {
            "matrices": 2 * rows * 4096**2 * _per_second(lambda: F.linear(x, weight)),
            "attention": 4 * tokens**2 * 2048 * attention,
            "convolutions": 2 * 27 * 96**2 * 4 * side**2 * _per_second(lambda: F.conv3d(clip, kernel, padding=1)),
        }


def _per_second(work: Callable[[], Tensor]) -> float:
    """Count how often something is computed in a second; what it gives is waited for."""
    work()[..., :1].sum().item()
    count, started = 0, time.monotonic()
    while time.monotonic() - started < _SECONDS:
        work()[..., :1].sum().item()
        count += 1
    return count / (time.monotonic() - started)
