"""The schedulers against the reference's numbers."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import load_golden

from s2v_flow.sampling import SCHEDULERS, SchedulerName
from s2v_flow.sampling.levels import symmetric_beta_quantile
from s2v_flow.sampling.schedule import scheduled_sigmas

GOLDEN_SIGMAS = load_golden("components/sigmas")[1]


@pytest.mark.parametrize("case", GOLDEN_SIGMAS)
def test_levels_equal_the_reference_to_the_bit(case: str) -> None:
    scheduler, shift, steps = case.split(".")
    sigmas = scheduled_sigmas(scheduler, int(steps.removeprefix("steps")), float(shift.removeprefix("shift")))  # type: ignore[arg-type]
    assert torch.equal(torch.tensor(sigmas, dtype=torch.float32), GOLDEN_SIGMAS[case])


@settings(deadline=None, max_examples=50)
@given(st.sampled_from(SCHEDULERS), st.integers(2, 200), st.floats(0.5, 20.0))
def test_levels_fall_from_at_most_one_to_zero(scheduler: SchedulerName, steps: int, shift: float) -> None:
    sigmas = scheduled_sigmas(scheduler, steps, shift)
    assert sigmas[0] <= 1
    assert sigmas[-1] == 0
    assert all(level > lower for level, lower in itertools.pairwise(sigmas))


def test_the_inverse_of_the_incomplete_beta_function_is_exact_where_it_is_known() -> None:
    """I_x(1/2, 1/2) = 2/pi asin(sqrt x), so that its inverse is sin^2(pi p / 2)."""
    probability = np.linspace(0, 1, 101)
    expected = np.sin(math.pi * probability / 2) ** 2
    assert np.allclose(symmetric_beta_quantile(probability, 0.5), expected, rtol=0, atol=1e-14)


def test_the_median_of_a_symmetric_beta_distribution_is_one_half() -> None:
    assert symmetric_beta_quantile(np.array([0.5]), 0.6).item() == 0.5


@pytest.mark.parametrize("shift", [0.0, -1.0, math.nan, math.inf])
def test_a_shift_that_is_not_positive_is_refused(shift: float) -> None:
    with pytest.raises(ValueError, match="shift must be"):
        scheduled_sigmas("simple", 4, shift)


def test_more_steps_than_there_are_levels_are_refused() -> None:
    with pytest.raises(ValueError, match="take fewer steps"):
        scheduled_sigmas("simple", 1001, 8.0)


def test_an_unknown_scheduler_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown scheduler 'karras'"):
        scheduled_sigmas("karras", 4, 8.0)  # type: ignore[arg-type]
