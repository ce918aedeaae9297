"""A text encoder's tokenizer: inside its file, beside it, or rebuilt from what a GGUF file holds of it; and its tokens.

Source: sentencepiece, src/sentencepiece_model.proto (message and field numbers).
"""

from __future__ import annotations

import struct
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from s2v_flow.errors import CheckpointError
from s2v_flow.weights.gguf import tokenizer_arrays
from s2v_flow.weights.header import Value, opened
from s2v_flow.weights.layout import TOKENIZER_KEY, no_tokenizer
from s2v_flow.weights.reader import Checkpoint

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

MAX_TOKENS = 512  # the last of them ends the text
EOS_ID = 1
_SPACE = "\u2581"  # in pieces
_NUM_LAST_WORDS = 6
_MAX_BYTES = 64_000_000
_UNIGRAM = 1
_FIX = "name the spiece.model of google/umt5-xxl"
_IDS = {40: "unknown_token_id", 41: "bos_token_id", 42: "eos_token_id", 43: "padding_token_id"}  # TrainerSpec's fields
_UNUSED, _BYTE = 5, 6


def find_tokenizer(checkpoint: Checkpoint, given: str | Path | None = None) -> bytes:
    """Return a text encoder's SentencePiece model, serialised: that of the `given` file, else the one inside its own.

    Raises:
        MissingError, CheckpointError: The file is missing; there is no tokenizer; it is damaged or too large.
    """
    if given is not None:
        return tokenizer_file(Path(given))
    if checkpoint.gguf is not None:
        return sentencepiece_model(checkpoint.path, checkpoint.gguf)
    entry = checkpoint.entries.get(TOKENIZER_KEY)
    if entry is None:
        raise no_tokenizer(checkpoint.path)
    if entry.dtype != "U8":
        what = f"its tokenizer ({TOKENIZER_KEY!r}) is no bytes"
        raise CheckpointError(f"{checkpoint.path}: {what}", fix="use another file")
    return checkpoint.read_bytes(TOKENIZER_KEY)


def tokenizer_file(path: Path) -> bytes:
    """Read a tokenizer's own file.

    Raises:
        MissingError, CheckpointError: It is missing or too large.
    """
    with opened(path) as (file, num_bytes):
        if num_bytes > _MAX_BYTES:
            raise CheckpointError(f"{path}: is no tokenizer: it has {num_bytes} bytes", _FIX)
        return file.read()


def holds_tokenizer(checkpoint: Checkpoint) -> bool:
    """Tell whether a GGUF file holds a tokenizer."""
    names = {f"tokenizer.ggml.{name}" for name in ("tokens", "scores", "token_type")}
    return checkpoint.gguf is not None and names <= checkpoint.gguf.keys()


def sentencepiece_model(path: Path, metadata: Mapping[str, Value]) -> bytes:
    """Return the model in a GGUF file's metadata as `SentencePieceProcessor.LoadFromSerializedProto` takes it.

    Raises:
        CheckpointError: There is no tokenizer inside, or it is damaged.
    """
    tokens, scores, types, table = tokenizer_arrays(path, metadata)
    pieces = b"".join(
        _bytes(1, _bytes(1, token) + _key(2, 5) + struct.pack("<f", score) + _number(3, type_))
        for token, score, type_ in zip(_distinct(tokens, types), scores, types, strict=True)
    )
    trainer = _number(3, _UNIGRAM) + _number(35, int(_BYTE in types))
    for field, name in _IDS.items():
        found = metadata.get(f"tokenizer.ggml.{name}")
        trainer += _number(field, found if isinstance(found, int) else -1)
    normaliser = _bytes(2, table)
    for field, name in ((3, "add_space_prefix"), (4, "remove_extra_whitespaces")):
        normaliser += _number(field, int(bool(metadata.get(f"tokenizer.ggml.{name}", True))))
    return pieces + _bytes(2, trainer) + _bytes(3, normaliser + _number(5, 1))


def read_tokenizer(model: bytes, name: str) -> SentencePieceProcessor:
    """Read a SentencePiece model; `model`: its serialised form, from the text encoder's file.

    Raises:
        CheckpointError: It is damaged.
    """
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(model)
    except RuntimeError as error:
        what = f"{name}: its tokenizer ({TOKENIZER_KEY}) is damaged, or is no SentencePiece model"
        raise CheckpointError(what, f"{_FIX} (tokenizer.json is another form)") from error
    return processor


def tokens(tokenizer: SentencePieceProcessor, text: str) -> list[int]:
    """Return every token id of `text`, however many; brackets and escapes mean nothing."""
    ids: list[int] = tokenizer.encode(text, out_type=int, add_bos=False, add_eos=False)
    return ids


def is_surely_short(text: str) -> bool:
    """Return whether a prompt cannot have more than 512 tokens: none is shorter than a byte of the normalised text."""
    return len(unicodedata.normalize("NFKC", text).encode("utf-8", "replace")) < MAX_TOKENS - 1


def measure(path: Path, text: str | Sequence[str], given: Path | None = None) -> tuple[int, str]:
    """Count a prompt's tokens with the tokenizer of a text encoder's file, or with the one `given`.

    `text`: the prompt, or its parts, where each is tokenised by itself.

    Returns how many tokens there are, the end of the text included, and the last words among the first 512 of them.

    Raises:
        CheckpointError: The tokenizer is missing or damaged.
    """
    tokenizer = read_tokenizer(find_tokenizer(Checkpoint.open(path), given), str(given or path))
    parts = [text] if isinstance(text, str) else list(text)
    pieces = [piece for part in tokenizer.encode(parts, out_type=str, add_bos=False, add_eos=False) for piece in part]
    kept = "".join(pieces[: MAX_TOKENS - 1]).replace(_SPACE, " ")
    return len(pieces) + 1, " ".join(kept.split()[-_NUM_LAST_WORDS:])


def _distinct(tokens: list[bytes], types: list[int]) -> list[bytes]:
    """Give unused pieces names of their own: converters pad vocabularies with repeated ones, which are refused."""
    return [
        b"<unused %d>" % index if kind == _UNUSED else token
        for index, (token, kind) in enumerate(zip(tokens, types, strict=True))
    ]


def _key(field: int, wire_type: int) -> bytes:
    return _varint(field << 3 | wire_type)


def _number(field: int, value: int) -> bytes:
    return _key(field, 0) + _varint(value % 2**64)


def _bytes(field: int, value: bytes) -> bytes:
    return _key(field, 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 127:
        encoded.append(value & 127 | 128)
        value >>= 7
    return bytes([*encoded, value])
