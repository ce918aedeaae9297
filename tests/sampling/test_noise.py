"""Starting noise and step noise."""

from __future__ import annotations

import pytest
import torch

from s2v_flow.sampling.sampler import initial_noise, step_generator

CPU = torch.device("cpu")


@pytest.mark.parametrize("seed", [0, 20, 2**63, 2**64 - 1])
def test_starting_noise_equals_that_of_torchs_global_generator(seed: int) -> None:
    shape = (1, 16, 2, 3, 5)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        expected = torch.randn(shape)
    noise = initial_noise(shape, seed)
    assert noise.dtype == torch.float32
    assert torch.equal(noise, expected)


def test_drawing_does_not_touch_the_global_generator() -> None:
    before = torch.get_rng_state()
    initial_noise((2, 2), 1)
    assert torch.equal(torch.get_rng_state(), before)


def test_on_the_cpu_step_noise_comes_from_the_next_seed() -> None:
    noise = torch.randn(2, 8, generator=step_generator(41, CPU))
    assert torch.equal(noise, initial_noise((2, 8), 42))


def test_the_largest_seed_has_a_next_one() -> None:
    noise = torch.randn(4, generator=step_generator(2**64 - 1, CPU))
    assert torch.equal(noise, initial_noise((4,), 0))


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seeds_out_of_range_are_refused(seed: int) -> None:
    with pytest.raises(ValueError, match="a seed is"):
        initial_noise((1,), seed)
    with pytest.raises(ValueError, match="a seed is"):
        step_generator(seed, CPU)
