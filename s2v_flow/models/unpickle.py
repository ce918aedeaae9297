"""The only code that opens a pickle: a process of its own, which shuts itself in first. `pickled` starts it.

It gets open files, not paths; it writes one safetensors file and tells how far it is, in lines of JSON. PyTorch's
restricted unpickler does the reading, with no other way behind it; whatever comes out and is not a plain tensor is
refused.
"""

from __future__ import annotations

import ctypes
import errno
import json
import math
import os
import pickle
import re
import struct
import sys
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s2v_flow.errors import CheckpointError, ExitCode, RefusedError, S2VFlowError
from s2v_flow.models.release import kind_of, new_names, tokenizer_pieces
from s2v_flow.weights.header import MAX_RANK
from s2v_flow.weights.tensor_stream import BLOCK_BYTES, Piece, in_dtype, stored_name, write_tensors

if TYPE_CHECKING:
    from torch import Tensor

OLDEST_TORCH = (2, 10)
MAX_TENSORS = 100_000
MAX_NAME = 512
MAX_PICKLE_BYTES = 32 * 2**20  # of the part of a zip that is a pickle: names, shapes; not the values
WRAPPERS = ("state_dict", "model", "module")

_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38
_SIGKILL = 9
_FIX_PLAIN = "use a file that holds a plain state dict, saved by torch.save"
_FIX_AGAIN = "download or copy the file again"
_UNREADABLE = (  # what torch.load raises on damaged files
    RuntimeError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    struct.error,
)


@dataclass(frozen=True)
class Unpickled:
    """What a file holds: its tensors by name, and how many other things beside its state dict were left out."""

    tensors: Mapping[str, Tensor]
    num_left_out: int = 0


def main() -> None:
    """Do the job that the first argument describes, and say how it went in the last line."""
    job = json.loads(sys.argv[1])
    try:
        _say(ok=_convert(job, is_offline=shut_in()))
    except S2VFlowError as error:
        _say(error={"message": error.message, "fix": error.fix, "exit_code": int(error.exit_code)})
    except OSError as error:
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        code = ExitCode.DISK_FULL if is_full else ExitCode.REFUSED
        _say(
            error={
                "message": f"it cannot be read, or the result not be written: {error.strerror}",
                "fix": None,
                "exit_code": int(code),
            }
        )


def _convert(job: Mapping[str, Any], *, is_offline: bool) -> dict[str, Any]:
    limit_all(job["limits"])
    path = f"/dev/fd/{job['source_fd']}"
    check_container(path, job["num_bytes"])
    import torch

    check_version(torch.__version__)
    torch.set_num_threads(1)
    limit_memory(job["limits"]["memory_bytes"])
    found = read_pickle(path, job["num_bytes"])
    names = new_names(found.tensors)
    kind = kind_of({names[key]: tuple(value.shape) for key, value in found.tensors.items()}, job["kind"])
    pieces = [in_dtype(_piece(names[key], value), job["dtype"]) for key, value in found.tensors.items()]
    with os.fdopen(job["target_fd"], "wb") as target:
        pieces += tokenizer_pieces(kind, names.values(), _read(job["tokenizer_fd"]))
        write_tensors(target, pieces, job["metadata"], lambda done, total: _say(done=done, total=total))
    return {"is_offline": is_offline, "num_left_out": found.num_left_out}


def _read(descriptor: int | None) -> bytes | None:
    if descriptor is None:
        return None
    with os.fdopen(descriptor, "rb") as file:
        return file.read()


def _say(**line: object) -> None:
    os.write(1, json.dumps(line).encode() + b"\n")


def shut_in() -> bool:
    """Give up the network, where the kernel lets a process do that, and die with the parent; both on Linux only.

    Returns:
        Whether the network is out of reach.
    """
    if sys.platform != "linux":
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    is_offline: bool = libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET) == 0
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    libc.prctl(_PR_SET_PDEATHSIG, _SIGKILL, 0, 0, 0)  # after unshare, which takes it back
    return is_offline


def limit_all(limits: Mapping[str, int]) -> None:
    """Limit this process for good: seconds of CPU, bytes in a file, open files; no core dumps."""
    import resource

    for kind, value in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, limits["file_bytes"]),
        (resource.RLIMIT_NOFILE, 64),
    ):
        resource.setrlimit(kind, (value, value))
    seconds = limits["cpu_seconds"]
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))  # SIGXCPU first, which tells what it was


def limit_memory(more_bytes: int) -> None:
    """Limit this process's address space to what it has and so many bytes more, on Linux."""
    import resource

    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        total = pages * resource.getpagesize() + more_bytes
        resource.setrlimit(resource.RLIMIT_AS, (total, total))
    import torch

    torch.empty(1)  # what torch allocates once, it allocates now


def check_version(version: str) -> None:
    """Refuse a PyTorch whose restricted unpickler is known to have holes.

    Raises:
        RefusedError: It is older than 2.10.
    """
    match = re.match(r"([0-9]+)\.([0-9]+)", version)
    if match is None or (int(match[1]), int(match[2])) < OLDEST_TORCH:
        raise RefusedError(
            f"PyTorch {version} opens pickles unsafely (CVE-2025-32434, CVE-2026-24747); 2.10 or newer is needed",
            fix="install a newer torch: pip install 'torch>=2.10'",
        )


def check_container(path: str, num_bytes: int) -> None:
    """Look at the directory of a zip before anything else does: nothing packed, nothing larger than the file.

    Raises:
        RefusedError: It is a bomb, or no file that torch.save wrote; or it is a tar.
        CheckpointError: It is damaged.
    """
    with open(path, "rb") as file:
        start = file.read(512)
    if start[257:262] == b"ustar":
        raise RefusedError("is a tar, PyTorch's oldest form, which cannot be opened safely", fix=_FIX_PLAIN)
    if not start.startswith(b"PK"):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError, LookupError, struct.error) as error:
        raise CheckpointError(f"is a damaged zip: {error}", fix=_FIX_AGAIN) from error
    if len(members) > MAX_TENSORS:
        raise RefusedError(f"has {len(members)} parts; at most {MAX_TENSORS} are accepted", fix=_FIX_PLAIN)
    if len({member.filename for member in members}) < len(members):
        raise RefusedError("is a zip that names a part twice", fix=_FIX_PLAIN)
    if any(member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1 for member in members):
        raise RefusedError("is a packed zip, which torch.save does not write", fix=_FIX_PLAIN)
    claimed = sum(max(member.file_size, member.compress_size) for member in members)
    if claimed > num_bytes:
        raise RefusedError(f"claims to hold {claimed} bytes, but the file has {num_bytes}", fix=_FIX_AGAIN)
    for member in members:
        if member.filename.endswith(".pkl") and member.file_size > MAX_PICKLE_BYTES:
            raise RefusedError(f"holds a pickle of {member.file_size} bytes beside its tensors", fix=_FIX_PLAIN)


def read_pickle(path: str, num_bytes: int) -> Unpickled:
    """Open a checked file with PyTorch's restricted unpickler, and let nothing through but plain tensors.

    Args:
        path: The file.
        num_bytes: Its size.

    Raises:
        RefusedError: It holds something else, or tensors that are not what they seem.
        CheckpointError: It is damaged.
    """
    state, num_left_out = _state_dict(_load(path))
    if len(state) > MAX_TENSORS:
        raise RefusedError(f"holds {len(state)} tensors; at most {MAX_TENSORS} are accepted", fix=_FIX_PLAIN)
    for name, value in state.items():
        check_name(name)
        check_tensor(name, value)
    claimed = sum(value.numel() * value.element_size() for value in state.values())
    if claimed > 2 * num_bytes:  # twice: an embedding may stand under two names
        raise RefusedError(f"holds tensors of {claimed} bytes in all, but the file has {num_bytes}", fix=_FIX_AGAIN)
    return Unpickled({name: value.detach() for name, value in state.items()}, num_left_out)


def _load(path: str) -> object:
    import torch

    with open(path, "rb") as file:
        is_zip = file.read(2) == b"PK"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd protocols: what comes out is looked at anyway
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL ([\w.]{1,100})", str(error))
        what = f"it asks for {wanted[1]}" if wanted else "its pickle is damaged or asks for more"
        raise RefusedError(f"holds more than plain tensors ({what}); nothing was run", fix=_FIX_PLAIN) from error
    except _UNREADABLE as error:
        reason = next(iter(str(error).splitlines()), "")[:200] or type(error).__name__
        if "allocate memory" in reason:
            raise RefusedError(f"needs more memory than a file of its size may: {reason}", fix=_FIX_AGAIN) from error
        raise CheckpointError(f"damaged, or no file of torch.save's: {reason}", fix=_FIX_AGAIN) from error


def _state_dict(loaded: object) -> tuple[dict[Any, Any], int]:
    """Return the state dict, which may be one level down, and how many entries beside it are left out."""
    if isinstance(loaded, dict):
        for wrapper in WRAPPERS:
            if isinstance(loaded.get(wrapper), dict):
                return dict(loaded[wrapper]), len(loaded) - 1
        return dict(loaded), 0
    raise RefusedError(f"holds a {type(loaded).__name__}, not a map of names to tensors", fix=_FIX_PLAIN)


def check_name(name: object) -> None:
    """Let through names that can be printed.

    Raises:
        RefusedError: It is none.
    """
    if not isinstance(name, str) or not name or len(name) > MAX_NAME or not name.isprintable():
        raise RefusedError(f"names a tensor {repr(name)[:100]}, which is no plain name", fix=_FIX_PLAIN)


def check_tensor(name: str, value: object) -> None:
    """Let through dense tensors in memory, of a dtype that safetensors has, within their storage.

    Raises:
        RefusedError: It is none.
    """
    reason = _objection(value)
    if reason is not None:
        raise RefusedError(f"{name!r} {reason}; only plain dense tensors are accepted", fix=_FIX_PLAIN)


def _objection(value: object) -> str | None:
    import torch

    if type(value) not in (torch.Tensor, torch.nn.Parameter):
        return f"is a {type(value).__name__[:100]}"
    assert isinstance(value, torch.Tensor)
    if value.layout != torch.strided or value.is_quantized or value.device.type != "cpu":
        return "is sparse, quantised or without data"
    if value.is_conj() or value.is_neg() or stored_name(value.dtype) is None or value.dim() > MAX_RANK:
        return f"has the dtype {value.dtype} and {value.dim()} dimensions"
    item = value.element_size()
    last = sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
    needed = (value.storage_offset() + last + 1) * item if value.numel() else 0
    held = value.untyped_storage().nbytes()
    if value.storage_offset() < 0 or min(value.stride(), default=0) < 0 or needed > held:
        return "reaches outside its storage"
    if math.prod(value.shape) * item > held:
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
