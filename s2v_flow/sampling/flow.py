"""The authors' solvers, with their own noise levels: flow_unipc and flow_dpmpp.

x = (1 - sigma) x0 + sigma * noise, so that lambda = ln((1 - sigma) / sigma). The levels are float64, and the model's
timestep is 1000 sigma cut to a whole number; the solver uses sigma itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from s2v_flow.sampling.catalog import SchedulerName
from s2v_flow.sampling.levels import NUM_TRAIN_LEVELS, UNIPC_FIRST_TIME, own_levels
from s2v_flow.sampling.schedule import check_falling, check_shift
from s2v_flow.sampling.state import Denoise, Draw, SolverState
from s2v_flow.sampling.unipc import Variant, unipc_step


def flow_log_snr(sigma: float) -> float:
    """Return lambda = ln((1 - sigma) / sigma); minus infinity at sigma = 1, where nothing is left of the signal."""
    return math.log((1 - sigma) / sigma) if sigma < 1 else -math.inf


UNIPC = Variant(order=2, alpha=lambda sigma: 1 - sigma, log_snr=flow_log_snr, is_b2=True)


def flow_unipc(denoise: Denoise, sigmas: Sequence[float], state: SolverState, draw: Draw) -> SolverState:
    """Take a step of the authors' default solver: UniPC of order 2, B2.

    Source: Wan-Video/Wan2.2, wan/utils/fm_solvers_unipc.py, FlowUniPCMultistepScheduler.
    """
    return unipc_step(UNIPC, denoise, sigmas, state)


def flow_dpmpp(denoise: Denoise, sigmas: Sequence[float], state: SolverState, draw: Draw) -> SolverState:
    """Take a step of the authors' second-order DPM-Solver++ (multistep, midpoint).

    Source: Wan-Video/Wan2.2, wan/utils/fm_solvers.py, FlowDPMSolverMultistepScheduler; C. Lu et al., 2022,
    DPM-Solver++, algorithm 2.
    """
    sigma, lower = sigmas[state.step], sigmas[state.step + 1]
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


def unipc_sigmas(_scheduler: SchedulerName, steps: int, shift: float) -> tuple[float, ...]:
    """Return the levels of flow_unipc, whatever the scheduler: steps + 1 float64 values, from just below 1 to 0.

    Raises:
        ValueError: steps < 1, or the shift is not positive.
    """
    return _sigmas(UNIPC_FIRST_TIME, steps, shift)


def dpmpp_sigmas(_scheduler: SchedulerName, steps: int, shift: float) -> tuple[float, ...]:
    """Return the levels of flow_dpmpp, whatever the scheduler: steps + 1 float64 values, from 1 to 0.

    Raises:
        ValueError: steps < 1, or the shift is not positive.
    """
    return _sigmas(1.0, steps, shift)


def whole_timestep(sigma: float) -> float:
    """Return the time the model is told: 1000 sigma, cut to a whole number."""
    return float(math.trunc(sigma * NUM_TRAIN_LEVELS))


def _sigmas(first_time: float, steps: int, shift: float) -> tuple[float, ...]:
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    sigmas = own_levels(first_time, steps, check_shift(shift))
    return check_falling(sigmas, f"shift {shift:g} with {steps} steps")
