"""`s2vflow models convert`: one safetensors file of the authors' own files, whole or not at all.

A pickle is opened in a process of its own (`convert.pickle`); shards and safetensors files are copied block by block.
Whatever made the file, it is checked as any model file is before it gets its name.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from s2v_flow.convert.pickle import convert_pickle
from s2v_flow.convert.release import (
    INDEX_SUFFIX,
    TOKENIZER_FILE,
    Progress,
    Shards,
    Wanted,
    kind_of,
    open_shards,
    open_single,
    write_model,
)
from s2v_flow.errors import CheckpointError, MissingError, RefusedError, S2VFlowError, UsageError
from s2v_flow.files.atomic import TakenError, finish, flush_folder, put_new, reap, temporary, writing
from s2v_flow.files.facts import file_digest
from s2v_flow.version import __version__
from s2v_flow.weights.header import is_pickle
from s2v_flow.weights.layout import TOKENIZER_KEY
from s2v_flow.weights.quantization import read_quantization
from s2v_flow.weights.reader import Checkpoint, refuse_shard

_VERSION, _DIGESTS = "s2vflow_version", "s2vflow_source_sha256"


@dataclass(frozen=True)
class Request:
    """What to convert: the source (a file, or a folder with an index of shards), the target, and how.

    `kind` is what the source has to be, "auto" anything that is known; `dtype` is "keep", "bf16", "fp16" or "fp32";
    `tokenizer` is a text encoder's, looked for beside the source unless given.
    """

    source: Path
    target: Path
    kind: str = "auto"
    dtype: str = "keep"
    tokenizer: Path | None = None
    overwrites: bool = False


@dataclass(frozen=True)
class Converted:
    """What was made: the file, the kind of model, how many tensors and bytes, the sources' sha256, remarks."""

    target: Path
    kind: str
    num_tensors: int
    num_bytes: int
    source_sha256: Mapping[str, str]
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return what `s2vflow models convert --json` prints."""
        return {
            "target": str(self.target),
            "kind": self.kind,
            "tensors": self.num_tensors,
            "bytes": self.num_bytes,
            "source_sha256": dict(self.source_sha256),
            "notes": list(self.notes),
        }


def convert(request: Request, on_progress: Progress = lambda done, total: None) -> Converted:
    """Make a safetensors file that the loaders take, of a pickle, of shards, or of another safetensors file.

    `on_progress`: called with the bytes that are written, and all.

    Raises:
        MissingError: A source or the tokenizer is missing.
        CheckpointError: A source is damaged, or is no model that is known.
        RefusedError: A source holds more than tensors, or names files outside its folder.
        S2VFlowError: The target is there already or cannot be written.
    """
    shards = _shards(request.source)
    sources = [request.source] if shards is None else list(shards.files)
    _check_target(request, sources)
    with writing(request.target):
        request.target.parent.mkdir(parents=True, exist_ok=True)
    reap(request.target.parent)
    before = [_identity(path) for path in sources]
    digests = {path.name: file_digest(path) for path in sources}
    metadata = {_VERSION: __version__, _DIGESTS: " ".join(digests.values())}
    if shards is not None:
        metadata = {**shards.metadata, **metadata}
    beside = request.source.parent / TOKENIZER_FILE
    tokenizer = request.tokenizer or (beside if beside.is_file() else None)
    wanted = Wanted(request.kind, request.dtype, metadata, tokenizer, request.tokenizer is not None)
    notes: tuple[str, ...] = ()
    with writing(request.target), temporary(request.target.parent, ".safetensors") as (file, name):
        if shards is not None:
            _from_shards(request.source, shards, wanted, file, on_progress)
        elif num_left_out := convert_pickle(request.source, file, wanted, on_progress):
            notes = (f"{num_left_out} other entries beside the state dict were left out",)
        finish(file)
        if [_identity(path) for path in sources] != before:
            raise CheckpointError(f"{request.source}: changed while it was read", "wait until it is completely written")
        kind, num_tensors = _verify(Path(name), request, metadata)
        num_bytes = os.stat(name).st_size
        _publish(name, request)
    return Converted(request.target, kind, num_tensors, num_bytes, digests, notes)


def _shards(source: Path) -> Shards | None:
    """Open what is no pickle: a folder's or a file's shards, or a single file."""
    if source.is_dir():
        indexes = sorted(source.glob(f"*{INDEX_SUFFIX}"))
        if len(indexes) != 1:
            what = f"a folder is converted if it holds one *{INDEX_SUFFIX}, and this one holds {len(indexes)}"
            raise MissingError(f"{source}: {what}", fix="name the file")
        return open_shards(indexes[0])
    if source.name.endswith(".json"):
        return open_shards(source)
    refuse_shard(source)
    return None if is_pickle(source) else open_single(source)


def _check_target(request: Request, sources: Sequence[Path]) -> None:
    target = request.target
    if target.suffix != ".safetensors":
        raise UsageError(f"-o {target}: its name has to end in .safetensors")
    if target.exists():
        if any(os.path.samefile(target, source) for source in sources):
            raise UsageError(f"-o {target}: is the source itself", "name another file")
        if not request.overwrites or not target.is_file():
            raise _there_already(target)


def _there_already(target: Path) -> S2VFlowError:
    return UsageError(f"{target}: is there already", "name another file with -o, or overwrite it with --force")


def _from_shards(source: Path, shards: Shards, wanted: Wanted, file: BinaryIO, on_progress: Progress) -> None:
    try:
        write_model(file, shards.pieces, wanted, on_progress)
    except S2VFlowError as error:
        error.message = f"{source}: {error.message}"
        raise


def _verify(path: Path, request: Request, metadata: Mapping[str, str]) -> tuple[str, int]:
    """Check a finished file as untrusted input; return its kind and how many tensors it has."""
    checkpoint = Checkpoint.open(path)
    names = checkpoint.file_keys.values()
    if checkpoint.metadata != metadata or not all(name.isprintable() for name in names):
        raise RefusedError(f"{request.source}: the result is not what was asked for, and was removed")
    kind = kind_of(checkpoint.shapes, request.kind)
    try:
        read_quantization(checkpoint)
    except CheckpointError as error:
        error.message = error.message.replace(str(path), str(request.source))
        raise
    if kind == "text_encoder":
        from s2v_flow.weights.tokenizer import read_tokenizer

        read_tokenizer(checkpoint.tensor(TOKENIZER_KEY).numpy().tobytes(), str(request.tokenizer or request.source))
    return kind, len(checkpoint.entries)


def _publish(name: str, request: Request) -> None:
    """Give a finished file its name, and overwrite nothing that appeared meanwhile."""
    if request.overwrites:
        os.replace(name, request.target)
    else:
        try:
            put_new(name, request.target)
        except TakenError as error:
            raise _there_already(request.target) from error
    flush_folder(request.target.parent)


def _identity(path: Path) -> tuple[int, int, int]:
    status = os.stat(path)
    return status.st_ino, status.st_size, status.st_mtime_ns
