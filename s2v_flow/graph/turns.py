"""Who computes what among several runs: one run per result, one run per GPU. Locks save work; the store is right."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from s2v_flow.files.lock import gpu_lock_path, turn
from s2v_flow.graph.events import Listener, Noted
from s2v_flow.graph.interrupt import ShouldStop, StoppedError, exit_code_of


@contextmanager
def node_turn(
    root: Path,
    key: str,
    node: str,
    emit: Listener,
    should_stop: ShouldStop,
    on_failure: Callable[[str], None] = lambda reason: None,
) -> Iterator[None]:
    """Wait, and say so, while another process computes the same result; afterwards it may be stored.

    `on_failure` is called with the reason where nothing can be locked.
    """

    def tell(holder: str) -> None:
        emit(Noted(node, f"waits for another run that computes the same ({holder})"))

    with turn(root / "locks" / key, f"node {node}", tell, _stopper(f"waiting for {node}", should_stop), on_failure):
        yield


@contextmanager
def gpu_turn(device: str, emit: Listener, should_stop: ShouldStop, *, is_needed: bool) -> Iterator[None]:
    """Wait, and say so, while another run of this user holds the GPU: two at once would run each other out of memory.

    Of devices other than GPUs nothing is locked. `is_needed`: whether the GPU will be used, and not shared.
    """
    if not is_needed or not device.startswith("cuda"):
        yield
        return

    def tell(holder: str) -> None:
        emit(Noted("", f"waits for {device}, which another run holds ({holder}); --share-gpu runs beside it"))

    def warn(reason: str) -> None:
        path = gpu_lock_path(device)
        text = f"{device} cannot be locked ({path}: {reason}): another run may use it at the same time"
        emit(Noted("", text, is_warning=True))

    with turn(gpu_lock_path(device), f"a run on {device}", tell, _stopper(f"waiting for {device}", should_stop), warn):
        yield


def _stopper(where: str, should_stop: ShouldStop) -> Callable[[], None]:
    def check() -> None:
        if should_stop():
            raise StoppedError(where, exit_code_of(should_stop))

    return check
