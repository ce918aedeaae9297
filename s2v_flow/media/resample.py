"""Change a sound's sample rate: soxr, as the authors do, or ComfyUI's windowed sinc."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import ceil, gcd
from typing import Literal

import numpy as np
import soxr
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from s2v_flow.media.audio import Sound

SPEECH_RATE_HZ = 16_000
"""The rate that Wav2Vec2 was trained with."""

_ZERO_CROSSINGS = 6
_ROLLOFF = 0.99
_BLOCK_SAMPLES = 65_536  # output samples at a time, which bounds the memory


def speech_blocks(sound: Sound, conditioning: Literal["comfyui", "official"]) -> Iterator[NDArray[np.float32]]:
    """Yield a sound as mono float32 [n] at 16 kHz, not normalised, as either pipeline's speech encoder gets it.

    "comfyui" resamples each channel by a windowed sinc, then averages; "official" averages, then resamples by soxr
    (HQ). What is at 16 kHz already is only averaged. All blocks together have `resampled_length` samples.

    Raises:
        ValueError: `conditioning` is neither.

    Source: Wan-Video/Wan2.2, wan/modules/s2v/audio_encoder.py (librosa.load); ComfyUI: the spec, section 3.
    """
    if conditioning == "comfyui":
        for block in windowed_sinc_blocks(sound.blocks(), sound.sample_rate_hz, SPEECH_RATE_HZ):
            yield np.asarray(block.mean(axis=0), dtype=np.float32)
    elif conditioning == "official":
        mono = (block.mean(axis=0, keepdims=True, dtype=np.float32) for block in sound.blocks())
        for block in _soxr_blocks(mono, 1, sound.sample_rate_hz, SPEECH_RATE_HZ):
            yield block[0]
    else:
        raise ValueError(f"conditioning must be 'comfyui' or 'official', got {conditioning!r}")


def resampled_length(num_samples: int, from_rate: int, to_rate: int) -> int:
    """Return how many samples there are at another rate: ceil(samples * to / from)."""
    return -(-num_samples * to_rate // from_rate)


@dataclass(frozen=True)
class Joined:
    """Sounds one after the other, by soxr (quality HQ) at `rate`, else the highest of theirs, block by block.

    The length of each is ceil(samples * new / old), exactly. Mono ones are doubled where another is stereo. Of all
    that, the first `limit` samples count.

    Source: librosa, core/audio.py, resample(res_type="soxr_hq").
    """

    parts: tuple[Sound, ...]
    limit: int | None = None
    rate: int | None = None

    @property
    def sample_rate_hz(self) -> int:
        """Samples a second."""
        return self.rate or max(part.sample_rate_hz for part in self.parts)

    @property
    def num_channels(self) -> int:
        """The number of channels."""
        return max(part.num_channels for part in self.parts)

    @property
    def num_samples(self) -> int:
        """The number of samples of each channel."""
        rate = self.sample_rate_hz
        length = sum(resampled_length(part.num_samples, part.sample_rate_hz, rate) for part in self.parts)
        return length if self.limit is None else min(length, self.limit)

    def blocks(self) -> Iterator[NDArray[np.float32]]:
        """Yield the samples in order, [channels, n] each."""
        left = self.num_samples
        for part in self.parts:
            given = (part.blocks(), part.num_channels, part.sample_rate_hz, self.sample_rate_hz)
            for block in _soxr_blocks(*given) if left else ():
                wanted = block[:, :left]
                left -= wanted.shape[1]
                yield np.repeat(wanted, self.num_channels, axis=0) if len(block) < self.num_channels else wanted
                if not left:
                    break


def _soxr_blocks(
    blocks: Iterable[NDArray[np.float32]], num_channels: int, from_rate: int, to_rate: int
) -> Iterator[NDArray[np.float32]]:
    """Resample [channels, n] blocks; soxr holds back what it needs, so they do not match those that come in."""
    if from_rate == to_rate:
        yield from blocks
        return
    stream = soxr.ResampleStream(from_rate, to_rate, num_channels, dtype="float32", quality="HQ")
    taken, given = 0, 0
    for block in blocks:
        for start in range(0, block.shape[1], _BLOCK_SAMPLES):
            part = block[:, start : start + _BLOCK_SAMPLES]
            taken += part.shape[1]
            resampled = stream.resample_chunk(np.ascontiguousarray(part.T)).T  # [channels, n]
            given += resampled.shape[1]
            yield resampled
    length = resampled_length(taken, from_rate, to_rate)
    rest = np.zeros((num_channels, max(length - given, 0)), dtype=np.float32)
    last = stream.resample_chunk(np.zeros((0, num_channels), np.float32), last=True).T[:, : rest.shape[1]]
    rest[:, : last.shape[1]] = last
    yield rest


def windowed_sinc_blocks(
    blocks: Iterable[NDArray[np.float32]], from_rate: int, to_rate: int
) -> Iterator[NDArray[np.float32]]:
    """Resample [channels, n] blocks by a Hann-windowed sinc to float32 [channels, ceil(samples * to / from)].

    With o and n the rates over their common divisor, f = 0.99 min(o, n) / o and W = 6 / f:
    y[m] = sum over |u| <= W of x[j] f sinc(f u) cos^2(pi u / (2 W)), where u = m o / n - j, and x is zero outside.
    Each output is computed once all samples that it needs are there.

    Source: pytorch/audio, functional/functional.py, resample (sinc_interp_hann), which ComfyUI uses; J. O. Smith, 2002.
    """
    if from_rate == to_rate:
        yield from (block.astype(np.float32) for block in blocks)
        return
    divisor = gcd(from_rate, to_rate)
    old, new = from_rate // divisor, to_rate // divisor
    kernel, reach = _polyphase_kernel(old, new)
    num_taps = kernel.shape[1]
    held: NDArray[np.float32] | None = None  # the padded sound from sample `first` on
    first, taken, given = 0, 0, 0

    def outputs(stop: int) -> Iterator[NDArray[np.float32]]:
        assert held is not None
        windows = sliding_window_view(held, num_taps, axis=1)  # [channels, samples, taps], a view
        for start in range(given, stop, _BLOCK_SAMPLES):
            index = np.arange(start, min(start + _BLOCK_SAMPLES, stop), dtype=np.int64)
            weights, position = kernel[index % new], index * old // new - first
            yield np.stack([np.einsum("mt,mt->m", rows[position], weights) for rows in windows])

    for block in blocks:
        start = np.zeros((block.shape[0], reach), np.float32) if held is None else held
        held = np.concatenate([start, block.astype(np.float32)], axis=1)
        taken += block.shape[1]
        stop = max(-(-(reach + taken - num_taps + 1) * new // old), given)  # the last needs num_taps from its place on
        if stop > given:
            yield from outputs(stop)
            given = stop
            unneeded = given * old // new - first
            held, first = held[:, unneeded:], first + unneeded
    assert held is not None, "there is a sound"
    held = np.pad(held, ((0, 0), (0, num_taps)))
    length = resampled_length(taken, from_rate, to_rate)
    if length > given:
        yield from outputs(length)


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
