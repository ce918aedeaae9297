"""What schedules are made of, without torch: planning asks here whether a sampler can step over its noise levels.

Five of the seven schedulers are computed here, to the bit. `normal`, `sgm_uniform` and `kl_optimal` take their last
operations from torch (`schedule.py`); here they stand as bounds, so that planning refuses what is within rounding.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, TypeAlias, TypeVar

import numpy as np

from s2v_flow.sampling import ONE_STEP_MORE, OWN_SCHEDULE, SamplerName, SchedulerName, minimum_steps

Levels: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"
Time = TypeVar("Time")

NUM_TRAIN_LEVELS = 1000
BETA_SHAPE = 0.6  # alpha and beta of the beta schedule
LINEAR_THRESHOLD = 0.025  # how far sigma falls in the linear half of linear_quadratic
COMFY_LAST_SIGMA = 2.0**-10  # 0.001 in the reference's float32 arithmetic
UNIPC_FIRST_TIME = float(np.float32(0.999))  # the authors' 0.999 has been through float32
_TIME_SLACK = 3e-4  # of 1000: what rounding may do to evenly spaced float32 times
_SLACK = 1e-6  # of a level: what rounding may do to it


def is_falling(sigmas: Sequence[float]) -> bool:
    """Return whether noise levels fall, from a finite one: no solver can step over two that do not."""
    return sigmas[0] < math.inf and all(level > lower for level, lower in itertools.pairwise(sigmas))


@lru_cache(maxsize=256)
def can_step(sampler: SamplerName, scheduler: SchedulerName, steps: int, shift: float) -> bool:
    """Return whether this sampler's noise levels fall; what `make_sampler` refuses, this does not let pass.

    `scheduler`: one of `sampling.SCHEDULERS`.
    """
    if steps < minimum_steps(sampler, scheduler) or not (math.isfinite(shift) and shift > 0):
        return False
    if sampler in OWN_SCHEDULE:
        return is_falling(own_levels(UNIPC_FIRST_TIME if sampler == "flow_unipc" else 1.0, steps, shift))
    with np.errstate(all="ignore"):
        asked = steps + (sampler in ONE_STEP_MORE), shift
        bounds = _BOUNDS[scheduler](*asked) if scheduler in _BOUNDS else (EXACT[scheduler](*asked),) * 2
        low, high = ([*np.minimum(bound.astype(np.float32), 1).tolist(), 0.0] for bound in bounds)
    falls = all(level > lower for level, lower in zip(low[:-1], high[1:], strict=True))
    return falls and (sampler not in ONE_STEP_MORE or low[-3] > COMFY_LAST_SIGMA)


def own_levels(first_time: float, steps: int, shift: float) -> tuple[float, ...]:
    """Return the levels of the authors' solvers, float64, from the shifted `first_time` to 0."""
    with np.errstate(all="ignore"):
        return (*shifted(np.linspace(first_time, 0, steps + 1)[:-1], shift).tolist(), 0.0)


def shifted(time: Time, shift: float) -> Time:
    """Return sigma = shift * t / (1 + (shift - 1) * t), in the precision of `time`: a number, an array or a tensor.

    Source: P. Esser et al., 2024, Scaling rectified flow transformers, equation 23.
    """
    t: Any = time
    sigma: Time = shift * t / (1 + (shift - 1) * t)
    return sigma


def table(shift: float) -> Levels:
    """Return the levels the model was trained on, rising, float32 [1000]."""
    times = np.arange(1, NUM_TRAIN_LEVELS + 1, dtype=np.float32) / np.float32(NUM_TRAIN_LEVELS)
    with np.errstate(all="ignore"):  # a shift that is almost 0 gives 0 or infinity, which do not fall
        return shifted(times, shift)


def simple(steps: int, shift: float) -> Levels:
    """Return evenly spaced levels of the table."""
    stride = NUM_TRAIN_LEVELS / steps
    return table(shift)[[NUM_TRAIN_LEVELS - (1 + int(i * stride)) for i in range(steps)]]


def ddim_uniform(steps: int, shift: float) -> Levels:
    """Return every n-th level of the table."""
    stride = max(NUM_TRAIN_LEVELS // steps, 1)
    return table(shift)[1::stride][::-1]


def beta(steps: int, shift: float) -> Levels:
    """Source: T. Lee et al., 2024, Beta sampling is all you need; alpha = beta = 0.6."""
    return table(shift)[_beta_indices(steps)]


def linear_quadratic(steps: int, shift: float) -> Levels:
    """Source: Movie Gen team, 2024, Movie Gen, section 3.4.2 (linear-quadratic t-schedule)."""
    num_linear = steps // 2
    num_quadratic = steps - num_linear
    slope = LINEAR_THRESHOLD / num_linear
    curve = (1 - LINEAR_THRESHOLD - slope * num_quadratic) / num_quadratic**2
    i = np.arange(steps, dtype=np.float64)
    levels: Levels = 1 - (slope * i + curve * np.maximum(i - num_linear, 0) ** 2)
    return levels


def kl_angles(steps: int, shift: float) -> Levels:
    """Return the angles whose tangents are the levels of kl_optimal, float32.

    Source: A. Sabour et al., 2024, Align Your Steps, theorem 3.1 (KL-optimal levels for a Gaussian).
    """
    levels = table(shift)
    weight = np.arange(steps, dtype=np.float32) / np.float32(steps - 1)
    angles: Levels = weight * math.atan(levels[0]) + (1 - weight) * math.atan(levels[-1])
    return angles


def normal_ends(shift: float) -> tuple[float, float]:
    """Return the first and the last time of normal, of 1000; they are shifted already, and shifted again later."""
    levels = table(shift) * np.float32(NUM_TRAIN_LEVELS)
    return float(levels[-1]), float(levels[0])


@lru_cache(maxsize=32)
def _beta_indices(steps: int) -> Levels:
    quantile = symmetric_beta_quantile(1 - np.arange(steps, dtype=np.float64) / steps, BETA_SHAPE)
    index = np.rint((NUM_TRAIN_LEVELS - 1) * quantile).astype(np.int64)  # halves to even: the median is level 500
    found: Levels = index[np.append(True, index[1:] != index[:-1])]
    return found


def symmetric_beta_quantile(probability: Levels, shape: float) -> Levels:
    """Invert the regularised incomplete beta function I_x(a, a), by bisection to the last bit: float64 x in [0, 1].

    `shape`: a > 0. I_(1-x) = 1 - I_x leaves only x <= 1/2 to solve for.
    """
    tail = np.minimum(probability, 1 - probability)
    low, high = np.zeros_like(tail), np.full_like(tail, 0.5)
    for _ in range(64):
        middle = (low + high) / 2
        is_below = _symmetric_beta_tail(middle, shape) < tail
        low, high = np.where(is_below, middle, low), np.where(is_below, high, middle)
    high = np.where(tail == 0.5, 0.5, high)  # by symmetry; the series comes near it only, and an index hangs on it
    return np.where(probability <= 0.5, high, 1 - high)


def _symmetric_beta_tail(x: Levels, shape: float) -> Levels:
    """Return I_x(a, a) for x in [0, 1/2], by its power series in x, whose terms fall at least as fast as 2^-k.

    Source: NIST, Digital Library of Mathematical Functions, 8.17.7 and 8.17.1.
    """
    total, coefficient = np.zeros_like(x), 1.0
    for k in range(64):
        total = total + coefficient / (shape + k) * x**k
        coefficient *= (k + 1 - shape) / (k + 1)
    beta = math.gamma(shape) ** 2 / math.gamma(2 * shape)
    return x**shape * total / beta


Bounds = tuple[Levels, Levels]


def _normal_bounds(steps: int, shift: float) -> Bounds:
    times = np.linspace(*normal_ends(shift), steps)
    slack = np.full(steps, _TIME_SLACK)
    slack[[0, -1]] = 0  # the ends are exact
    low, high = (shifted(((times + side * slack) / NUM_TRAIN_LEVELS).astype(np.float32), shift) for side in (-1, 1))
    return low * (1 - _SLACK), high * (1 + _SLACK)


def _sgm_uniform_bounds(steps: int, shift: float) -> Bounds:
    low, high = _normal_bounds(steps + 1, shift)
    return low[:-1], high[:-1]


def _kl_optimal_bounds(steps: int, shift: float) -> Bounds:
    levels = np.tan(kl_angles(steps, shift).astype(np.float64))
    return levels * (1 - _SLACK), levels * (1 + _SLACK)


EXACT: Mapping[SchedulerName, Callable[[int, float], Levels]] = {
    "simple": simple, "beta": beta, "linear_quadratic": linear_quadratic, "ddim_uniform": ddim_uniform,
}  # fmt: skip
_BOUNDS: Mapping[SchedulerName, Callable[[int, float], Bounds]] = {
    "normal": _normal_bounds, "sgm_uniform": _sgm_uniform_bounds, "kl_optimal": _kl_optimal_bounds,
}  # fmt: skip
