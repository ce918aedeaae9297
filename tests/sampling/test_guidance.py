"""Guidance, and velocity to clean latent."""

from __future__ import annotations

import torch

from s2v_flow.sampling.sampler import denoised_from_velocity, guide

GENERATOR = torch.Generator().manual_seed(0)
CONDITIONAL, UNCONDITIONAL, X = torch.randn(3, 1, 16, 1, 2, 2, generator=GENERATOR)


def test_guidance_extrapolates_from_the_unconditional_prediction() -> None:
    expected = UNCONDITIONAL + 6.0 * (CONDITIONAL - UNCONDITIONAL)
    assert torch.equal(guide(CONDITIONAL, UNCONDITIONAL, 6.0), expected)


def test_guidance_leaves_its_arguments_alone() -> None:
    conditional, unconditional = CONDITIONAL.clone(), UNCONDITIONAL.clone()
    guide(conditional, unconditional, 6.0)
    assert torch.equal(conditional, CONDITIONAL)
    assert torch.equal(unconditional, UNCONDITIONAL)


def test_guiding_velocities_is_guiding_clean_latents() -> None:
    on_velocity = denoised_from_velocity(X, guide(CONDITIONAL, UNCONDITIONAL, 4.5), 0.7)
    clean = [denoised_from_velocity(X, velocity, 0.7) for velocity in (CONDITIONAL, UNCONDITIONAL)]
    assert torch.allclose(on_velocity, guide(clean[0], clean[1], 4.5), atol=1e-5)


def test_a_16_bit_velocity_is_widened_before_it_is_scaled() -> None:
    velocity = CONDITIONAL.bfloat16()
    clean = denoised_from_velocity(X, velocity, 0.7)
    assert clean.dtype == torch.float32
    assert torch.allclose(clean, X - 0.7 * velocity.float(), atol=1e-6)
