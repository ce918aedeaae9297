"""ComfyUI's solvers but UniPC: one function per solver, one call of it per step.

x is the sample at level sigma, m = denoise(x, sigma), d = (x - m) / sigma the slope, lambda = -ln sigma. A prime marks
the next level. All coefficients are Python floats made from the levels, so that no step waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from s2v_flow.sampling.state import Denoise, Draw, SolverState

ADAMS_BASHFORTH = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)
DEIS_ORDER = 3
QUADRATURE_POINTS = 32


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
