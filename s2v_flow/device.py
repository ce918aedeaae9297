"""Which device a run uses, found out without importing torch."""

from __future__ import annotations

import ctypes
import importlib.util
import re
import sys
from pathlib import Path

from s2v_flow.errors import ExitCode, S2VFlowError

_NAMES = re.compile(r"cpu|mps|cuda(:\d{1,3})?")


def resolve_device(asked: str) -> str:
    """Return torch's name of the device to use.

    Args:
        asked: "auto", "cpu", "cuda", "cuda:N" or "mps".

    Returns:
        What is asked for; for auto an NVIDIA GPU if torch was built for it and the driver sees one, else the CPU.

    Raises:
        S2VFlowError: The name is unknown, or the device is not there.
    """
    if asked == "auto":
        return "cuda" if _cuda_devices() > 0 else "cpu"
    if not _NAMES.fullmatch(asked):
        raise S2VFlowError(
            f"unknown device {asked!r}", fix="use auto, cpu, cuda, cuda:N or mps", exit_code=ExitCode.USAGE
        )
    index = int(asked.partition(":")[2] or 0)
    if asked.startswith("cuda") and index >= _cuda_devices():
        raise S2VFlowError(
            f"there is no device {asked}: torch and the driver see {_cuda_devices()} NVIDIA GPUs",
            fix="use --device cpu, or install a torch build for your GPU",
            exit_code=ExitCode.USAGE,
        )
    if asked == "mps" and sys.platform != "darwin":
        raise S2VFlowError("there is no device mps outside macOS", fix="use --device cpu", exit_code=ExitCode.USAGE)
    return asked


def device_class(device: str) -> str:
    """Return a device's class, "cpu", "cuda" or "mps", without its index."""
    return device.partition(":")[0]


def _cuda_devices() -> int:
    """Count the NVIDIA GPUs that torch could use: its build's version file and the driver are asked, not torch."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        return 0
    version = Path(next(iter(spec.submodule_search_locations))) / "version.py"
    if not version.is_file() or re.search(r"^cuda\b[^=\n]*=\s*None", version.read_text(), re.MULTILINE):
        return 0
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


def free_memory_bytes(device: str, meminfo: Path = Path("/proc/meminfo")) -> int | None:
    """Return how much memory is free where a device computes; None where that is not known without asking a driver."""
    if device_class(device) != "cpu":
        return None
    try:
        match = re.search(r"^MemAvailable:\s+(\d+) kB$", meminfo.read_text(encoding="ascii"), re.MULTILINE)
    except (OSError, ValueError):
        return None
    return None if match is None else int(match[1]) * 1024
