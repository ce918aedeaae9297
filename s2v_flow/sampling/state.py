"""The contract between samplers and their caller: what a solver calls, and everything it remembers.

A solver's step is a function `step(denoise, sigmas, state, draw) -> state`. Nothing is remembered outside the state, so
a run that was cut after any step goes on to the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import torch
from torch import Tensor

from s2v_flow.sampling.step_cache import Memory

Denoise: TypeAlias = Callable[[Tensor, float], Tensor]
"""`denoise(x, sigma) -> x0`, the clean latent as the model guesses it; float32 of one shape, sigma a Python float."""

Draw: TypeAlias = Callable[[Tensor], Tensor]
"""`draw(x) -> noise`: fresh standard normal noise of x's shape, dtype and device."""

_HISTORY = "history."
_CACHE = "cache."


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
