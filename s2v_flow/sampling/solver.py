"""The solvers, ComfyUI's and the authors': one function per solver, one call of it per step.

x is the sample at level sigma, m = denoise(x, sigma), d = (x - m) / sigma the slope, lambda half the log of the
signal-to-noise ratio: -ln sigma in ComfyUI's solvers, ln((1 - sigma) / sigma) in the authors'. A prime marks the next
level. All coefficients are Python floats made from the levels, so that no step waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from s2v_flow.sampling import SchedulerName
from s2v_flow.sampling.levels import COMFY_LAST_SIGMA, NUM_TRAIN_LEVELS, own_levels
from s2v_flow.sampling.schedule import check_falling, check_shift, scheduled_sigmas
from s2v_flow.sampling.state import Denoise, Draw, SolverState

ADAMS_BASHFORTH = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))
DEIS_ORDER = 3
QUADRATURE_POINTS = 32
COMFY_RESULT_SCALE = 0.999


def euler(denoise: Denoise, sigmas: Sequence[float], state: SolverState, draw: Draw) -> SolverState:
    """Follow the slope: x' = x + (sigma' - sigma) d. On a flow model DDIM is the same step."""
    sigma, lower = _levels(sigmas, state)
    return state.advance(_move(state.x, denoise(state.x, sigma), lower / sigma))


def heun(denoise: Denoise, sigmas: Sequence[float], state: SolverState, draw: Draw) -> SolverState:
    """Follow the mean of the slopes at both ends of the step; two model calls, except in the last step.

    Source: T. Karras et al., 2022, Elucidating the design space of diffusion-based generative models, algorithm 1.
    """
    sigma, lower = _levels(sigmas, state)
    x, m = state.x, denoise(state.x, sigma)
    if lower == 0:
        return state.advance(m)
    guess = _move(x, m, lower / sigma)
    slopes = (x - m) / sigma + (guess - denoise(guess, lower)) / lower
    return state.advance(x + slopes * ((lower - sigma) / 2))


def euler_ancestral(denoise: Denoise, sigmas: Sequence[float], state: SolverState, draw: Draw) -> SolverState:
    """Step below the next level and add noise up to it, in the flow model's scaling (eta 1).

    Source: K. Crowson, k-diffusion, sampling.py, sample_euler_ancestral; its form for flow models as in ComfyUI.
    """
    sigma, lower = _levels(sigmas, state)
    m = denoise(state.x, sigma)
    if lower == 0:
        return state.advance(m)
    below = lower * lower / sigma
    scale = (1 - lower) / (1 - below)
    noise_scale = math.sqrt(max(lower * lower - (below * scale) ** 2, 0.0))
    return state.advance(_move(state.x, m, below / sigma) * scale + draw(state.x) * noise_scale)


def lcm(denoise: Denoise, sigmas: Sequence[float], state: SolverState, draw: Draw) -> SolverState:
    """Jump to the clean guess and noise it again: x' = (1 - sigma') m + sigma' * noise.

    Source: S. Luo et al., 2023, Latent consistency models, algorithm 3.
    """
    sigma, lower = _levels(sigmas, state)
    m = denoise(state.x, sigma)
    if lower == 0:
        return state.advance(m)
    return state.advance(m * (1 - lower) + draw(state.x) * lower)


def dpmpp_2m(denoise: Denoise, sigmas: Sequence[float], state: SolverState, draw: Draw) -> SolverState:
    """Extrapolate the clean guess from this step's and the last one's, in lambda.

    Source: C. Lu et al., 2022, DPM-Solver++, algorithm 2 (2M).
    """
    sigma, lower = _levels(sigmas, state)
    m = denoise(state.x, sigma)
    if lower == 0:
        return state.advance(m)
    guess = m
    if past := state.past("denoised"):
        r = math.log(sigmas[state.step - 1] / sigma) / math.log(sigma / lower)
        guess = torch.lerp(m, past[0], -1 / (2 * r))
    return state.advance(_move(state.x, guess, lower / sigma), denoised=[m])


def res_multistep(denoise: Denoise, sigmas: Sequence[float], state: SolverState, draw: Draw) -> SolverState:
    """Take a second-order exponential multistep.

    Source: Q. Zhang et al., 2023, Improved order analysis and design of exponential integrator for diffusion models.
    """
    sigma, lower = _levels(sigmas, state)
    m = denoise(state.x, sigma)
    if lower == 0:
        return state.advance(m)
    x = _move(state.x, m, lower / sigma)
    if past := state.past("denoised"):
        h, h_before = math.log(sigma / lower), math.log(sigmas[state.step - 1] / sigma)
        phi_1 = -math.expm1(-h) / h
        phi_2 = (1 - phi_1) / h
        x = x + (m - past[0]) * (phi_2 * h * h / h_before)
    return state.advance(x, denoised=[m])


def ipndm(denoise: Denoise, sigmas: Sequence[float], state: SolverState, draw: Draw) -> SolverState:
    """Follow an Adams-Bashforth extrapolation of up to four slopes, as if steps were even.

    Source: Q. Zhang and Y. Chen, 2022, Fast sampling of diffusion models with exponential integrator (iPNDM).
    """
    sigma, lower = _levels(sigmas, state)
    m = denoise(state.x, sigma)
    if lower == 0:
        return state.advance(m)
    slopes = [(state.x - m) / sigma, *state.past("slope")][: len(ADAMS_BASHFORTH)]
    weights = [weight * (lower - sigma) for weight in ADAMS_BASHFORTH[len(slopes) - 1]]
    return state.advance(_add(state.x, slopes, weights), slope=slopes[: len(ADAMS_BASHFORTH) - 1])


def deis(denoise: Denoise, sigmas: Sequence[float], state: SolverState, draw: Draw) -> SolverState:
    """Integrate the polynomial through up to three slopes, with T(s) = sqrt(ln(1 + s^2)) as its abscissa.

    Source: Q. Zhang and Y. Chen, 2022, Fast sampling of diffusion models with exponential integrator (tAB-DEIS).
    """
    sigma, lower = _levels(sigmas, state)
    m = denoise(state.x, sigma)
    if lower == 0:
        return state.advance(m)
    slopes = [(state.x - m) / sigma, *state.past("slope")][:DEIS_ORDER]
    nodes = [sigmas[state.step - age] for age in range(len(slopes))]
    return state.advance(_add(state.x, slopes, _deis_weights(nodes, lower)), slope=slopes[: DEIS_ORDER - 1])


def flow_dpmpp(denoise: Denoise, sigmas: Sequence[float], state: SolverState, draw: Draw) -> SolverState:
    """Take a step of the authors' second-order DPM-Solver++ (multistep, midpoint).

    Source: Wan-Video/Wan2.2, wan/utils/fm_solvers.py, FlowDPMSolverMultistepScheduler; C. Lu et al., 2022,
    DPM-Solver++, algorithm 2.
    """
    sigma, lower = _levels(sigmas, state)
    m = denoise(state.x, sigma)
    if lower == 0:
        return state.advance(m)
    here = flow_log_snr(sigma)
    h = flow_log_snr(lower) - here
    guess = m
    if past := state.past("denoised"):
        r = (here - flow_log_snr(sigmas[state.step - 1])) / h  # infinite in the second step
        guess = torch.lerp(m, past[0], -1 / (2 * r))
    x = (state.x * (lower / sigma)).sub_(guess, alpha=(1 - lower) * math.expm1(-h))
    return state.advance(x, denoised=[m])


def flow_log_snr(sigma: float) -> float:
    """Return lambda = ln((1 - sigma) / sigma); minus infinity at sigma = 1, where nothing is left of the signal."""
    return math.log((1 - sigma) / sigma) if sigma < 1 else -math.inf


@dataclass(frozen=True)
class Variant:
    """A flavour of UniPC: a multistep predictor, corrected by the next step's own model call, at one call a step.

    Interval i runs from sigma_i to sigma_(i+1); h = lambda_(i+1) - lambda_i, E = e^-h - 1, p the interval's order.

    Source: W. Zhao et al., 2023, UniPC, algorithms 1 and 2, data prediction; FLOW_B2, the authors' default solver:
    Wan-Video/Wan2.2, wan/utils/fm_solvers_unipc.py, FlowUniPCMultistepScheduler.
    """

    order: int  # the highest of an interval
    alpha: Callable[[float], float]  # level to the scale of the clean latent in x
    log_snr: Callable[[float], float]  # level > 0 to lambda
    is_b2: bool  # whether B is E (B2) or -h (B1)


COMFY_B1 = Variant(order=3, alpha=lambda sigma: 1.0, log_snr=lambda sigma: -math.log(sigma), is_b2=False)
COMFY_B2 = Variant(order=3, alpha=lambda sigma: 1.0, log_snr=lambda sigma: -math.log(sigma), is_b2=True)
FLOW_B2 = Variant(order=2, alpha=lambda sigma: 1 - sigma, log_snr=flow_log_snr, is_b2=True)


def uni_pc(denoise: Denoise, sigmas: Sequence[float], state: SolverState, draw: Draw) -> SolverState:
    """Take a step of ComfyUI's uni_pc: order 3, B1."""
    return unipc_step(COMFY_B1, denoise, sigmas, state)


def uni_pc_bh2(denoise: Denoise, sigmas: Sequence[float], state: SolverState, draw: Draw) -> SolverState:
    """Take a step of ComfyUI's uni_pc_bh2: order 3, B2."""
    return unipc_step(COMFY_B2, denoise, sigmas, state)


def flow_unipc(denoise: Denoise, sigmas: Sequence[float], state: SolverState, draw: Draw) -> SolverState:
    """Take a step of the authors' default solver: UniPC of order 2, B2.

    Source: Wan-Video/Wan2.2, wan/utils/fm_solvers_unipc.py, FlowUniPCMultistepScheduler.
    """
    return unipc_step(FLOW_B2, denoise, sigmas, state)


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
    """The coefficients of one interval, from the levels alone."""

    ratio: float  # sigma' / sigma
    decay: float  # alpha' E, alpha' being alpha at the interval's end
    scale: float  # alpha' B
    gaps: tuple[float, ...]  # r_1 to r_p; r_p = 1 is the interval's own end
    moments: tuple[float, ...]  # b_1 to b_p

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

        `guesses`: the model's at its start (m_i) and at the levels before, newest first; `rho`: the weights of the
        differences D_1, D_2, ..., as long as there are any; `ahead`: the model's guess at its end, if known: the last
        of the differences.
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


def comfy_sigmas(scheduler: SchedulerName, steps: int, shift: float) -> tuple[float, ...]:
    """Return ComfyUI's levels for UniPC: one step more, without the last but one level; the last is 2^-10, not 0.

    Raises:
        ValueError: As `schedule.scheduled_sigmas`, or no level is left above 2^-10.
    """
    sigmas = (*scheduled_sigmas(scheduler, steps + 1, shift)[:-2], COMFY_LAST_SIGMA)
    return check_falling(sigmas, f"scheduler {scheduler} with shift {shift:g} and {steps} steps")


def comfy_result(x: Tensor) -> Tensor:
    """Undo the scale that ComfyUI takes the last level to leave on the sample."""
    return x / COMFY_RESULT_SCALE


def own_sigmas(first_time: float, _scheduler: SchedulerName, steps: int, shift: float) -> tuple[float, ...]:
    """Return the levels of the authors' solvers, whatever the scheduler: steps + 1 float64 values, from the first to 0.

    Raises:
        ValueError: The shift is not positive, or the levels repeat (too many steps).
    """
    return check_falling(own_levels(first_time, steps, check_shift(shift)), f"shift {shift:g} with {steps} steps")


def whole_timestep(sigma: float) -> float:
    """Return the time the model is told: 1000 sigma, cut to a whole number."""
    return float(math.trunc(sigma * NUM_TRAIN_LEVELS))


def _deis_weights(nodes: Sequence[float], lower: float) -> list[float]:
    """Integrate each Lagrange polynomial on T(nodes) over s from nodes[0] to `lower`, by Gauss-Legendre quadrature."""
    points, weights = np.polynomial.legendre.leggauss(QUADRATURE_POINTS)
    half = (lower - nodes[0]) / 2
    abscissa = np.sqrt(np.log1p((nodes[0] + half * (points + 1)) ** 2))
    t = np.sqrt(np.log1p(np.square(nodes)))
    integrals = []
    for j in range(len(nodes)):
        others = [k for k in range(len(nodes)) if k != j]
        basis = np.prod([(abscissa - t[k]) / (t[j] - t[k]) for k in others], axis=0)
        integrals.append(float(half * np.sum(weights * basis)))
    return integrals


def _levels(sigmas: Sequence[float], state: SolverState) -> tuple[float, float]:
    """Return this step's level and the next."""
    return sigmas[state.step], sigmas[state.step + 1]


def _move(x: Tensor, denoised: Tensor, ratio: float) -> Tensor:
    """Return x + (sigma' - sigma) d, for ratio = sigma' / sigma: x moved towards `denoised`, which ratio 0 gives."""
    return torch.lerp(denoised, x, ratio)


def _add(x: Tensor, tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return x plus the weighted sum of `tensors`."""
    for tensor, weight in zip(tensors, weights, strict=True):
        x = x.add(tensor, alpha=weight)
    return x
