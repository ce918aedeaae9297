"""Invent how a head moves without a voice: what the VAE learns from."""

from __future__ import annotations

import torch
from torch import Tensor

from training.faces import EXPRESSIONS, Motion


def random_motion(num_frames: int, generator: torch.Generator) -> Motion:
    """Draw a motion: a mouth that babbles and rests, blinks, sway, expressions that come and go."""

    def uniform(low: float, high: float, count: int = 1) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=generator)

    babble = _smooth(torch.rand(num_frames + 2, generator=generator), 3)
    wave = (_knots(num_frames, 2 + int(uniform(2, 4)), generator) * 1.5 - 0.3).clamp(0, 1)
    opening = (babble[:num_frames] * 1.6 - 0.3).clamp(0, 1) * wave
    lids = torch.ones(num_frames)
    if uniform(0, 1) < 0.35:
        start = int(uniform(-2, num_frames))
        for offset, value in enumerate((0.5, 0.0, 0.0, 0.5)):
            if 0 <= start + offset < num_frames:
                lids[start + offset] = value
    expressions = {name: torch.zeros(num_frames) for name in EXPRESSIONS}
    for _ in range(1 + int(uniform(0, 1.3))):
        if uniform(0, 1) < 0.6:
            name = EXPRESSIONS[int(uniform(0, len(EXPRESSIONS) - 1e-6))]
            expressions[name] = (_knots(num_frames, 9, generator) * 3 - 1).clamp(0, 1) * uniform(0.5, 1.0)
    return Motion(
        opening=opening,
        roundness=_knots(num_frames, 3, generator).sub(0.4).mul(2).clamp(0, 1),
        lids=lids,
        x=_knots(num_frames, 9, generator).sub(0.5) * 0.12,
        y=_knots(num_frames, 9, generator).sub(0.5) * 0.05,
        tilt=_knots(num_frames, 9, generator).sub(0.5) * 0.12,
        **expressions,
    )


def _smooth(values: Tensor, width: int) -> Tensor:
    return values.unfold(0, width, 1).mean(-1)


def _knots(num_frames: int, step: int, generator: torch.Generator) -> Tensor:
    """Draw a curve in 0..1 through random values every `step` frames: [F]."""
    count = num_frames // step + 2
    values = torch.rand(1, 1, count, generator=generator)
    curve = torch.nn.functional.interpolate(values, size=count * step, mode="linear", align_corners=True)[0, 0]
    start = int(torch.randint(step, (1,), generator=generator))
    return curve[start : start + num_frames]
