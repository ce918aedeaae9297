"""UMT5: the reference's features, tokens by T5's rules, and no work on padding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from reference import load_golden, load_keys, relative_error

from s2v_flow.errors import CheckpointError
from s2v_flow.models.encoders import TextEncoder, build_umt5
from s2v_flow.models.load import load_text_encoder, shapes_of
from s2v_flow.weights.tokenizer import EOS_ID, MAX_TOKENS, read_tokenizer

PROMPT = "The man is playing the guitar. He looks down at his hands and sings gently."


@pytest.fixture(scope="module")
def encoder(tiny_models: Path) -> TextEncoder:
    file = tiny_models / "text_encoders" / "tiny_umt5.safetensors"
    return load_text_encoder(file, dtype=torch.float32, device="cpu", quantized=False)


def test_hidden_states_equal_the_reference(encoder: TextEncoder) -> None:
    inputs, outputs, _ = load_golden("components/umt5_tiny")
    hidden = encoder.hidden(inputs["input_ids"], inputs["attention_mask"])
    assert relative_error(hidden, outputs["hidden"]) <= 3e-6


def test_without_padding_the_rows_are_the_reference_rows(encoder: TextEncoder) -> None:
    inputs, outputs, _ = load_golden("components/umt5_tiny")
    for ids, mask, expected in zip(inputs["input_ids"], inputs["attention_mask"], outputs["hidden"], strict=True):
        num_tokens = int(mask.sum())
        hidden = encoder.hidden(ids[None, :num_tokens], mask[None, :num_tokens])
        assert relative_error(hidden[0], expected[:num_tokens]) <= 3e-6
        assert not expected[num_tokens:].any()


def test_full_size_encoder_has_the_released_keys() -> None:
    expected = load_keys("umt5_xxl")
    assert len(expected) == 242
    assert shapes_of(build_umt5(expected)) == expected


def test_prompt_ends_with_eos_and_has_no_other_special_token(encoder: TextEncoder) -> None:
    ids = encoder.tokenize(PROMPT)
    assert ids[-1] == EOS_ID
    assert EOS_ID not in ids[:-1]
    assert 0 not in ids
    assert encoder.encode(PROMPT).shape == (1, len(ids), 64)


def test_empty_prompt_is_the_eos_alone(encoder: TextEncoder) -> None:
    assert encoder.tokenize("") == [EOS_ID]
    assert encoder.encode("").shape == (1, 1, 64)


def test_brackets_are_text(encoder: TextEncoder) -> None:
    assert encoder.tokenize("(guitar:1.2)") != encoder.tokenize("guitar")
    assert len(encoder.tokenize("(guitar:1.2)")) > len(encoder.tokenize("guitar"))


def test_a_long_prompt_is_cut_so_that_eos_is_the_last_of_512(
    encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Tensor] = []
    hidden = encoder.hidden
    monkeypatch.setattr(encoder, "hidden", lambda ids, mask: seen.append(ids) or hidden(ids, mask))
    long = PROMPT * 40
    assert len(encoder.tokenize(long)) > MAX_TOKENS
    assert encoder.encode(long).shape == (1, MAX_TOKENS, 64)
    assert seen[0][0].tolist() == [*encoder.tokenize(long)[: MAX_TOKENS - 1], EOS_ID]


def test_embedding_is_one_table_in_memory(encoder: TextEncoder) -> None:
    state = encoder.module.state_dict()
    assert state["shared.weight"].data_ptr() == state["encoder.embed_tokens.weight"].data_ptr()


def test_a_damaged_tokenizer_is_an_error_of_ours() -> None:
    with pytest.raises(CheckpointError, match=r"te\.safetensors: its tokenizer \(spiece_model\) is damaged"):
        read_tokenizer(b"nonsense", "te.safetensors")
