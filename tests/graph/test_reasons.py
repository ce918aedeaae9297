"""Why a node must run, in words."""

from __future__ import annotations

import re
from typing import Any

import pytest

from s2v_flow.cache.store import Entry
from s2v_flow.graph.ports import Ref
from s2v_flow.graph.status import NEVER, explain
from s2v_flow.nodes.chunk import Chunk
from s2v_flow.nodes.encode import EncodeText

BASE: dict[str, Any] = {
    "kind": "chunk",
    "version": 1,
    "fields": {"steps": 4, "cfg": 1.0, "sampler": "euler"},
    "inputs": {"positive": "sha256:a", "history": ["sha256:x", "sha256:y"]},
    "numerics": {"device": "cpu"},
}


def entry(node: str = "first", **changes: Any) -> Entry:
    return Entry("f" * 64, {**BASE, **changes}, {}, {"node": node})


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"fields": {"steps": 20, "cfg": 1.0, "sampler": "euler"}}, "nodes.first.steps: 20 -> 4"),
        ({"fields": {"steps": 4, "cfg": 1.0, "sampler": "heun"}}, "nodes.first.sampler: 'heun' -> 'euler'"),
        ({"inputs": {"positive": "sha256:b", "history": BASE["inputs"]["history"]}}, "input positive is another"),
        ({"inputs": {"history": BASE["inputs"]["history"]}}, "input positive is new"),
        ({"numerics": {"device": "cuda"}}, "device: 'cuda' -> 'cpu'"),
        ({"version": 0}, "the kind chunk has changed in s2vflow (version 0 -> 1)"),
        ({"kind": "decode"}, NEVER),
    ],
)
def test_the_difference_from_the_nearest_result_is_named(changes: dict[str, Any], text: str) -> None:
    assert explain("first", "first", BASE, [entry(**changes)]) == text


def test_the_nearest_of_several_results_counts() -> None:
    """Fewer differences win, whoever made the result."""
    far = entry(fields={"steps": 1, "cfg": 2.0, "sampler": "heun"})
    near = entry("other", fields={"steps": 5, "cfg": 1.0, "sampler": "euler"})
    assert explain("first", "first", BASE, [far, near]) == "nodes.first.steps: 5 -> 4"


def test_a_field_that_an_identity_leaves_out_reads_as_in_a_recipe() -> None:
    """What its value is now, or was by default; a value that is the same in both says nothing."""
    plain = {"width": 64, "height": 64, "steps": 4, "cfg": 1.0, "sampler": "euler", "scheduler": "simple", "shift": 8.0}
    chunk = Chunk(**plain, conditioning="comfyui", seed=1, num_latent_frames=2, audio_offset=0)
    easy = chunk.model_copy(update={"step_cache": "easy"})
    prompt = EncodeText(text_encoder=Ref("umt5"), text="She speaks.")
    for one, other, text in (
        (chunk, easy, "step_cache: 'off' -> 'easy'"),
        (chunk, easy.model_copy(update={"step_cache_threshold": 0.3}), "step_cache: 'off' -> 'easy'; {}0.2 -> 0.3"),
        (prompt, prompt.model_copy(update={"prompt_syntax": "comfyui"}), "prompt_syntax: 'plain' -> 'comfyui'"),
    ):
        images = [{**BASE, "fields": of.identity({}, lambda kind, asked: asked)} for of in (one, other)]
        told = f"nodes.a.{text}".format("nodes.a.step_cache_threshold: ")
        assert explain("a", "a", images[1], [Entry("f" * 64, images[0], {}, {})], other) == told
        back = re.sub("('?[a-z0-9.]+'?) -> ('?[a-z0-9.]+'?)", r"\2 -> \1", told)
        assert explain("a", "a", images[0], [Entry("f" * 64, images[1], {}, {})], one) == back


def test_a_replaced_file_is_named_without_its_digest() -> None:
    """Digests say nothing to people."""
    image = {**BASE, "fields": {"checkpoint": "sha256:1"}}
    assert (
        explain("a", "dit", image, [entry(fields={"checkpoint": "sha256:2"})]) == "nodes.dit.checkpoint: another file"
    )
    assert explain("a", "dit", image, [entry(fields={})]) == "nodes.dit.checkpoint: null -> a file"
