"""Planning's word on schedules against the samplers' own."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s2v_flow.sampling import SAMPLERS, SCHEDULERS, SamplerName, SchedulerName
from s2v_flow.sampling.levels import can_step
from s2v_flow.sampling.sampler import make_sampler

steps_ = st.one_of(st.integers(1, 500), st.sampled_from([1, 2, 3, 4, 8, 20, 499, 500]))
shifts = st.one_of(st.floats(0.005, 20), st.floats(0, 1000, exclude_min=True), st.floats(-40, 3).map(lambda x: 10**x))


def is_taken(sampler: SamplerName, scheduler: SchedulerName, steps: int, shift: float) -> bool:
    try:
        make_sampler(sampler, scheduler, steps, shift, seed=0)
    except ValueError:
        return False
    return True


@pytest.mark.slow
@settings(deadline=None, max_examples=300)
@given(st.sampled_from(SAMPLERS), st.sampled_from(SCHEDULERS), steps_, shifts)
def test_what_planning_accepts_the_sampler_accepts(
    sampler: SamplerName, scheduler: SchedulerName, steps: int, shift: float
) -> None:
    """So that what the sampler refuses planning refuses."""
    assert not can_step(sampler, scheduler, steps, shift) or is_taken(sampler, scheduler, steps, shift)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("sampler", ["euler", "uni_pc", "flow_unipc", "flow_dpmpp"])
def test_what_the_sampler_accepts_planning_accepts_at_every_shift_in_use(
    sampler: SamplerName, scheduler: SchedulerName
) -> None:
    shifts = (0.01, 0.1, 0.25, 0.5, 1.0, 3.0, 5.0, 8.0, 12.0, 100.0)
    for steps, shift in itertools.product((1, 2, 4, 20, 50, 100, 500), shifts):
        expected = is_taken(sampler, scheduler, steps, shift)
        assert can_step(sampler, scheduler, steps, shift) is expected, (steps, shift)
