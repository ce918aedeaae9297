"""What the trainings share: their options, and steps with a falling rate and a moving average that a later call continues."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from training import state


def parser(description: str | None, *, steps: int) -> argparse.ArgumentParser:
    """Return what reads the options of every training."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--state", type=Path, default=state.DEFAULT)
    made.add_argument("--steps", type=int, default=steps)
    return made


def long_parser(description: str | None, *, steps: int, rate: float, save_every: int) -> argparse.ArgumentParser:
    """Return what reads the options of a training that is continued."""
    made = parser(description, steps=steps)
    made.add_argument("--minutes", type=float, default=math.inf)
    made.add_argument("--rate", type=float, default=rate)
    made.add_argument("--save-every", type=int, default=save_every)
    return made


def start(reader: argparse.ArgumentParser, train: Callable[[argparse.Namespace], object]) -> None:
    """Train as the command line says, in one thread."""
    options = reader.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    train(options)


def time_apart(weights: Mapping[str, Tensor], *, factor: float) -> list[dict[str, Any]]:
    """Return a VAE's learned weights in two groups: the time convolutions learn `factor` times as quickly."""
    learned = [(key, value) for key, value in weights.items() if value.requires_grad]
    return [
        {
            "params": [value for key, value in learned if ("time_conv" in key) == is_time],
            "factor": factor if is_time else 1.0,
            "weight_decay": 1e-4,
        }
        for is_time in (True, False)
    ]


class Loop:
    """AdamW's steps until `steps` are done or `minutes` are over; what is saved on the way continues in the next call.

    Args:
        options: `steps`, `minutes`, `rate`, `save_every`.
        path: The state file.
        saved: What stands in it (`state.load_state`), or None.
        weights: All that is kept, by key; what needs a gradient is learned.
        groups: AdamW's; the rate of each is times its `factor`, if it has one.
        beta: AdamW's second.
        memory: How much of the moving average a step keeps, once it has begun well.
        warmup: Steps until the rate is whole.
        least: The share of the rate at the end.
    """

    def __init__(
        self,
        options: argparse.Namespace,
        path: Path,
        saved: Mapping[str, Any] | None,
        weights: Mapping[str, Tensor],
        groups: list[dict[str, Any]],
        *,
        beta: float = 0.98,
        memory: float,
        warmup: int = 20,
        least: float = 0.03,
    ) -> None:
        self._options, self._path, self._weights = options, path, weights
        self._memory, self._warmup, self._least = memory, warmup, least
        self._optimizer = torch.optim.AdamW(groups, lr=options.rate, betas=(0.9, beta))
        self._begun = time.monotonic()
        self.step: int = 0
        self.losses: list[float] = []
        self.average = {key: value.detach().clone() for key, value in weights.items()}
        if saved is not None:
            self.step, self.average = saved["step"], saved["average"]
            self._optimizer.load_state_dict(saved["optimizer"])

    @property
    def minutes(self) -> float:
        """How long this call has been training."""
        return (time.monotonic() - self._begun) / 60

    @property
    def is_due(self) -> bool:
        """Tell whether the step that was just made is one after which to report and save."""
        return self.step % self._options.save_every == 0 or self.step == self._options.steps

    def steps(self) -> Iterator[int]:
        """Yield the number of each step that is still to be made; it must be made by `learn`."""
        while self.step < self._options.steps and self.minutes < self._options.minutes:
            left = math.sin(math.pi / 2 * (1 - self.step / self._options.steps)) ** 2
            rate = (
                self._options.rate * min(1, (self.step + 1) / self._warmup) * (self._least + (1 - self._least) * left)
            )
            for group in self._optimizer.param_groups:
                group["lr"] = group.get("factor", 1.0) * rate
            yield self.step

    def learn(self, loss: Tensor, mend: Callable[[], None] = lambda: None) -> None:
        """Make a step down a loss; `mend` puts back what must not change, before it enters the average."""
        self._optimizer.zero_grad()
        loss.backward()
        learned = [value for group in self._optimizer.param_groups for value in group["params"]]
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        self._optimizer.step()
        mend()
        self.step += 1
        self.losses.append(loss.item())
        keep = min(self._memory, self.step / (self.step + 10))
        with torch.no_grad():
            for key, value in self._weights.items():
                if value.requires_grad:
                    self.average[key].lerp_(value, 1 - keep)

    def recent(self, values: list[float]) -> float:
        """Return the mean of what was noted at each step since the last report."""
        last = values[-self._options.save_every :]
        return sum(last) / len(last)

    def save(self, **more: object) -> None:
        """Write what a later call continues from; `more` is kept beside it."""
        weights = {key: value.detach() for key, value in self._weights.items()}
        kept = {"weights": weights, "average": self.average, "optimizer": self._optimizer.state_dict()}
        state.save_state({**kept, "step": self.step, **more}, self._path)
