"""The live models: one instance of each, loaded on first use, freed when the memory budget wants it."""

from __future__ import annotations

import gc
import threading
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import nn


class HasModule(Protocol):
    """A model whose weights are in its `module`."""

    @property
    def module(self) -> nn.Module:
        """The weights."""


Model = TypeVar("Model", bound="nn.Module | HasModule")


@dataclass(frozen=True)
class ModelKey:
    """What makes two models the same: the files' contents, LoRAs in order with their strengths, dtype, fp8, device.

    `loras` holds (digest, strength) pairs; `dtype` and `device` are as torch prints them.
    """

    kind: str
    digests: tuple[str, ...]
    dtype: str
    device: str
    quantized: bool = False
    loras: tuple[tuple[str, float], ...] = ()


@dataclass
class _Live:
    model: Any
    num_bytes: int
    num_users: int = 0


class ModelRegistry:
    """Holds live models by key. Use it as a context manager: leaving it frees everything.

    Models that are in use are never freed, so the budget can be exceeded by what is in use at once. Calls from
    several threads are safe; a model is loaded once, however many ask for it.

    `memory_budget_bytes`: how many bytes of weights may stay live for reuse; None: no limit.
    """

    def __init__(self, memory_budget_bytes: int | None = None):
        self.memory_budget_bytes = self._asked_bytes = memory_budget_bytes
        self.device_limit: int | None = None
        self.loads: Counter[ModelKey] = Counter()
        self.facts: dict[ModelKey, dict[str, Any]] = {}  # how a model was loaded, for those who find it live
        self.load_dit: Callable[..., Any] | None = None  # loads a diffusion model that several processes share
        self._live: OrderedDict[ModelKey, _Live] = OrderedDict()  # the least recently used first
        self._lock = threading.RLock()

    @property
    def num_bytes(self) -> int:
        """The live models' weights, in bytes."""
        with self._lock:
            return sum(live.num_bytes for live in self._live.values())

    def hold_to(self, device: str, limit: int | None, beside: int) -> None:
        """Hold this process to `limit` bytes on a device from here on; None: all that is free.

        A GPU's allocator then gives no more, as if there were none. `beside`: the most that a run takes of it beside
        models, which are freed, where unused, to leave so much.
        """
        self.device_limit, self.memory_budget_bytes = limit, self._asked_bytes
        if limit is not None:
            left = max(limit - beside, 0)
            self.memory_budget_bytes = left if self._asked_bytes is None else min(left, self._asked_bytes)
        if device.startswith("cuda"):
            total = torch.cuda.mem_get_info(device)[1]
            share = 1.0 if limit is None else min(limit / total, 1.0)
            torch.cuda.set_per_process_memory_fraction(share, torch.device(device).index)

    def is_live(self, key: ModelKey) -> bool:
        """Return whether the model `key` is loaded, used or not."""
        with self._lock:
            return key in self._live

    def acquire(self, key: ModelKey, load: Callable[[], Model], *, expected_bytes: int = 0) -> Model:
        """Return the model `key`, loading it if it is not live, and mark it as in use; `release` it when done.

        `load` is called at most once while the model is live; room for `expected_bytes`, its size, is made before.
        """
        with self._lock:
            live = self._live.get(key)
            if live is None:
                self._make_room(expected_bytes)
                model = load()
                self.loads[key] += 1
                live = self._live[key] = _Live(model, weight_bytes(model))
            live.num_users += 1
            self._live.move_to_end(key)
            self._make_room(0)
            return cast("Model", live.model)

    def release(self, key: ModelKey) -> None:
        """Say that one user of the model `key` is done; it stays live while the budget allows.

        Raises:
            ValueError: The model is not in use.
        """
        with self._lock:
            if key not in self._live or self._live[key].num_users == 0:
                raise ValueError(f"{key.kind} is not in use")
            self._live[key].num_users -= 1
            self._make_room(0)

    def free_unused(self) -> int:
        """Free every model that is not in use; return how many bytes of weights that gave back."""
        with self._lock:
            return self._free([key for key, live in self._live.items() if live.num_users == 0])

    def _make_room(self, wanted_bytes: int) -> None:
        """Free unused models, the least recently used first, until `wanted_bytes` more fit into the budget."""
        if self.memory_budget_bytes is None:
            return
        surplus = self.num_bytes + wanted_bytes - self.memory_budget_bytes
        chosen = []
        for key, size in [(key, live.num_bytes) for key, live in self._live.items() if live.num_users == 0]:
            if surplus > 0:
                chosen.append(key)
                surplus -= size
        self._free(chosen)

    def _free(self, keys: list[ModelKey]) -> int:
        weights, freed = [], 0
        for key in keys:
            live = self._live.pop(key)
            weights += [weakref.ref(tensor) for tensor in _tensors(live.model)]
            freed += live.num_bytes
            del live
        if any(weight() is not None for weight in weights):
            gc.collect()  # a module held a reference cycle; a collection costs up to a second, so not in vain
        if keys and torch.cuda.is_available():
            torch.cuda.empty_cache()
        return freed

    def __enter__(self) -> ModelRegistry:
        return self

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._free(list(self._live))


def weight_bytes(model: nn.Module | HasModule) -> int:
    """Count the bytes of a model's parameters and buffers, each storage once."""
    tensors = {tensor.data_ptr(): tensor for tensor in _tensors(model)}
    return sum(tensor.nbytes for tensor in tensors.values())


def _tensors(model: nn.Module | HasModule) -> Iterator[torch.Tensor]:
    module = model if isinstance(model, nn.Module) else model.module
    return chain(module.parameters(), module.buffers())
