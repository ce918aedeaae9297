"""A prompt's tokens: UMT5's tokenizer, which stands inside the text encoder's file. No torch here."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from s2v_flow.errors import CheckpointError
from s2v_flow.weights.layout import TOKENIZER_KEY

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

MAX_TOKENS = 512  # the last of them ends the text
EOS_ID = 1
_SPACE = "\u2581"  # in pieces
_NUM_LAST_WORDS = 6


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
        raise CheckpointError(
            what, "name the spiece.model of google/umt5-xxl (tokenizer.json is another form)"
        ) from error
    return processor


def tokens(tokenizer: SentencePieceProcessor, text: str) -> list[int]:
    """Return every token id of `text`, however many; brackets and escapes mean nothing."""
    ids: list[int] = tokenizer.encode(text, out_type=int, add_bos=False, add_eos=False)
    return ids


def is_surely_short(text: str) -> bool:
    """Return whether a prompt cannot have more than 512 tokens: none is shorter than a byte of the normalised text."""
    return len(unicodedata.normalize("NFKC", text).encode("utf-8", "replace")) < MAX_TOKENS - 1


def measure(path: Path, text: str | Sequence[str], given: Path | None = None) -> tuple[int, str]:
    """Count a prompt's tokens with the tokenizer of a text encoder.

    Args:
        path: The text encoder's file.
        text: The prompt, or its parts, where each is tokenised by itself.
        given: A tokenizer's own file, where there is one.

    Returns:
        How many tokens there are, the end of the text included, and the last words among the first 512 of them.

    Raises:
        CheckpointError: The tokenizer is missing or damaged.
    """
    from s2v_flow.weights.reader import Checkpoint
    from s2v_flow.weights.tokenizer import find_tokenizer

    tokenizer = read_tokenizer(find_tokenizer(Checkpoint.open(path), given), str(given or path))
    parts = [text] if isinstance(text, str) else list(text)
    pieces = [piece for part in tokenizer.encode(parts, out_type=str, add_bos=False, add_eos=False) for piece in part]
    kept = "".join(pieces[: MAX_TOKENS - 1]).replace(_SPACE, " ")
    return len(pieces) + 1, " ".join(kept.split()[-_NUM_LAST_WORDS:])
