"""Read a GGUF file's header, every bound checked, without torch: tensors, their block types, and the tokenizer inside.

The `gguf` package's own reader makes objects of every token of a vocabulary: 22 CPU seconds for UMT5's 256,384, where a
plan has half a second. This one steps over what it is not asked for; the package is the tests' reference.
Source: ggml, docs/gguf.md; blocks: ggml-common.h.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from s2v_flow.errors import CheckpointError
from s2v_flow.weights.header import MAX_NAME_LENGTH, MAX_RANK, Array, Header, TensorEntry, Value, opened

MAGIC = b"GGUF"
MAX_PAIRS = 10_000
MAX_TENSORS = 100_000
MAX_ITEMS = 4_000_000  # of an array: the largest vocabularies have a sixteenth
_MAX_TEXT_BYTES = 1_000_000
_MAX_ALIGNMENT = 2**20

BLOCKS: Mapping[int, tuple[str, int, int]] = {  # type: its name, a block's elements and bytes
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 30: ("BF16", 1, 2),
    2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210), 20: ("IQ4_NL", 32, 18), 23: ("IQ4_XS", 256, 136),
}  # fmt: skip
BLOCK_SIZES: Mapping[str, tuple[int, int]] = {name: (elements, size) for name, elements, size in BLOCKS.values()}
_REFUSED = {
    9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 21: "IQ3_S",
    22: "IQ2_S", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0",
    35: "TQ2_0", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0",
}  # fmt: skip
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_INT, _FLOAT, _TEXT, _ARRAY = 5, 6, 8, 9
_WHOLE_NUMBERS = (4, 5, 10, 11)

# llama.cpp's names for a T5 encoder, and ComfyUI's
_T5_NAMES = (
    ("token_embd.", "shared."),
    ("enc.output_norm.", "encoder.final_layer_norm."),
    ("enc.blk.", "encoder.block."),
    (".attn_rel_b.", ".layer.0.SelfAttention.relative_attention_bias."),
    (".attn_norm.", ".layer.0.layer_norm."),
    *((f".attn_{name}.", f".layer.0.SelfAttention.{name}.") for name in "qkvo"),
    (".ffn_gate.", ".layer.1.DenseReluDense.wi_0."),
    (".ffn_up.", ".layer.1.DenseReluDense.wi_1."),
    (".ffn_down.", ".layer.1.DenseReluDense.wo."),
    (".ffn_norm.", ".layer.1.layer_norm."),
)


def is_gguf(path: Path) -> bool:
    """Tell by a file's first bytes whether it is a GGUF file.

    Raises:
        MissingError: There is no such file, or it cannot be read.
        CheckpointError: It is not a regular file.
    """
    with opened(path) as (file, _):
        return file.read(len(MAGIC)) == MAGIC


def read_gguf(path: Path) -> Header:
    """Read and check the header of a GGUF file; neither tensors nor vocabularies are read.

    Raises:
        MissingError: There is no such file, or it cannot be read.
        CheckpointError: The file is damaged or truncated, or has tensors of a type that is not supported.
    """
    with _mapped(path) as reader:
        version = reader.number("I")
        if version in (2 << 24, 3 << 24):
            raise CheckpointError(f"{path}: is a big-endian GGUF file", "use the little-endian file of that model")
        if version not in (2, 3):
            raise reader.damaged(f"its version is {version}, expected 2 or 3 in little-endian order")
        num_tensors, num_pairs = reader.number("Q"), reader.number("Q")
        if num_tensors > MAX_TENSORS or num_pairs > MAX_PAIRS:
            raise reader.damaged(f"it claims {num_tensors} tensors and {num_pairs} values")
        metadata: dict[str, Value] = {}
        for _ in range(num_pairs):
            key = reader.text(MAX_NAME_LENGTH)
            metadata[key] = reader.value(reader.number("I"))
        found = dict(reader.entry() for _ in range(num_tensors))
        if len(found) != num_tensors:
            raise reader.damaged("it names a tensor twice")
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 0 < alignment <= _MAX_ALIGNMENT:
            raise reader.damaged(f"its alignment is {alignment}")
        start = -(-reader.position // alignment) * alignment
        return _checked(reader, metadata, found, start)


def tokenizer_arrays(path: Path, metadata: Mapping[str, Value]) -> tuple[list[bytes], list[float], list[int], bytes]:
    """Read the tokenizer inside a file: pieces, their scores and types, and the normaliser's table (or nothing).

    Raises:
        CheckpointError: There is none, or it is damaged.
    """
    arrays = [metadata.get(f"tokenizer.ggml.{name}") for name in ("tokens", "scores", "token_type")]
    table = metadata.get("tokenizer.ggml.precompiled_charsmap")
    with _mapped(path) as reader:
        tokens, scores, types = arrays
        if not isinstance(tokens, Array) or not isinstance(scores, Array) or not isinstance(types, Array):
            raise CheckpointError(f"{path}: has no tokenizer inside", fix="name one: tokenizer: spiece.model")
        is_typed = (tokens.type, scores.type, types.type) == (_TEXT, _FLOAT, _INT)
        if not is_typed or not tokens.count == scores.count == types.count:
            raise reader.damaged("its tokenizer's lists do not fit each other")
        return (
            [*reader.texts(tokens)],
            [*reader.numbers(scores)],
            [int(number) for number in reader.numbers(types)],
            bytes(int(number) for number in reader.numbers(table)) if isinstance(table, Array) and table.count else b"",
        )


def _checked(reader: _Reader, metadata: dict[str, Value], found: dict[str, TensorEntry], start: int) -> Header:
    """Place the tensors in the file, and give them ComfyUI's names."""
    is_t5 = "token_embd.weight" in found or metadata.get("general.architecture") in ("t5", "t5encoder")
    entries: dict[str, TensorEntry] = {}
    end = start
    for name, entry in sorted(found.items(), key=lambda item: item[1].begin):
        shape = reader.own_shape(name, entry.shape, metadata.get(f"comfy.gguf.orig_shape.{name}"))
        placed = replace(entry, shape=shape, begin=start + entry.begin, end=start + entry.end)
        if placed.begin < end:
            raise reader.damaged(f"{name!r} overlaps the tensor before it")
        end = placed.end
        if end > reader.num_bytes:
            raise reader.damaged(f"{name!r} needs {end} bytes, but the file has {reader.num_bytes} (truncated?)")
        key = _t5_key(name) if is_t5 else name
        if key in entries:
            raise reader.damaged(f"it names {key!r} twice")
        entries[key] = placed
    return Header({key: entries[key] for key in sorted(entries)}, gguf=metadata)


def _t5_key(name: str) -> str:
    for theirs, ours in _T5_NAMES:
        name = name.replace(theirs, ours)
    return name


class _Reader:
    """Steps through the header; whatever would lie past the end of the file is damage."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self.num_bytes = len(data)
        self.position = len(MAGIC)
        self._data = data

    def damaged(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: damaged GGUF file: {what}", fix="download or copy the file again")

    def take(self, count: int) -> int:
        """Step over `count` bytes and return where they begin."""
        begin, self.position = self.position, self.position + count
        if self.position > self.num_bytes:
            raise self.damaged(f"its header needs {self.position} bytes, but the file has {self.num_bytes}")
        return begin

    def number(self, code: str) -> int:
        return int(self.scalar(code))

    def scalar(self, code: str) -> float | int | bool:
        place = self.take(struct.calcsize(f"<{code}"))
        value: float | int | bool = struct.unpack_from(f"<{code}", self._data, place)[0]
        return value

    def raw(self, limit: int) -> bytes:
        length = self.number("Q")
        if length > limit:
            raise self.damaged(f"a text has {length} bytes; at most {limit} are accepted")
        begin = self.take(length)
        return self._data[begin : begin + length]

    def text(self, limit: int) -> str:
        try:
            return self.raw(limit).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.damaged("a name is no UTF-8") from error

    def value(self, type_: int) -> Value:
        """Read a value of the metadata; of an array, only where it stands."""
        if type_ in _SCALARS:
            return self.scalar(_SCALARS[type_])
        if type_ == _TEXT:
            return self.raw(_MAX_TEXT_BYTES).decode("utf-8", "replace")
        if type_ != _ARRAY:
            raise self.damaged(f"it has a value of the unknown type {type_}")
        array = Array(self.number("I"), self.number("Q"), self.position)
        if array.count > MAX_ITEMS or array.type not in (*_SCALARS, _TEXT):
            raise self.damaged(f"it has an array of {array.count} items of the type {array.type}")
        if array.type == _TEXT:
            for _ in range(array.count):
                self.take(self.number("Q"))
        else:
            self.take(array.count * struct.calcsize(f"<{_SCALARS[array.type]}"))
        return array

    def texts(self, array: Array) -> Iterator[bytes]:
        self.position = array.begin
        for _ in range(array.count):
            yield self.raw(_MAX_TEXT_BYTES)

    def numbers(self, array: Array) -> Iterator[float]:
        self.position = array.begin
        code = _SCALARS.get(array.type)
        if code is None:
            raise self.damaged("its tokenizer holds texts where numbers should be")
        place = self.take(array.count * struct.calcsize(f"<{code}"))
        yield from struct.unpack_from(f"<{array.count}{code}", self._data, place)

    def own_shape(self, name: str, stored: tuple[int, ...], noted: Value | None) -> tuple[int, ...]:
        """Return a tensor's shape: the noted one, where a converter has rearranged its rows to fill blocks."""
        if noted is None:
            return stored
        shape: tuple[int, ...] = ()
        if isinstance(noted, Array) and noted.type in _WHOLE_NUMBERS and noted.count <= MAX_RANK:
            shape = tuple(int(size) for size in self.numbers(noted))
        if not shape or min(shape) < 0 or math.prod(shape) != math.prod(stored):
            raise self.damaged(f"{name!r} is {list(stored)}, and was {list(shape)} by comfy.gguf.orig_shape")
        return shape

    def entry(self) -> tuple[str, TensorEntry]:
        """Read one tensor's name, type and shape; its place counts from where the data begins."""
        name = self.text(MAX_NAME_LENGTH)
        rank = self.number("I")
        if rank > MAX_RANK:
            raise self.damaged(f"{name!r} has {rank} dimensions")
        shape = tuple(self.number("Q") for _ in range(rank))[::-1]
        type_, begin = self.number("I"), self.number("Q")
        if type_ not in BLOCKS:
            what = _REFUSED.get(type_, f"of the unknown type {type_}")
            fix = "use a file in one of Q2_K to Q6_K, Q4_0 to Q8_0, IQ4_NL, IQ4_XS, F16, BF16 or F32"
            raise CheckpointError(f"{self.path}: {name!r} is quantised as {what}, which is not supported", fix=fix)
        dtype, elements, block_bytes = BLOCKS[type_]
        count = math.prod(shape)
        if count >= 2**48 or (elements > 1 and (not shape or shape[-1] % elements)):
            raise self.damaged(f"{name!r} has the shape {list(shape)} in blocks of {elements} ({dtype})")
        return name, TensorEntry(dtype, shape, begin, begin + count // elements * block_bytes)


@contextmanager
def _mapped(path: Path) -> Iterator[_Reader]:
    """Map a file for the time of a block."""
    with opened(path) as (file, num_bytes):
        if num_bytes < 24 or file.read(len(MAGIC)) != MAGIC:
            raise CheckpointError(f"{path}: damaged GGUF file: it has {num_bytes} bytes", "download the file again")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            yield _Reader(path, data)
