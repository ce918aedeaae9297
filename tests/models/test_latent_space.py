"""The latent space's scale and strides."""

from __future__ import annotations

import pytest
import torch
from reference import load_golden, relative_error

from s2v_flow.models.vae import denormalise, normalise, num_latent_frames


@pytest.mark.parametrize("case", ["vae_tiny_encode_17f", "vae_full_encode_9f"])
def test_normalising_a_raw_latent_gives_what_the_reference_model_sees(case: str) -> None:
    _, expected, _ = load_golden(f"components/{case}")
    assert relative_error(normalise(expected["latent"]), expected["model_latent"]) <= 1e-6


def test_denormalising_undoes_normalising() -> None:
    latent = torch.randn(2, 16, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    assert relative_error(denormalise(normalise(latent)), latent) <= 1e-6


def test_a_zero_normalised_latent_is_the_mean_of_each_channel() -> None:
    raw = denormalise(torch.zeros(1, 16, 1, 1, 1))
    assert raw[0, 0].item() == pytest.approx(-0.7571)
    assert raw[0, 15].item() == pytest.approx(-0.2921)


def test_the_dtype_is_kept() -> None:
    assert normalise(torch.zeros(1, 16, 1, 1, 1, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [(16, 1, 2, 2), (1, 48, 1, 2, 2)])
def test_what_is_not_a_latent_of_16_channels_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="a latent is"):
        normalise(torch.zeros(shape))


def test_77_frames_are_20_latent_frames() -> None:
    assert num_latent_frames(77) == 20
    assert num_latent_frames(1) == 1
