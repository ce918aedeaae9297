"""Read sound files into arrays, and measure how long they really are."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from s2v_flow.errors import MediaError, RefusedError
from s2v_flow.media.audio_blocks import HALF_POWER, Block, decode_blocks
from s2v_flow.media.source import (
    MAX_AUDIO_SECONDS,
    MAX_SAMPLE_RATE_HZ,
    MIN_SAMPLE_RATE_HZ,
    Remark,
)

_BLOCK_SAMPLES = 65_536
_SILENT_PEAK = 1e-3  # -60 dB of full scale
_LOUD_PEAK, _MAX_VALUE = 4.0, 1e9


class Sound(Protocol):
    """A sound, whole or read as it is used."""

    @property
    def sample_rate_hz(self) -> int:
        """Samples a second."""

    @property
    def num_channels(self) -> int:
        """The number of channels."""

    @property
    def num_samples(self) -> int:
        """The number of samples of each channel."""

    def blocks(self) -> Iterator[NDArray[np.float32]]:
        """Yield the samples in order, [channels, n] each."""


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

    def blocks(self) -> Iterator[NDArray[np.float32]]:
        """Yield the samples, [channels, n]: all at once."""
        yield self.waveform


@dataclass(frozen=True)
class AudioInfo:
    """What a sound file decodes to, and what of that a listener might not expect.

    `gain` keeps the sum of many channels within full scale; as they keep half of the centre's power, so does the gain.
    """

    sample_rate_hz: int
    num_channels: int
    num_samples: int
    gain: float = 1.0
    notes: tuple[str, ...] = ()

    @property
    def duration_seconds(self) -> Fraction:
        """The exact length."""
        return Fraction(self.num_samples, self.sample_rate_hz)


def probe_audio(path: str | os.PathLike[str], max_seconds: float = MAX_AUDIO_SECONDS) -> AudioInfo:
    """Measure a sound by decoding it, keeping nothing: the length is the decoded one, whatever the header says.

    wav, flac, ogg, mp3, aac, m4a, or the sound of an mp4, mov, mkv or webm file, told by content; at its own rate, more
    than two channels mixed to stereo. Encoder delay is removed where the file says how long it is; where timestamps
    leave holes there is silence. It takes a few milliseconds for each minute of sound.

    Raises:
        MissingError: the file is not there, or may not be read.
        MediaError: it is not a sound file, is damaged, cut short or empty, holds NaN, infinity or over 1e9, has
            more than 8 channels or a rate outside 8 to 192 kHz.
        RefusedError: it is longer than `max_seconds`.
    """
    rate, num_channels, num_samples, peak, loudest = 0, 0, 0, 1.0, 0.0
    notes: list[str] = []
    for block in _checked_blocks(path, max_seconds, notes.append):
        rate, num_channels = block.rate, block.samples.shape[0]
        num_samples += block.samples.shape[1]
        largest = float(np.abs(block.samples).max())
        peak, loudest = max(peak, largest) if block.is_mixed else peak, max(loudest, largest)
    if loudest > _LOUD_PEAK and peak == 1:
        notes.append(Remark(f"its peak is {loudest:.0f} times full scale, which the video's sound clips: set volume"))
    if loudest < _SILENT_PEAK:
        notes.append(Remark("it is silent from beginning to end: is the right track recorded?"))
    return AudioInfo(rate, num_channels, num_samples, max(1 / peak, HALF_POWER), tuple(notes))


@dataclass(frozen=True)
class AudioClip:
    """A file's sound, or a part of it, read as it is used: memory does not grow with its length.

    The part runs from sample `first` to `last` (not included), faded in and out linearly over `num_fade_samples` (at
    most half of it), with `num_lead` samples of silence before it and `num_tail` after it; of all that, the first
    `limit` samples count.
    """

    path: str | os.PathLike[str]
    sample_rate_hz: int
    num_channels: int
    first: int
    last: int
    num_fade_samples: int = 0
    limit: int | None = None
    gain: float = 1.0
    num_lead: int = 0
    num_tail: int = 0

    @property
    def num_samples(self) -> int:
        """The number of samples of each channel."""
        length = self.num_lead + self.last - self.first + self.num_tail
        return length if self.limit is None else min(length, self.limit)

    def blocks(self) -> Iterator[NDArray[np.float32]]:
        """Yield the samples in order, [channels, n] each.

        Raises:
            MissingError, MediaError, RefusedError: as `probe_audio`.
        """
        yield from silence(self.num_channels, min(self.num_lead, self.num_samples))
        length = min(self.num_samples - self.num_lead, self.last - self.first)
        yield from self._part(length)
        yield from silence(self.num_channels, self.num_samples - self.num_lead - length)

    def _part(self, length: int) -> Iterator[NDArray[np.float32]]:
        position = -self.first  # of a block's first sample within the part
        for _, samples, _ in _checked_blocks(self.path, MAX_AUDIO_SECONDS) if length > 0 else ():
            start, stop = max(-position, 0), min(length - position, samples.shape[1])
            if start < stop:
                faded = self._faded(samples[:, start:stop], position + start)
                yield faded if self.gain == 1 else faded * np.float32(self.gain)
            position += samples.shape[1]
            if position >= length:
                return

    def _faded(self, samples: NDArray[np.float32], position: int) -> NDArray[np.float32]:
        """Fade the samples that begin at `position` of the part; a copy only where there is a fade."""
        length = min(self.num_fade_samples, (self.last - self.first) // 2)
        places = np.arange(position, position + samples.shape[1])
        nearest_end = np.minimum(places, self.last - self.first - 1 - places)
        if length == 0 or nearest_end.min() >= length:
            return samples
        gain = (nearest_end + 1).clip(max=length + 1).astype(np.float32) / np.float32(length + 1)
        return np.asarray(samples * gain)


def silence(num_channels: int, num_samples: int) -> Iterator[NDArray[np.float32]]:
    """Yield silence in blocks [channels, n]; none where there are no samples."""
    for start in range(0, num_samples, _BLOCK_SAMPLES):
        yield np.zeros((num_channels, min(_BLOCK_SAMPLES, num_samples - start)), np.float32)


def open_audio(path: str | os.PathLike[str]) -> AudioClip:
    """Return all of a file's sound, once its length is measured.

    Raises:
        MissingError, MediaError, RefusedError: as `probe_audio`.
    """
    info = probe_audio(path)
    return AudioClip(path, info.sample_rate_hz, info.num_channels, 0, info.num_samples, gain=info.gain)


def _checked_blocks(
    path: str | os.PathLike[str],
    max_seconds: float,
    note: Callable[[str], None] = lambda text: None,
) -> Iterator[Block]:
    """Yield the decoded blocks: all within the limits, of one rate and channel count, one sample or more in all."""
    rate, num_channels, num_samples = 0, 0, 0
    for block in decode_blocks(path, note):
        block_rate, samples, _ = block
        if rate == 0:
            rate, num_channels = block_rate, samples.shape[0]
            if not MIN_SAMPLE_RATE_HZ <= rate <= MAX_SAMPLE_RATE_HZ:  # no recording of a voice has such
                raise MediaError(
                    f"{path}: its sample rate is {rate} Hz",
                    f"resample it to a rate between {MIN_SAMPLE_RATE_HZ} and {MAX_SAMPLE_RATE_HZ} Hz",
                )
        if (block_rate, samples.shape[0]) != (rate, num_channels):
            raise MediaError(f"{path}: its rate or channels change on the way", "re-encode it by ffmpeg")
        start = num_samples
        num_samples += samples.shape[1]
        if num_samples > max_seconds * rate:
            raise RefusedError(
                f"{path}: the sound is too long (over {num_samples / rate:.0f} s, {num_channels} channels, {rate} Hz)",
                f"cut it to {max_seconds:g} s or less",
            )
        finite = np.abs(samples) <= _MAX_VALUE  # encoders fail at 1e16
        if not finite.all():
            second = (start + int(np.argmin(finite.all(axis=0)))) / rate
            raise MediaError(
                f"{path}: holds NaN, infinity or a value over {_MAX_VALUE:g} at {second:.3f} s",
                "export the sound again, as 16-bit wav",
            )
        if samples.shape[1]:
            yield block
    if num_samples == 0:
        raise MediaError(f"{path}: the sound has no samples", "give a sound that is longer than nothing")
