"""The demo's training: a few steps of each part learn something, and the package's loaders read what they write."""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from s2v_flow.demo import plan
from s2v_flow.demo.plan import FOLDER, generated_wav2vec2, vae_with_time
from s2v_flow.models.conditioning import Branch
from s2v_flow.models.dit import WanS2V
from s2v_flow.models.load import load_audio_encoder, load_dit, load_text_encoder, load_vae
from s2v_flow.models.vae import normalise
from training import clips, state, train_audio, train_decoder, train_dit, train_hearing, train_text, train_vae
from training.clips import clip, portrait, voice
from training.dit import SIDE, Student, keep_flags, learned_keys, measure_codes
from training.faces import Motion, draw_character, render
from training.train_hearing import Hearing
from training.vae import TrainableVAE

CPU = {"dtype": torch.float32, "device": "cpu"}


def options(folder: Path, **given: object) -> argparse.Namespace:
    defaults = {"state": folder, "minutes": 60.0, "save_every": 4, "rate": 1e-3}
    return argparse.Namespace(**{**defaults, **given})


def babble(seconds: float, rng: random.Random) -> np.ndarray:
    """Speak without espeak-ng: a tone that swells and rests."""
    count = int(seconds * 16_000)
    time = np.arange(count) / 16_000
    loud = np.clip(np.sin(2 * np.pi * rng.uniform(2, 4) * time), 0, 1)
    return (loud * np.sin(2 * np.pi * rng.uniform(120, 400) * time)).astype(np.float32)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.manual_seed(0)


def test_a_character_is_drawn_with_an_open_mouth_where_it_should_be() -> None:
    who = draw_character(torch.Generator().manual_seed(1))
    closed, opened = render(who, Motion.still(2, opening=torch.tensor([0.0, 1.0])))
    changed = (closed - opened).abs().amax(0) > 0.1
    rows = changed.any(1).nonzero()
    assert 68 < rows.min() < rows.max() < 112


@pytest.mark.slow
def test_the_vae_learns_and_its_file_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = state.load_weights(FOLDER / "vae.safetensors")
    weights["decoder.head.2.bias"] += 0.3
    state.save_weights(weights, tmp_path / "start.safetensors")
    clip_of_five = render(draw_character(torch.Generator().manual_seed(2)), Motion.still(5))[..., 32:96, 32:96]
    batch = clip_of_five.transpose(0, 1)[None] * 2 - 1, torch.ones(1, 1, 1, 64, 64)
    monkeypatch.setattr(train_vae, "_batch", lambda generator, clip: batch)
    losses = train_vae.train(
        options(tmp_path, start=tmp_path / "start.safetensors", part="decoder", steps=8, rate=3e-2)
    )
    assert losses[-1] < 0.8 * losses[0]
    again = train_vae.train(options(tmp_path, start=None, part="decoder", steps=9, rate=3e-2))
    assert len(again) == 1  # goes on where it stopped
    save_file(vae_with_time(state.load_weights(tmp_path / "vae.safetensors")), tmp_path / "demo_vae.safetensors")
    load_vae(tmp_path / "demo_vae.safetensors", torch.float32, "cpu")


@pytest.mark.slow
def test_the_vae_is_the_packages() -> None:
    """Frame by frame with gradients, or streamed with kernels of three frames: the same to rounding."""
    weights = state.load_weights(FOLDER / "vae.safetensors")
    pixels = render(draw_character(torch.Generator().manual_seed(3)), Motion.still(9)).transpose(0, 1)[None] * 2 - 1
    from s2v_flow.models.vae import VAEConfig, WanVAE

    vae = WanVAE(VAEConfig(width=16))
    vae.load_state_dict(vae_with_time(weights))
    with torch.no_grad():
        latent = TrainableVAE(weights).encode(pixels)
        torch.testing.assert_close(normalise(vae.encode(pixels)), latent, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            vae.decode(vae.encode(pixels)), TrainableVAE(weights).decode(latent), rtol=1e-4, atol=1e-4
        )


def write_clips(folder: Path, count: int) -> None:
    generator = torch.Generator().manual_seed(0)
    (folder / "clips").mkdir()
    for index in range(count):
        reference = torch.randn(16, 16, 16, generator=generator)
        content = {
            "latent": reference[:, None].expand(-1, 3, -1, -1) * 0.5,
            "before": reference.clone(),
            "reference": reference,
            "opening": torch.rand(12, generator=generator),
            "roundness": torch.rand(12, generator=generator),
            **{name: torch.tensor(0) for name in ("first", "expression_before", "expression", "is_long")},
        }
        save_file(
            {key: value.contiguous() for key, value in content.items()}, folder / "clips" / f"{index}.safetensors"
        )


@pytest.mark.slow
def test_the_dit_learns_and_its_file_loads(tmp_path: Path) -> None:
    write_clips(tmp_path, 3)
    losses = train_dit.train(options(tmp_path, steps=12, batch=2, rate=1e-3))
    assert losses[-1] < 0.8 * losses[0]
    assert len(train_dit.train(options(tmp_path, steps=13, batch=2))) == 1
    weights = plan.built_in() | state.load_weights(tmp_path / "dit.safetensors")
    save_file({key: value.contiguous() for key, value in weights.items()}, tmp_path / "demo_s2v.safetensors")
    load_dit(tmp_path / "demo_s2v.safetensors", quantized=False, **CPU)


@pytest.mark.soak
def test_the_decoder_learns_from_drawn_clips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.clips.speak", babble)
    for module in (clips, train_decoder):
        monkeypatch.setattr(module, "NUM_VOICES", 1)
    monkeypatch.setattr(train_decoder, "HELD_OUT", 1)
    state.save_weights(state.load_weights(FOLDER / "vae.safetensors"), tmp_path / "vae.safetensors")
    clips.make(options(tmp_path, begin=100, clips=103, worker="0/1"))
    given = options(tmp_path, batch=2, clips=3)
    losses = train_decoder.train(argparse.Namespace(**vars(given), steps=8))
    assert np.mean(losses[-3:]) < losses[0]
    assert len(train_decoder.train(argparse.Namespace(**vars(given), steps=9))) == 1  # goes on where it stopped
    save_file(vae_with_time(state.load_weights(tmp_path / "vae.safetensors")), tmp_path / "demo_vae.safetensors")
    load_vae(tmp_path / "demo_vae.safetensors", torch.float32, "cpu")


def random_dit() -> dict[str, Tensor]:
    """Make the model's weights, random where they are learned."""
    weights = plan.built_in()
    generator = torch.Generator().manual_seed(0)
    for key in learned_keys():
        if "ffn.2" in key or key.endswith("bias"):
            weights[key] = torch.randn(weights[key].shape, generator=generator) * 0.03
    keep_flags(weights)
    return weights


@pytest.mark.parametrize("has_motion", [pytest.param(False, marks=pytest.mark.slow), True])
def test_the_students_forward_pass_is_the_models(has_motion: bool) -> None:
    """Within 0.5 %: what is worked out once, codes of time and place, varies a little with the picture's contrast."""
    weights = random_dit()
    generator = torch.Generator().manual_seed(1)
    portrait_latent, motion, noisy = (torch.randn(1, 16, count, 16, 16, generator=generator) for count in (1, 13, 10))
    model = WanS2V(plan.CONFIG)
    model.load_state_dict(weights)
    chunk = model.prepare_chunk(
        num_latent_frames=10,
        height=2 * SIDE,
        width=2 * SIDE,
        reference_latent=portrait_latent,
        motion_latent=motion if has_motion else None,
        control_latent=torch.zeros(1, 16, 1, 2, 2),
        conditioning="official",
    )
    before = motion[:, :, -1:] if has_motion else portrait_latent
    rest = torch.zeros(1, 10, 8), torch.zeros(1, 4), torch.zeros(1, dtype=torch.int64)
    with torch.no_grad():
        student = Student(weights, measure_codes(weights))(noisy, portrait_latent, before, *rest)
        for sigma in (1.0, 8 / 11):
            branch = Branch(model.prepare_text(torch.zeros(1, 512, 64)))
            found = noisy - sigma * model(noisy, torch.tensor([1000 * sigma]), chunk, [branch])[0]
            assert (found - student).norm() < 5e-3 * found.norm()


def test_what_is_heard_is_what_the_injector_adds() -> None:
    hearing = Hearing()
    features = torch.randn(2, 40, 64)
    model = WanS2V(plan.CONFIG)
    model.load_state_dict(plan.built_in() | hearing.weights())
    embed = features.transpose(1, 2)[:, None].expand(-1, 25, -1, -1)
    with torch.no_grad():
        audio = model.prepare_audio(embed, num_latent_frames=10, conditioning="official")
        assert audio is not None
        added = model.audio_injector(torch.randn(2, 640, plan.D), audio.blocks[0], 0, torch.float32)
        torch.testing.assert_close(added.view(2, 10, 64, plan.D)[:, :, 5, plan.MOUTH], hearing(features))


def test_what_is_read_is_what_the_cross_attention_adds(tiny_models: Path) -> None:
    encoder = load_text_encoder(tiny_models / "text_encoders" / "tiny_umt5.safetensors", quantized=False, **CPU)
    tokens, lengths, _ = train_text._encoded(encoder, {"She smiles.": 1, "The man speaks.": 0})
    weights = train_text.initial()
    model = WanS2V(plan.CONFIG)
    model.load_state_dict(plan.built_in() | weights)
    context = torch.zeros(2, 512, 64)
    context[:, : tokens.shape[1]] = tokens
    with torch.no_grad():
        text = model.prepare_text(context).blocks[0]
        added = model.blocks[0].cross_attn(torch.randn(2, 3, plan.D), text)
        torch.testing.assert_close(added[:, 0, plan.EXPRESSION], train_text.read(weights, tokens, lengths))


@pytest.mark.slow
def test_the_text_is_learned(tmp_path: Path, tiny_models: Path) -> None:
    path = tiny_models / "text_encoders" / "tiny_umt5.safetensors"
    losses = train_text.train(options(tmp_path, text_encoder=path, steps=30, sentences=24))
    assert np.mean(losses[-5:]) < 0.9 * losses[0]
    assert (tmp_path / "text.safetensors").is_file()


@pytest.mark.slow
def test_the_ears_are_trained_and_their_file_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_audio, "speak", babble)
    monkeypatch.setattr(train_hearing, "speak", babble)
    losses = train_audio.train(options(tmp_path, steps=10, clips=2))
    assert np.mean(losses[-3:]) < losses[0]
    weights = generated_wav2vec2() | state.load_weights(tmp_path / "wav2vec2.safetensors")
    save_file({key: value.contiguous() for key, value in weights.items()}, tmp_path / "demo_wav2vec2.safetensors")
    load_audio_encoder(tmp_path / "demo_wav2vec2.safetensors", **CPU)
    losses = train_hearing.train(options(tmp_path, steps=24, voices=8))
    assert np.mean(losses[-5:]) < 0.9 * losses[0]


@pytest.mark.parametrize(
    ("index", "num_frames"),
    [pytest.param(0, 10, marks=pytest.mark.soak), pytest.param(100, 3, marks=pytest.mark.slow)],
)
def test_a_clip_is_the_same_every_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, index: int, num_frames: int
) -> None:
    monkeypatch.setattr("training.clips.speak", babble)
    vae = TrainableVAE(state.load_weights(FOLDER / "vae.safetensors"))
    voices = [voice(0, tmp_path)]
    with torch.no_grad():
        first, second = clip(index, voices, vae), clip(index, voices, vae)
    assert first["latent"].shape == (16, num_frames, 16, 16)
    assert first["opening"].shape == (4 * num_frames,)
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_the_weights_are_small() -> None:
    """All of them under 15 MB, no file over 5 MB."""
    sizes = [path.stat().st_size for path in FOLDER.glob("*.safetensors")]
    assert len(sizes) == 5
    assert sum(sizes) < 15e6
    assert max(sizes) < 5e6


def test_every_trained_file_is_whole() -> None:
    """The rules and what was learned make up all keys of each model, in its shapes."""
    files = dict(plan.trained_files())
    WanS2V(plan.CONFIG).load_state_dict(files["diffusion_models/demo_s2v.safetensors"])
    assert load_file(FOLDER / "dit.safetensors").keys() == set(learned_keys())
    assert portrait(draw_character(torch.Generator().manual_seed(1))).shape == (1, 3, 128, 128)
