"""Read a safetensors header, every bound checked, without torch: what a model file holds, before anything is loaded.

Source: safetensors, README.md, "Format" (8 bytes of little-endian header length, JSON, one contiguous data section).
"""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import stat
import struct
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from s2v_flow.errors import CheckpointError, MissingError, RefusedError

MAX_HEADER_BYTES = 16 * 2**20
MAX_HEADER_VALUES = 1_000_000  # 14B models need about 20,000; bounds the parser's memory
MAX_RANK = 16
MAX_NAME_LENGTH = 1000  # messages name tensors
_MAX_DETAIL = 500
_START_BYTES = 4096

ITEM_BYTES: Mapping[str, int] = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip

_PICKLE_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".pkl", ".pickle", ".pt2")
_FOREIGN_STARTS: Sequence[tuple[int, bytes, str]] = (  # where in the file, what stands there, what that means
    (0, b"GGUF", "a GGUF file, which is loaded as it is and not converted"),
    (0, b"PK", "a zip archive without a model of PyTorch's: unpack it, and name the file that was in it"),
    (0, b"\x1f\x8b", "an archive (gzip): unpack it, and name the file that was in it"),
    (0, b"7z\xbc\xaf", "an archive (7z): unpack it, and name the file that was in it"),
    (0, b"Rar!", "an archive (rar): unpack it, and name the file that was in it"),
    (0, b"\xfd7zXZ", "an archive (xz): unpack it, and name the file that was in it"),
    (0, b"(\xb5/\xfd", "an archive (zstd): unpack it, and name the file that was in it"),
    (0, b"\x89HDF", "an HDF5 file of Keras's, which is not supported"),
    (0, b"\x93NUMPY", "an array of NumPy's, not a model"),
    (4, b"TFL3", "a TensorFlow Lite model, which is not supported"),
    (0, b"\x89PNG", "a picture, not a model"),
    (0, b"\xff\xd8\xff", "a picture, not a model"),
    (0, b"RIFF", "a picture or sound, not a model"),
    (4, b"ftyp", "a video or sound, not a model"),
)
_ONNX = re.compile(rb"\x08[\x01-\x20][\x12\x3a\x42]")  # an ir_version, then the producer, the graph or the opset
_LFS = re.compile(r"version https://git-lfs\S*\s.*?^size ([0-9]+)", re.DOTALL | re.MULTILINE)
_MARKUP = re.compile(r"<(script|style).*?(</\1>|$)|<[^>]*(>|$)", re.DOTALL)
_SHOWN_TEXT = 160


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of the header: its dtype as safetensors spells it, its shape, and its bytes in the data section."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Array:
    """An array of a GGUF file's metadata, not read: its items' type and number, and where they begin."""

    type: int
    count: int
    begin: int


Value = bool | int | float | str | Array


@dataclass(frozen=True)
class Header:
    """A checked header: the tensors by name, in file order, the free-form metadata, and where the data begins.

    Of a GGUF file: tensors by name in ComfyUI's spelling, their places counted from the file's start, and its `gguf`.
    """

    entries: Mapping[str, TensorEntry]
    metadata: Mapping[str, str] = field(default_factory=dict)
    data_begin: int = 0
    gguf: Mapping[str, Value] | None = None


def read_header(path: Path, *, any_name: bool = False) -> Header:
    """Read and check the header of a safetensors file; the data section is not touched.

    The tensors cover that without gap or overlap. Names and contents that promise a pickle are refused unread; with
    `any_name` only the contents count.

    Raises:
        MissingError: There is no such file, or it cannot be read.
        RefusedError: The file is a pickle.
        CheckpointError: The file is damaged, truncated or of another format.
    """
    if path.suffix.lower() in _PICKLE_SUFFIXES and not any_name:
        raise _pickle_refused(path)
    with opened(path) as (file, file_bytes):
        return _parse(path, file, file_bytes)


def is_pickle(path: Path) -> bool:
    """Tell by a file's first bytes whether it is a pickle: plain, in a zip or in a tar. Nothing is unpickled.

    Raises:
        MissingError: There is no such file, or it cannot be read.
        CheckpointError: It is not a regular file.
    """
    with opened(path) as (file, file_bytes):
        start = file.read(_START_BYTES)
        return not _is_header_start(start, file_bytes) and _is_pickle(file, start)


@contextmanager
def opened(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """Open a regular file to read; yield it and its size in bytes.

    Raises:
        MissingError: There is no such file, or it cannot be read.
        CheckpointError: It is not a regular file.
    """
    try:
        # O_NONBLOCK: opening a named pipe must not wait for a writer
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        with open(descriptor, "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise CheckpointError(f"{path}: is not a regular file", fix="name a .safetensors file")
            yield file, status.st_size
    except FileNotFoundError as error:
        raise MissingError(f"{path}: no such file", fix="check its name, or download it") from error
    except OSError as error:
        raise MissingError(f"{path}: cannot be read: {error.strerror}", "check its permissions") from error


def _parse(path: Path, file: BinaryIO, file_bytes: int) -> Header:
    start = file.read(_START_BYTES)
    length = int.from_bytes(start[:8], "little")
    if not file_bytes:
        raise _damaged(path, "it has 0 bytes")
    if not _is_header_start(start, file_bytes):
        _explain_foreign(path, file, start)
    if file_bytes < 8:
        raise _damaged(path, f"it has {file_bytes} bytes; the header's length alone takes 8")
    if length > MAX_HEADER_BYTES:
        raise _damaged(path, f"its header claims {length} bytes; at most {MAX_HEADER_BYTES} are accepted")
    if 8 + length > file_bytes:
        raise _damaged(path, f"its header needs {8 + length} bytes, but the file has {file_bytes} (truncated?)")
    file.seek(8)
    tree = parse_map(path, file.read(length))
    metadata = tree.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(type(value) is str for value in metadata.values()):
        raise _damaged(path, "its __metadata__ is not a map of texts")
    longest = max(map(len, tree), default=0)
    if longest > MAX_NAME_LENGTH:
        raise _damaged(path, f"a tensor's name has {longest} characters; at most {MAX_NAME_LENGTH} are accepted")
    entries = {name: _entry(path, name, value) for name, value in tree.items()}
    _check_layout(path, entries, file_bytes - 8 - length)
    return Header(entries, metadata, 8 + length)


def _is_header_start(start: bytes, file_bytes: int) -> bool:
    return start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= file_bytes


def _is_pickle(file: BinaryIO, start: bytes) -> bool:
    if start.startswith(b"PK"):
        try:
            with zipfile.ZipFile(file) as archive:
                return any(name.endswith("data.pkl") for name in archive.namelist())
        except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError, LookupError, struct.error):
            return True  # damaged: what it was to be is unknown
    is_plain = start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")
    return is_plain or start[257:262] == b"ustar"


def _explain_foreign(path: Path, file: BinaryIO, start: bytes) -> None:
    """Say what a file is that does not begin as a safetensors file does, if that is known."""
    if _is_pickle(file, start):
        raise _pickle_refused(path)
    fix = "name a .safetensors file, or download the .safetensors file again"
    for place, mark, what in _FOREIGN_STARTS:
        if start[place:].startswith(mark):
            as_it_is = "put it into a models folder, and name it as the checkpoint of a load node"
            raise CheckpointError(f"{path}: is {what}", as_it_is if mark == b"GGUF" else fix)
    if _ONNX.match(start) or path.suffix.lower() == ".onnx":
        raise CheckpointError(f"{path}: is an ONNX model, which is not supported", fix)
    text = _text(start)
    if text is None:
        return
    pointer = _LFS.match(text)
    if pointer is not None:
        what = f"{path}: is a Git LFS pointer, not the file itself, which has {pointer[1]} bytes"
        raise CheckpointError(what, fix="run `git lfs pull` in its repository, or download the file itself")
    if text.startswith("{") and '"weight_map"' in text:
        raise CheckpointError(f"{path}: is an index of shards, not a model", f"join them: {convert_command(path)}")
    is_page = text.startswith("<")
    words = " ".join((_MARKUP.sub(" ", text) if is_page else text).split())
    words = words if len(words) <= _SHOWN_TEXT else words[:_SHOWN_TEXT] + "..."
    what = "a web page or XML" if is_page else "text"
    said = f"; it says {words!r}" if words else ""
    fix = "download the file again; if it says that a login is needed, log in or accept the model's licence first"
    raise CheckpointError(f"{path}: is {what}, not a model: the download failed{said}", fix)


def _text(start: bytes) -> str | None:
    """Return what a file begins with, if that is text: UTF-8, or nearly."""
    text = start.decode("utf-8-sig", "replace").strip()
    is_text = all(character.isprintable() or character in "\t\r\n" for character in text)
    return text if text and is_text and 10 * text.count("\ufffd") <= len(text) else None


def _pickle_refused(path: Path) -> RefusedError:
    what = f"{path}: is a pickle (PyTorch's older format), which can run code when opened; it was not opened"
    return RefusedError(what, fix=f"convert it first: {convert_command(path)}")


def convert_command(source: Path, target: Path | None = None, *more: str) -> str:
    """Return the command line that makes a safetensors file of a model in another form: `target`, or one beside it."""
    if target is None:
        target = source.with_name(source.name.removesuffix(".index.json")).with_suffix(".safetensors")
        target = source.with_name(f"{source.stem}-converted.safetensors") if target == source else target
    return shlex.join(["s2vflow", "models", "convert", str(source), "-o", str(target), *more])


def _damaged(path: Path, what: str) -> CheckpointError:
    what = what if len(what) <= _MAX_DETAIL else what[:_MAX_DETAIL] + "..."
    return CheckpointError(f"{path}: damaged or not a safetensors file: {what}", fix="download or copy the file again")


def parse_map(path: Path, raw: bytes, what: str = "header") -> dict[str, Any]:
    """Parse a JSON map, its size bounded, no name twice; `what`: which part of the file it is, for messages.

    Raises:
        CheckpointError: It is none.
    """
    if sum(raw.count(mark) for mark in (b",", b"[", b"{")) > MAX_HEADER_VALUES:
        raise _damaged(path, f"its {what} holds more than {MAX_HEADER_VALUES} values")

    def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        tree: dict[str, Any] = {}
        for name, value in pairs:
            if name in tree:
                raise _damaged(path, f"its {what} names {name!r} twice")
            tree[name] = value
        return tree

    try:
        tree = json.loads(raw.decode("utf-8"), object_pairs_hook=without_repeats)
    except RecursionError:
        raise _damaged(path, f"its {what} is nested too deeply") from None
    except ValueError as error:
        raise _damaged(path, f"its {what} is not JSON ({error})") from error
    if not isinstance(tree, dict):
        raise _damaged(path, f"its {what} is not a map")
    return tree


def _entry(path: Path, name: str, value: object) -> TensorEntry:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise _damaged(path, f"{name!r} lacks dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        what = f"{path}: {name!r} has the dtype {repr(dtype)[:40]}, which is not supported"
        raise CheckpointError(what, "use a file in bf16, fp16, fp32 or fp8 (e4m3fn, e5m2)")
    if not _is_counts(shape) or len(shape) > MAX_RANK or not _is_counts(offsets) or len(offsets) != 2:
        raise _damaged(path, f"{name!r} has the shape {shape!r} and data_offsets {offsets!r}")
    begin, end = offsets
    expected = math.prod(shape) * ITEM_BYTES[dtype]
    if end - begin != expected:
        raise _damaged(path, f"{name!r} ({dtype} {shape}) needs {expected} bytes, but its offsets give {end - begin}")
    return TensorEntry(dtype, tuple(shape), begin, end)


def _is_counts(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def _check_layout(path: Path, entries: Mapping[str, TensorEntry], data_bytes: int) -> None:
    position = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != position:
            raise _damaged(path, f"{name!r} starts at byte {entry.begin} of the data, expected {position}")
        position = entry.end
    if position != data_bytes:
        what = f"its tensors need {position} bytes of data, but the file has {data_bytes}"
        lacking = position - data_bytes
        raise _damaged(path, what if lacking < 0 else f"{what} (truncated?): the file is {lacking} bytes short")
