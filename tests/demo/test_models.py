"""The demo's models: the pinned weights, written whole or not at all."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from s2v_flow.demo import models
from s2v_flow.demo.models import make_demo_models
from s2v_flow.errors import RefusedError
from s2v_flow.weights.family import detect_family
from s2v_flow.weights.reader import Checkpoint

FILES = {
    "audio_encoders/demo_wav2vec2.safetensors": (421, "wav2vec2"),
    "diffusion_models/demo_s2v.safetensors": (315, "wan s2v"),
    "vae/demo_vae.safetensors": (194, "wan vae"),
    "audio_encoders/tiny_wav2vec2.safetensors": (422, "wav2vec2"),
    "diffusion_models/tiny_s2v.safetensors": (315, "wan s2v"),
    "diffusion_models/tiny_s2v_fp8_metadata.safetensors": (425, "wan s2v"),
    "diffusion_models/tiny_s2v_fp8_scaled.safetensors": (426, "wan s2v"),
    "loras/tiny_lightning_lora.safetensors": (184, "lora"),
    "loras/tiny_lightning_lora_peft.safetensors": (128, "lora"),
    "text_encoders/tiny_umt5.safetensors": (23, "umt5 encoder"),
    "text_encoders/tiny_umt5_fp8_scaled.safetensors": (38, "umt5 encoder"),
    "text_encoders/tiny_umt5_fp8_tagged.safetensors": (51, "umt5 encoder"),
    "vae/tiny_vae.safetensors": (194, "wan vae"),
}


def sha256(value: Tensor) -> str:
    return hashlib.sha256(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def read(file: Path, key: str) -> Tensor:
    with safe_open(file, framework="pt") as opened:
        value: Tensor = opened.get_tensor(key)
    return value


def test_all_files_are_there_and_are_what_they_should_be(demo_models: Path) -> None:
    found = {}
    for file in demo_models.rglob("*"):
        if file.is_file():
            checkpoint = Checkpoint.open(file)
            found[file.relative_to(demo_models).as_posix()] = (
                len(checkpoint.entries),
                detect_family(checkpoint.shapes),
            )
    assert found == FILES


PINNED = [
    ("diffusion_models/tiny_s2v", "blocks.0.self_attn.q.weight", "b327f539c24ee815"),
    ("diffusion_models/tiny_s2v", "casual_audio_encoder.weights", "db893c6368e75c82"),
    ("diffusion_models/tiny_s2v_fp8_scaled", "blocks.4.ffn.2.weight", "919354e9b2e7bb63"),
    ("diffusion_models/tiny_s2v_fp8_scaled", "blocks.4.ffn.2.scale_weight", "03fa818c3f23265e"),
    ("vae/tiny_vae", "decoder.upsamples.3.time_conv.weight", "9c1f568a223a1f86"),
    ("text_encoders/tiny_umt5", "shared.weight", "bc0745dc538c35f6"),
    ("text_encoders/tiny_umt5", "spiece_model", "9c8fe7dab5b5ba36"),
    ("text_encoders/tiny_umt5_fp8_scaled", "encoder.block.1.layer.1.DenseReluDense.wo.weight", "d90e8f4dad1dcac9"),
    (
        "audio_encoders/tiny_wav2vec2",
        "encoder.pos_conv_embed.conv.parametrizations.weight.original0",
        "d03f175ce44bc697",
    ),
    ("loras/tiny_lightning_lora", "diffusion_model.blocks.3.ffn.0.lora_up.weight", "620d9e6f4b3a031f"),
    ("loras/tiny_lightning_lora_peft", "diffusion_model.blocks.3.ffn.0.lora_A.weight", "3c332239877bcf2b"),
]


@pytest.mark.parametrize(("file", "key", "digest"), PINNED)
def test_weights_are_the_reference_weights(demo_models: Path, file: str, key: str, digest: str) -> None:
    """The digests are of files written by the reference's own script, which the golden outputs were made with."""
    assert sha256(read(demo_models / f"{file}.safetensors", key)) == digest


@pytest.mark.slow
def test_another_seed_gives_other_weights(tmp_path: Path, demo_models: Path) -> None:
    make_demo_models(tmp_path / "models", seed=1)
    file, key = "diffusion_models/tiny_s2v_fp8_scaled.safetensors", "blocks.0.ffn.0.weight"
    assert sha256(read(tmp_path / "models" / file, key)) != sha256(read(demo_models / file, key))
    assert read(tmp_path / "models" / file, "blocks.0.ffn.0.scale_weight").shape == (1,)


def test_a_folder_with_files_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(RefusedError, match="is not empty"):
        make_demo_models(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(models, "save_file", fail)
    with pytest.raises(OSError, match="No space"):
        make_demo_models(tmp_path / "models")
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_is_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "_files", lambda seed: iter([("vae/a.safetensors", {"x": torch.zeros(1)})]))
    root = tmp_path / "models"
    root.mkdir()
    make_demo_models(root)
    assert read(root / "vae" / "a.safetensors", "x").shape == (1,)
    assert list(tmp_path.iterdir()) == [root]
