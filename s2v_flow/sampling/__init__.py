"""Schedules, solvers, noise and guidance: functions over one contract, `denoise(x, sigma) -> x0`.

Here are the names, and the rules about them that a recipe is checked against, without torch. A new sampler is one name
here, one function in `solver.py`, and one row in `sampler.py`; other packages' samplers are known by what they declare.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

from s2v_flow.plugins import SAMPLERS as PLUGINS
from s2v_flow.plugins import declared

SAMPLERS = (
    *("uni_pc", "uni_pc_bh2", "euler", "euler_ancestral", "heun", "dpmpp_2m", "lcm", "res_multistep", "ddim", "deis"),
    *("ipndm", "flow_unipc", "flow_dpmpp"),
)
"""The built-in samplers."""

if TYPE_CHECKING:
    SamplerName: TypeAlias = str
else:
    SamplerName = Literal[SAMPLERS + tuple(plugin.name for plugin in declared() if plugin.entry.group == PLUGINS)]

SchedulerName = Literal["simple", "normal", "sgm_uniform", "beta", "linear_quadratic", "kl_optimal", "ddim_uniform"]

SCHEDULERS: tuple[SchedulerName, ...] = get_args(SchedulerName)

OWN_SCHEDULE: tuple[SamplerName, ...] = ("flow_unipc", "flow_dpmpp")
"""Samplers that bring their own noise levels: `scheduler` has no effect on them, `shift` does."""

ONE_STEP_MORE: tuple[SamplerName, ...] = ("uni_pc", "uni_pc_bh2")
"""Samplers that ask the scheduler for one step more than they take, and leave the last but one level out."""

MINIMUM_STEPS: Mapping[SchedulerName, int] = {"linear_quadratic": 2, "kl_optimal": 2}
"""The fewest steps a scheduler can be asked for, where that is more than one."""

CALLS_PER_STEP: Mapping[SamplerName, int] = {"heun": 2}
"""How often a sampler calls the model in a step, where that is more than once; a step to sigma = 0 is one call."""


def minimum_steps(sampler: SamplerName, scheduler: SchedulerName) -> int:
    """Return the fewest steps that this sampler can take with this scheduler."""
    if sampler in OWN_SCHEDULE:
        return 1
    return max(1, MINIMUM_STEPS.get(scheduler, 1) - (sampler in ONE_STEP_MORE))
