"""A rank other than the first: a process that does as it is told, and writes nothing but its own log."""

from __future__ import annotations

import multiprocessing
import os
import threading
from multiprocessing.connection import wait
from pathlib import Path


def serve(rank: int, size: int, device: str, folder: Path) -> None:
    """Take part until something fails, or the first rank is gone; see `Rank`."""
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    descriptor = os.open(log_path(folder, rank), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for number in (1, 2):
        os.dup2(descriptor, number)
    from s2v_flow.parallel.rank import Rank

    member = Rank(rank, size, device, folder)
    member.meet()
    member.serve()


def log_path(folder: Path, rank: int) -> Path:
    """Return where a rank's process writes what it would print."""
    return folder / f"rank-{rank}.log"


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
    os._exit(1)
