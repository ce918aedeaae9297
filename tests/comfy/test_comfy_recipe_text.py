"""The written recipe is read as what was meant, whatever the text."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
from comfy_workflows import load_text
from hypothesis import given, settings
from hypothesis import strategies as st

from s2v_flow.comfy.finish import Reference, Sections
from s2v_flow.comfy.importer import recipe_text
from s2v_flow.recipe.reader import FORBIDDEN

# fmt: off
HARD = [
    "", "yes", "1e-4", "0x1F", "~", "null", "true", "- a", "a: b", "a #b", "a:", "# a", "{a}", "[a]", "a, b", "*a",
    "&a", "!a", "%a", "@a", "`a", "|", ">", "'", '"', "\\", "a\nb", "a\n\nb", " a", "a ", "a\n", "\na", "a\n b",
    "\t", "a\r\nb", "\x85", "\u2028", "\ufeff", "${params.x}", "$params.x", "$$params.x", "$${", "$$${", "$dit",
    "<<<<<<< a", "---", "...", "a\n---\nb", "a\n%b", "12:30", "2024-01-01", "=", "<<", "\x00", "\ud800", "色调，静态",
    "-", "?", "a?",
]
# fmt: on


def read_back(text: str, number: float) -> dict[str, Any]:
    sections = Sections(
        params={"text": text, "number": number},
        nodes={
            "umt5": {"kind": "load_text_encoder", "checkpoint": text or "x"},
            "one": {"kind": "encode_text", "text_encoder": Reference("$umt5"), "text": text},
            "two": {"kind": "encode_text", "text_encoder": Reference("$umt5"), "text": Reference("$params.text")},
        },
        remarks={"one": [text], "params": [text]},
        notes=[text],
    )
    with tempfile.TemporaryDirectory() as folder:
        recipe = load_text(recipe_text(sections, f"about {text}", {"p": {"params": {"text": text}}}), Path(folder))
    nodes = {name: spec.node.model_dump(mode="json") for name, spec in recipe.nodes.items()}
    texts = {nodes["one"]["text"], nodes["two"]["text"], recipe.params["text"]}
    assert len(texts) == 1
    return {"text": texts.pop(), "file": nodes["umt5"]["checkpoint"], "number": recipe.params["number"]}


@pytest.mark.parametrize("text", HARD)
def test_hard_texts_are_read_as_they_were(text: str) -> None:
    """As a parameter, in a node and as a file's name; as a comment they do no harm."""
    clean = FORBIDDEN.sub("", text)
    assert read_back(text, 1.0) == {"text": clean, "file": clean if text else "x", "number": 1.0}


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(st.text(max_size=60), st.floats(allow_nan=False, allow_infinity=False, width=32) | st.integers(0, 2**64 - 1))
def test_any_text_and_any_number_are_read_as_they_were(text: str, number: float) -> None:
    """What recipes may not hold is left out."""
    made = read_back(text, number)
    assert (made["text"], made["number"]) == (FORBIDDEN.sub("", text), number)
