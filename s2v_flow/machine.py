"""This machine: the device a run uses, memory free and used, found out without torch; how fast it computes."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from s2v_flow.errors import UsageError

if sys.platform != "win32":
    import resource  # here, not on first use: a process may have no file left to open by then


def _found(pattern: str, path: Path) -> str | None:
    """Return the group of a pattern in a file of the system; None where that is not there, or cannot be read."""
    with suppress(OSError):
        match = re.search(pattern, path.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
        return match and match[1]
    return None


def peak_memory_bytes(status: Path = Path("/proc/self/status")) -> int:
    """Return the process's peak resident memory in bytes; 0 where the system does not say.

    On Linux by its status, where that can be read: `getrusage` counts what the parent had before exec, too.
    """
    if sys.platform == "win32":
        return 0
    if peak_kb := _found(r"^VmHWM:\s+([0-9]+) kB$", status):
        return 1024 * int(peak_kb)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def trim_heap() -> None:
    """Give memory that was freed back to the system, where the C library would keep it (Linux's)."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def forget_peaks(clear: Path = Path("/proc/self/clear_refs")) -> None:
    """Let the process's and the GPUs' peak memory count from now on, where the system can do that (Linux)."""
    with suppress(OSError):
        clear.write_text("5", encoding="ascii")
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        for index in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(index)


def peak_device_bytes() -> int | None:
    """Return the most that torch has allocated on one GPU, without waiting for it; None where it used none."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    return max(int(torch.cuda.max_memory_allocated(index)) for index in range(torch.cuda.device_count()))


_NAMES = re.compile(r"cpu|cuda(:(0|[1-9]\d{0,2}))?")
_VISIBLE = ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES")


def resolve_device(asked: str) -> str:
    """Return torch's name of the device to use: what is asked for, "cpu", "cuda" (AMD's GPUs, too) or "cuda:N".

    For "auto" it is a GPU if torch was built for it and the driver sees one, else the CPU.

    Raises:
        S2VFlowError: The name is unknown, or the device is not there.
    """
    if asked == "auto":
        return "cuda" if num_gpus() > 0 else "cpu"
    if asked.partition(":")[0] == "mps":
        message = "Apple GPUs (mps) are not supported yet: nobody has run the models there, which need float64 and fp8"
        raise UsageError(message, "use --device cpu")
    if not _NAMES.fullmatch(asked):
        raise UsageError(f"unknown device {asked!r}", "use auto, cpu, cuda or cuda:N")
    index = int(asked.partition(":")[2] or 0)
    if asked.startswith("cuda") and index >= (count := num_gpus()):
        text = f"there is no device {asked}: torch and the driver see {count} GPU{'' if count == 1 else 's'}"
        fix = f"use --device cuda:{count - 1}" if count else "use --device cpu, or install a torch build for your GPU"
        raise UsageError(text, fix)
    return asked


def device_class(device: str) -> str:
    """Return a device's class, "cpu" or "cuda", without its index."""
    return device.partition(":")[0]


def num_gpus() -> int:
    """Count the GPUs that torch could use: its build's version file and the driver are asked, not torch."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        return 0
    version = Path(next(iter(spec.submodule_search_locations))) / "version.py"
    built_for = gpu_build(version.read_text(encoding="utf-8")) if version.is_file() else None
    if built_for == "rocm":
        return _amd_gpus()
    return _nvidia_gpus() if built_for == "cuda" else 0


def gpu_build(version: str) -> str | None:
    """Tell for which GPUs torch was built, by its version file's text: "cuda", "rocm" or None."""
    for name, value in re.findall(r"^(cuda|hip)\b[^=\n]*=\s*(.+)$", version, re.MULTILINE):
        if value.strip() != "None":
            return "rocm" if name == "hip" else "cuda"
    return None


def _nvidia_gpus() -> int:
    driver, count = _nvidia_driver(), ctypes.c_int(0)
    return count.value if driver is not None and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 else 0


def _nvidia_driver() -> Any:
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None
    return driver if driver.cuInit(0) == 0 else None


def compute_capability(device: str) -> tuple[int, int] | None:
    """Return an NVIDIA GPU's compute capability, as its driver says; None for other devices."""
    driver = None if device_class(device) == "cpu" else _nvidia_driver()
    if driver is None:
        return None
    handle, value = ctypes.c_int(0), ctypes.c_int(0)
    if driver.cuDeviceGet(ctypes.byref(handle), int(device.partition(":")[2] or 0)) != 0:
        return None
    found = []
    for attribute in (75, 76):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
        if driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, handle) != 0:
            return None
        found.append(value.value)
    return found[0], found[1]


@cache
def cpu_bf16_units(cpuinfo: Path = Path("/proc/cpuinfo")) -> tuple[str, ...]:
    """Return the CPU's units for bfloat16, as Linux calls them: of amx_bf16, avx512_bf16."""
    flags = (_found(r"^flags\s*:(.*)$", cpuinfo) or "").split()
    return tuple(name for name in ("amx_bf16", "avx512_bf16") if name in flags)


def _amd_gpus(topology: Path = Path("/sys/class/kfd/kfd/topology/nodes")) -> int:
    """Count the kernel driver's nodes that have vector units; the CPU's have none."""
    count = sum(int(_found(r"^simd_count (\d+)$", each) or 0) > 0 for each in topology.glob("*/properties"))
    for name in _VISIBLE:
        if name in os.environ:
            count = min(count, len([item for item in os.environ[name].split(",") if item.strip()]))
    return count


@cache
def hardware(device: str, root: Path = Path("/proc")) -> str:
    """Name what computes, not whose it is: the GPUs as their driver calls them, or the CPU and how many of it."""
    files = root.glob("driver/nvidia/gpus/*/information") if device_class(device) != "cpu" else [root / "cpuinfo"]
    names: set[str] = set()
    for file in files:
        with suppress(OSError, ValueError):
            names |= set(re.findall(r"^(?:model name|Model)\s*:\s*(.+)$", file.read_text(encoding="utf-8"), re.M))
    count = f" x {os.cpu_count()}" if device_class(device) == "cpu" else ""
    return (", ".join(sorted(names)) or f"{platform.machine()} {device_class(device)}") + count


def free_memory_bytes(
    device: str, meminfo: Path = Path("/proc/meminfo"), groups: Path = Path("/sys/fs/cgroup")
) -> int | None:
    """Return how much memory is free where a device computes; None where that is not known without asking a driver.

    On Linux, of the machine, or of the control groups that the process is in: a container's, a Slurm job's.
    """
    if device_class(device) != "cpu":
        return None
    free_kb = _found(r"^MemAvailable:\s+(\d+) kB$", meminfo)
    return None if free_kb is None else min([int(free_kb) * 1024, *_free_in_groups(meminfo.parent, groups)])


def _free_in_groups(proc: Path, root: Path) -> Iterator[int]:
    """Yield what each control group, of either version, has left of its limit; file caches count as free."""
    version_2 = ("memory.max", "memory.current", "inactive_file")
    version_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    with suppress(OSError, ValueError):
        for line in (proc / "self" / "cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers not in ("", "memory"):
                continue
            limit, used, cached = version_1 if controllers else version_2
            group = root / controllers / path.strip("/")
            for folder in (group, *group.parents):
                with suppress(OSError, ValueError):  # no limit, or not to be seen in a container
                    left = int((folder / limit).read_text("ascii")) - int((folder / used).read_text("ascii"))
                    yield max(left + int(_found(rf"^{cached} (\d+)$", folder / "memory.stat") or 0), 0)
                if folder == root / controllers:
                    break


_SECONDS = 0.3  # for which each part is measured


def measure(device: str, item_bytes: int) -> dict[str, float]:
    """Measure what a model's arithmetic is made of, each alone, of sizes at which a device is busy. Imports torch.

    Returns FLOP a second in "matrices", "attention" and "convolutions"; `item_bytes`: 4 for float32, 2 for bfloat16.
    """
    import torch
    import torch.nn.functional as F

    rows, tokens, side = (8192, 8192, 256) if device != "cpu" else (512, 1024, 16)
    options: Any = {"device": device, "dtype": torch.float32 if item_bytes == 4 else torch.bfloat16}
    x, weight = torch.randn(rows, 4096, **options), torch.randn(4096, 4096, **options)
    heads = torch.randn(1, 16, tokens, 128, **options)
    clip = torch.randn(1, 96, 4, side, side, **options)
    kernel = torch.randn(96, 96, 3, 3, 3, **options)
    with torch.inference_mode():
        attention = _per_second(lambda: F.scaled_dot_product_attention(heads, heads, heads))
        return {
            "matrices": 2 * rows * 4096**2 * _per_second(lambda: F.linear(x, weight)),
            "attention": 4 * tokens**2 * 2048 * attention,
            "convolutions": 2 * 27 * 96**2 * 4 * side**2 * _per_second(lambda: F.conv3d(clip, kernel, padding=1)),
        }


def _per_second(work: Callable[[], Any]) -> float:
    """Count how often something is computed in a second; what it gives is waited for."""
    work()[..., :1].sum().item()
    count, started = 0, time.monotonic()
    while time.monotonic() - started < _SECONDS:
        work()[..., :1].sum().item()
        count += 1
    return count / (time.monotonic() - started)
