"""Write a safetensors file as a stream of blocks: memory stays flat however large the model is.

Source: safetensors, README.md, "Format"; safetensors/src/tensor.rs, serialize (wide dtypes first: all are aligned).
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

from s2v_flow.errors import BadNumbersError, CheckpointError, ExitCode, S2VFlowError
from s2v_flow.weights.header import ITEM_BYTES, MAX_HEADER_BYTES
from s2v_flow.wording import size_text

if TYPE_CHECKING:
    import torch

BLOCK_BYTES = 16 * 2**20  # a multiple of every dtype's size
DTYPES: Mapping[str, str] = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}  # as --dtype spells them
_CAST = frozenset({"F64", "F32", "F16", "BF16"})
_TORCH_NAMES: Mapping[str, str] = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu", "I64": "int64", "I32": "int32", "I16": "int16",
    "I8": "int8", "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip

Progress = Callable[[int, int], None]  # bytes that are written, bytes in all


@dataclass(frozen=True)
class Piece:
    """One tensor to be written: its name, dtype as safetensors spells it, shape, and where its bytes come from."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    blocks: Callable[[], Iterable[bytes]]

    @property
    def num_bytes(self) -> int:
        """The size of its data."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


def stored_name(dtype: torch.dtype) -> str | None:
    """Return how safetensors spells a dtype, None if a file cannot hold it."""
    name = str(dtype).removeprefix("torch.")
    return next((stored for stored, known in _TORCH_NAMES.items() if known == name), None)


def in_dtype(piece: Piece, wanted: str) -> Piece:
    """Return a tensor in another dtype; only floating point of 16 bits and more is changed.

    `wanted`: "keep", "bf16", "fp16" or "fp32".

    Raises:
        CheckpointError: It is in fp8 or int8, whose values mean nothing without their scales.
    """
    if wanted == "keep" or DTYPES[wanted] == piece.dtype:
        return piece
    if piece.dtype.startswith("F8_") or piece.dtype == "I8":
        name = "int8" if piece.dtype == "I8" else "fp8"
        raise CheckpointError(f"{piece.name!r} is in {name}, which is not expanded", fix="leave --dtype out")
    if piece.dtype not in _CAST:
        return piece
    return Piece(piece.name, DTYPES[wanted], piece.shape, lambda: _cast(piece, DTYPES[wanted]))


def _cast(piece: Piece, wanted: str) -> Iterator[bytes]:
    import torch

    stored: torch.dtype = getattr(torch, _TORCH_NAMES[piece.dtype])
    for block in piece.blocks():
        values = torch.frombuffer(bytearray(block), dtype=stored)
        cast = values.to(getattr(torch, _TORCH_NAMES[wanted]))
        if wanted == "F16" and (cast.isinf() & ~values.isinf()).any():
            raise BadNumbersError(f"{piece.name!r} holds values that fp16 cannot hold", fix="use --dtype bf16 or keep")
        yield cast.view(torch.uint8).numpy().tobytes()


def write_tensors(file: BinaryIO, pieces: Sequence[Piece], metadata: Mapping[str, str], on_progress: Progress) -> None:
    """Write a safetensors file from its beginning; equal tensors, in any order, and metadata give equal bytes.

    Raises:
        CheckpointError: The header is too long, or a tensor yields another number of bytes than it has.
        S2VFlowError: There is not enough space on the disk; nothing was written.
        OSError: The file cannot be written.
    """
    pieces = sorted(pieces, key=lambda piece: (-ITEM_BYTES[piece.dtype], piece.name))
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    position = 0
    for piece in pieces:
        end = position + piece.num_bytes
        header[piece.name] = {"dtype": piece.dtype, "shape": list(piece.shape), "data_offsets": [position, end]}
        position = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    if len(raw) > MAX_HEADER_BYTES:
        raise CheckpointError(f"its names take {len(raw)} bytes; at most {MAX_HEADER_BYTES} are accepted")
    _check_space(file, 8 + len(raw) + position)
    file.write(len(raw).to_bytes(8, "little") + raw)
    done = 0
    for piece in pieces:
        due = done + piece.num_bytes
        for block in piece.blocks():
            file.write(block)
            done += len(block)
            on_progress(done, position)
        if done != due:
            raise CheckpointError(f"{piece.name!r} changed while it was read", "wait until it is completely written")


def _check_space(file: BinaryIO, needed: int) -> None:
    if sys.platform == "win32":
        return  # the disk says so itself, later
    status = os.fstatvfs(file.fileno())
    free = status.f_bavail * status.f_frsize
    if needed > free:
        fix = "free some space, or name a target on another disk with -o"
        what = f"{size_text(needed)} are to be written, {size_text(free)} are free"
        raise S2VFlowError(what, fix, exit_code=ExitCode.DISK_FULL)
