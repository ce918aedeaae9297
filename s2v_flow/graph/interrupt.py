"""Stopping a run, at the end of the step that is running or at once; and waiting for another, until a stop.

A signal's first arrival asks for a stop. Where work is being done in steps, it is taken up at the end of the running
step, after a resume point; anywhere else, and at the second arrival, the program leaves at once. Nothing stored is lost
either way.

One run computes a result, one run uses a GPU: locks save work; the store is right without them.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import FrameType

from s2v_flow.errors import ExitCode
from s2v_flow.files.lock import gpu_lock_path, turn
from s2v_flow.graph.events import Listener, Noted

EXIT_CODES = {
    "SIGINT": ExitCode.INTERRUPTED,
    "SIGTERM": ExitCode.TERMINATED,
    "SIGHUP": ExitCode.TERMINATED,
    "SIGUSR1": ExitCode.CHECKPOINTED,
}
WORDS = {
    ExitCode.INTERRUPTED: "interrupted",
    ExitCode.TERMINATED: "terminated",
    ExitCode.CHECKPOINTED: "stopped as asked",
}


class StoppedError(BaseException):
    """A stop was requested. Like KeyboardInterrupt, it is not to be caught on the way.

    Attributes:
        where: What the run had come to ("talk[2] at step 3 of 20, resume point written"), or empty.
        exit_code: 130, 143 or 75, by what asked.
        lost: The plan nodes that were finished and could not be stored.
    """

    lost: tuple[str, ...] = ()

    def __init__(self, where: str = "", exit_code: ExitCode = ExitCode.INTERRUPTED) -> None:
        super().__init__(where)
        self.where = where
        self.exit_code = exit_code

    def __str__(self) -> str:
        at = f": {self.where}" if self.where else ""
        but = f" (except {', '.join(self.lost)}: the cache could not be written)" if self.lost else ""
        return f"{WORDS[self.exit_code]}{at}; what was finished is stored{but}, and the same command goes on from there"


ShouldStop = Callable[[], bool]


class StopRequest:
    """What the signals' handlers set and a run asks: a callable `should_stop`, and how patient it is.

    `tell`: called inside a signal handler with a line of text, when a first signal has to wait for a step's end.
    """

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self._depth = 0
        self._exit_code: ExitCode | None = None

    def __call__(self) -> bool:
        """Tell whether a stop was asked for."""
        return self._exit_code is not None

    @property
    def exit_code(self) -> ExitCode:
        """The exit code of the request."""
        return self._exit_code or ExitCode.INTERRUPTED

    def install(self) -> None:
        """Handle the signals from now on; only a program's main thread may do that. What nohup ignores stays so."""
        for name in EXIT_CODES:
            number = getattr(signal, name, None)  # Windows has no SIGUSR1
            if number is not None and (name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN):
                signal.signal(number, self.handle)

    def ignore(self) -> None:
        """Let nothing more interrupt a program that is leaving."""
        for name in EXIT_CODES:
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), signal.SIG_IGN)

    @contextmanager
    def patiently(self) -> Iterator[None]:
        """Let a first signal wait for the end of a step, inside this block."""
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Take a signal.

        Raises:
            StoppedError: It has not to wait. SIGINT raises it too: where KeyboardInterrupt passes through `exec` of
                text, CPython notes it as not handled, and leaves with the signal instead of the exit code.
        """
        name = signal.Signals(number).name
        is_first, self._exit_code = self._exit_code is None, EXIT_CODES[name]
        if is_first and self._depth:
            again = "Ctrl-C" if name == "SIGINT" else name
            self._tell(f"\nstopping at the end of this step, with a resume point; {again} again stops at once\n")
            return
        raise StoppedError(exit_code=EXIT_CODES[name])


def patience(should_stop: ShouldStop) -> AbstractContextManager[None]:
    """Return a block in which a first signal waits until `should_stop` is asked."""
    return should_stop.patiently() if isinstance(should_stop, StopRequest) else nullcontext()


def never() -> bool:
    """Go on."""
    return False


def exit_code_of(should_stop: ShouldStop) -> ExitCode:
    """Return the exit code for a stop that `should_stop` asked for."""
    return should_stop.exit_code if isinstance(should_stop, StopRequest) else ExitCode.INTERRUPTED


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
