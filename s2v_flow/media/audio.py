"""Read sound files into arrays, and measure how long they really are."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from s2v_flow.errors import MediaError, RefusedError
from s2v_flow.media.audio_blocks import Block, decode_blocks
from s2v_flow.media.limits import (
    MAX_AUDIO_CHANNELS,
    MAX_AUDIO_SECONDS,
    MAX_AUDIO_VALUES,
    MAX_SAMPLE_RATE_HZ,
    MIN_SAMPLE_RATE_HZ,
)


@dataclass(frozen=True, eq=False)
class Audio:
    """A sound: float32 samples [channels, samples], full scale 1.

    Raises:
        ValueError: the waveform is not float32 [channels, samples], is empty, or the rate is not positive.
    """

    waveform: NDArray[np.float32]
    sample_rate_hz: int

    def __post_init__(self) -> None:
        if self.waveform.ndim != 2 or self.waveform.dtype != np.float32 or self.waveform.size == 0:
            raise ValueError(
                f"waveform must be float32 [channels, samples], got {self.waveform.dtype} {self.waveform.shape}"
            )
        if self.sample_rate_hz < 1:
            raise ValueError(f"sample_rate_hz must be at least 1, got {self.sample_rate_hz}")

    @property
    def num_channels(self) -> int:
        """The number of channels."""
        return int(self.waveform.shape[0])

    @property
    def num_samples(self) -> int:
        """The number of samples of each channel."""
        return int(self.waveform.shape[1])

    @property
    def duration_seconds(self) -> Fraction:
        """The exact length."""
        return Fraction(self.num_samples, self.sample_rate_hz)


@dataclass(frozen=True)
class AudioInfo:
    """What a sound file decodes to."""

    sample_rate_hz: int
    num_channels: int
    num_samples: int

    @property
    def duration_seconds(self) -> Fraction:
        """The exact length."""
        return Fraction(self.num_samples, self.sample_rate_hz)


def probe_audio(path: str | os.PathLike[str], max_seconds: float = MAX_AUDIO_SECONDS) -> AudioInfo:
    """Measure a sound file by decoding it, keeping nothing: the length is the decoded one, whatever the header says.

    It takes a few milliseconds for each minute of sound, and finds every mistake that `read_audio` would find.

    Raises:
        MissingError, MediaError, RefusedError: as `read_audio`.
    """
    rate, num_channels, num_samples = 0, 0, 0
    for block_rate, samples in _checked_blocks(path, max_seconds):
        rate, num_channels = block_rate, samples.shape[0]
        num_samples += samples.shape[1]
    return AudioInfo(rate, num_channels, num_samples)


def read_audio(path: str | os.PathLike[str], max_seconds: float = MAX_AUDIO_SECONDS) -> Audio:
    """Read wav, flac, ogg, mp3, aac, m4a, or the sound of an mp4, mov, mkv or webm file, at its own rate.

    The format is told by content, not by suffix; of several sound tracks the first is read. Encoder delay is removed
    where the file says how long it is. Integer samples are divided by their full scale.

    Raises:
        MissingError: the file is not there, or may not be read.
        MediaError: it is not a sound file, is damaged, cut short or empty, holds NaN or infinity, has more than 8
            channels or a rate outside 8 to 192 kHz.
        RefusedError: it is longer than `max_seconds`, or too large for the memory.
    """
    rate, blocks = 0, []
    for block_rate, samples in _checked_blocks(path, max_seconds):
        rate = block_rate
        blocks.append(samples)
    return Audio(np.concatenate(blocks, axis=1), rate)


def cut_audio(audio: Audio, first: int, last: int, *, num_fade_samples: int = 0) -> Audio:
    """Take samples `first` to `last` (not included), faded in and out linearly.

    Args:
        audio: The sound.
        first: At least 0.
        last: At most the sound's length.
        num_fade_samples: How long each fade is; at most half of what is taken.

    Returns:
        The part; a copy only where it is faded.
    """
    part = audio.waveform[:, first:last]
    length = min(num_fade_samples, part.shape[1] // 2)
    if length > 0:
        ramp = np.arange(1, length + 1, dtype=np.float32) / np.float32(length + 1)
        part = part.copy()
        part[:, :length] *= ramp
        part[:, -length:] *= ramp[::-1]
    return Audio(part, audio.sample_rate_hz)


def _checked_blocks(path: str | os.PathLike[str], max_seconds: float) -> Iterator[Block]:
    """Yield the decoded blocks: all within the limits, of one rate and channel count, one sample or more in all."""
    rate, num_channels, num_samples = 0, 0, 0
    for block_rate, samples in decode_blocks(path):
        if rate == 0:
            rate, num_channels = block_rate, samples.shape[0]
            _check_kind(path, rate, num_channels)
        if (block_rate, samples.shape[0]) != (rate, num_channels):
            raise MediaError(f"{path}: its rate or channels change on the way", "re-encode it by ffmpeg")
        start = num_samples
        num_samples += samples.shape[1]
        if num_samples > max_seconds * rate or num_samples * num_channels > MAX_AUDIO_VALUES:
            raise RefusedError(
                f"{path}: the sound is too long (over {num_samples / rate:.0f} s, {num_channels} channels, {rate} Hz)",
                f"cut it to {max_seconds:g} s or less, or save it as mono at a lower rate",
            )
        finite = np.isfinite(samples)
        if not finite.all():
            second = (start + int(np.argmin(finite.all(axis=0)))) / rate
            raise MediaError(
                f"{path}: holds NaN or infinity at {second:.3f} s", "export the sound again, as 16-bit wav"
            )
        if samples.shape[1]:
            yield rate, samples
    if num_samples == 0:
        raise MediaError(f"{path}: the sound has no samples", "give a sound that is longer than nothing")


def _check_kind(path: str | os.PathLike[str], rate: int, num_channels: int) -> None:
    """Refuse rates and channel counts that no recording of a voice has."""
    if not MIN_SAMPLE_RATE_HZ <= rate <= MAX_SAMPLE_RATE_HZ:
        raise MediaError(
            f"{path}: its sample rate is {rate} Hz",
            f"resample it to a rate between {MIN_SAMPLE_RATE_HZ} and {MAX_SAMPLE_RATE_HZ} Hz",
        )
    if not 1 <= num_channels <= MAX_AUDIO_CHANNELS:
        raise MediaError(f"{path}: it has {num_channels} channels", f"mix it down to at most {MAX_AUDIO_CHANNELS}")
