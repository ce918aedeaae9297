from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from math import gcd
from typing import Literal

import numpy as np
import pytest
import soxr
import torch
from numpy.typing import NDArray
from reference import load_golden, relative_error

from s2v_flow.media.audio import Audio
from s2v_flow.media.resample import Joined, speech_blocks, windowed_sinc_blocks


def resample_windowed_sinc(waveform: NDArray[np.float32], from_rate: int, to_rate: int) -> NDArray[np.float32]:
    return np.concatenate([*windowed_sinc_blocks([waveform], from_rate, to_rate)], axis=1)


def resample(audio: Audio, rate: int) -> Audio:
    """Return all of a sound at another rate."""
    return Audio(np.concatenate([*Joined((audio,), rate=rate).blocks()], axis=1), rate)


def speech_waveform(audio: Audio, conditioning: Literal["comfyui", "official"]) -> NDArray[np.float32]:
    """Return all of a sound as an encoder hears it."""
    return np.concatenate([*speech_blocks(audio, conditioning)])


@pytest.mark.parametrize("rate", [22_050, 44_100, 48_000])
def test_windowed_sinc_gives_comfyui_s_numbers(rate: int) -> None:
    inputs, outputs, _ = load_golden("components/audio_resample")
    actual = resample_windowed_sinc(inputs["waveform"].numpy(), rate, 16_000)
    assert actual.dtype == np.float32
    assert relative_error(torch.from_numpy(actual), outputs[f"to16k_from{rate}"]) <= 2e-5  # measured: 2e-7


@pytest.mark.parametrize(
    ("old", "new", "samples"), [(3, 2, 40), (8_000, 16_000, 33), (11_025, 16_000, 500), (44_101, 16_000, 999)]
)
def test_windowed_sinc_equals_the_formula_summed_directly(old: int, new: int, samples: int) -> None:
    signal = np.random.default_rng(0).standard_normal((2, samples)).astype(np.float32)
    common = gcd(old, new)
    o, n = old // common, new // common
    factor = 0.99 * min(o, n) / o
    length = -(-samples * n // o)
    u = np.arange(length)[:, None] * o / n - np.arange(samples)[None]
    kernel = np.where(np.abs(u) <= 6 / factor, factor * np.sinc(factor * u) * np.cos(np.pi * u * factor / 12) ** 2, 0)
    expected = torch.from_numpy(signal.astype(np.float64) @ kernel.T)
    assert relative_error(torch.from_numpy(resample_windowed_sinc(signal, old, new)), expected) <= 2e-5


def test_windowed_sinc_of_long_sound_is_the_same_across_blocks() -> None:
    signal = np.random.default_rng(0).standard_normal((1, 80_000)).astype(np.float32)
    whole = resample_windowed_sinc(signal, 8_000, 16_000)  # 160000 samples: more than two blocks
    part = resample_windowed_sinc(signal[:, 30_000:70_000], 8_000, 16_000)
    assert np.array_equal(whole[:, 60_100:139_900], part[:, 100:79_900])


def test_windowed_sinc_needs_memory_for_a_block_not_for_a_matrix() -> None:
    signal = np.zeros((1, 1_000_000), dtype=np.float32)
    tracemalloc.start()
    resample_windowed_sinc(signal, 44_100, 16_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60e6


def test_soxr_resampling_has_an_exact_length_and_keeps_a_tone() -> None:
    time = np.arange(44_100 * 2) / 44_100
    audio = Audio(np.stack([np.sin(2 * np.pi * f * time) for f in (300, 900)]).astype(np.float32), 44_100)
    result = resample(audio, 16_000)
    assert result.waveform.shape == (2, 32_000)
    assert result.waveform.dtype == np.float32
    expected = np.sin(2 * np.pi * 300 * np.arange(32_000) / 16_000)
    assert np.abs(result.waveform[0, 500:-500] - expected[500:-500]).max() < 1e-4
    for samples in (1, 2, 7, 1_001):
        short = Audio(np.ones((1, samples), np.float32), 44_100)
        assert resample(short, 16_000).num_samples == -(-samples * 16_000 // 44_100)
    assert np.array_equal(resample(audio, 44_100).waveform, audio.waveform)


def test_speech_is_resampled_then_averaged_for_comfyui_and_averaged_first_for_the_authors() -> None:
    waveform = np.random.default_rng(0).standard_normal((2, 4_410)).astype(np.float32)
    audio = Audio(waveform, 44_100)
    comfyui, official = speech_waveform(audio, "comfyui"), speech_waveform(audio, "official")
    assert comfyui.shape == official.shape == (1_600,)
    assert comfyui.dtype == official.dtype == np.float32
    assert np.array_equal(comfyui, resample_windowed_sinc(waveform, 44_100, 16_000).mean(axis=0))
    assert np.array_equal(official, soxr.resample(waveform.mean(axis=0), 44_100, 16_000, quality="HQ"))
    with pytest.raises(ValueError, match="conditioning"):
        speech_waveform(audio, "other")  # type: ignore[arg-type]


def test_speech_at_16_khz_is_only_averaged() -> None:
    waveform = np.array([[0.5, 0.25, -1], [0, 0.25, 1]], dtype=np.float32)
    for conditioning in ("comfyui", "official"):
        assert speech_waveform(Audio(waveform, 16_000), conditioning).tolist() == [0.25, 0.25, 0.0]


class InPieces:
    """A sound that comes in blocks of odd sizes."""

    def __init__(self, waveform: np.ndarray, sample_rate_hz: int) -> None:
        self.waveform, self.sample_rate_hz = waveform, sample_rate_hz
        self.num_channels, self.num_samples = waveform.shape

    def blocks(self) -> Iterator[np.ndarray]:
        sizes = np.random.default_rng(1).integers(1, 9000, 500)
        yield from np.split(self.waveform, np.cumsum(sizes)[np.cumsum(sizes) < self.num_samples], axis=1)


@pytest.mark.parametrize("rate", [8_000, 16_000, 22_050, 44_100, 48_000, 11_025])
@pytest.mark.parametrize("num_samples", [1, 50, 99_999])
def test_a_sound_in_pieces_is_resampled_to_the_same_bits_as_whole(rate: int, num_samples: int) -> None:
    waveform = np.random.default_rng(0).standard_normal((2, num_samples)).astype(np.float32)
    pieces, whole = InPieces(waveform, rate), Audio(waveform, rate)
    for conditioning in ("official", "comfyui"):
        found = np.concatenate([*speech_blocks(pieces, conditioning)])
        assert np.array_equal(found, speech_waveform(whole, conditioning)), conditioning
        assert len(found) == -(-num_samples * 16_000 // rate)
    if rate != 48_000:
        found = np.concatenate([*Joined((pieces,), rate=48_000).blocks()], axis=1)
        assert np.array_equal(found, resample(whole, 48_000).waveform)


def test_windowed_sinc_equals_what_it_was_before_it_came_in_blocks() -> None:
    """The formula's own matrix on the middle of a long sound, across the blocks' borders."""
    signal = np.random.default_rng(3).standard_normal((1, 300_000)).astype(np.float32)
    whole = resample_windowed_sinc(signal, 44_100, 16_000)
    pieces = np.concatenate([*speech_blocks(InPieces(signal, 44_100), "comfyui")])
    assert np.array_equal(whole[0], pieces)
    for start in (0, 65_000, 108_000):
        part = resample_windowed_sinc(signal[:, start * 441 // 160 // 441 * 441 :][:, :4410], 44_100, 16_000)
        offset = start * 441 // 160 // 441 * 160
        assert np.array_equal(whole[0, offset + 20 : offset + 1580], part[0, 20:1580])


def test_joined_sounds_follow_one_another_at_the_higher_rate_in_stereo() -> None:
    mono = Audio(np.random.default_rng(0).uniform(-1, 1, (1, 1001)).astype(np.float32), 8_000)
    stereo = Audio(np.random.default_rng(1).uniform(-1, 1, (2, 700)).astype(np.float32), 16_000)
    sound = Joined((mono, stereo, mono))
    assert (sound.sample_rate_hz, sound.num_channels, sound.num_samples) == (16_000, 2, 2002 + 700 + 2002)
    got = np.concatenate([*sound.blocks()], axis=1)
    twice = resample(mono, 16_000).waveform.repeat(2, axis=0)
    assert np.array_equal(got, np.concatenate([twice, stereo.waveform, twice], axis=1))
    for limit in (0, 100, 2002, 2100, 9999):
        cut = Joined(sound.parts, limit)
        assert np.array_equal(np.concatenate([got[:, :0], *cut.blocks()], axis=1), got[:, :limit])
        assert cut.num_samples == min(limit, 4704)
