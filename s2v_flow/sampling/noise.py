"""Where randomness comes from: the noise a video starts as, and the noise of ancestral steps.

The starting noise is drawn on the CPU whatever the sampling device, so that one seed gives one video everywhere, and
the same noise as in ComfyUI.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

NUM_SEEDS = 2**64


def initial_noise(shape: Sequence[int], seed: int) -> Tensor:
    """Draw the noise that a sample starts as.

    Args:
        shape: The latent's full shape, [B, 16, F, H, W].
        seed: 0 to 2^64 - 1.

    Returns:
        Standard normal noise of `shape`, float32 on the CPU: what torch.manual_seed(seed) and torch.randn give, without
        touching torch's global generator.

    Raises:
        ValueError: The seed is out of range.
    """
    return torch.randn(
        tuple(shape), generator=torch.Generator("cpu").manual_seed(check_seed(seed)), dtype=torch.float32
    )


def step_generator(seed: int, device: torch.device) -> torch.Generator:
    """Make the generator of the noise that ancestral samplers add after a step.

    It lives on the sampling device, as ComfyUI's does. On the CPU its seed is one more than the run's, because the
    run's own seed would repeat the starting noise.

    Args:
        seed: The run's seed, 0 to 2^64 - 1.
        device: The device that the sample lives on.

    Raises:
        ValueError: The seed is out of range.
    """
    offset = 1 if device.type == "cpu" else 0
    return torch.Generator(device).manual_seed((check_seed(seed) + offset) % NUM_SEEDS)


def check_seed(seed: int) -> int:
    """Return `seed`; raise ValueError unless 0 <= seed < 2^64."""
    if not 0 <= seed < NUM_SEEDS:
        raise ValueError(f"a seed is a whole number from 0 to 2^64 - 1, got {seed}")
    return seed
