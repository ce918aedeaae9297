"""Files as torch.save writes them, and such as it never would: forged zips, pickles that ask for too much."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

# The authors' spelling of the text encoder's keys, from ComfyUI's; read off wan/modules/t5.py, T5Encoder.
AUTHORS_TEXT_KEYS = (
    ("encoder.final_layer_norm", "norm"),
    ("encoder.block.", "blocks."),
    (".layer.0.SelfAttention.relative_attention_bias", ".pos_embedding.embedding"),
    (".layer.0.SelfAttention.", ".attn."),
    (".layer.0.layer_norm", ".norm1"),
    (".layer.1.layer_norm", ".norm2"),
    (".layer.1.DenseReluDense.wi_0", ".ffn.gate.0"),
    (".layer.1.DenseReluDense.wi_1", ".ffn.fc1"),
    (".layer.1.DenseReluDense.wo", ".ffn.fc2"),
    ("shared.", "token_embedding."),
)


def authors_text_key(key: str) -> str:
    """Return the authors' name of a text encoder's tensor."""
    for ours, theirs in AUTHORS_TEXT_KEYS:
        key = key.replace(ours, theirs)
    return key


@dataclass(frozen=True)
class Calls:
    """Makes a directory where it is unpickled."""

    trace: Path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.trace),)


@dataclass(frozen=True)
class FakeStorage:
    """A storage of so many float32 numbers, as a pickle claims it."""

    count: int
    key: str = "0"


@dataclass(frozen=True)
class FakeTensor:
    """A tensor as a pickle describes it, true or not."""

    storage: FakeStorage
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int = 0

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        arguments = (self.storage, self.offset, self.shape, self.stride, False, OrderedDict())
        return torch._utils._rebuild_tensor_v2, arguments


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: Any) -> Any:
        if isinstance(value, FakeStorage):
            return ("storage", torch.FloatStorage, value.key, "cpu", value.count)
        return None


class _LegacyPickler(_Pickler):
    def persistent_id(self, value: Any) -> Any:
        found = super().persistent_id(value)
        return None if found is None else (*found, None)


def pickled(value: object, pickler: type[_Pickler] = _Pickler) -> bytes:
    """Return a value's pickle, fakes included."""
    buffer = io.BytesIO()
    pickler(buffer, 2).dump(value)
    return buffer.getvalue()


def forge_legacy(path: Path, value: object) -> Path:
    """Write torch.save's older form around any value, with one storage, "0", of 64 bytes."""
    sizes = {"short": 2, "int": 4, "long": 4}
    head = (0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": sizes})
    parts = [*map(pickled, head), pickled(value, _LegacyPickler), pickled(["0"])]
    path.write_bytes(b"".join(parts) + (16).to_bytes(8, "little") + bytes(64))
    return path


def forge(path: Path, value: object, *, storages: Mapping[str, bytes] | None = None, packed: bool = False) -> Path:
    """Write a zip in torch.save's layout around any pickle.

    Args:
        path: Where to write it.
        value: What the pickle holds; bytes are taken as a pickle.
        storages: The data by their keys; 64 bytes as "0" unless given.
        packed: Compress the parts.
    """
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", value if isinstance(value, bytes) else pickled(value))
        archive.writestr("archive/byteorder", "little")
        for key, data in ({"0": bytes(64)} if storages is None else storages).items():
            archive.writestr(f"archive/data/{key}", data)
        archive.writestr("archive/version", "3\n")
    return path
