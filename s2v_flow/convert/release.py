"""The authors' own release of the model: what its files are called, and how their keys become those of ComfyUI's files.

Only the text encoder is spelt differently. The diffusion model (in shards), the VAE and the audio encoder have the same
keys there and here.

Source: Wan-Video/Wan2.2, wan/configs/wan_s2v_14B.py.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import BinaryIO

from s2v_flow.errors import CheckpointError, ExitCode, MissingError, RefusedError, S2VFlowError
from s2v_flow.weights.family import KINDS, describe_mismatch, detect_family, is_all_in_one, part_of
from s2v_flow.weights.header import MAX_HEADER_BYTES, Header, parse_map, read_header
from s2v_flow.weights.layout import TOKENIZER_KEY
from s2v_flow.weights.names import new_names
from s2v_flow.weights.reader import Shapes
from s2v_flow.weights.tensor_stream import BLOCK_BYTES, Piece, Progress, in_dtype, write_tensors

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
        S2VFlowError: One is named, and this is no text encoder.
        CheckpointError: The tensors are no model that is known.
    """
    pieces = _of_one_model(pieces, wanted.kind)
    names = new_names([piece.name for piece in pieces])
    pieces = [in_dtype(replace(piece, name=names[piece.name]), wanted.dtype) for piece in pieces]
    kind = kind_of({piece.name: piece.shape for piece in pieces}, wanted.kind)
    if wanted.is_tokenizer_named and kind != "text_encoder":
        raise S2VFlowError("is no text encoder", "leave out --tokenizer", exit_code=ExitCode.USAGE)
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
    try:
        with open(index, "rb") as file:
            raw = file.read(MAX_HEADER_BYTES + 1)
    except OSError as error:
        raise MissingError(f"{index}: cannot be read: {error.strerror}", "check its permissions") from error
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
