"""Wav2Vec2: the reference's 25 states, either normalisation, and windows that change nothing."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import torch
from models_for_tests import features
from reference import fill_module, load_golden, load_keys, relative_error
from safetensors.torch import load_file, save_file

from s2v_flow.errors import MediaError
from s2v_flow.models import encoders
from s2v_flow.models.encoders import AudioEncoder, build_wav2vec2, normalise
from s2v_flow.models.load import load_audio_encoder


@pytest.fixture(scope="module")
def encoder(demo_models: Path) -> AudioEncoder:
    file = demo_models / "audio_encoders" / "tiny_wav2vec2.safetensors"
    return load_audio_encoder(file, dtype=torch.float32, device="cpu")


def assert_states_equal(encoder: AudioEncoder, name: str) -> None:
    inputs, outputs, _ = load_golden(f"components/{name}")
    states = features(encoder, inputs["waveform"][0], "comfyui")
    assert states.shape[0] == 25
    assert len(outputs) >= 5
    for key, expected in outputs.items():
        assert relative_error(states[int(key.removeprefix("layer"))], expected[0]) <= 3e-6, key


def test_states_equal_the_reference(encoder: AudioEncoder) -> None:
    assert_states_equal(encoder, "wav2vec2_tiny")


def test_a_file_without_the_mask_of_training_gives_the_same_states(
    tmp_path: Path, demo_models: Path, encoder: AudioEncoder
) -> None:
    weights = load_file(demo_models / "audio_encoders" / "tiny_wav2vec2.safetensors")
    del weights["masked_spec_embed"]
    save_file(weights, tmp_path / "a.safetensors")
    other = load_audio_encoder(tmp_path / "a.safetensors", dtype=torch.float32, device="cpu")
    clip = torch.sin(torch.arange(8000) / 9)
    assert torch.equal(features(other, clip, "official"), features(encoder, clip, "official"))


@pytest.mark.parity
def test_full_size_states_equal_the_reference() -> None:
    assert_states_equal(AudioEncoder(fill_module(build_wav2vec2(load_keys("wav2vec2_large")))), "wav2vec2_large")


def test_full_size_encoder_has_the_released_keys() -> None:
    expected = load_keys("wav2vec2_large")
    assert len(expected) == 422
    module = build_wav2vec2(expected)
    assert {key: tuple(value.shape) for key, value in module.state_dict().items()} == expected
    assert module.config.num_attention_heads == 16


def test_conditioning_chooses_the_variance() -> None:
    x = torch.tensor([1.0, 2.0, 3.0, 6.0])
    assert torch.allclose(normalise(x, unbiased=False).square().mean(), torch.tensor(1.0))
    assert torch.allclose(normalise(x, unbiased=True).square().sum() / 3, torch.tensor(1.0))
    assert not normalise(torch.zeros(9), unbiased=False).any()  # silence stays finite


def test_the_two_conditionings_differ_and_mono_needs_no_channel_axis(encoder: AudioEncoder) -> None:
    x = torch.randn(2, 800, generator=torch.Generator().manual_seed(0))
    official, comfyui = features(encoder, x, "official"), features(encoder, x, "comfyui")
    assert 0 < relative_error(official, comfyui) < 1e-2
    assert torch.equal(features(encoder, x.mean(0), "official"), official)


def test_windows_of_the_first_convolutions_change_nothing(
    encoder: AudioEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(400 + 320 * 20 + 11, generator=torch.Generator().manual_seed(0))
    whole = features(encoder, x, "official")
    assert whole.shape == (25, 21, 64)
    monkeypatch.setattr(encoders, "WINDOW_STATES", 4)
    assert relative_error(features(encoder, x, "official"), whole) < 1e-6


def test_weights_go_with_the_encoder(demo_models: Path) -> None:
    """Without help of the garbage collector: nothing in it refers to itself."""
    path = demo_models / "audio_encoders" / "tiny_wav2vec2.safetensors"
    gc.collect()
    gc.disable()
    try:
        encoder = load_audio_encoder(path, dtype=torch.float32, device="cpu")
        held = [weakref.ref(parameter) for parameter in encoder.module.parameters()]
        del encoder
        assert not any(ref() is not None for ref in held)
    finally:
        gc.enable()


def test_one_state_needs_400_samples(encoder: AudioEncoder) -> None:
    assert features(encoder, torch.ones(400), "official").shape == (25, 1, 64)
    with pytest.raises(MediaError, match="399 samples"):
        features(encoder, torch.ones(399), "official")
