"""A step cache: where the model's output changes little, the last step that was computed stands in for it.

Approximate. How much the velocity changes per change of x is taken from the last two computed steps; its expected
relative change is summed up from step to step, and while the sum is below a threshold, the velocity is not computed:
as published ("easy"), it is x plus what velocity and x last differed by; or it is the last one itself ("velocity"),
which a straight flow's is. The first 15 % of the steps (two at least) and the last one are always computed.

Whether to compute is decided on the host: one number per step is read from the device, which waits for the step before.

Source: X. Zhou et al., 2025, Less is enough: training-free video diffusion acceleration via runtime-adaptive caching
(EasyCache).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

FIRST_SHARE, FEWEST_FIRST = 0.15, 2  # of the steps, and how many: always computed

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


class StepCache:
    """The cache of one run, of `num_steps`, of a sampler that calls the model once a step.

    `kind`: "easy" or "velocity": what stands in for a velocity that is not computed; `threshold`: how large the sum of
    relative changes may become, > 0; 0.2 is usual.
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
