"""Noise schedules: from a number of steps and a shift to falling noise levels sigma.

A flow model is trained on levels in (0, 1]; `shift` > 1 moves the levels of evenly spaced times towards 1. Arithmetic
is in float32 where ComfyUI's is, so that the model sees the same times to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from s2v_flow.sampling import MINIMUM_STEPS, SchedulerName, levels
from s2v_flow.sampling import SCHEDULERS as NAMES


def scheduled_sigmas(scheduler: SchedulerName, steps: int, shift: float) -> tuple[float, ...]:
    """Return a scheduler's noise levels, float32 values, falling, the last one 0: usually steps + 1 of them.

    `ddim_uniform` and `beta` may give another number of them; `linear_quadratic` does not depend on the shift.

    Raises:
        ValueError: An unknown scheduler, too few steps, a shift that is not positive, or levels that repeat
            (too many steps).
    """
    if scheduler not in SCHEDULERS:
        raise ValueError(f"unknown scheduler {scheduler!r}; known: {', '.join(NAMES)}")
    least = MINIMUM_STEPS.get(scheduler, 1)
    if steps < least:
        raise ValueError(f"scheduler {scheduler} needs at least {least} steps, got {steps}")
    found = SCHEDULERS[scheduler](steps, check_shift(shift)).float()
    sigmas = (*found.clamp_max(1).tolist(), 0.0)  # the first may have been rounded above 1
    return check_falling(sigmas, f"scheduler {scheduler} with shift {shift:g} and {steps} steps")


def check_shift(shift: float) -> float:
    """Return `shift`; raise ValueError unless it is positive and finite."""
    if not (math.isfinite(shift) and shift > 0):
        raise ValueError(f"shift must be a positive number, got {shift}")
    return shift


def check_falling(sigmas: tuple[float, ...], what: str) -> tuple[float, ...]:
    """Return `sigmas`; raise ValueError, naming `what`, if two neighbours do not fall."""
    if not levels.is_falling(sigmas):
        raise ValueError(f"{what} gives noise levels that do not fall; take fewer steps, or a shift nearer to 8")
    return sigmas


def _normal(steps: int, shift: float) -> Tensor:
    return levels.shifted(torch.linspace(*levels.normal_ends(shift), steps) / levels.NUM_TRAIN_LEVELS, shift)


def _exact(scheduler: Callable[[int, float], levels.Levels]) -> Callable[[int, float], Tensor]:
    return lambda steps, shift: torch.from_numpy(scheduler(steps, shift).copy())


SCHEDULERS: Mapping[str, Callable[[int, float], Tensor]] = {
    **{name: _exact(found) for name, found in levels.EXACT.items()},
    "normal": _normal,
    "sgm_uniform": lambda steps, shift: _normal(steps + 1, shift)[:-1],
    "kl_optimal": lambda steps, shift: torch.tan(torch.from_numpy(levels.kl_angles(steps, shift))),
}
"""Scheduler to the function that gives its levels without the last 0, from steps and shift. Names: `__init__.py`."""
