"""A model file: what it holds, and its tensors, read one at a time."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s2v_flow.errors import CheckpointError
from s2v_flow.weights.header import TensorEntry, convert_command, read_header

if TYPE_CHECKING:
    from torch import Tensor

KEY_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "wav2vec2.")
LORA_SUFFIXES = (".lora_down.weight", ".lora_up.weight", ".lora_A.weight", ".lora_B.weight")

_SHARD = re.compile(r"(?P<model>.+)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})\.safetensors")

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Checkpoint:
    """An open model file. Keys are given without the prefix that some files carry; `file_keys` has them as stored.

    Opening reads the header only, and needs no torch. Use `Checkpoint.open`.
    """

    path: Path
    metadata: Mapping[str, str]
    entries: Mapping[str, TensorEntry]
    file_keys: Mapping[str, str]
    prefix: str
    _handle: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        """Open a model file and check its header.

        Args:
            path: A .safetensors file.

        Returns:
            The checkpoint; no tensor has been read.

        Raises:
            MissingError: There is no such file, or it cannot be read.
            RefusedError: The file is a pickle.
            CheckpointError: The file is damaged, truncated or of another format.
        """
        path = Path(path)
        _refuse_shard(path)
        header = read_header(path)
        prefix = common_prefix(header.entries)
        file_keys: dict[str, str] = {}
        for stored in header.entries:
            key = stored[len(prefix) :] if stored.startswith(prefix) else stored
            if key in file_keys:
                raise CheckpointError(f"{path}: holds {key!r} twice, as {file_keys[key]!r} and as {stored!r}")
            file_keys[key] = stored
        entries = {key: header.entries[stored] for key, stored in file_keys.items()}
        return cls(path, header.metadata, entries, file_keys, prefix)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Key to shape."""
        return {key: entry.shape for key, entry in self.entries.items()}

    @cached_property
    def dtypes(self) -> dict[str, str]:
        """Key to dtype, as safetensors spells it ("F32", "BF16", "F8_E4M3")."""
        return {key: entry.dtype for key, entry in self.entries.items()}

    @property
    def num_bytes(self) -> int:
        """The tensors' bytes in the file."""
        return sum(entry.end - entry.begin for entry in self.entries.values())

    def tensor(self, key: str) -> Tensor:
        """Read one tensor.

        Args:
            key: Its key, without the file's prefix.

        Returns:
            A CPU tensor in the stored dtype, mapped from the file: pages are read when they are used.

        Raises:
            KeyError: The file holds no such tensor.
            CheckpointError: The file changed since it was opened.
        """
        from safetensors import SafetensorError, safe_open

        try:
            if not self._handle:
                self._handle["file"] = safe_open(self.path, framework="pt", device="cpu")
            value: Tensor = self._handle["file"].get_tensor(self.file_keys[key])
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self.path}: cannot be read any more: {error}") from error
        return value


def _refuse_shard(path: Path) -> None:
    """Refuse one of several files of a model by its name, as transformers and diffusers give it."""
    shard = _SHARD.fullmatch(path.name)
    if shard is None or int(shard["count"]) < 2 or not path.is_file():
        return
    index = path.with_name(f"{shard['model']}.safetensors.index.json")
    fix = f"join them: {convert_command(index)}"
    if not index.is_file():
        fix = f"download {index.name} and the other parts into its folder, and {fix}"
    raise CheckpointError(f"{path}: is part {int(shard['number'])} of {int(shard['count'])} of a model", fix)


def common_prefix(keys: Mapping[str, object]) -> str:
    """Return the prefix that some files put before a model's keys, or nothing."""
    if any(key.endswith(LORA_SUFFIXES) for key in keys):
        return ""  # a LoRA's keys are reported as the file spells them
    for prefix in KEY_PREFIXES:
        if any(key.startswith(prefix) for key in keys):
            return prefix
    return ""
