"""The contract between samplers and their caller: what a solver calls, everything it remembers, and a step cache.

A solver's step is a function `step(denoise, sigmas, state, draw) -> state`. Nothing is remembered outside the state, so
a run that was cut after any step goes on to the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import torch
from torch import Tensor

FIRST_SHARE, FEWEST_FIRST = 0.15, 2  # of the steps, and how many: always computed, whatever a step cache says

Denoise: TypeAlias = Callable[[Tensor, float], Tensor]
"""`denoise(x, sigma) -> x0`, the clean latent as the model guesses it; float32 of one shape, sigma a Python float."""

Draw: TypeAlias = Callable[[Tensor], Tensor]
"""`draw(x) -> noise`: fresh standard normal noise of x's shape, dtype and device."""

_HISTORY = "history."
_CACHE = "cache."
_NAMES = ("numbers", "x", "rate", "computed_0", "computed_1", "computed_2")


@dataclass(frozen=True)
class Memory:
    """What the cache remembers between steps.

    `rate`: the relative change of the velocity to be expected per mean absolute change of x, a scalar on the device;
    None before two steps are computed.
    """

    step: int = 0  # how many are done
    reused: int = 0  # how many of them were not computed
    change: float = 0.0  # the sum of expected relative changes since the last computed step
    x: Tensor | None = None  # what the last step started from
    computed: tuple[Tensor, ...] = ()  # what the last computed step started from; its velocities, the guided one first
    rate: Tensor | None = None

    def to_tensors(self) -> dict[str, Tensor]:
        """Return all of it as named tensors, fit for safetensors: contiguous copies that share no memory."""
        numbers = torch.tensor([self.step, self.reused, self.change], dtype=torch.float64)
        named = zip(_NAMES, (numbers, self.x, self.rate, *self.computed), strict=False)
        return {name: t.clone(memory_format=torch.contiguous_format) for name, t in named if t is not None}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Memory:
        """Read what `to_tensors` gave; tensors stay on the device they come on.

        Raises:
            ValueError: Something is missing, or a name is unknown.
        """
        if not {"numbers", "x", "computed_0", "computed_1"} <= tensors.keys() <= set(_NAMES):
            raise ValueError(f"these tensors are no step cache: {', '.join(sorted(tensors)) or 'none'}")
        step, reused, change = tensors["numbers"].tolist()
        computed = tuple(tensors[name] for name in _NAMES[3:] if name in tensors)
        return cls(int(step), int(reused), change, tensors["x"], computed, tensors.get("rate"))

    def to(self, device: torch.device) -> Memory:
        """Return it with its tensors on `device`."""
        x, rate = (None if tensor is None else tensor.to(device) for tensor in (self.x, self.rate))
        return replace(self, x=x, rate=rate, computed=tuple(tensor.to(device) for tensor in self.computed))


@dataclass(frozen=True)
class SolverState:
    """Everything a solver remembers between steps.

    `history`: earlier tensors by series and age: "denoised_1" is the last step's, "denoised_2" the one's before.
    """

    step: int  # how many are done
    x: Tensor  # the sample, float32: what the next step starts from
    history: Mapping[str, Tensor] = field(default_factory=dict)
    rng: Tensor | None = None  # the state of the generator of step noise, uint8 on the CPU, where some was drawn
    cache: Memory | None = None  # what a step cache remembers

    def past(self, series: str) -> list[Tensor]:
        """Return the tensors of a series, the last step's first."""
        found: list[Tensor] = []
        while (tensor := self.history.get(f"{series}_{len(found) + 1}")) is not None:
            found.append(tensor)
        return found

    def advance(self, x: Tensor, **series: Sequence[Tensor]) -> SolverState:
        """Return the state after one more step, with these series as the only history, the newest tensor first."""
        history = {f"{name}_{age}": tensor for name, past in series.items() for age, tensor in enumerate(past, start=1)}
        return replace(self, step=self.step + 1, x=x, history=history)

    def to_tensors(self) -> dict[str, Tensor]:
        """Return the state as named tensors, fit for safetensors: contiguous copies that share no memory."""
        named = {_HISTORY + name: tensor for name, tensor in self.history.items()}
        named |= {"x": self.x} | ({} if self.rng is None else {"rng": self.rng})
        copies = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in named.items()}
        cache = {} if self.cache is None else self.cache.to_tensors()
        copies |= {_CACHE + name: tensor for name, tensor in cache.items()}
        return {"step": torch.tensor(self.step, dtype=torch.int64), **copies}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> SolverState:
        """Read a state from what `to_tensors` gave; tensors stay on the device they come on.

        Raises:
            ValueError: "step" or "x", or a part of the step cache, is missing, or a name is unknown.
        """
        history, cache = (
            {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
            for prefix in (_HISTORY, _CACHE)
        )
        others = {name: tensor for name, tensor in tensors.items() if not name.startswith((_HISTORY, _CACHE))}
        if not {"step", "x"} <= others.keys() <= {"step", "x", "rng"}:
            raise ValueError(f"these tensors are no solver state: {', '.join(sorted(tensors)) or 'none'}")
        memory = Memory.from_tensors(cache) if cache else None
        return cls(int(others["step"]), others["x"], history, others.get("rng"), memory)


Step: TypeAlias = Callable[[Denoise, Sequence[float], SolverState, Draw], SolverState]
"""One step of a solver, from level `sigmas[state.step]` to the next one."""


class StepCache:
    """The cache of one run, of `num_steps`, of a sampler that calls the model once a step.

    Approximate: where the model's output changes little, the last step that was computed stands in for it. How much the
    velocity changes per change of x is taken from the last two computed steps; its expected relative change is summed
    up from step to step, and while the sum is below a threshold, the velocity is not computed: as published ("easy"),
    it is x plus what velocity and x last differed by; or it is the last one itself ("velocity"), which a straight
    flow's is. The first 15 % of the steps (two at least) and the last one are always computed. Whether to compute is
    decided on the host: one number per step is read from the device, which waits for the step before.

    `kind`: "easy" or "velocity": what stands in for a velocity that is not computed; `threshold`: how large the sum of
    relative changes may become, > 0; 0.2 is usual.

    Source: X. Zhou et al., 2025, Less is enough: training-free video diffusion acceleration via runtime-adaptive
    caching (EasyCache).
    """

    def __init__(self, kind: str, threshold: float, num_steps: int) -> None:
        self.memory = Memory()
        self.kind, self.threshold = kind, threshold
        self._computes = {*range(max(FEWEST_FIRST, math.ceil(FIRST_SHARE * num_steps))), num_steps - 1}

    def velocities(self, x: Tensor, compute: Callable[[], list[Tensor]]) -> list[Tensor]:
        """Return the next step's velocities, one per branch, of x's shape: those of `compute`, or reused ones.

        What is remembered changes only where all went well: a step that fails can be taken again.
        """
        now = self.memory
        if now.step not in self._computes and now.rate is not None and now.x is not None:
            change = now.change + float(_distance(x, now.x) * now.rate)
            if change < self.threshold:  # never where it is not a number
                self.memory = replace(now, step=now.step + 1, reused=now.reused + 1, change=change, x=x)
                start, *velocities = now.computed
                return velocities if self.kind == "velocity" else [velocity + (x - start) for velocity in velocities]
        velocities, rate = compute(), None
        if now.computed:
            start, before, *_ = now.computed
            rate = _distance(velocities[0], before) / _distance(x, start) / velocities[0].abs().mean()
        self.memory = Memory(now.step + 1, now.reused, 0.0, x, (x, *velocities), rate)
        return velocities


def _distance(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).abs().mean()
