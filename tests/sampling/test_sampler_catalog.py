"""The catalog of names, which recipes are checked against, and the tables that implement it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from s2v_flow import sampling as catalog
from s2v_flow.sampling.sampler import SOLVERS, make_sampler
from s2v_flow.sampling.schedule import SCHEDULERS


def test_every_name_has_a_row_and_every_row_a_name() -> None:
    assert set(catalog.SAMPLERS) == set(SOLVERS)
    assert set(catalog.SCHEDULERS) == set(SCHEDULERS)


def test_the_catalog_needs_no_torch() -> None:
    code = "import sys, s2v_flow.sampling; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("sampler", catalog.SAMPLERS)
def test_samplers_with_their_own_schedule_and_no_others_ignore_the_scheduler(sampler: catalog.SamplerName) -> None:
    sigmas = {make_sampler(sampler, scheduler, 5, 3.0, seed=0).sigmas for scheduler in catalog.SCHEDULERS}
    assert (len(sigmas) == 1) == (sampler in catalog.OWN_SCHEDULE)


@pytest.mark.parametrize("sampler", catalog.SAMPLERS)
@pytest.mark.parametrize("scheduler", catalog.SCHEDULERS)
def test_the_fewest_steps_are_possible_and_one_less_is_not(
    sampler: catalog.SamplerName, scheduler: catalog.SchedulerName
) -> None:
    least = catalog.minimum_steps(sampler, scheduler)
    assert make_sampler(sampler, scheduler, least, 3.0, seed=0).num_steps >= 1
    with pytest.raises(ValueError, match="step"):
        make_sampler(sampler, scheduler, least - 1, 3.0, seed=0)
