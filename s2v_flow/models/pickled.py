"""Have a pickle opened by a process that can do little harm, and believe nothing that it says without looking.

What that process may do is bounded before it looks at the file: memory, time, the size of what it writes. It has an
empty environment, an empty folder, no input, and, where the kernel lets a process give it up, no network. It could
still read the user's other files: what stands before that is PyTorch's restricted unpickler, which runs nothing.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

from s2v_flow.errors import CheckpointError, ExitCode, MissingError, RefusedError, S2VFlowError
from s2v_flow.weights.tensor_stream import Progress

_MAX_LINE = 1 << 16
_LAST_WORDS = 2000  # bytes of what a crashed process wrote
_CODE = "import sys; sys.path.append(sys.argv.pop()); from s2v_flow.models.unpickle import main; main()"
_FIX = "do not use this file unless you know where it comes from; if you do, report this"


@dataclass(frozen=True)
class Limits:
    """What the process may use: memory beyond PyTorch's own, CPU and wall-clock seconds, bytes in the result."""

    memory_bytes: int
    cpu_seconds: int
    wall_seconds: int
    file_bytes: int

    @classmethod
    def for_size(cls, num_bytes: int) -> Limits:
        """Return limits that an honest file of this size keeps: read at 5 MB/s, written in float32, twice in memory."""
        return cls(
            memory_bytes=2 * num_bytes + 4 * 2**30,
            cpu_seconds=120 + num_bytes // (20 * 2**20),
            wall_seconds=300 + num_bytes // (5 * 2**20),
            file_bytes=4 * num_bytes + 64 * 2**20,
        )


@dataclass(frozen=True)
class Order:
    """What is to be made of a pickle: the kind it must have, the dtype, texts for the header, the tokenizer's file."""

    kind: str = "auto"
    dtype: str = "keep"
    metadata: Mapping[str, str] | None = None
    tokenizer: Path | None = None


@dataclass(frozen=True)
class Outcome:
    """What the process says of its work; what it made has to be looked at."""

    is_offline: bool
    num_left_out: int


def convert_pickle(
    source: Path, target: BinaryIO, order: Order, on_progress: Progress, limits: Limits | None = None
) -> Outcome:
    """Let a process of its own make a safetensors file of a pickle.

    Args:
        source: The pickle.
        target: An empty file; on success it holds what the process calls a safetensors file.
        order: What is to be made.
        on_progress: Called with the bytes that are written, and all.
        limits: What the process may use; unless given, by the source's size.

    Raises:
        MissingError: The source or the tokenizer cannot be read.
        RefusedError: The source holds more than tensors, or more than a limit; or this system has no limits.
        S2VFlowError: Whatever the process found wrong with it.
    """
    if sys.platform == "win32":
        raise RefusedError(
            f"{source}: is a pickle, and Windows cannot limit the process that would open it",
            fix="convert it on Linux or macOS, or in WSL",
        )
    with ExitStack() as stack:
        read = stack.enter_context(_readable(source))
        spelling = None if order.tokenizer is None else stack.enter_context(_readable(order.tokenizer))
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="s2vflow-")))
        num_bytes = os.fstat(read.fileno()).st_size
        limits = limits or Limits.for_size(num_bytes)
        job = {
            "source_fd": read.fileno(),
            "target_fd": target.fileno(),
            "tokenizer_fd": None if spelling is None else spelling.fileno(),
            "num_bytes": num_bytes,
            "kind": order.kind,
            "dtype": order.dtype,
            "metadata": dict(order.metadata or {}),
            "limits": asdict(limits),
        }
        files = [file.fileno() for file in (read, target, spelling) if file is not None]
        said = stack.enter_context(tempfile.TemporaryFile())
        process = subprocess.Popen(
            [sys.executable, "-I", "-B", "-c", _CODE, json.dumps(job), str(Path(__file__).parents[2])],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=said,
            pass_fds=files,
            env={},
            cwd=scratch,
            start_new_session=True,
        )
        try:
            return _follow(source, process, on_progress, limits, said)
        finally:
            _end(process)


@contextmanager
def _readable(path: Path) -> Iterator[BinaryIO]:
    try:
        file = open(path, "rb")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise MissingError(f"{path}: cannot be read: {error.strerror}") from error
    with file:
        yield file


def _follow(
    source: Path, process: subprocess.Popen[bytes], on_progress: Progress, limits: Limits, said: BinaryIO
) -> Outcome:
    """Listen to the process until it has said how it went."""
    try:
        for line in _lines(process, time.monotonic() + limits.wall_seconds):
            message = json.loads(line)
            if "ok" in message:
                made = message["ok"]
                return Outcome(bool(made["is_offline"]), int(made["num_left_out"]))
            if "error" in message:
                raise _error(source, message["error"])
            on_progress(int(message["done"]), int(message["total"]))
    except TimeoutError as error:
        what = f"{source}: opening it takes longer than {limits.wall_seconds} s, so it was stopped"
        raise RefusedError(what, fix=_FIX) from error
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise RefusedError(
            f"{source}: the process that opened it said something odd, so it was stopped", _FIX
        ) from error
    raise _crash(source, process, said)


def _lines(process: subprocess.Popen[bytes], deadline: float) -> Iterator[bytes]:
    """Yield what the process says, line by line.

    Raises:
        TimeoutError: It did not end in time.
        ValueError: A line is too long.
    """
    assert process.stdout is not None
    rest = b""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while True:
            left = deadline - time.monotonic()
            if left <= 0 or not selector.select(left):
                raise TimeoutError
            block = os.read(process.stdout.fileno(), _MAX_LINE)
            if not block:
                return
            *lines, rest = (rest + block).split(b"\n")
            if len(rest) > _MAX_LINE:
                raise ValueError("a line without an end")
            yield from lines


def _error(source: Path, told: Mapping[str, object]) -> S2VFlowError:
    """Return the error that the process reported, as the class that its exit code stands for."""
    message, fix = f"{source}: {str(told['message'])[:_LAST_WORDS]}", told["fix"]
    advice = None if fix is None else str(fix)[:_LAST_WORDS]
    code = ExitCode(int(str(told["exit_code"])))
    if code is ExitCode.MISSING:
        return CheckpointError(message, advice)
    if code is ExitCode.REFUSED:
        return RefusedError(message, advice)
    return S2VFlowError(message, advice, exit_code=code)


def _crash(source: Path, process: subprocess.Popen[bytes], said: BinaryIO) -> S2VFlowError:
    """Explain an end without a result."""
    with suppress(subprocess.TimeoutExpired):
        process.wait(5)
    code = process.returncode
    if code is not None and code < 0:
        reason = "its time was up" if -code == signal.SIGXCPU else f"it crashed with signal {-code}"
    else:
        said.seek(max(0, said.seek(0, os.SEEK_END) - _LAST_WORDS))
        words = said.read().decode("utf-8", "replace").strip().splitlines()
        reason = words[-1] if words else f"it left with {code}"
    return RefusedError(f"{source}: the process that opened it made nothing of it: {reason[:_LAST_WORDS]}", fix=_FIX)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the process and what it may have started."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdout is not None:
        process.stdout.close()
