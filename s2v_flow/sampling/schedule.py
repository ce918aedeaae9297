"""Noise schedules: from a number of steps and a shift to falling noise levels sigma.

A flow model is trained on levels in (0, 1]; `shift` > 1 moves the levels of evenly spaced times towards 1. Arithmetic
is in float32 where ComfyUI's is, so that the model sees the same times to the bit.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TypeVar

import torch
from torch import Tensor

from s2v_flow.sampling.catalog import MINIMUM_STEPS, SchedulerName

Time = TypeVar("Time", float, Tensor)

NUM_TRAIN_LEVELS = 1000
BETA_SHAPE = 0.6  # alpha and beta of the beta schedule
LINEAR_THRESHOLD = 0.025  # how far sigma falls in the linear half of linear_quadratic


def scheduled_sigmas(scheduler: SchedulerName, steps: int, shift: float) -> tuple[float, ...]:
    """Return a scheduler's noise levels, falling, the last one 0.

    Args:
        scheduler: One of `catalog.SCHEDULERS`.
        steps: How many steps to ask for; `ddim_uniform` and `beta` may give another number.
        shift: The shift of the noise schedule, > 0; `linear_quadratic` does not depend on it.

    Returns:
        The levels, float32 values, usually steps + 1 of them.

    Raises:
        ValueError: An unknown scheduler, too few steps, a shift that is not positive, or levels that repeat
            (too many steps).
    """
    if scheduler not in SCHEDULERS:
        raise ValueError(f"unknown scheduler {scheduler!r}; known: {', '.join(SCHEDULERS)}")
    least = MINIMUM_STEPS.get(scheduler, 1)
    if steps < least:
        raise ValueError(f"scheduler {scheduler} needs at least {least} steps, got {steps}")
    levels = SCHEDULERS[scheduler](steps, check_shift(shift)).float()
    sigmas = (*levels.clamp_max(1).tolist(), 0.0)  # the first may have been rounded above 1
    return check_falling(sigmas, f"scheduler {scheduler} at {steps} steps")


def shifted(time: Time, shift: float) -> Time:
    """Return sigma = shift * t / (1 + (shift - 1) * t), in the precision of `time`.

    Source: P. Esser et al., 2024, Scaling rectified flow transformers, equation 23.
    """
    return shift * time / (1 + (shift - 1) * time)


def check_shift(shift: float) -> float:
    """Return `shift`; raise ValueError unless it is positive and finite."""
    if not (math.isfinite(shift) and shift > 0):
        raise ValueError(f"shift must be a positive number, got {shift}")
    return shift


def check_falling(sigmas: tuple[float, ...], what: str) -> tuple[float, ...]:
    """Return `sigmas`; raise ValueError, naming `what`, if two neighbours do not fall: no solver can step over that."""
    if any(level <= lower for level, lower in itertools.pairwise(sigmas)):
        raise ValueError(f"{what} gives noise levels that do not fall; take fewer steps")
    return sigmas


def _table(shift: float) -> Tensor:
    """Return the levels the model was trained on, rising, float32 [1000]."""
    return shifted(torch.arange(1, NUM_TRAIN_LEVELS + 1) / NUM_TRAIN_LEVELS, shift)


def _simple(steps: int, shift: float) -> Tensor:
    stride = NUM_TRAIN_LEVELS / steps
    return _table(shift)[[NUM_TRAIN_LEVELS - (1 + int(i * stride)) for i in range(steps)]]


def _normal(steps: int, shift: float) -> Tensor:
    table = _table(shift) * NUM_TRAIN_LEVELS  # its ends are shifted already, and are shifted again: that is how it is
    return shifted(torch.linspace(table[-1].item(), table[0].item(), steps) / NUM_TRAIN_LEVELS, shift)


def _sgm_uniform(steps: int, shift: float) -> Tensor:
    return _normal(steps + 1, shift)[:-1]


def _ddim_uniform(steps: int, shift: float) -> Tensor:
    stride = max(NUM_TRAIN_LEVELS // steps, 1)
    return _table(shift)[1::stride].flip(0)


def _beta(steps: int, shift: float) -> Tensor:
    """Source: T. Lee et al., 2024, Beta sampling is all you need; alpha = beta = 0.6."""
    quantile = _symmetric_beta_quantile(1 - torch.arange(steps, dtype=torch.float64) / steps, BETA_SHAPE)
    index = torch.round((NUM_TRAIN_LEVELS - 1) * quantile).long()  # halves to even: the median, 499.5, is level 500
    return _table(shift)[torch.unique_consecutive(index)]


def _kl_optimal(steps: int, shift: float) -> Tensor:
    """Source: A. Sabour et al., 2024, Align Your Steps, theorem 3.1 (KL-optimal levels for a Gaussian)."""
    table = _table(shift)
    weight = torch.arange(steps) / (steps - 1)
    return torch.tan(weight * math.atan(table[0].item()) + (1 - weight) * math.atan(table[-1].item()))


def _linear_quadratic(steps: int, shift: float) -> Tensor:
    """Source: Movie Gen team, 2024, Movie Gen, section 3.4.2 (linear-quadratic t-schedule)."""
    num_linear = steps // 2
    num_quadratic = steps - num_linear
    slope = LINEAR_THRESHOLD / num_linear
    curve = (1 - LINEAR_THRESHOLD - slope * num_quadratic) / num_quadratic**2
    i = torch.arange(steps, dtype=torch.float64)
    return 1 - (slope * i + curve * (i - num_linear).clamp_min(0) ** 2)


def _symmetric_beta_quantile(probability: Tensor, shape: float) -> Tensor:
    """Invert the regularised incomplete beta function I_x(a, a), by bisection to the last bit.

    Args:
        probability: Values in [0, 1], float64.
        shape: a > 0.

    Returns:
        x in [0, 1] with I_x(a, a) = probability. I_(1-x) = 1 - I_x leaves only x <= 1/2 to solve for.
    """
    tail = torch.minimum(probability, 1 - probability)
    low, high = torch.zeros_like(tail), torch.full_like(tail, 0.5)
    for _ in range(64):
        middle = (low + high) / 2
        is_below = _symmetric_beta_tail(middle, shape) < tail
        low, high = torch.where(is_below, middle, low), torch.where(is_below, high, middle)
    high = torch.where(tail == 0.5, 0.5, high)  # by symmetry; the series comes near it only, and an index hangs on it
    return torch.where(probability <= 0.5, high, 1 - high)


def _symmetric_beta_tail(x: Tensor, shape: float) -> Tensor:
    """Return I_x(a, a) for x in [0, 1/2], by its power series in x, whose terms fall at least as fast as 2^-k.

    Source: NIST, Digital Library of Mathematical Functions, 8.17.7 and 8.17.1.
    """
    total, coefficient = torch.zeros_like(x), 1.0
    for k in range(64):
        total = total + coefficient / (shape + k) * x**k
        coefficient *= (k + 1 - shape) / (k + 1)
    beta = math.gamma(shape) ** 2 / math.gamma(2 * shape)
    return x**shape * total / beta


SCHEDULERS: Mapping[str, Callable[[int, float], Tensor]] = MappingProxyType(
    {
        "simple": _simple,
        "normal": _normal,
        "sgm_uniform": _sgm_uniform,
        "beta": _beta,
        "linear_quadratic": _linear_quadratic,
        "kl_optimal": _kl_optimal,
        "ddim_uniform": _ddim_uniform,
    }
)
"""Scheduler to the function that gives its levels without the last 0, from steps and shift. Names: `catalog.py`."""
