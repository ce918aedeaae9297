"""Classifier-free guidance, and the step from the model's velocity to a clean latent."""

from __future__ import annotations

from torch import Tensor


def guide(conditional: Tensor, unconditional: Tensor, cfg: float) -> Tensor:
    """Combine the two branches: unconditional + cfg * (conditional - unconditional).

    Source: J. Ho and T. Salimans, 2022, Classifier-free diffusion guidance, equation 6 (with cfg = 1 + w).

    Args:
        conditional: The prediction given the prompt; velocities or clean latents, any shape.
        unconditional: The prediction given the negative prompt; same kind, shape and dtype.
        cfg: The guidance scale; 1 gives the conditional prediction.

    Returns:
        The guided prediction; the arguments are not changed.
    """
    return (conditional - unconditional).mul_(cfg).add_(unconditional)


def denoised_from_velocity(x: Tensor, velocity: Tensor, sigma: float) -> Tensor:
    """Return the clean latent x0 = x - sigma * velocity of a flow model.

    Args:
        x: The noisy latent, float32.
        velocity: The model's output, same shape, any floating dtype; widened to x's before it is scaled.
        sigma: The noise level of x.

    Returns:
        x0, in x's dtype.
    """
    return x.sub(velocity.to(x.dtype), alpha=sigma)
