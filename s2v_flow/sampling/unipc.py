"""UniPC: a multistep predictor, corrected by the next step's own model call, so that a step costs one call.

A step at level sigma_i calls the model on the predicted sample, corrects the interval before with what it said, and
predicts over the interval ahead. Interval i runs from sigma_i to sigma_(i+1); lambda is half the log of the
signal-to-noise ratio, h = lambda_(i+1) - lambda_i, E = e^-h - 1, p the interval's order.

Source: W. Zhao et al., 2023, UniPC, algorithms 1 and 2, data prediction.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from s2v_flow.sampling.catalog import SchedulerName
from s2v_flow.sampling.levels import COMFY_LAST_SIGMA
from s2v_flow.sampling.schedule import check_falling, scheduled_sigmas
from s2v_flow.sampling.state import Denoise, Draw, SolverState

COMFY_RESULT_SCALE = 0.999


@dataclass(frozen=True)
class Variant:
    """A flavour of UniPC.

    Attributes:
        order: The highest order of an interval.
        alpha: Level to the scale of the clean latent in x.
        log_snr: Level > 0 to lambda.
        is_b2: Whether B is E (B2) or -h (B1).
    """

    order: int
    alpha: Callable[[float], float]
    log_snr: Callable[[float], float]
    is_b2: bool


COMFY_B1 = Variant(order=3, alpha=lambda sigma: 1.0, log_snr=lambda sigma: -math.log(sigma), is_b2=False)
COMFY_B2 = Variant(order=3, alpha=lambda sigma: 1.0, log_snr=lambda sigma: -math.log(sigma), is_b2=True)


def uni_pc(denoise: Denoise, sigmas: Sequence[float], state: SolverState, draw: Draw) -> SolverState:
    """Take a step of ComfyUI's uni_pc: order 3, B1."""
    return unipc_step(COMFY_B1, denoise, sigmas, state)


def uni_pc_bh2(denoise: Denoise, sigmas: Sequence[float], state: SolverState, draw: Draw) -> SolverState:
    """Take a step of ComfyUI's uni_pc_bh2: order 3, B2."""
    return unipc_step(COMFY_B2, denoise, sigmas, state)


def comfy_sigmas(scheduler: SchedulerName, steps: int, shift: float) -> tuple[float, ...]:
    """Return ComfyUI's levels for UniPC: one step more, without the last but one level; the last is 2^-10, not 0.

    Args:
        scheduler: One of `catalog.SCHEDULERS`.
        shift: The shift of the noise schedule, > 0.

    Returns:
        The levels, usually steps + 1 of them.

    Raises:
        ValueError: As `schedule.scheduled_sigmas`, or no level is left above 2^-10.
    """
    sigmas = (*scheduled_sigmas(scheduler, steps + 1, shift)[:-2], COMFY_LAST_SIGMA)
    return check_falling(sigmas, f"scheduler {scheduler} with shift {shift:g} and {steps} steps")


def comfy_result(x: Tensor) -> Tensor:
    """Undo the scale that ComfyUI takes the last level to leave on the sample."""
    return x / COMFY_RESULT_SCALE


def unipc_step(variant: Variant, denoise: Denoise, sigmas: Sequence[float], state: SolverState) -> SolverState:
    """Call the model, correct the interval before, predict over the interval ahead.

    Args:
        sigmas: The levels; where the last is 0 the last step ends on the model's guess.
        state: Before step i: x is the prediction at level i, "corrected" the corrected sample of the level before,
            "denoised" the model's guesses at the levels before, newest first.

    Returns:
        The state after one more step. After the last step x is the prediction; there is no call left to correct it.
    """
    i = state.step
    m, before = denoise(state.x, sigmas[i]), state.past("denoised")
    if sigmas[i + 1] == 0:
        return state.advance(m)
    x = state.x
    if i > 0:
        last = Interval.at(variant, sigmas, i - 1)
        (start,) = state.past("corrected")
        x = last.move(start, before, last.corrector_weights(), ahead=m)
    guesses = [m, *before]
    ahead = Interval.at(variant, sigmas, i)
    y = ahead.move(x, guesses, ahead.predictor_weights())
    return state.advance(y, denoised=guesses[: variant.order], corrected=[x])


@dataclass(frozen=True)
class Interval:
    """The coefficients of one interval, from the levels alone.

    Attributes:
        ratio: sigma' / sigma.
        decay: alpha' E, alpha' being alpha at the interval's end.
        scale: alpha' B.
        gaps: r_1 to r_p; r_p = 1 is the interval's own end.
        moments: b_1 to b_p.
    """

    ratio: float
    decay: float
    scale: float
    gaps: tuple[float, ...]
    moments: tuple[float, ...]

    @classmethod
    def at(cls, variant: Variant, sigmas: Sequence[float], i: int) -> Interval:
        """Work out interval i of the levels `sigmas`; its order is lower in the first and last intervals."""
        p = min(variant.order, i + 1, len(sigmas) - 1 - i)
        here = variant.log_snr(sigmas[i])
        h = variant.log_snr(sigmas[i + 1]) - here
        E = math.expm1(-h)
        B = E if variant.is_b2 else -h
        gaps = [(variant.log_snr(sigmas[i - k]) - here) / h for k in range(1, p)]
        g, moments = -E / h - 1, []
        for j in range(1, p + 1):
            moments.append(math.factorial(j) * g / B)
            g = -g / h - 1 / math.factorial(j + 1)
        alpha = variant.alpha(sigmas[i + 1])
        return cls(sigmas[i + 1] / sigmas[i], alpha * E, alpha * B, (*gaps, 1.0), tuple(moments))

    def predictor_weights(self) -> list[float]:
        """Return rho_1 to rho_(p-1)."""
        return [0.5] if len(self.gaps) == 2 else self._solve(len(self.gaps) - 1)

    def corrector_weights(self) -> list[float]:
        """Return rho_1 to rho_p."""
        return [0.5] if len(self.gaps) == 1 else self._solve(len(self.gaps))

    def move(self, x: Tensor, guesses: Sequence[Tensor], rho: Sequence[float], ahead: Tensor | None = None) -> Tensor:
        """Move x over the interval, to the sample at its end.

        Args:
            x: The sample at its start.
            guesses: The model's guesses at its start (m_i) and at the levels before, newest first.
            rho: The weights of the differences D_1, D_2, ..., as long as there are any.
            ahead: The model's guess at its end, if known: the last of the differences.
        """
        m = guesses[0]
        others = list(guesses[1 : len(self.gaps)]) + ([] if ahead is None else [ahead])
        y = (x * self.ratio).sub_(m, alpha=self.decay)
        for other, weight, gap in zip(others, rho, self.gaps, strict=False):
            y.sub_(other - m, alpha=self.scale * weight / gap)
        return y

    def _solve(self, num_weights: int) -> list[float]:
        """Solve sum_k rho_k r_k^(j-1) = b_j, j = 1 to `num_weights`, over the first gaps."""
        powers = np.vander(self.gaps[:num_weights], increasing=True).T
        solution: list[float] = np.linalg.solve(powers, np.array(self.moments[:num_weights])).tolist()
        return solution
