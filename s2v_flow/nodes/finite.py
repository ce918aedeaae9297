"""Whether numbers are finite, found out without making the GPU wait. Imports torch: used inside run()."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor


class FiniteWatch:
    """Watches a tensor per step: one reduction each, whose result is looked at once it has arrived.

    Reading a flag from a GPU at once would wait for everything that was queued before it. The flag is copied to pinned
    memory instead, behind the step's own kernels, and read when the copy is over: usually one step later.
    """

    def __init__(self) -> None:
        self._pending: deque[tuple[int, Tensor, torch.Event | None]] = deque()

    def add(self, step: int, x: Tensor) -> None:
        """Watch the tensor that step `step` ended on; any shape and floating dtype."""
        lowest, highest = torch.aminmax(x.detach())  # one pass that makes no copy; NaN comes through
        flag = torch.isfinite(lowest) & torch.isfinite(highest)
        if not flag.is_cuda:
            self._pending.append((step, flag, None))
            return
        host = torch.empty((), dtype=torch.bool, pin_memory=True)
        host.copy_(flag, non_blocking=True)
        event = torch.Event(flag.device)
        event.record(torch.cuda.current_stream(flag.device))
        self._pending.append((step, host, event))

    def first_bad(self, *, waits: bool = False) -> int | None:
        """Return the first step whose tensor was not finite, as far as is known; `waits`: until all is known."""
        while self._pending:
            step, flag, event = self._pending[0]
            if event is not None and not event.query():
                if not waits:
                    return None
                event.synchronize()
            self._pending.popleft()
            if not bool(flag):
                return step
        return None
