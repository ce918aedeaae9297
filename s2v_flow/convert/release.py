"""The authors' own release of the model: what its files are called, and how their keys become those of ComfyUI's files.

Only the text encoder is spelt differently. The diffusion model (in shards), the VAE and the audio encoder have the same
keys there and here.

Source: Wan-Video/Wan2.2, wan/configs/wan_s2v_14B.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO

from s2v_flow.errors import CheckpointError, MissingError
from s2v_flow.weights.family import KINDS, describe_mismatch, detect_family, is_all_in_one, part_of
from s2v_flow.weights.layout import TOKENIZER_KEY
from s2v_flow.weights.names import new_names
from s2v_flow.weights.reader import Shapes
from s2v_flow.weights.tensor_stream import Piece, Progress, in_dtype, write_tensors

RELEASE_FOLDER = "Wan2.2-S2V-14B"
TOKENIZER_FILE = "google/umt5-xxl/spiece.model"  # beside the text encoder

# by the models folder in which what is made of them belongs
RELEASE_FILES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "text_encoders": ("models_t5_umt5-xxl-enc-bf16.pth",),
        "vae": ("Wan2.1_VAE.pth",),
        "diffusion_models": ("diffusion_pytorch_model.safetensors.index.json",),
        "audio_encoders": (
            "wav2vec2-large-xlsr-53-english/model.safetensors",
            "wav2vec2-large-xlsr-53-english/pytorch_model.bin",
        ),
    }
)

_UNUSED = ("umt5xxl.logit_scale",)  # ComfyUI saves it with every text encoder
_MAX_TOKENIZER_BYTES = 64 * 2**20


def kind_of(shapes: Shapes, wanted: str = "auto") -> str:
    """Say which kind of model a file holds.

    Args:
        shapes: Key to shape, the keys as `new_names` gives them.
        wanted: What it has to be, or "auto".

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
    """What is to be made: the kind it must have, the dtype, texts for the header, a text encoder's tokenizer."""

    kind: str = "auto"
    dtype: str = "keep"
    metadata: Mapping[str, str] = field(default_factory=dict)
    tokenizer: Path | None = None


def write_model(file: BinaryIO, pieces: Sequence[Piece], wanted: Wanted, on_progress: Progress) -> None:
    """Write tensors of the authors' release as the loaders take them: keys, dtype, tokenizer.

    Raises:
        MissingError: A tokenizer is needed, and is not there.
        CheckpointError: The tensors are no model that is known.
        S2VFlowError: They cannot be written.
    """
    pieces = _of_one_model(pieces, wanted.kind)
    names = new_names([piece.name for piece in pieces])
    pieces = [in_dtype(replace(piece, name=names[piece.name]), wanted.dtype) for piece in pieces]
    kind = kind_of({piece.name: piece.shape for piece in pieces}, wanted.kind)
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
        raise MissingError(f"{path}: cannot be read: {error.strerror}") from error


def _read_tokenizer(path: Path | None) -> bytes:
    if path is None:
        fix = f"name it with --tokenizer; in the authors' release it is {TOKENIZER_FILE}"
        raise MissingError("this is a text encoder without its tokenizer", fix)
    with open_file(path) as file:
        raw = file.read(_MAX_TOKENIZER_BYTES + 1)
    if len(raw) > _MAX_TOKENIZER_BYTES:
        raise CheckpointError(f"{path}: is too large for a tokenizer", fix=f"name {TOKENIZER_FILE} of the release")
    return raw
