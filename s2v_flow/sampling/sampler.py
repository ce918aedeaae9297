"""The one entry to sampling: a sampler by name, which starts, iterates, stops, resumes and ends; noise; and guidance.

The starting noise is drawn on the CPU whatever the sampling device, so that one seed gives one video everywhere, and
the same noise as in ComfyUI.

Example:
    sampler = make_sampler("uni_pc", "simple", steps=20, shift=8.0, seed=20)
    for state in sampler.iterate(denoise, sampler.start(initial_noise(shape, seed=20))):
        ...  # progress, cancellation, state.to_tensors(): the caller's
    latent = sampler.result(state)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from s2v_flow.plugins import SAMPLERS, plugins
from s2v_flow.sampling import SamplerName, SchedulerName, solver
from s2v_flow.sampling.levels import NUM_TRAIN_LEVELS, UNIPC_FIRST_TIME
from s2v_flow.sampling.schedule import scheduled_sigmas
from s2v_flow.sampling.state import Denoise, SolverState, Step


def float32_timestep(sigma: float) -> float:
    """Return the time the model is told: 1000 sigma, multiplied in float32 as ComfyUI does."""
    return float(np.float32(sigma) * np.float32(NUM_TRAIN_LEVELS))


@dataclass(frozen=True)
class Solver:
    """A row of the table of samplers: the step, and what a sampler does in its own way."""

    step: Step
    sigmas: Callable[[SchedulerName, int, float], tuple[float, ...]] = scheduled_sigmas  # by scheduler, steps and shift
    draws_noise: bool = False  # steps add fresh noise
    is_start_scaled: bool = True  # x starts as sigma_0 times the noise, rather than the noise
    timestep: Callable[[float], float] = float32_timestep  # level to the time the model is told
    result: Callable[[Tensor], Tensor] = lambda x: x  # the last x to the sample


def _own(step: Step, first_time: float) -> Solver:
    """Return the row of one of the authors' solvers."""
    return Solver(step, partial(solver.own_sigmas, first_time), is_start_scaled=False, timestep=solver.whole_timestep)


SOLVERS: Mapping[SamplerName, Solver] = {
    "uni_pc": Solver(solver.uni_pc, solver.comfy_sigmas, result=solver.comfy_result),
    "uni_pc_bh2": Solver(solver.uni_pc_bh2, solver.comfy_sigmas, result=solver.comfy_result),
    "euler": Solver(solver.euler),
    "euler_ancestral": Solver(solver.euler_ancestral, draws_noise=True),
    "heun": Solver(solver.heun),
    "dpmpp_2m": Solver(solver.dpmpp_2m),
    "lcm": Solver(solver.lcm, draws_noise=True),
    "res_multistep": Solver(solver.res_multistep),
    "ddim": Solver(solver.euler),
    "deis": Solver(solver.deis),
    "ipndm": Solver(solver.ipndm),
    "flow_unipc": _own(solver.flow_unipc, UNIPC_FIRST_TIME),
    "flow_dpmpp": _own(solver.flow_dpmpp, 1.0),
}
"""Every sampler. Names: `__init__.py`."""


@dataclass(frozen=True)
class Sampler:
    """A sampler with its noise levels, ready to run."""

    name: SamplerName
    sigmas: tuple[float, ...]  # falling, one more than there are steps
    seed: int  # the run's: what step noise is drawn from
    device: torch.device  # where the sample lives
    solver: Solver

    @property
    def num_steps(self) -> int:
        """How many steps the run takes; a few schedulers give another number than was asked for."""
        return len(self.sigmas) - 1

    def timestep(self, sigma: float) -> float:
        """Return the time that the model is told at level `sigma`, on the scale 0 to 1000."""
        return self.solver.timestep(sigma)

    def start(self, noise: Tensor) -> SolverState:
        """Return the state before the first step, on the sampler's device.

        `noise`: standard normal noise of the latent's shape, float32, on any device (`initial_noise`).
        """
        x = noise.to(self.device, torch.float32)
        return SolverState(step=0, x=x * self.sigmas[0] if self.solver.is_start_scaled else x)

    def iterate(self, denoise: Denoise, state: SolverState) -> Iterator[SolverState]:
        """Take the steps that are left, and yield the state after each one.

        Stopping is to stop asking. Any state, before or after `SolverState.to_tensors`, can be given to another
        `iterate` of an equal sampler, which goes on to the same bits.

        Args:
            denoise: `denoise(x, sigma) -> x0`; x is float32 on the sampler's device, sigma a Python float, and the
                model's time is `self.timestep(sigma)`. Must return float32 of x's shape, and leave x as it is.
            state: From `start`, an earlier `iterate`, or `SolverState.from_tensors`.
        """
        assert state.rng is not None or state.step == 0 or not self.solver.draws_noise, "another sampler's state"
        state = _moved(state, self.device)
        generator = step_generator(self.seed, self.device)
        if state.rng is not None:
            generator.set_state(state.rng)

        def draw(x: Tensor) -> Tensor:
            return torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)

        while state.step < self.num_steps:
            state = self.solver.step(denoise, self.sigmas, state, draw)
            if self.solver.draws_noise:
                state = replace(state, rng=generator.get_state())
            yield state

    def result(self, state: SolverState) -> Tensor:
        """Return the sample, float32, still normalised.

        Raises:
            ValueError: Steps are left.
        """
        if state.step != self.num_steps:
            raise ValueError(f"the run is not over: {state.step} of {self.num_steps} steps are done")
        return self.solver.result(state.x)


def make_sampler(
    name: SamplerName, scheduler: SchedulerName, steps: int, shift: float, seed: int, device: torch.device | str = "cpu"
) -> Sampler:
    """Make a sampler.

    Args:
        scheduler: One of `sampling.SCHEDULERS`; without effect on the samplers in `sampling.OWN_SCHEDULE`.
        steps: How many steps, at least `sampling.minimum_steps(name, scheduler)`.
        shift: > 0.
        seed: The run's seed, 0 to 2^64 - 1; only samplers that draw step noise use it here.
        device: Where the sample lives, and step noise is drawn.

    Raises:
        ValueError: An unknown name, or a value that is out of range.
        S2VFlowError: The sampler is another package's, and cannot be imported.
    """
    row = SOLVERS.get(name) or _plugin(name)
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    return Sampler(name, row.sigmas(scheduler, steps, shift), check_seed(seed), torch.device(device), row)


def _plugin(name: SamplerName) -> Solver:
    """Return another package's sampler, which is a step alone or a row."""
    plugin = plugins(SAMPLERS).get(name)
    if plugin is None:
        raise ValueError(f"unknown sampler {name!r}; known: {', '.join(SOLVERS)}")
    made = plugin.load()
    if not isinstance(made, Solver) and not callable(made):
        raise plugin.faulty("is neither a function nor a Solver")
    return made if isinstance(made, Solver) else Solver(made)


def _moved(state: SolverState, device: torch.device) -> SolverState:
    """Return the state with its tensors on `device`; generator states live on the CPU."""
    history = {name: tensor.to(device) for name, tensor in state.history.items()}
    rng = None if state.rng is None else state.rng.cpu()
    return replace(state, x=state.x.to(device), history=history, rng=rng)


def guide(conditional: Tensor, unconditional: Tensor, cfg: float) -> Tensor:
    """Combine predictions with and without the prompt: unconditional + cfg * (conditional - unconditional), a new one.

    Both are velocities or clean latents, of one shape and dtype; cfg 1 gives the conditional one.

    Source: J. Ho and T. Salimans, 2022, Classifier-free diffusion guidance, equation 6 (with cfg = 1 + w).
    """
    return (conditional - unconditional).mul_(cfg).add_(unconditional)


def denoised_from_velocity(x: Tensor, velocity: Tensor, sigma: float) -> Tensor:
    """Return the clean latent x0 = x - sigma * velocity of a flow model, in x's dtype, float32.

    `velocity`: the model's output, any floating dtype; widened before it is scaled.
    """
    return x.sub(velocity.to(x.dtype), alpha=sigma)


NUM_SEEDS = 2**64


def initial_noise(shape: Sequence[int], seed: int) -> Tensor:
    """Draw the noise that a sample starts as: standard normal of `shape` [B, 16, F, H, W], float32 on the CPU.

    It is what torch.manual_seed(seed) and torch.randn give, without touching torch's global generator.

    Raises:
        ValueError: The seed is not from 0 to 2^64 - 1.
    """
    return torch.randn(
        tuple(shape), generator=torch.Generator("cpu").manual_seed(check_seed(seed)), dtype=torch.float32
    )


def step_generator(seed: int, device: torch.device) -> torch.Generator:
    """Make the generator of the noise that ancestral samplers add after a step, on the device that the sample lives on.

    ComfyUI's lives there, too. On the CPU its seed is one more than the run's, because the run's own seed would repeat
    the starting noise.

    Raises:
        ValueError: The seed is not from 0 to 2^64 - 1.
    """
    offset = 1 if device.type == "cpu" else 0
    return torch.Generator(device).manual_seed((check_seed(seed) + offset) % NUM_SEEDS)


def check_seed(seed: int) -> int:
    """Return `seed`; raise ValueError unless 0 <= seed < 2^64."""
    if not 0 <= seed < NUM_SEEDS:
        raise ValueError(f"a seed is a whole number from 0 to 2^64 - 1, got {seed}")
    return seed
