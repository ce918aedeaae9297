"""Checkpoints: prefixes, tensors, and what a file is called."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from reference import load_keys
from safetensors.torch import save_file

from s2v_flow.errors import CheckpointError
from s2v_flow.weights.reader import Checkpoint, describe_mismatch, detect_family


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model.", "wav2vec2."])
def test_prefix_is_stripped(tmp_path: Path, prefix: str) -> None:
    value = torch.arange(6.0).reshape(2, 3)
    save_file({f"{prefix}a.weight": value}, tmp_path / "a.safetensors")
    checkpoint = Checkpoint.open(tmp_path / "a.safetensors")
    assert checkpoint.shapes == {"a.weight": (2, 3)}
    assert checkpoint.dtypes == {"a.weight": "F32"}
    assert checkpoint.num_bytes == 24
    assert torch.equal(checkpoint.tensor("a.weight"), value)


def test_lora_keys_keep_their_prefix(tmp_path: Path) -> None:
    save_file({"diffusion_model.a.lora_down.weight": torch.zeros(1, 2)}, tmp_path / "a.safetensors")
    assert set(Checkpoint.open(tmp_path / "a.safetensors").shapes) == {"diffusion_model.a.lora_down.weight"}


def test_a_key_with_and_without_prefix_is_refused(tmp_path: Path) -> None:
    save_file({"diffusion_model.a": torch.zeros(1), "a": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="holds 'a' twice"):
        Checkpoint.open(tmp_path / "a.safetensors")


def test_file_that_vanished_after_opening_is_an_error_of_ours(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    checkpoint = Checkpoint.open(tmp_path / "a.safetensors")
    (tmp_path / "a.safetensors").unlink()
    with pytest.raises(CheckpointError, match="cannot be read any more"):
        checkpoint.tensor("a")


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
    assert detect_family({}) == "unknown (0 tensors, the first '')"


def test_t5_without_a_bias_in_every_layer_is_not_umt5() -> None:
    t5 = {
        key: shape
        for key, shape in load_keys("umt5_xxl").items()
        if "relative_attention_bias" not in key or "block.0." in key
    }
    assert detect_family(t5) == "t5 encoder"
