"""Change a sound's sample rate: soxr, as the authors do, or ComfyUI's windowed sinc."""

from __future__ import annotations

from math import ceil, gcd
from typing import Literal

import numpy as np
import soxr
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from s2v_flow.media.audio import Audio

SPEECH_RATE_HZ = 16_000
"""The rate that Wav2Vec2 was trained with."""

_ZERO_CROSSINGS = 6
_ROLLOFF = 0.99
_BLOCK_SAMPLES = 65_536  # output samples at a time, which bounds the memory


def speech_waveform(audio: Audio, conditioning: Literal["comfyui", "official"]) -> NDArray[np.float32]:
    """Return a sound as mono float32 [samples] at 16 kHz, not normalised, as either pipeline's speech encoder gets it.

    "comfyui" resamples each channel by a windowed sinc, then averages; "official" averages, then resamples by soxr
    (HQ). What is at 16 kHz already is only averaged.

    Raises:
        ValueError: `conditioning` is neither.

    Source: Wan-Video/Wan2.2, wan/modules/s2v/audio_encoder.py (librosa.load); ComfyUI: the spec, section 3.
    """
    if conditioning == "comfyui":
        channels = resample_windowed_sinc(audio.waveform, audio.sample_rate_hz, SPEECH_RATE_HZ)
        return np.asarray(channels.mean(axis=0), dtype=np.float32)
    if conditioning == "official":
        mono = Audio(audio.waveform.mean(axis=0, keepdims=True, dtype=np.float32), audio.sample_rate_hz)
        return np.asarray(resample(mono, SPEECH_RATE_HZ).waveform[0])
    raise ValueError(f"conditioning must be 'comfyui' or 'official', got {conditioning!r}")


def resample(audio: Audio, sample_rate_hz: int) -> Audio:
    """Resample by soxr (quality HQ); the length is ceil(samples * new / old), exactly.

    Raises:
        ValueError: the rate is not positive.

    Source: librosa, core/audio.py, resample(res_type="soxr_hq").
    """
    if sample_rate_hz < 1:
        raise ValueError(f"sample_rate_hz must be at least 1, got {sample_rate_hz}")
    if sample_rate_hz == audio.sample_rate_hz:
        return audio
    length = -(-audio.num_samples * sample_rate_hz // audio.sample_rate_hz)
    samples = np.ascontiguousarray(audio.waveform.T)  # [samples, channels]
    resampled = soxr.resample(samples, audio.sample_rate_hz, sample_rate_hz, quality="HQ")[:length]
    waveform = np.zeros((audio.num_channels, length), dtype=np.float32)
    waveform[:, : len(resampled)] = resampled.T
    return Audio(waveform, sample_rate_hz)


def resample_windowed_sinc(waveform: NDArray[np.float32], from_rate: int, to_rate: int) -> NDArray[np.float32]:
    """Resample [channels, samples] by a Hann-windowed sinc; returns float32 [channels, ceil(samples * to / from)].

    With o and n the rates over their common divisor, f = 0.99 min(o, n) / o and W = 6 / f:
    y[m] = sum over |u| <= W of x[j] f sinc(f u) cos^2(pi u / (2 W)), where u = m o / n - j, and x is zero outside.

    Raises:
        ValueError: a rate is not positive, or the waveform is not [channels, samples].

    Source: pytorch/audio, functional/functional.py, resample (sinc_interp_hann), which ComfyUI uses; J. O. Smith, 2002.
    """
    if from_rate < 1 or to_rate < 1 or waveform.ndim != 2:
        raise ValueError(f"cannot resample {waveform.shape} from {from_rate} to {to_rate} Hz")
    if from_rate == to_rate:
        return waveform.astype(np.float32)
    divisor = gcd(from_rate, to_rate)
    old, new = from_rate // divisor, to_rate // divisor
    kernel, reach = _polyphase_kernel(old, new)
    num_taps = kernel.shape[1]
    length = -(-waveform.shape[1] * new // old)
    padded = np.pad(waveform.astype(np.float32), ((0, 0), (reach, num_taps)))
    windows = sliding_window_view(padded, num_taps, axis=1)  # [channels, samples, taps], a view
    resampled = np.empty((waveform.shape[0], length), dtype=np.float32)
    for start in range(0, length, _BLOCK_SAMPLES):
        index = np.arange(start, min(start + _BLOCK_SAMPLES, length), dtype=np.int64)
        weights, position = kernel[index % new], index * old // new
        for channel, rows in enumerate(windows):
            resampled[channel, index] = np.einsum("mt,mt->m", rows[position], weights)
    return resampled


def _polyphase_kernel(old: int, new: int) -> tuple[NDArray[np.float32], int]:
    """Return the kernel [new, taps] of each output phase, and how many samples before the phase's position it starts.

    In float32 and in this order of operations: the phases' rounding (1e-5 of the result) is part of ComfyUI's numbers.
    """
    cutoff = _ROLLOFF * min(old, new)  # in cycles of `old` samples
    reach = ceil(_ZERO_CROSSINGS * old / cutoff)
    phase = np.arange(new)
    first = phase * old // new - reach
    sample = first[:, None] + np.arange(2 * reach + 2)[None]  # [new, taps]
    time = sample.astype(np.float32) / np.float32(old) - (phase.astype(np.float32) / np.float32(new))[:, None]
    time *= np.float32(cutoff)
    window = np.cos(time.clip(-_ZERO_CROSSINGS, _ZERO_CROSSINGS) * np.float32(np.pi / _ZERO_CROSSINGS / 2)) ** 2
    angle = time * np.float32(np.pi)
    sinc = np.divide(np.sin(angle), angle, out=np.ones_like(angle), where=angle != 0)
    kernel = sinc * window * np.float32(cutoff / old)
    assert kernel.dtype == np.float32
    return kernel, reach
