"""The step cache as a function of tensors: what it reuses, when it computes, what it remembers."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from s2v_flow.sampling.state import Memory, SolverState, StepCache

STEPS = 20
SHAPE = (1, 16, 2, 4, 4)


def draw(seed: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


class Walk:
    """Steps along a line; a model of two branches whose velocity is `gain` times x, and how often it was asked."""

    def __init__(self, cache: StepCache, gain: float = 0.5, stride: float = 0.02) -> None:
        self.cache, self.gain, self.stride = cache, gain, stride
        self.start, self.direction = draw(1), draw(2)
        self.computed: list[int] = []

    def step(self, number: int) -> list[Tensor]:
        x = self.start + number * self.stride * self.direction

        def compute() -> list[Tensor]:
            self.computed.append(number)
            return [x * self.gain, x * -self.gain]

        return self.cache.velocities(x, compute)


def walked(threshold: float, steps: int = STEPS) -> Walk:
    walk = Walk(StepCache("easy", threshold, steps))
    for number in range(steps):
        walk.step(number)
    return walk


@pytest.mark.parametrize(("steps", "first"), [(20, 3), (40, 6), (4, 2), (2, 2), (1, 1)])
def test_the_first_steps_and_the_last_are_always_computed(steps: int, first: int) -> None:
    """15 % of them, two at least: before there are two, nothing can be expected."""
    assert walked(1e9, steps).computed == [*range(first), *range(max(first, steps - 1), steps)]


def test_a_step_is_reused_until_the_expected_change_adds_up_to_the_threshold() -> None:
    """The velocity is linear in x here, so that what is expected is what happens: |dv| / |v| per step."""
    walk = Walk(StepCache("easy", 1e9, STEPS))
    for number in range(3):
        walk.step(number)
    at_last = walk.start + 2 * walk.stride * walk.direction
    change = float((walk.stride * walk.direction).abs().mean() / at_last.abs().mean())
    for fits in (1, 2, 5):
        assert walked(change * (fits + 0.5)).computed[:4] == [0, 1, 2, 3 + fits]


@pytest.mark.parametrize(("kind", "strides"), [("easy", 2), ("velocity", 0)])
def test_what_is_reused_is_x_and_what_the_velocity_differed_by_or_the_velocity(kind: str, strides: int) -> None:
    """For each branch."""
    walk = Walk(StepCache(kind, 1e9, STEPS))
    *_, before = [walk.step(number) for number in range(3)]
    moved = strides * walk.stride * walk.direction
    walk.step(3)
    found = walk.step(4)
    assert walk.computed == [0, 1, 2]
    for velocity, old in zip(found, before, strict=True):
        assert torch.allclose(velocity, old + moved, atol=1e-6)
    assert walk.cache.memory.reused == 2


def test_a_large_or_unknown_change_is_never_reused() -> None:
    """A threshold that nothing stays under; an x that stands still, of which no rate can be known; bad numbers."""
    assert walked(1e-9).computed == list(range(STEPS))
    still = Walk(StepCache("easy", 0.2, STEPS), stride=0.0)
    for number in range(STEPS):
        still.step(number)
    assert still.computed == list(range(STEPS))
    spoilt = Walk(StepCache("easy", 0.2, STEPS), gain=float("nan"))
    for number in range(STEPS):
        spoilt.step(number)
    assert spoilt.computed == list(range(STEPS))


def test_a_step_that_fails_leaves_what_is_remembered_as_it_was() -> None:
    walk = Walk(StepCache("easy", 0.2, STEPS))
    walk.step(0)
    before = walk.cache.memory

    def fail() -> list[Tensor]:
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        walk.cache.velocities(draw(3), fail)
    assert walk.cache.memory is before


@pytest.mark.parametrize("after", [1, 2, 5, 9])
def test_a_cache_that_was_stored_goes_on_to_the_same_bits(after: int) -> None:
    """Inside a solver's state, through safetensors."""
    walk = Walk(StepCache("easy", 0.2, STEPS))
    for number in range(after):
        walk.step(number)
    payload = save(SolverState(after, draw(4), cache=walk.cache.memory).to_tensors())
    memory = SolverState.from_tensors(load(payload)).cache
    assert memory is not None
    again = Walk(StepCache("easy", 0.2, STEPS))
    again.cache.memory = memory
    for number in range(after, STEPS):
        for one, other in zip(walk.step(number), again.step(number), strict=True):
            assert torch.equal(one, other)
    assert [number for number in walk.computed if number >= after] == again.computed
    assert walk.cache.memory.reused == again.cache.memory.reused > 0


def test_half_a_cache_is_refused() -> None:
    tensors = walked(0.2).cache.memory.to_tensors()
    for name in ("numbers", "x", "computed_0", "computed_1"):
        with pytest.raises(ValueError, match="no step cache"):
            Memory.from_tensors({key: tensor for key, tensor in tensors.items() if key != name})
    with pytest.raises(ValueError, match="no step cache"):
        Memory.from_tensors({**tensors, "more": torch.zeros(1)})
