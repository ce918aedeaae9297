"""Which kind of model a file holds is read off its keys; tests/nodes/test_weight_files.py has what people mix up."""

from __future__ import annotations

import pytest
from reference import load_keys

from s2v_flow.weights.family import describe_mismatch, detect_family


@pytest.mark.parametrize(
    ("keys", "family"),
    [("s2v_14b", "wan s2v"), ("umt5_xxl", "umt5 encoder"), ("wan21_vae", "wan vae"), ("wav2vec2_large", "wav2vec2")],
)
def test_full_size_files_are_recognised(keys: str, family: str) -> None:
    assert detect_family(load_keys(keys)) == family
    assert describe_mismatch(family, load_keys(keys)) is None


def test_other_wan_files_are_recognised() -> None:
    t2v = {key: shape for key, shape in load_keys("s2v_14b").items() if key.startswith(("blocks", "head", "patch"))}
    assert detect_family(t2v) == "wan t2v"
    assert detect_family({**t2v, "patch_embedding.weight": (5120, 36, 1, 2, 2)}) == "wan i2v"
    assert describe_mismatch("wan s2v", t2v) == "this is a wan t2v checkpoint: it has no audio_injector.*"
    assert detect_family({"decoder.head.0.gamma": (1,), "conv2.weight": (48, 48, 1, 1, 1)}) == "wan 2.2 vae"
    assert detect_family({"a.lora_A.weight": (1, 1)}) == "lora"
    assert detect_family({"b": (1,), "a": (1,)}) == "unknown (2 tensors, the first 'a')"
    assert detect_family({}) == "unknown and empty"


def test_t5_without_a_bias_in_every_layer_is_not_umt5() -> None:
    t5 = {
        key: shape
        for key, shape in load_keys("umt5_xxl").items()
        if "relative_attention_bias" not in key or "block.0." in key
    }
    assert detect_family(t5) == "t5 encoder"
