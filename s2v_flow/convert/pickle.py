"""Make a safetensors file of a pickle, in a child process with PyTorch's restricted unpickler and nothing else.

The parent unpickles nothing: it hands the child open files, limits its memory, time and output, and checks the result
as any model file. The child opens the pickle with `torch.load(weights_only=True)`, with no fallback, and writes only
dense tensors. It has an empty environment and folder and no input; it could still read the user's files.
"""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from s2v_flow.convert.release import BLOCK_BYTES, Piece, Progress, Wanted, open_file, stored_name, write_model
from s2v_flow.errors import CheckpointError, ExitCode, RefusedError, S2VFlowError
from s2v_flow.weights.header import MAX_RANK

if TYPE_CHECKING:
    from torch import Tensor

OLDEST_TORCH = (2, 10)  # for pickles; everything else works with older ones too
WRAPPERS = ("state_dict", "model", "module")
_MAX_NAME = 512
_MAX_LINE = 1 << 16  # bytes that the child says at once
_MAX_WORDS = 2000  # characters of it that are shown
_CODE = "import sys; sys.path.append(sys.argv.pop()); from s2v_flow.convert.pickle import main; main()"
_FIX_PLAIN = "use a file that holds a plain state dict, saved by torch.save"
_FIX_AGAIN = "download or copy the file again"
_FIX_SOURCE = "do not use this file unless you know where it comes from; if you do, report this"
_UNREADABLE = (  # what torch.load raises on damaged files
    RuntimeError, ValueError, EOFError, LookupError, TypeError, AttributeError, ArithmeticError, AssertionError,
    struct.error,
)  # fmt: skip


@dataclass(frozen=True)
class Limits:
    """What the child may use: memory beyond PyTorch's own (on Linux), seconds, bytes in the result."""

    memory_bytes: int
    seconds: int
    file_bytes: int

    @classmethod
    def for_size(cls, num_bytes: int) -> Limits:
        """Return limits that an honest file of this size keeps: read at 5 MB/s, written in float32, twice in memory."""
        return cls(2 * num_bytes + 4 * 2**30, 300 + num_bytes // (5 * 2**20), 4 * num_bytes + 64 * 2**20)


def convert_pickle(
    source: Path, target: BinaryIO, wanted: Wanted, on_progress: Progress, limits: Limits | None = None
) -> int:
    """Let a child process make a safetensors file of a pickle: how many entries beside the state dict were left out.

    `limits`: what the child may use; unless given, by the source's size.

    Raises:
        MissingError: The source or the tokenizer cannot be read.
        RefusedError: The source holds more than tensors, or needs more than a limit; or this system has no limits.
        S2VFlowError: Whatever the child found wrong with it.
    """
    if sys.platform == "win32":
        what = f"{source}: is a pickle, and Windows cannot limit the process that would open it"
        raise RefusedError(what, fix="convert it on Linux or macOS, or in WSL")
    with ExitStack() as stack:
        read = stack.enter_context(open_file(source))
        scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="s2vflow-"))
        limits = limits or Limits.for_size(os.fstat(read.fileno()).st_size)
        files = [read.fileno(), target.fileno()]
        if wanted.tokenizer is not None:
            files.append(stack.enter_context(open_file(wanted.tokenizer)).fileno())
        told = {**vars(wanted), "metadata": dict(wanted.metadata), "tokenizer": None}
        job = json.dumps({"files": files, "wanted": told, "limits": asdict(limits)})
        child = subprocess.Popen(
            [sys.executable, "-I", "-B", "-c", _CODE, job, str(Path(__file__).parents[2])],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=files,
            env={},
            cwd=scratch,
            start_new_session=True,
        )
        stack.enter_context(child)
        stack.callback(_kill, child)
        timer = threading.Timer(limits.seconds, _kill, [child])
        timer.daemon = True
        stack.callback(timer.cancel)
        timer.start()
        return _follow(source, child, limits, on_progress)


def _kill(child: subprocess.Popen[bytes]) -> None:
    """Kill the child and what it may have started."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)


def _follow(source: Path, child: subprocess.Popen[bytes], limits: Limits, on_progress: Progress) -> int:
    """Read the child's messages until its result; lines of another form are its error output."""
    assert child.stdout is not None
    words = ""
    while line := child.stdout.readline(_MAX_LINE):
        try:
            what, first, second, *rest = json.loads(line)
            if what == "error":
                raise _error(source, ExitCode(first), str(second), *map(str, rest))
            done, total = int(first), int(second)
        except (ValueError, TypeError, LookupError, RecursionError):
            words = line.decode("utf-8", "replace").strip() or words
            continue
        if what == "made":
            return total
        on_progress(done, total)
    code = child.wait()
    if code in (-signal.SIGKILL, -signal.SIGXCPU):
        reason = f"it took more than {limits.seconds} s, or more memory than there is, and was stopped"
    else:
        reason = words or f"it left with {code}"
    raise RefusedError(f"{source}: the process that opened it made nothing of it: {reason[:_MAX_WORDS]}", _FIX_SOURCE)


def _error(source: Path, code: ExitCode, message: str, fix: str | None = None) -> S2VFlowError:
    """Return the error that the child reported, as the class that its exit code stands for."""
    message, fix = f"{source}: {message[:_MAX_WORDS]}", fix and fix[:_MAX_WORDS]
    if code is ExitCode.MISSING:
        return CheckpointError(message, fix)
    return RefusedError(message, fix) if code is ExitCode.REFUSED else S2VFlowError(message, fix, exit_code=code)


def main() -> None:
    """In the child: do the job that the first argument describes; a line for every block, the last says how it went."""
    job = json.loads(sys.argv[1])
    try:
        num_left_out = _convert(*job["files"], wanted=job["wanted"], limits=Limits(**job["limits"]))
        _say("made", 0, num_left_out)
    except S2VFlowError as error:
        _say("error", int(error.exit_code), error.message, *filter(None, [error.fix]))
    except MemoryError:
        _say("error", int(ExitCode.REFUSED), "needs more memory than a file of its size may", _FIX_AGAIN)
    except OSError as error:
        code = ExitCode.DISK_FULL if error.errno in (errno.ENOSPC, errno.EDQUOT) else ExitCode.REFUSED
        _say("error", int(code), f"it cannot be read, or the result not be written: {error.strerror}")


def _say(*line: object) -> None:
    os.write(1, json.dumps(line).encode() + b"\n")


def _convert(source: int, target: int, tokenizer: int | None = None, *, wanted: Any, limits: Limits) -> int:
    limit(limits)
    tensors, num_left_out = read_pickle(f"/dev/fd/{source}")
    pieces = [_piece(name, value) for name, value in tensors.items()]
    spelling = None if tokenizer is None else Path(f"/dev/fd/{tokenizer}")
    with os.fdopen(target, "wb") as file:
        write_model(file, pieces, Wanted(**{**wanted, "tokenizer": spelling}), partial(_say, "written"))
    return num_left_out


def limit(limits: Limits) -> None:
    """Limit this process for good: address space beyond what PyTorch takes (Linux), seconds of CPU, files.

    Raises:
        RefusedError: PyTorch's restricted unpickler is known to have holes.
    """
    import resource

    import torch

    check_version(torch.__version__)
    torch.set_num_threads(1)
    torch.empty(1)  # what torch allocates once, it allocates now
    values = {
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_FSIZE: limits.file_bytes,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CPU: limits.seconds,
    }
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        values[resource.RLIMIT_AS] = pages * resource.getpagesize() + limits.memory_bytes
    for kind, value in values.items():
        _, hard = resource.getrlimit(kind)
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def check_version(version: str) -> None:
    """Refuse a PyTorch whose restricted unpickler is known to have holes.

    Raises:
        RefusedError: It is older than 2.10.
    """
    match = re.match(r"([0-9]+)\.([0-9]+)", version)
    if match is None or (int(match[1]), int(match[2])) < OLDEST_TORCH:
        raise RefusedError(
            f"PyTorch {version} opens pickles unsafely (CVE-2025-32434, CVE-2026-24747): for this, and for nothing "
            "else, 2.10 or newer is needed",
            fix="install a newer torch: pip install 'torch>=2.10'; or use a safetensors file of the same model",
        )


def read_pickle(path: str) -> tuple[dict[str, Tensor], int]:
    """Open a file with PyTorch's restricted unpickler, and let nothing through but plain tensors, by name.

    The second value is how many entries beside the state dict were left out.

    Raises:
        RefusedError: It holds something else, or tensors that are not what they seem.
        CheckpointError: It is damaged.
    """
    num_bytes = os.stat(path).st_size
    with open(path, "rb") as file:
        start = file.read(512)
        file.seek(0)  # where /dev/fd gives out one and the same open file
    if start[257:262] == b"ustar":
        raise RefusedError("is a tar, PyTorch's oldest form, which cannot be opened safely", fix=_FIX_PLAIN)
    is_zip = start.startswith(b"PK")
    if is_zip:
        _check_zip(path, num_bytes)
    state, num_left_out = _state_dict(_load(path, is_zip))
    for name, value in state.items():
        if not isinstance(name, str) or not name or len(name) > _MAX_NAME or not name.isprintable():
            raise RefusedError(f"names a tensor {repr(name)[:100]}, which is no plain name", fix=_FIX_PLAIN)
        reason = _objection(value)
        if reason is not None:
            raise RefusedError(f"{name!r} {reason}; only plain dense tensors are accepted", fix=_FIX_PLAIN)
    claimed = sum(value.numel() * value.element_size() for value in state.values())
    if claimed > 2 * num_bytes:  # twice: an embedding may stand under two names
        raise RefusedError(f"holds tensors of {claimed} bytes in all, but the file has {num_bytes}", fix=_FIX_AGAIN)
    return {name: value.detach() for name, value in state.items()}, num_left_out


def _check_zip(path: str, num_bytes: int) -> None:
    """Refuse a zip that would unpack to more than it is."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError, LookupError, struct.error) as error:
        raise CheckpointError(f"is a damaged zip: {error}", fix=_FIX_AGAIN) from error
    if any(member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1 for member in members):
        raise RefusedError("is a packed zip, which torch.save does not write", fix=_FIX_PLAIN)
    claimed = sum(max(member.file_size, member.compress_size) for member in members)
    if claimed > num_bytes:
        raise RefusedError(f"claims to hold {claimed} bytes, but the file has {num_bytes}", fix=_FIX_AGAIN)


def _load(path: str, is_zip: bool) -> object:
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd protocols: what comes out is looked at anyway
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL ([\w.]{1,100})", str(error))
        what = f"it asks for {asked[1]}" if asked else "its pickle is damaged or asks for more"
        raise RefusedError(f"holds more than plain tensors ({what}); nothing was run", fix=_FIX_PLAIN) from error
    except _UNREADABLE as error:
        reason = next(iter(str(error).splitlines()), "")[:200] or type(error).__name__
        if "allocate memory" in reason:
            raise MemoryError from error
        raise CheckpointError(f"damaged, or no file of torch.save's: {reason}", fix=_FIX_AGAIN) from error


def _state_dict(loaded: object) -> tuple[dict[Any, Any], int]:
    """Return the state dict, which may be one level down, and how many entries beside it are left out."""
    if not isinstance(loaded, dict):
        raise RefusedError(f"holds a {type(loaded).__name__}, not a map of names to tensors", fix=_FIX_PLAIN)
    inner = next((loaded[name] for name in WRAPPERS if isinstance(loaded.get(name), dict)), None)
    return (loaded, 0) if inner is None else (inner, len(loaded) - 1)


def _objection(value: object) -> str | None:
    """Say why a value is not a dense tensor in memory, of a dtype that safetensors has, within its storage."""
    import torch

    if type(value) not in (torch.Tensor, torch.nn.Parameter):
        return f"is a {type(value).__name__[:100]}"
    assert isinstance(value, torch.Tensor)
    if value.layout != torch.strided or value.is_quantized or value.device.type != "cpu":
        return "is sparse, quantised or without data"
    if value.is_conj() or value.is_neg() or stored_name(value.dtype) is None or value.dim() > MAX_RANK:
        return f"has the dtype {value.dtype} and {value.dim()} dimensions"
    held = value.untyped_storage().nbytes()
    last = sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
    needed = (value.storage_offset() + last + 1) * value.element_size() if value.numel() else 0
    if value.storage_offset() < 0 or min(value.stride(), default=0) < 0 or needed > held:
        return "reaches outside its storage"
    if value.numel() * value.element_size() > held:
        return f"has the shape {list(value.shape)}, more than its storage of {held} bytes"
    return None


def _piece(name: str, value: Tensor) -> Piece:
    stored = stored_name(value.dtype)
    assert stored is not None
    return Piece(name, stored, tuple(value.shape), partial(_blocks, value))


def _blocks(value: Tensor) -> Iterator[bytes]:
    import torch

    flat = value.contiguous().reshape(-1)
    step = BLOCK_BYTES // value.element_size()
    for first in range(0, flat.shape[0], step):
        yield flat[first : first + step].view(torch.uint8).numpy().tobytes()
