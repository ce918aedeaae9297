"""The first rank's side: it starts the others, tells them what it does itself, and ends with them."""

from __future__ import annotations

import itertools
import multiprocessing
import shutil
import signal
import tempfile
import threading
import weakref
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast

import torch
from torch import Tensor

from s2v_flow.errors import ExitCode, S2VFlowError
from s2v_flow.files.atomic import reap, temporary_prefix
from s2v_flow.models.conditioning import Branch, PreparedChunk
from s2v_flow.models.load import LoadedDit
from s2v_flow.nodes.shortage import memory_failure
from s2v_flow.parallel.layout import rank_device
from s2v_flow.parallel.peer import log_path, serve
from s2v_flow.parallel.rank import Held, Rank

if TYPE_CHECKING:
    from s2v_flow.models.dit import WanS2V

_KEPT = "every chunk that was finished"
_LOST_SECONDS = 10.0  # how long it may take to see which process an error of communication is from


class Team:
    """The ranks of one run. Close it in any case.

    `size`: at least 2; `device`: "cpu", or "cuda" for a GPU each.
    """

    def __init__(self, size: int, device: str) -> None:
        self._size, self._device = size, device
        reap(Path(tempfile.gettempdir()))  # of runs that were killed
        self._folder = Path(tempfile.mkdtemp(prefix=f"{temporary_prefix()}ranks-"))
        self._held: dict[int, weakref.ref[Any]] = {}  # what the other ranks hold too
        self._count = itertools.count()
        self._is_closing = False
        self._is_lost = threading.Event()
        self._unmet: RuntimeError | None = None
        self._codes: dict[int, int] = {}  # exit codes, by rank, of those that left first
        self._processes: list[SpawnProcess] = []
        self._rank = Rank(0, size, device, self._folder)
        self.traffic = self._rank.traffic

    def start(self) -> None:
        """Start the processes, and wait until all have met.

        Raises:
            S2VFlowError: One has left, or they cannot reach each other.
        """
        context = multiprocessing.get_context("spawn")
        signals = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1}
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # inherited: the first rank alone stops the run
        try:
            for rank in range(1, self._size):
                process = context.Process(
                    target=serve, args=(rank, self._size, self._device, self._folder), daemon=True
                )
                process.start()
                self._processes.append(process)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        threading.Thread(target=self._watch, daemon=True).start()
        meeting = threading.Thread(target=self._meet, daemon=True)  # nothing ends it if a rank is lost meanwhile
        meeting.start()
        while meeting.is_alive() and not self._is_lost.is_set():
            meeting.join(0.05)
        if self._is_lost.is_set() or self._unmet:
            self._fail(self._unmet or EOFError())

    def load_dit(self, path: Path, **options: Any) -> LoadedDit:
        """Load a diffusion model on every rank; see `models.load.load_dit`."""
        loaded: LoadedDit = self.call("load", path, **options)
        return replace(loaded, module=cast("WanS2V", SharedDit(self, loaded)))

    def call(self, method: str, *given: Any, local: dict[str, Any] | None = None, **options: Any) -> Any:
        """Call a method of `Rank` on every rank, and return what it returns here; `local` is for this one alone.

        Raises:
            S2VFlowError: Another rank was lost, or failed; or this one failed where the others cannot go on.
        """
        gone, number = [name for name, ref in self._held.items() if ref() is None], next(self._count)
        for name in gone:
            del self._held[name]
        try:
            self._rank.tell(
                number, gone, method, [*map(self._sent, given)], {name: self._sent(it) for name, it in options.items()}
            )
            value = getattr(self._rank, method)(*given, **options, **(local or {}))
        except (MemoryError, RuntimeError) as error:
            if method != "forward" and memory_failure(error):
                raise  # there may be another way, and the others can take it, too
            self._fail(error)
        if self._is_lost.is_set():  # over NCCL that ends a forward pass with any numbers
            self._fail(EOFError())
        if method != "forward" and value is not None:
            self._held[number] = weakref.ref(value)
        return value

    def close(self) -> None:
        """End the other ranks, which have nothing to finish, and the communication."""
        self._is_closing = True
        for process in self._processes:
            process.kill()
            process.join()
        self._rank.leave()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _meet(self) -> None:
        try:
            self._rank.meet()
        except RuntimeError as error:
            self._unmet = error

    def _sent(self, value: Any) -> Any:
        """Return what stands for a value in a message."""
        held = next((Held(number) for number, ref in self._held.items() if ref() is value), None)
        return held or (value.cpu() if isinstance(value, Tensor) else value)

    def _watch(self) -> None:
        """End all ranks with the first one that leaves, so that none waits for it; note which that was."""
        ended = wait([process.sentinel for process in self._processes])
        if self._is_closing:
            return
        for rank, process in enumerate(self._processes, 1):
            if process.sentinel in ended:
                process.join()  # its files are closed a moment before it has an exit code
                self._codes[rank] = process.exitcode or 0
        for process in self._processes:
            process.kill()
        self._is_lost.set()
        self._rank.abandon()

    def _fail(self, error: BaseException) -> NoReturn:
        """Raise what is to be told of an error in a call: memory ran out, or a rank left; no more can be called."""
        failure = memory_failure(error)
        if failure is None and not self._is_lost.wait(_LOST_SECONDS):
            if error is self._unmet:
                text = f"--gpus {self._size}: the processes cannot meet: {str(error).strip()}"
                raise S2VFlowError(text, "one GPU; NCCL_DEBUG=WARN in the environment says more")
            raise error
        logs = {rank: log_path(self._folder, rank).read_text("utf-8", "replace") for rank in self._codes}
        logs |= {0: failure} if failure else {}
        said = []
        for rank, text in logs.items():
            where = f"rank {rank} ({rank_device(self._device, rank)})"
            last = text.strip().rpartition("\n")[2]
            if memory_failure(RuntimeError(text)):
                fix = "a smaller width and height, a shorter length, or placement: streamed in the model's node"
                text = f"out of memory on {where}: {last}"
                raise S2VFlowError(text, fix, _KEPT, exit_code=ExitCode.OUT_OF_MEMORY)
            code = self._codes[rank]
            said.append(f"{where} was killed by {signal.Signals(-code).name}" if code < 0 else f"{where}: {last}")
        fix = "the same command goes on, with any number of --gpus"
        raise S2VFlowError(f"--gpus {self._size}: {'; '.join(said)}", fix, _KEPT)


class SharedDit:
    """A diffusion model on all ranks, with what sampling calls of the one here, a `WanS2V`."""

    def __init__(self, team: Team, loaded: LoadedDit) -> None:
        self._team, self._loaded, self.module, self.attention = team, loaded, loaded.module, loaded.module.attention
        self.prepare_text, self.prepare_audio, self.prepare_chunk = (
            partial(team.call, "use", loaded, f"prepare_{what}") for what in ("text", "audio", "chunk")
        )

    @property
    def is_streamed(self) -> bool:
        """See `WanS2V`."""
        return self.module.is_streamed

    def stream_weights(self, device: torch.device | str) -> None:
        """See `WanS2V`; every rank streams to its own device."""
        self._team.call("use", self._loaded, "stream_weights", device=device)

    def __call__(self, x: Tensor, timestep: Tensor, chunk: PreparedChunk, branches: Sequence[Branch]) -> list[Tensor]:
        """See `WanS2V.forward`."""
        parts = [part for branch in branches for part in (branch.text, branch.audio)]
        local = {"x": x, "time": timestep}
        velocities: list[Tensor] = self._team.call("forward", self._loaded, self.attention, chunk, *parts, local=local)
        return velocities
