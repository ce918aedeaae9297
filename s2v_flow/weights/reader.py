"""A model file: what it holds, which family it is of, and its tensors, read one at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s2v_flow.errors import CheckpointError
from s2v_flow.weights.header import TensorEntry, read_header

if TYPE_CHECKING:
    from torch import Tensor

KEY_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "wav2vec2.")
LORA_SUFFIXES = (".lora_down.weight", ".lora_up.weight", ".lora_A.weight", ".lora_B.weight")

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

    @property
    def family(self) -> str:
        """What kind of model this is, in words (see `detect_family`)."""
        return detect_family(self.shapes)

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


def common_prefix(keys: Mapping[str, object]) -> str:
    """Return the prefix that some files put before a model's keys, or nothing."""
    if any(key.endswith(LORA_SUFFIXES) for key in keys):
        return ""  # a LoRA's keys are reported as the file spells them
    for prefix in KEY_PREFIXES:
        if any(key.startswith(prefix) for key in keys):
            return prefix
    return ""


def detect_family(shapes: Shapes) -> str:
    """Say what kind of model a file holds, from its keys and shapes.

    Args:
        shapes: Key to shape, without the file's prefix.

    Returns:
        "lora", "wan s2v", "wan i2v", "wan t2v", "wan vae", "wan 2.2 vae", "umt5 encoder", "t5 encoder", "wav2vec2",
        or "unknown (...)" with the first key.
    """
    if any(key.endswith(LORA_SUFFIXES) for key in shapes):
        return "lora"
    if "casual_audio_encoder.encoder.final_linear.weight" in shapes:
        return "wan s2v"
    if "head.modulation" in shapes and "blocks.0.self_attn.q.weight" in shapes:
        takes_image = "img_emb.proj.0.weight" in shapes or shapes.get("patch_embedding.weight", (0, 0))[1:2] == (36,)
        return "wan i2v" if takes_image else "wan t2v"
    if "decoder.head.0.gamma" in shapes:
        return "wan 2.2 vae" if shapes.get("conv2.weight", (16,))[:1] == (48,) else "wan vae"
    if "encoder.block.0.layer.0.SelfAttention.q.weight" in shapes:
        # T5 has a position bias in its first layer only
        last = "encoder.block.1.layer.0.SelfAttention."
        return (
            "t5 encoder"
            if last + "q.weight" in shapes and last + "relative_attention_bias.weight" not in shapes
            else "umt5 encoder"
        )
    if "feature_extractor.conv_layers.0.conv.weight" in shapes:
        return "wav2vec2"
    return f"unknown ({len(shapes)} tensors, the first {min(shapes, default='')!r})"


def describe_mismatch(wanted: str, shapes: Shapes) -> str | None:
    """Explain why a file is not of the wanted family, naming what it lacks.

    Args:
        wanted: A family, as `detect_family` spells it.
        shapes: Key to shape, without the file's prefix.

    Returns:
        A clause ("this is a wan t2v checkpoint: it has no audio_injector.*"), or None if the family fits.
    """
    found = detect_family(shapes)
    if found == wanted:
        return None
    lacks = {
        "wan s2v": "audio_injector.*",
        "wan vae": "decoder.head.0.gamma of the 16-channel VAE",
        "umt5 encoder": "encoder.block.*.SelfAttention.relative_attention_bias",
        "wav2vec2": "feature_extractor.conv_layers.*",
        "lora": "lora_down, lora_up, lora_A or lora_B",
    }[wanted]
    return (
        f"this is a {found} file: it has no {lacks}"
        if "unknown" in found
        else f"this is a {found} checkpoint: it has no {lacks}"
    )
