"""How much memory this process has had at most, and on GPUs."""

from __future__ import annotations

import re
import sys
from pathlib import Path

if sys.platform != "win32":
    import resource  # here, not on first use: a process may have no file left to open by then


def peak_memory_bytes(status: Path = Path("/proc/self/status")) -> int:
    """Return the process's peak resident memory in bytes; 0 where the system does not say.

    On Linux by its status, where that can be read: `getrusage` counts what the parent had before exec, too.
    """
    if sys.platform == "win32":
        return 0
    try:
        match = re.search(r"^VmHWM:\s+([0-9]+) kB$", status.read_text(encoding="ascii"), re.MULTILINE)
    except (OSError, ValueError):
        match = None
    if match is not None:
        return 1024 * int(match[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_device_bytes() -> int | None:
    """Return the most that torch has allocated on one GPU so far, without waiting for it; None where it used none."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    return max(int(torch.cuda.max_memory_allocated(index)) for index in range(torch.cuda.device_count()))
