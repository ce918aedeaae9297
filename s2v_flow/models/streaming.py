"""Weights offloaded to host memory and brought to the device for their use, the next ones prefetched meanwhile.

A diffusion model's blocks run one after the other, so two of them on the device are enough: one computes, one arrives.
Copies overlap with computing; whether they hide behind it on a GPU is not measured yet.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from s2v_flow.machine import free_memory_bytes

ALIGNMENT = 512  # what torch's own allocations have: kernels are chosen by it, too
PINNED_BYTES = 2**31
HOST_RESERVE_BYTES = 2**31


@dataclass(frozen=True, eq=False)
class Slot:
    """A parameter or a buffer of a layer: where it rests, and its place on the device, counted from a unit's start."""

    holder: nn.Module
    name: str
    rest: Tensor
    offset: int

    def place(self, tensor: Tensor) -> None:
        """Let the layer compute with `tensor`."""
        parameter = self.holder._parameters.get(self.name)
        if parameter is None:
            self.holder._buffers[self.name] = tensor
        else:
            parameter.data = tensor

    def view(self, memory: Tensor) -> Tensor:
        """Return this slot's part of a unit's bytes, uint8 [n]."""
        part = memory[self.offset : self.offset + self.rest.nbytes]
        return part.view(self.rest.dtype).view(self.rest.shape)


@dataclass(frozen=True, eq=False)
class Unit:
    """Weights that are used together. `slab` holds all of them in one piece of pinned memory, or is None."""

    slots: tuple[Slot, ...]
    num_bytes: int
    slab: Tensor | None = None

    def copy_to(self, memory: Tensor) -> None:
        """Copy the weights to `memory`, uint8 [num_bytes or more]; the host does not wait where they are pinned."""
        if self.slab is not None:
            memory[: self.num_bytes].copy_(self.slab, non_blocking=True)
            return
        for slot in self.slots:
            slot.view(memory).copy_(slot.rest, non_blocking=True)

    @contextmanager
    def at(self, memory: Tensor) -> Iterator[None]:
        """Let the layers compute with the copy in `memory`; afterwards they have their resting weights again."""
        try:
            for slot in self.slots:
                slot.place(slot.view(memory))
            yield
        finally:
            for slot in self.slots:
                slot.place(slot.rest)


class WeightStream:
    """The weights of layers that run one after the other, offloaded to host memory.

    Iterating gives the units' numbers, each while its weights are on the device; close the iterator if it is left early
    (`contextlib.closing`). Two copies are alive at a time; between two passes there is none.

    Args:
        units: For each number the modules that are used then.
        besides: Modules inside of them whose weights are left as they are.
        is_pinned: Whether the weights are packed into pinned memory, from which copies need no help of the host, a unit
            in one piece. Otherwise those in host memory stay where they are: in a mapped model file.
    """

    def __init__(
        self,
        units: Sequence[Sequence[nn.Module]],
        device: torch.device | str,
        *,
        besides: Sequence[nn.Module] = (),
        is_pinned: bool,
    ) -> None:
        self.device = torch.device(device)
        left = {layer for module in besides for layer in module.modules()}
        sizes = [_plan(modules, left)[1] for modules in units]
        self.largest_bytes = max(sizes, default=0)
        slabs = pinned_slabs(sizes) if is_pinned else iter([None] * len(sizes))
        # unit by unit: what a unit held before is freed before the next one needs room
        self._units = tuple(_at_rest(*_plan(modules, left), slab) for modules, slab in zip(units, slabs, strict=True))

    def __iter__(self) -> Generator[int, None, None]:
        """Yield each unit's number while its layers have their weights on the device."""
        memory = [torch.empty(self.largest_bytes, dtype=torch.uint8, device=self.device) for _ in range(2)]
        copies = _Copies(self.device)
        try:
            for number, unit in enumerate(self._units):
                if number == 0:
                    copies.start(unit, memory[0])
                copies.arrive()
                with unit.at(memory[number % 2]):
                    yield number
                if number + 1 < len(self._units):  # behind what has just been queued: it arrives while that computes
                    copies.start(self._units[number + 1], memory[(number + 1) % 2])
                copies.used()
        finally:
            copies.arrive()  # the memory goes back to the allocator: no copy may still write to it


class _Copies:
    """Copies on a stream of their own, in step with the stream that computes; the host never waits for either."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._side = side_stream(device)
        self._is_free: torch.cuda.Event | None = None
        self.used()

    def start(self, unit: Unit, memory: Tensor) -> None:
        """Copy, once what used `memory` before is over: the unit before the one that computes now."""
        if self._side is None or self._is_free is None:
            unit.copy_to(memory)
            return
        with torch.cuda.stream(self._side):
            self._side.wait_event(self._is_free)
            unit.copy_to(memory)

    def arrive(self) -> None:
        """Let what is queued from here on wait for the copies that were started."""
        if self._side is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._side)

    def used(self) -> None:
        """Say that the present unit's computations are queued."""
        if self._side is not None:
            self._is_free = torch.cuda.current_stream(self._device).record_event()


def side_stream(device: torch.device) -> torch.cuda.Stream | None:
    """Return a stream for copies beside the one that computes; None where all are done in turn."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]


def can_pin(num_bytes: int, device: torch.device) -> bool:
    """Return whether `num_bytes` of weights should be packed into pinned memory: on CUDA, and if that leaves 2 GiB.

    Pinned memory cannot be swapped or dropped: too much of it ends the process, or others.
    """
    if device.type != "cuda":
        return False
    available = free_memory_bytes("cpu")
    return available is None or num_bytes + HOST_RESERVE_BYTES <= available


def pinned_slabs(sizes: Sequence[int]) -> Iterator[Tensor]:
    """Allocate pinned memory as it is asked for: uint8 [size] for each size; ordinary memory where none can be had.

    torch rounds what it pins up to a power of two, which for a block of 351 MB would be half as much again: slabs are
    cut from pieces that are such powers.
    """
    left = sum(sizes)
    piece = torch.empty(0, dtype=torch.uint8)
    for size in sizes:
        if size > len(piece):
            piece = _pinned(piece_bytes(size, left))
        yield piece[:size]
        piece = piece[size:]
        left -= size


def piece_bytes(size: int, left: int) -> int:
    """Return how much to pin at once for `size` bytes now and `left` in all, these included: a power of two.

    The largest that is no more than 2 GiB, nor more than what is left, if `size` fits; else the least that holds it.
    """
    largest = min(1 << max(left.bit_length() - 1, 0), PINNED_BYTES)
    return largest if largest >= size else 1 << max(size - 1, 0).bit_length()


def _pinned(size: int) -> Tensor:
    try:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)
    except RuntimeError:  # the driver has no more, or there is none: copies wait for the host, and are as right
        return torch.empty(size, dtype=torch.uint8)


def _plan(modules: Sequence[nn.Module], left: set[nn.Module]) -> tuple[list[Slot], int]:
    """List what the modules hold, each once, with its place; return how many bytes that is, too."""
    slots: list[Slot] = []
    size = 0
    holders = dict.fromkeys(layer for module in modules for layer in module.modules() if layer not in left)
    for holder in holders:
        for name, tensor in [*holder._parameters.items(), *holder._buffers.items()]:
            if tensor is not None:
                slots.append(Slot(holder, name, tensor.detach(), size))
                size += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    return slots, size


def _at_rest(slots: Sequence[Slot], size: int, slab: Tensor | None) -> Unit:
    """Bring the weights to host memory, into `slab` if it is given, and let the layers have them there."""
    resting = []
    for slot in slots:
        rest = slot.rest.cpu() if slab is None else slot.view(slab).copy_(slot.rest)
        slot.place(rest)
        resting.append(Slot(slot.holder, slot.name, rest, slot.offset))
    return Unit(tuple(resting), size, slab)
