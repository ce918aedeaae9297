"""A CUDA device that computes on the CPU, and refuses what a GPU refuses: what would break on one is found without one.

Inside `pretend_cuda()` torch has a device cuda:0, or one with another number beside those that nothing may use. Its
tensors hold one of the CPU, and every operation on them is computed there, in the thread that entered. The rules are a
GPU's:

- Tensors of two devices do not mix; only pointwise operations take a number that lies on the CPU.
- Where the host waits for the device is counted, and an error under `torch.cuda.set_sync_debug_mode("error")`.
- Streams and the host are ordered by events and waits alone (vector clocks). Memory that is read, written or freed
  without a wait for what another does with it is an error, whatever the numbers happen to be. An event is over for
  the host only once the host has waited: as late as may be.
- Memory is counted as it is allocated, with its peak; past the limit there is torch.OutOfMemoryError.

What it cannot show: kernels, their rounding, workspaces and speed, fragmentation, drivers.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch
from weakref import WeakValueDictionary

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from s2v_flow import machine
from s2v_flow.parallel import peer

CPU = torch.device("cpu")
HOST, DEFAULT = 0, 1  # who works: the host, the device's first stream; others are numbered from 2
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "bincount", "repeat_interleave"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}  # they take indices from the host, and wait
ONE_DTYPE = {"native_layer_norm", "native_group_norm"}  # of input and weights, where a CPU takes two
Clock = Counter[int]  # of each who works, up to where it is known to be over


class WaitedError(RuntimeError):
    """The host waited for the device where that is forbidden."""


class OtherDeviceError(AssertionError):
    """Something is for another device than the one that there is."""


class RaceError(AssertionError):
    """Two use the same memory, and nothing says which is first."""


class Memory:
    """A piece of memory: who has read and written it, and when. `owner`: the stream it was allocated on, or HOST."""

    def __init__(self, device: Device, num_bytes: int, owner: int) -> None:
        self.device, self.num_bytes, self.owner = device, num_bytes, owner
        self.reads, self.writes = Clock(), Clock()

    def use(self, who: int, what: str, *, writes: bool = False) -> None:
        """Note an access, behind all that it must not overtake."""
        clock = self.device.clocks[who]
        for past in (self.writes, self.reads)[: 1 + writes]:
            if any(clock[other] < count for other, count in past.items() if other != who):
                raise RaceError(f"{what} by {who} does not wait for what others do with its memory: {dict(past)}")
        (self.writes if writes else self.reads)[who] = clock[who]

    def __del__(self) -> None:
        if self.owner != HOST:
            self.device.give_back(self)


class Device:
    """The device's state. `attention`: the backends that computed; `waits`: what the host waited for."""

    def __init__(self, limit: int, capability: tuple[int, int], index: int) -> None:
        self.limit = self.total = limit
        self.index, self.current = index, 0  # its number, and the one that "cuda" means at present
        self.capability, self.stream, self.debug_mode = capability, DEFAULT, "default"
        self.allocated = self.peak = self.reserved = 0
        self.has_biased_cudnn = True
        self.waits, self.attention, self.faults = list[str](), list[str](), list[str]()
        self.clocks: dict[int, Clock] = {HOST: Clock(), DEFAULT: Clock()}
        self.blocks: WeakValueDictionary[int, Memory] = WeakValueDictionary()
        self.generators: WeakValueDictionary[int, Generator] = WeakValueDictionary()
        self.pinned: dict[int, tuple[Tensor, Memory]] = {}  # they stay until the end

    def allocate(self, num_bytes: int) -> Memory:
        size = -(-num_bytes // 512) * 512
        if self.allocated + size > self.limit:
            text = f"CUDA out of memory. Tried to allocate {size} bytes; {self.limit - self.allocated} are free"
            raise torch.OutOfMemoryError(text)
        self.allocated += size
        self.peak, self.reserved = max(self.peak, self.allocated), max(self.reserved, self.allocated)
        return Memory(self, size, self.stream)

    def give_back(self, memory: Memory) -> None:
        """Take memory for free: the stream that it was allocated on may use it again at once."""
        self.allocated -= memory.num_bytes
        for other, count in (memory.reads | memory.writes).items():
            if other != memory.owner and self.clocks[memory.owner][other] < count:
                self.faults.append(f"memory of stream {memory.owner} is freed while {other} may use it")

    def is_meant(self, asked: Any) -> bool:
        """Tell whether a device is this one; "cuda" and None: the present one."""
        asked = torch.device(asked).index if isinstance(asked, (str, torch.device)) else asked
        return (self.current if asked is None else asked) == self.index

    def require(self, asked: Any) -> None:
        """Refuse what is for another device."""
        if not self.is_meant(asked):
            raise OtherDeviceError(f"cuda:{self.index} is meant, not {asked} (at present cuda:{self.current})")

    def launch(self) -> None:
        """Begin a piece of work on the present stream, behind all that the host knows."""
        clock = self.clocks[self.stream]
        clock |= self.clocks[HOST]
        clock[self.stream] += 1

    def wait(self, what: str) -> None:
        """Let the host wait for the present stream."""
        self.waits.append(what)
        if self.debug_mode == "error":
            raise WaitedError(f"called a synchronizing CUDA operation: {what}")
        self.clocks[HOST] |= self.clocks[self.stream]

    def synchronize(self, device: object = None) -> None:
        self.require(device)
        for clock in self.clocks.values():
            self.clocks[HOST] |= clock

    def pin(self, tensor: Tensor) -> Tensor:
        self.pinned[address(tensor)] = tensor, Memory(self, 0, HOST)
        return tensor

    def memory(self, tensor: Tensor) -> Memory:
        """Return the record of a tensor's memory; of the host's, pinned memory alone is used beside other work."""
        if isinstance(tensor, DeviceTensor):
            return tensor.memory
        return self.pinned.get(address(tensor), (None, Memory(self, 0, HOST)))[1]

    def choose(self, device: torch.device | int) -> None:
        self.current = device if isinstance(device, int) else device.index

    def reset_peak(self, device: object = None) -> None:
        self.peak = self.allocated if device in (None, self.index) else self.peak

    def figure(self, name: str, device: object = None) -> int:
        """Return one of the allocator's figures: 0 for another device."""
        return getattr(self, name) if self.is_meant(device) else 0

    def empty_cache(self) -> None:
        self.reserved = self.allocated

    def hold_to(self, share: float, device: object = None) -> None:
        self.require(device)
        self.limit = round(share * self.total)


def address(tensor: Tensor) -> int:
    return 0 if tensor.is_meta else tensor.untyped_storage().data_ptr()


class DeviceTensor(Tensor):
    """A tensor on the device: `held` has its numbers, `memory` says who uses them."""

    held: Tensor
    memory: Memory

    @staticmethod
    def __new__(cls, held: Tensor, device: Device) -> DeviceTensor:
        layout = held.size(), held.stride(), held.storage_offset()
        made: DeviceTensor = Tensor._make_wrapper_subclass(
            cls, *layout, dtype=held.dtype, device=torch.device("cuda", device.index)
        )
        size = held.untyped_storage().nbytes()
        memory = device.blocks.get(address(held)) if size else None
        if memory is None:
            memory = device.blocks[address(held)] = device.allocate(size)
        made.held, made.memory = held, memory
        return made

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError("can't convert cuda device type tensor to numpy. Use Tensor.cpu() to copy the tensor first.")

    def __array__(self, *given: Any) -> Any:
        return self.numpy()

    def __repr__(self, **_: Any) -> str:
        return f"DeviceTensor({self.held!r})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Take attention as a whole: torch takes it apart by the device, before anybody is asked."""
        if func is F.scaled_dot_product_attention:
            return attend(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError(f"{func}: the device is another thread's")


@cache
def written_by(func: Any) -> tuple[bool, tuple[tuple[int, str], ...]]:
    """Tell whether an operation is a view, and which of its arguments it writes."""
    marked = [(index, each) for index, each in enumerate(func._schema.arguments) if each.alias_info]
    written = tuple((index, each.name) for index, each in marked if each.alias_info.is_write)
    return bool(marked) and not written, written


def tensors_in(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors_in(value)


def on_cpu(value: Any) -> Any:
    """Return an argument with tensors of the CPU in the place of the device's."""
    if isinstance(value, DeviceTensor):
        return value.held
    if isinstance(value, torch.device):
        return CPU if value.type == "cuda" else value
    return type(value)(map(on_cpu, value)) if type(value) in (list, tuple) else value


class Computing(TorchDispatchMode):
    """Computes every operation on the CPU, by the device's rules."""

    def __init__(self, device: Device) -> None:
        super().__init__()
        self.device = device

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch's compiler is imported

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, device, name = dict(kwargs or {}), self.device, func._schema.name.partition("::")[2]
        given = [*tensors_in(args), *tensors_in(kwargs.values())]
        comes_from_device = any(isinstance(each, DeviceTensor) for each in given)
        target = args[0].device if name == "copy_" else kwargs.get("device")
        is_on_device = comes_from_device if target is None else target.type == "cuda"
        if target is not None and is_on_device:
            device.require(target)
        is_pinned = kwargs.pop("pin_memory", None) and not is_on_device
        is_view, marks = written_by(func)
        written = {id(each) for each in tensors_in(args[at] if at < len(args) else kwargs.get(to) for at, to in marks)}
        is_copy = name in ("copy_", "_to_copy") and isinstance(given[-1], DeviceTensor) != is_on_device
        if comes_from_device or is_on_device:
            if not is_copy:
                self.check(name, func, args, kwargs, given)
            if not is_view:
                device.launch()
            if name in WAITING or (name in INDEXING and any(waits_for(each) for each in given[1:])):
                device.wait(name)
        for each in () if is_view or is_copy else given:
            device.memory(each).use(
                device.stream if isinstance(each, DeviceTensor) else HOST, name, writes=id(each) in written
            )
        options = {key: on_cpu(value) for key, value in kwargs.items()}
        found = (convolve if name == "convolution" else func)(*on_cpu(args), **options)
        inside = {id(each.held): each for each in given if isinstance(each, DeviceTensor)}
        made = self.wrapped(found, inside, name, is_view or is_copy) if is_on_device else found
        if is_pinned:
            device.pin(made)
        if is_copy:
            made = args[0] if name == "copy_" else made
            self.copied(given[-1], made, kwargs.get("non_blocking") or args[2:3] == (True,), is_new=name != "copy_")
        return made

    def copied(self, source: Tensor, into: Tensor, non_blocking: bool, *, is_new: bool) -> None:
        """Order a copy between the devices: the host waits unless it may go on, and its memory is pinned."""
        to_device = isinstance(into, DeviceTensor)
        if non_blocking and is_new and not to_device:
            self.device.pin(into)  # as torch does
        overlaps = non_blocking and address(on_cpu(source if to_device else into)) in self.device.pinned
        if not overlaps and not (non_blocking and to_device):  # what is not pinned is handed over at once
            self.device.wait("a copy to the device" if to_device else "a copy to the host")
        for tensor, writes in ((source, False), (into, True)):
            who = self.device.stream if overlaps or isinstance(tensor, DeviceTensor) else HOST
            self.device.memory(tensor).use(who, "a copy", writes=writes)

    def check(self, name: str, func: Any, args: Any, kwargs: dict[str, Any], given: list[Tensor]) -> None:
        """Refuse what the device refuses."""
        others = [each for each in given if not isinstance(each, DeviceTensor) and not each.is_meta]
        takes_numbers = torch.Tag.pointwise in func.tags and all(each.dim() == 0 for each in others)
        if others and (others[0] is args[0] or not (takes_numbers or name in INDEXING)):
            raise RuntimeError(f"Expected all tensors to be on the same device, but found cuda and cpu! ({name})")
        if func.namespace == "c10d" and not all(each.is_contiguous() for each in given):
            raise RuntimeError(f"Tensors must be contiguous ({name})")
        if "generator" in kwargs and kwargs["generator"]._cdata not in self.device.generators:
            raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
        if name in ONE_DTYPE and len({each.dtype for each in given}) > 1:
            raise RuntimeError(f"expected one scalar type in {name}")
        if name == "_scaled_mm":
            fits = given[0].shape[1] % 16 == given[1].shape[1] % 16 == 0 and given[1].stride(0) == 1
            if self.device.capability < (8, 9) or not fits:
                raise RuntimeError(
                    "_scaled_mm: needs compute capability 8.9, sizes that 16 divides, columns in one piece"
                )

    def wrapped(self, found: Any, inside: dict[int, DeviceTensor], name: str, is_written: bool) -> Any:
        """Return what came out, on the device; what was given is itself again."""
        if isinstance(found, (list, tuple)):
            return type(found)(self.wrapped(each, inside, name, is_written) for each in found)
        if not isinstance(found, Tensor) or id(found) in inside:
            return inside.get(id(found), found)
        made = DeviceTensor(found, self.device)
        if not is_written:
            made.memory.use(self.device.stream, name, writes=True)
        return made


def waits_for(index: Tensor) -> bool:
    return not isinstance(index, DeviceTensor) or index.dtype == torch.bool


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, *more: Any) -> Tensor:
    """Convolve in float32 by the CPU's quick kernels: torch's own choice takes minutes for a few small frames."""
    wide = x.float(), weight.float(), None if bias is None else bias.float()
    return torch.ops.aten.mkldnn_convolution(*wide, padding, stride, more[0], more[-1]).to(x.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, *given: Any, **options: Any) -> Tensor:
    """Compute attention by the CPU's own choice; note which backend of the device would have computed it."""
    device, asked, width = _present[-1], torch.backends.cuda, q.shape[-1]
    has_16_bits = device.capability >= (8, 0) and q.dtype in (torch.float16, torch.bfloat16)
    able = {
        SDPBackend.FLASH_ATTENTION: asked.flash_sdp_enabled() and has_16_bits and attn_mask is None and width <= 256,
        SDPBackend.CUDNN_ATTENTION: asked.cudnn_sdp_enabled() and has_16_bits and width <= 128,
        SDPBackend.EFFICIENT_ATTENTION: asked.mem_efficient_sdp_enabled(),
        SDPBackend.MATH: asked.math_sdp_enabled(),
    }
    chosen = next((each for each in map(SDPBackend, torch._C._get_sdp_priority_order()) if able.get(each)), None)
    if chosen is None:
        raise RuntimeError("No available kernel. Aborting execution.")
    if chosen == SDPBackend.CUDNN_ATTENTION and attn_mask is not None and not device.has_biased_cudnn:
        raise RuntimeError("cuDNN Frontend error: No valid execution plans built.")
    device.attention.append(chosen.name.partition("_")[0].lower())
    tensors = [each for each in (q, k, v, attn_mask) if each is not None]
    if not all(isinstance(each, DeviceTensor) for each in tensors):
        raise RuntimeError("Expected all tensors to be on the same device (attention)")
    device.launch()
    for each in tensors:
        device.memory(each).use(device.stream, "attention")
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
        made = DeviceTensor(F.scaled_dot_product_attention(*map(on_cpu, tensors), *given, **options), device)
    made.memory.use(device.stream, "attention", writes=True)
    return made


class Event:
    """A point in a stream."""

    def __init__(self, device: object = None, **_: Any) -> None:
        self.clock = Clock()

    def record(self, stream: Stream | None = None) -> None:
        self.clock = Clock(_present[-1].clocks[(stream or current_stream()).number])

    def query(self) -> bool:
        return self.clock <= _present[-1].clocks[HOST]

    def synchronize(self) -> None:
        _present[-1].clocks[HOST] |= self.clock


class Stream:
    """A stream of the device."""

    def __init__(self, device: object = None, *, number: int | None = None) -> None:
        if number is None:
            _present[-1].require(device)
        self.number = len(_present[-1].clocks) if number is None else number
        _present[-1].clocks.setdefault(self.number, Clock())

    def record_event(self) -> Event:
        event = Event()
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        _present[-1].clocks[self.number] |= event.clock

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(other.record_event())


def current_stream(device: object = None) -> Stream:
    _present[-1].require(device)
    return Stream(number=_present[-1].stream)


@contextmanager
def on_stream(stream: Stream | None) -> Iterator[None]:
    before = _present[-1].stream
    _present[-1].stream = before if stream is None else stream.number
    try:
        yield
    finally:
        _present[-1].stream = before


class Generator(torch.Generator):
    """A generator on the CPU, or on the device: its numbers are then the CPU's of the same seed."""

    def __new__(cls, device: torch.device | str = "cpu") -> Generator:
        made = super().__new__(cls, "cpu")
        if torch.device(device).type == "cuda":
            _present[-1].generators[made._cdata] = made  # torch hands over another object of the same address
        return made


def set_data(self: Tensor, value: Tensor) -> None:
    """Let a tensor have another's numbers, wherever they are, as `tensor.data = value` does."""
    if not (isinstance(self, DeviceTensor) or isinstance(value, DeviceTensor)):
        torch._C.TensorBase.data.__set__(self, value)
        return
    other = nn.Parameter(value.detach(), requires_grad=False) if isinstance(self, nn.Parameter) else value.detach()
    self.__class__, other.__class__ = other.__class__, self.__class__
    self.__dict__, other.__dict__ = other.__dict__, self.__dict__
    torch._C._swap_tensor_impl(self, other)


def guard_device() -> None:
    """Give torch the guard of CUDA devices that does nothing, as FakeTensorMode does where torch knows of CUDA.

    A build for the CPU alone has none at all: a guard of no devices takes the place, for torch to put its own there.
    """
    library = ctypes.CDLL(f"{torch.__path__[0]}/lib/libc10.so")
    guards = (ctypes.c_void_p * 2).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    if not guards[1]:
        method = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)(lambda _: 0)  # how many devices there are
        methods = (ctypes.c_void_p * 32)(*[ctypes.cast(method, ctypes.c_void_p).value] * 32)
        guard = (ctypes.c_void_p * 1)(ctypes.addressof(methods))
        guards[1] = ctypes.addressof(guard)
    torch._C._ensureCUDADeviceGuardSet()


def meet_over_gloo(meet: Any, name: str, *, device_id: torch.device | None = None, **options: Any) -> None:
    """Let processes that would meet over NCCL, too, send all of it over gloo."""
    assert (name, device_id) == ("cpu:gloo,cuda:nccl", torch.device("cuda", _present[-1].index))
    meet("gloo", **options)


_present: list[Device] = []


@contextmanager
def pretend_cuda(limit: int = 2**34, capability: tuple[int, int] = (9, 0), index: int = 0) -> Iterator[Device]:
    """Let torch have one GPU of `limit` bytes inside, with a number that may be another than 0.

    Raises:
        RaceError: At the end: memory was freed while another stream might use it.
    """
    guard_device()
    device = Device(limit, capability, index)
    facts = {"name": "pretended", "total_memory": limit, "major": capability[0], "minor": capability[1]}
    changes: list[tuple[Any, dict[str, Any]]] = [
        (torch.cuda, {
            "is_available": lambda: True, "is_initialized": lambda: True, "_lazy_init": lambda: None,
            "device_count": lambda: index + 1, "current_device": lambda: device.current, "set_device": device.choose,
            "get_device_name": lambda *_: "pretended", "get_device_capability": lambda *_: capability,
            "get_device_properties": lambda *_: SimpleNamespace(multi_processor_count=1, **facts),
            "mem_get_info": lambda of=None: (limit - device.figure("reserved", of), limit),
            "memory_reserved": partial(device.figure, "reserved"),
            "memory_allocated": partial(device.figure, "allocated"),
            "max_memory_allocated": partial(device.figure, "peak"),
            "reset_peak_memory_stats": device.reset_peak, "empty_cache": device.empty_cache,
            "set_per_process_memory_fraction": device.hold_to, "synchronize": device.synchronize,
            "set_sync_debug_mode": partial(setattr, device, "debug_mode"),
            "Stream": Stream, "Event": Event, "stream": on_stream, "current_stream": current_stream,
        }),
        (torch, {"Event": type("Event", (Event,), {}), "Generator": Generator}),
        (dist, {"init_process_group": partial(meet_over_gloo, dist.init_process_group)}),
        (Tensor, {"data": property(Tensor.detach, set_data)}),
    ]  # fmt: skip
    for name, value in (("num_gpus", lambda: index + 1), ("compute_capability", lambda _: capability)):
        known = getattr(machine, name)
        changes += [(module, {name: value}) for module in sys.modules.values() if vars(module).get(name) is known]
    with ExitStack() as stack:
        for owner, values in changes:
            stack.enter_context(patch.multiple(owner, **values))
        _present.append(device)
        stack.callback(_present.pop)
        stack.enter_context(torch.backends.cudnn.flags(enabled=True))
        torch._C._set_only_lift_cpu_tensors(True)
        stack.callback(torch._C._set_only_lift_cpu_tensors, False)
        with Computing(device):
            yield device
        gc.collect()
        if device.faults:
            raise RaceError("; ".join(device.faults))


def serve_on_pretended(rank: int, size: int, device: str, folder: Path) -> None:
    """Be a rank with a GPU of its own, in the place of `parallel.peer.serve`."""
    with pretend_cuda(index=rank):
        peer.serve(rank, size, device, folder)
