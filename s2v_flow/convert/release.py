"""The authors' own release of the model: what its files are called, and how their keys become those of ComfyUI's files.

Only the text encoder is spelt differently. The diffusion model (in shards), the VAE and the audio encoder have the same
keys there and here. What is made of them is written as a stream of blocks: memory stays flat however large it is.

Source: Wan-Video/Wan2.2, wan/configs/wan_s2v_14B.py; safetensors, README.md, "Format"; safetensors/src/tensor.rs,
serialize (wide dtypes first: all are aligned).
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from s2v_flow.errors import (
    BadNumbersError,
    CheckpointError,
    ExitCode,
    MissingError,
    RefusedError,
    S2VFlowError,
    UsageError,
)
from s2v_flow.weights.family import KINDS, describe_mismatch, detect_family, is_all_in_one, part_of
from s2v_flow.weights.header import ITEM_BYTES, MAX_HEADER_BYTES, Header, parse_map, read_header
from s2v_flow.weights.layout import TOKENIZER_KEY
from s2v_flow.weights.names import new_names
from s2v_flow.weights.reader import Shapes
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


RELEASE_FOLDER = "Wan2.2-S2V-14B"
TOKENIZER_FILE = "google/umt5-xxl/spiece.model"  # beside the text encoder

# by the models folder in which what is made of them belongs
RELEASE_FILES: Mapping[str, tuple[str, ...]] = {
    "text_encoders": ("models_t5_umt5-xxl-enc-bf16.pth",),
    "vae": ("Wan2.1_VAE.pth",),
    "diffusion_models": ("diffusion_pytorch_model.safetensors.index.json",),
    "audio_encoders": (
        "wav2vec2-large-xlsr-53-english/model.safetensors",
        "wav2vec2-large-xlsr-53-english/pytorch_model.bin",
    ),
}

_UNUSED = ("umt5xxl.logit_scale",)  # ComfyUI saves it with every text encoder
_MAX_TOKENIZER_BYTES = 64 * 2**20


def kind_of(shapes: Shapes, wanted: str = "auto") -> str:
    """Say which kind of model a file holds, by its shapes, the keys as `new_names` gives them.

    `wanted`: what it has to be, or "auto".

    Raises:
        CheckpointError: It is of no kind that is known, or of another than was wanted.
    """
    if wanted != "auto":
        mismatch = describe_mismatch(KINDS[wanted], shapes)
        if mismatch is not None:
            raise CheckpointError(mismatch, fix="name another --kind, or leave it out")
        return wanted
    family = detect_family(shapes)
    for kind, known in KINDS.items():
        if family == known:
            return kind
    article = "an" if family.startswith("unknown") else "a"
    raise CheckpointError(f"this is {article} {family} file; only {', '.join(KINDS.values())} files are converted")


@dataclass(frozen=True)
class Wanted:
    """What is to be made: the kind it must have, the dtype, texts for the header, a tokenizer, whether it was named."""

    kind: str = "auto"
    dtype: str = "keep"
    metadata: Mapping[str, str] = field(default_factory=dict)
    tokenizer: Path | None = None
    is_tokenizer_named: bool = False


def write_model(file: BinaryIO, pieces: Sequence[Piece], wanted: Wanted, on_progress: Progress) -> None:
    """Write tensors of the authors' release as the loaders take them: keys, dtype, tokenizer.

    Raises:
        MissingError: A tokenizer is needed, and is not there.
        UsageError: One is named, and this is no text encoder.
        CheckpointError: The tensors are no model that is known.
    """
    pieces = _of_one_model(pieces, wanted.kind)
    names = new_names([piece.name for piece in pieces])
    pieces = [in_dtype(replace(piece, name=names[piece.name]), wanted.dtype) for piece in pieces]
    kind = kind_of({piece.name: piece.shape for piece in pieces}, wanted.kind)
    if wanted.is_tokenizer_named and kind != "text_encoder":
        raise UsageError("is no text encoder", "leave out --tokenizer")
    if kind == "text_encoder" and TOKENIZER_KEY not in names.values():
        tokenizer = _read_tokenizer(wanted.tokenizer)
        pieces.append(Piece(TOKENIZER_KEY, "U8", (len(tokenizer),), lambda: [tokenizer]))
    write_tensors(file, pieces, wanted.metadata, on_progress)


def _of_one_model(pieces: Sequence[Piece], wanted: str) -> Sequence[Piece]:
    """Return the tensors of one model of an all-in-one checkpoint; of any other file all of them."""
    if not is_all_in_one(piece.name for piece in pieces):
        return pieces
    parts = [(*part_of(piece.name), piece) for piece in pieces]
    kinds = sorted({kind for kind, _, _ in parts})
    if wanted not in kinds:
        fix = f"say which: {' or '.join(f'--kind {kind}' for kind in kinds)}"
        raise CheckpointError(f"is an all-in-one checkpoint of several models: {', '.join(kinds)}", fix)
    return [replace(piece, name=name) for kind, name, piece in parts if kind == wanted and name not in _UNUSED]


def open_file(path: Path) -> BinaryIO:
    """Open a file to be read.

    Raises:
        MissingError: It cannot be.
    """
    try:
        return open(path, "rb")
    except OSError as error:
        raise MissingError(f"{path}: cannot be read: {error.strerror}", "check its permissions") from error


def _read_tokenizer(path: Path | None) -> bytes:
    if path is None:
        fix = f"name it with --tokenizer; in the authors' release it is {TOKENIZER_FILE}"
        raise MissingError("this is a text encoder without its tokenizer", fix)
    with open_file(path) as file:
        raw = file.read(_MAX_TOKENIZER_BYTES + 1)
    if len(raw) > _MAX_TOKENIZER_BYTES:
        raise CheckpointError(f"{path}: is too large for a tokenizer", fix=f"name {TOKENIZER_FILE} of the release")
    return raw


INDEX_SUFFIX = ".safetensors.index.json"


@dataclass(frozen=True)
class Shards:
    """Tensors in one or more safetensors files."""

    files: tuple[Path, ...]
    pieces: tuple[Piece, ...]
    metadata: Mapping[str, str]


def open_single(path: Path) -> Shards:
    """Open a safetensors file, whatever its name; only its header is read.

    Raises:
        MissingError, RefusedError, CheckpointError: It is missing, a pickle, or damaged.
    """
    header = read_header(path, any_name=True)
    return Shards((path,), tuple(_pieces(path, header)), header.metadata)


def open_shards(index: Path) -> Shards:
    """Open the shards that an index names, all of them in its own folder; only headers are read.

    Raises:
        MissingError: The index or a shard is missing.
        RefusedError: The index names a file outside its folder.
        CheckpointError: The index and the shards do not say the same, or one of them is damaged.
    """
    listed = _read_index(index)
    pieces: list[Piece] = []
    metadata: dict[str, str] = {}
    found: dict[str, str] = {}
    names = sorted(set(listed.values()))
    for name in names:
        header = read_header(index.parent / name)
        for key in header.entries:
            if key in found:
                raise CheckpointError(f"{index}: {key!r} is in two shards, {found[key]} and {name}")
            found[key] = name
        for text, value in header.metadata.items():
            if metadata.setdefault(text, value) != value:
                raise CheckpointError(f"{index}: {name} and the shards before it say different things of {text!r}")
        pieces += _pieces(index.parent / name, header)
    for key in sorted(listed.keys() | found.keys()):
        if found.get(key) != listed.get(key):
            said, fact = (f"in {place}" if place else "nowhere" for place in (listed.get(key), found.get(key)))
            fix = "download the shards and the index again"
            raise CheckpointError(f"{index}: {key!r} should be {said}, and is {fact}", fix)
    return Shards(tuple(index.parent / name for name in names), tuple(pieces), metadata)


def _read_index(index: Path) -> dict[str, str]:
    with open_file(index) as file:
        raw = file.read(MAX_HEADER_BYTES + 1)
    if len(raw) > MAX_HEADER_BYTES:
        raise CheckpointError(f"{index}: has more than {MAX_HEADER_BYTES} bytes")
    listed = parse_map(index, raw, "index").get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise CheckpointError(f"{index}: has no weight_map, so it is no index of shards")
    for name in listed.values():
        if not isinstance(name, str):
            raise CheckpointError(f"{index}: its weight_map is not a map of texts")
        if not name.endswith(".safetensors") or not name.isprintable() or set(name) & set("/\\:"):
            raise RefusedError(f"{index}: names {name!r}, which is no safetensors file in its own folder")
    return listed


def _pieces(path: Path, header: Header) -> Iterator[Piece]:
    data_bytes = max((entry.end for entry in header.entries.values()), default=0)
    start = os.stat(path).st_size - data_bytes
    for name, entry in header.entries.items():
        blocks = partial(_read, path, start + entry.begin, entry.end - entry.begin)
        yield Piece(name, entry.dtype, entry.shape, blocks)


def _read(path: Path, start: int, num_bytes: int) -> Iterator[bytes]:
    with open(path, "rb") as file:
        file.seek(start)
        while num_bytes and (block := file.read(min(BLOCK_BYTES, num_bytes))):
            num_bytes -= len(block)
            yield block
