"""A model file: what it holds, and its tensors, read one at a time."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s2v_flow.errors import CheckpointError
from s2v_flow.files.facts import per_file
from s2v_flow.weights.gguf import BLOCK_SIZES, is_gguf, read_gguf
from s2v_flow.weights.header import TensorEntry, Value, convert_command, opened, read_header
from s2v_flow.weights.names import new_names

if TYPE_CHECKING:
    from torch import Tensor

_MAPPED_BYTES = 2**27
_SHARD = re.compile(r"(?P<model>.+)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})\.safetensors")

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Checkpoint:
    """An open model file. Keys are given in one spelling, see `new_names`; `file_keys` has them as stored.

    Opening reads the header only, and needs no torch. Use `Checkpoint.open`. `gguf` is a GGUF file's metadata, None for
    a safetensors file.
    """

    path: Path
    metadata: Mapping[str, str]
    entries: Mapping[str, TensorEntry]
    file_keys: Mapping[str, str]
    data_begin: int = 0
    gguf: Mapping[str, Value] | None = None
    _handle: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        """Open a safetensors or GGUF file and check its header; no tensor is read.

        Raises:
            MissingError: There is no such file, or it cannot be read.
            RefusedError: The file is a pickle.
            CheckpointError: The file is damaged, truncated or of another format.
        """
        return cls(Path(path), *_described(Path(path)))

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Key to shape."""
        return {key: entry.shape for key, entry in self.entries.items()}

    @cached_property
    def dtypes(self) -> dict[str, str]:
        """Key to dtype, as the file's format spells it ("F32", "BF16", "F8_E4M3", "Q4_K")."""
        return {key: entry.dtype for key, entry in self.entries.items()}

    @property
    def num_bytes(self) -> int:
        """The tensors' bytes in the file."""
        return sum(entry.end - entry.begin for entry in self.entries.values())

    def read_bytes(self, key: str) -> bytes:
        """Read one tensor's bytes, without torch: for short ones that are texts.

        Raises:
            CheckpointError: The file changed since it was opened.
        """
        entry = self.entries[key]
        with opened(self.path) as (file, _):
            file.seek(self.data_begin + entry.begin)
            found = file.read(entry.end - entry.begin)
        if len(found) != entry.end - entry.begin:
            raise CheckpointError(f"{self.path}: {key!r} cannot be read any more")
        return found

    def tensor(self, key: str) -> Tensor:
        """Read one tensor, of those that there are: on the CPU, in the stored dtype, mapped from the file.

        Pages are read when they are used. Of GGUF's block types it is the bytes, uint8 [..., bytes of a row], or
        [blocks, bytes] where a row is not made of whole blocks.

        Raises:
            CheckpointError: The file changed since it was opened.
        """
        if self.gguf is not None:
            return self._block_tensor(self.entries[key])
        from safetensors import SafetensorError, safe_open

        try:
            if "file" not in self._handle:
                self._handle["file"] = safe_open(self.path, framework="pt", device="cpu")
            value: Tensor = self._handle["file"].get_tensor(self.file_keys[key])
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self.path}: cannot be read any more: {error}") from error
        return value

    def let_go(self, key: str) -> None:
        """Say that a tensor was copied: what was mapped for such ones is given back every 128 MiB, unless in use."""
        entry = self.entries[key]
        self._handle["copied"] = self._handle.get("copied", 0) + entry.end - entry.begin
        if self._handle["copied"] > _MAPPED_BYTES:
            self._handle.clear()

    def _block_tensor(self, entry: TensorEntry) -> Tensor:
        import torch

        try:
            if "bytes" not in self._handle:
                size = self.path.stat().st_size
                self._handle["bytes"] = torch.from_file(str(self.path), shared=False, size=size, dtype=torch.uint8)
            stored: Tensor = self._handle["bytes"][entry.begin : entry.end]
        except (OSError, RuntimeError) as error:
            raise CheckpointError(f"{self.path}: cannot be read any more: {error}") from error
        if len(stored) != entry.end - entry.begin:
            raise CheckpointError(f"{self.path}: cannot be read any more: it has become shorter")
        elements, size = BLOCK_SIZES[entry.dtype]
        if elements > 1:
            if entry.shape[-1] % elements:  # a converter has rearranged its rows to fill blocks
                return stored.view(-1, size)
            return stored.view(*entry.shape[:-1], entry.shape[-1] // elements * size)
        dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[entry.dtype]
        aligned = stored if entry.begin % size == 0 else stored.clone()
        return aligned.view(dtype).view(entry.shape)


@per_file
def _described(
    path: Path,
) -> tuple[Mapping[str, str], Mapping[str, TensorEntry], Mapping[str, str], int, Mapping[str, Value] | None]:
    """Return a checkpoint's metadata, entries, keys as stored, where its data begins, and GGUF's metadata."""
    refuse_shard(path)
    header = read_gguf(path) if path.is_file() and is_gguf(path) else read_header(path)
    try:
        file_keys = {key: stored for stored, key in new_names(header.entries).items()}
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    entries = {key: header.entries[stored] for key, stored in file_keys.items()}
    return header.metadata, entries, file_keys, header.data_begin, header.gguf


def refuse_shard(path: Path) -> None:
    """Refuse one of several files of a model by its name, as transformers and diffusers give it.

    Raises:
        CheckpointError: It is one.
    """
    shard = _SHARD.fullmatch(path.name)
    if shard is None or int(shard["count"]) < 2 or not path.is_file():
        return
    index = path.with_name(f"{shard['model']}.safetensors.index.json")
    fix = f"join them: {convert_command(index)}"
    if not index.is_file():
        fix = f"download {index.name} and the other parts into its folder, and {fix}"
    raise CheckpointError(f"{path}: is part {int(shard['number'])} of {int(shard['count'])} of a model", fix)
