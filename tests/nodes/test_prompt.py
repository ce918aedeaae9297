"""Weights in prompts are read and computed as ComfyUI does, where a recipe says so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from reference import load_golden, relative_error

from s2v_flow.graph.ports import Ref
from s2v_flow.models.encoders import TextEncoder
from s2v_flow.models.load import load_text_encoder
from s2v_flow.nodes.encode import EncodeText, weighted_parts
from s2v_flow.weights.tokenizer import EOS_ID


@pytest.fixture(scope="module")
def encoder(tiny_models: Path) -> TextEncoder:
    file = tiny_models / "text_encoders" / "tiny_umt5.safetensors"
    return load_text_encoder(file, dtype=torch.float32, device="cpu", quantized=False)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("foo", [("foo", 1)]),
        ("(foo)(bar)", [("foo", 1.1), ("bar", 1.1)]),
        ("((foo))", [("foo", 1.21)]),
        ("((foo):1.1)", [("foo", 1.21)]),
        ("((foo:1.1))", [("foo", 1.1)]),
        ("((foo:1.0):0.0)", [("foo", 1.0)]),
        ("foo ((((a (b:6) c:9)))) d", [("foo ", 1), ("a ", 9), ("b", 6), (" c", 9), (" d", 1)]),
        ("foo ((((a (b:6) c):9))) d", [("foo ", 1), ("a ", 9.9), ("b", 6), (" c", 9.9), (" d", 1)]),
        ("[x] \\(open:2\\) {y}", [("[x] (open:2) {y}", 1)]),
        ("(a:b)", [("a:b", 1.1)]),
        ("(:1.2)", [(":1.2", 1.1)]),
        ("()", []),
        ("12:30) (x:2)", [("12:30) (x:2)", 1)]),
        ("a (b", [("a ", 1), ("(b", 1)]),
    ],
)  # fmt: skip
def test_parts_are_those_of_comfyui(text: str, parts: list[tuple[str, float]]) -> None:
    """The first eight are the cases that its documentation of the rule gives."""
    found = weighted_parts(text)
    assert [words for words, _ in found] == [words for words, _ in parts]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in parts])


def test_nesting_and_weights_are_bounded() -> None:
    for text in ("(" * 9_000 + "a" + ")" * 9_000, "(a:nan)", "(a:1e999)"):
        with pytest.raises(ValueError, match="in a prompt"):
            weighted_parts(text)
        with pytest.raises(ValidationError, match="in a prompt"):
            EncodeText(text_encoder=Ref("umt5"), text=text, prompt_syntax="comfyui")
        assert EncodeText(text_encoder=Ref("umt5"), text=text).parts() == [(text, 1.0)]


def test_weighted_prompts_equal_the_reference(encoder: TextEncoder) -> None:
    _, outputs, case = load_golden("components/umt5_weights")
    for index, text in enumerate(case["prompts"]):
        found = encoder.encode_parts(weighted_parts(text))
        assert relative_error(found[0], outputs[str(index)]) <= 3e-6


def test_weighted_rows_are_moved_away_from_those_of_an_empty_prompt(encoder: TextEncoder) -> None:
    """Against the whole of it computed another way: both prompts padded to 512 tokens and masked, in one batch."""
    parts = weighted_parts("(sings:1.5) gently, ((looking) down:0.5)")
    pairs = [(token, weight) for text, weight in parts for token in encoder.tokenize(text)[:-1]] + [(EOS_ID, 1.0)]
    ids, mask = torch.zeros(2, 512, dtype=torch.int64), torch.zeros(2, 512, dtype=torch.int64)
    ids[0, : len(pairs)], mask[0, : len(pairs)] = torch.tensor([token for token, _ in pairs]), 1
    ids[1, 0], mask[1, 0] = EOS_ID, 1
    z, empty = encoder.hidden(ids, mask)[:, : len(pairs)]
    weights = torch.tensor([weight for _, weight in pairs])[:, None]
    found = encoder.encode_parts(parts)
    assert relative_error(found[0], torch.lerp(empty, z, weights)) <= 3e-6
    assert relative_error(found[0], z) > 0.1
    assert torch.equal(encoder.encode_parts([("She ", 1.0)]), encoder.encode("She "))


def test_the_plain_syntax_stays_out_of_the_identity_and_weights_count() -> None:
    def identity(**fields: str) -> dict[str, object]:
        node = EncodeText(text_encoder=Ref("umt5"), text="(a:1.2)", **fields)  # type: ignore[arg-type]
        return node.identity({}, lambda kind, asked: asked)

    assert identity() == identity(prompt_syntax="plain") == {"text": "(a:1.2)"}
    assert identity(prompt_syntax="comfyui") == {"text": "(a:1.2)", "prompt_syntax": "comfyui"}
