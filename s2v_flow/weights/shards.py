"""Safetensors files as a source of tensors: one file, or shards with their index."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from s2v_flow.errors import CheckpointError, MissingError, RefusedError
from s2v_flow.weights.header import MAX_HEADER_BYTES, Header, parse_map, read_header
from s2v_flow.weights.tensor_stream import BLOCK_BYTES, Piece

INDEX_SUFFIX = ".safetensors.index.json"


@dataclass(frozen=True)
class Shards:
    """Tensors in one or more safetensors files. `index` tells their files, where there is one."""

    files: tuple[Path, ...]
    pieces: tuple[Piece, ...]
    metadata: Mapping[str, str]
    index: Path | None = None


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
            raise CheckpointError(
                f"{index}: {key!r} should be {said}, and is {fact}", fix="download the shards and the index again"
            )
    return Shards(tuple(index.parent / name for name in names), tuple(pieces), metadata, index)


def _read_index(index: Path) -> dict[str, str]:
    """Return which shard holds which tensor."""
    try:
        with open(index, "rb") as file:
            raw = file.read(MAX_HEADER_BYTES + 1)
    except OSError as error:
        raise MissingError(f"{index}: cannot be read: {error.strerror}") from error
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
