"""Checkpoints: prefixes, tensors, and what a file is called."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from s2v_flow.errors import CheckpointError
from s2v_flow.weights.reader import Checkpoint


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


@pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="other systems do not list what is mapped")
def test_what_is_mapped_of_copied_tensors_is_given_back(tmp_path: Path) -> None:
    """Every 128 MiB; a tensor that is still in use stays as it is."""
    path, size = tmp_path / "a.safetensors", 2**27
    save_file({"kept": torch.full((2**19,), 7, dtype=torch.uint8), "large": torch.ones(size, dtype=torch.uint8)}, path)
    checkpoint = Checkpoint.open(path)

    def mapped() -> int:
        return Path("/proc/self/maps").read_text().count(str(path))

    kept = checkpoint.tensor("kept")
    assert mapped() == 1
    checkpoint.let_go("large")
    assert mapped() == 1
    checkpoint.let_go("kept")
    assert bool((kept == 7).all())
    del kept
    assert mapped() == 0
    assert bool((checkpoint.tensor("large") == 1).all())


def test_file_that_vanished_after_opening_is_an_error_of_ours(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    checkpoint = Checkpoint.open(tmp_path / "a.safetensors")
    (tmp_path / "a.safetensors").unlink()
    with pytest.raises(CheckpointError, match="cannot be read any more"):
        checkpoint.tensor("a")
