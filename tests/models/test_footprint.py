"""How much arithmetic the models take, counted without them."""

from __future__ import annotations

import pytest

from s2v_flow.models.footprint import Weights, chunk_flops, vae_flops


def test_a_step_of_the_full_model_is_what_was_counted_by_its_operations() -> None:
    """1,973 TFLOP at 640x640, 20 latent frames, with motion; 3,912 with guidance (docs/hardware.md)."""
    shapes = {"head.modulation": (1, 2, 5120), **{f"blocks.{n}.ffn.0.weight": (13824, 5120) for n in range(40)}}
    dit = Weights(shapes, 0, 2, False, False)
    inputs = ["positive", "reference", "history", "speech"]
    assert sum(chunk_flops(dit, 640, 640, 20, inputs)) == pytest.approx(1_973e12, rel=0.01)
    assert sum(chunk_flops(dit, 640, 640, 20, [*inputs, "negative"])) == pytest.approx(3_912e12, rel=0.02)


def test_the_vae_convolves_each_stage_at_its_own_resolution() -> None:
    """In space and in time: of a weight of 10 numbers, 2 FLOP each for every cell of its stage."""
    keys = {"conv1": 1, "middle.0.residual.2": 1, "upsamples.0.residual.2": 1, "upsamples.3.resample.1": 4 * 2}
    keys |= {"upsamples.8.residual.2": 16 * 4, "upsamples.14.residual.6": 64 * 4, "head.2": 64 * 4}
    for key, cells in keys.items():
        vae = Weights({f"decoder.{key}.weight": (2, 5, 1, 1, 1)}, 0, 4, False, True)
        assert vae_flops(vae, "decoder", 32, 16, 8) == (0, 0, 20 * 8 * 2 * cells), key
    keys = {"conv1": 256, "downsamples.0.residual.2": 256, "downsamples.2.resample.1": 64, "head.2": 1}
    for key, cells in keys.items():
        vae = Weights({f"encoder.{key}.weight": (2, 5, 1, 1, 1)}, 0, 4, False, True)
        assert vae_flops(vae, "encoder", 32, 16, 8) == (0, 0, 20 * 8 * 2 * cells), key
