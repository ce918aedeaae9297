"""Decode a sound file block by block, mixed down to stereo: wav, flac and ogg by libsndfile, the rest by FFmpeg.

A wav or flac file of more than two channels goes to FFmpeg, which knows which of them is the centre.

MP3 goes to FFmpeg, as in ComfyUI, because libsndfile cuts an mp3 without a Xing header at a length that it guesses from
the first frame's bit rate. Where both decode the same samples they agree to 1e-6, encoder delay removed alike.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fractions import Fraction
from io import FileIO
from typing import Any, NamedTuple

import av
import numpy as np
import soundfile
from numpy.typing import NDArray

from s2v_flow.errors import MediaError
from s2v_flow.media.source import (
    AV_ERRORS,
    MAX_AUDIO_CHANNELS,
    bare_packets,
    damaged,
    id3_end,
    open_container,
    open_source,
    origin,
    sniff,
    truncated,
    usable_track,
    whole_packets,
)

_BLOCK_SAMPLES = 65_536
_LARGEST_OGG_PAGE = 65_307
_ALLOWED_GAP_SECONDS = Fraction(1, 100)  # Matroska rounds to milliseconds
_MAX_GAP_SECONDS = 3600  # one timestamp that is spoilt may say years
_MP3_FRAME_SAMPLES = 1152
_UNKNOWN_LENGTH = 2**62  # samples: what libsndfile says of a flac that was streamed, and then fails at its end
_VORBIS_LAYOUTS: Mapping[int, tuple[str, ...]] = {  # the order of ogg's channels: Vorbis I, 4.3.9; RFC 7845, 5.1.1.2
    3: ("FL", "FC", "FR"),
    4: ("FL", "FR", "BL", "BR"),
    5: ("FL", "FC", "FR", "BL", "BR"),
    6: ("FL", "FC", "FR", "BL", "BR", "LFE"),
    7: ("FL", "FC", "FR", "SL", "SR", "BC", "LFE"),
    8: ("FL", "FC", "FR", "SL", "SR", "BL", "BR", "LFE"),
}
_SAMPLE_TYPES: Mapping[str, Any] = {
    "u8": np.uint8,
    "s16": np.int16,
    "s32": np.int32,
    "flt": np.float32,
    "dbl": np.float64,
}


class Block(NamedTuple):
    """A piece of sound: samples [1 or 2, n] in [-1, 1]; float formats and what is mixed down may go beyond."""

    rate: int
    samples: NDArray[np.float32]
    is_mixed: bool = False


def decode_blocks(path: str | os.PathLike[str], note: Callable[[str], None]) -> Iterator[Block]:
    """Yield a file's sound in order, as mono or stereo; memory does not grow with its length.

    More than two channels are mixed down. Where a container's timestamps leave a hole, or its sound starts late, there
    is silence. `note` is called with what a listener might not expect, at the latest at the end.

    Raises:
        MissingError: the file is not there.
        MediaError: it is not a sound file, is damaged, has no sound in it, or is cut short.
    """
    with open_source(path) as file:
        name = sniff(file, path)
        if name == "ogg":
            _check_last_ogg_page(file, path)
        source = with_real_length(file, path, note) if name == "wav" else file
        if name == "ogg" or (name in ("wav", "flac") and _is_plain(source, path)):
            yield from _libsndfile_blocks(source, path, note)
        else:
            yield from _ffmpeg_blocks(source, name, path, note)


def _is_plain(file: FileIO | Patched, path: str | os.PathLike[str]) -> bool:
    """Tell whether libsndfile knows all about a wav or flac file: no layout is needed, and the length is known."""
    with _opened_by_libsndfile(file, path) as sound:
        return int(sound.channels) <= 2 and sound.frames < _UNKNOWN_LENGTH


def _libsndfile_blocks(
    file: FileIO | Patched, path: str | os.PathLike[str], note: Callable[[str], None]
) -> Iterator[Block]:
    """Yield the blocks of a wav or flac file of one or two channels, or of an ogg file."""
    with _opened_by_libsndfile(file, path) as sound:
        is_mixed = sound.channels > 2
        if sound.channels > MAX_AUDIO_CHANNELS:
            raise _too_many_channels(path, sound.channels)
        if is_mixed:
            note(f"its sound is mixed from {sound.channels} channels to stereo")
        while True:
            block: NDArray[np.float32] = sound.read(_BLOCK_SAMPLES, dtype="float32", always_2d=True).T
            if block.shape[1] == 0:
                return
            samples = to_stereo(block, _VORBIS_LAYOUTS[len(block)]) if is_mixed else block
            yield Block(sound.samplerate, samples, is_mixed)


def _too_many_channels(path: str | os.PathLike[str], count: int) -> MediaError:
    return MediaError(f"{path}: it has {count} channels", f"mix it down to at most {MAX_AUDIO_CHANNELS}")


@contextmanager
def _opened_by_libsndfile(file: FileIO | Patched, path: str | os.PathLike[str]) -> Iterator[Any]:
    """Open a file, and leave it at its start."""
    source = file.fileno() if isinstance(file, FileIO) else file
    try:
        with soundfile.SoundFile(source, closefd=False) as sound:
            yield sound
    except (soundfile.SoundFileError, ValueError, OverflowError) as error:
        raise damaged(path, error) from error
    finally:
        file.seek(0)


def _check_last_ogg_page(file: FileIO, path: str | os.PathLike[str]) -> None:
    """Refuse an ogg file that does not end with a whole page that is marked as the last one (RFC 3533)."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 2 * _LARGEST_OGG_PAGE))
    tail = file.read(2 * _LARGEST_OGG_PAGE)
    file.seek(0)
    page = tail[tail.rfind(b"OggS") :]
    num_segments = page[26] if len(page) > 26 else 255
    if len(page) < 27 + num_segments + sum(page[27 : 27 + num_segments]) or not page[5] & 4:
        raise truncated(path, "its last page is missing")


def _ffmpeg_blocks(
    file: FileIO | Patched, name: str, path: str | os.PathLike[str], note: Callable[[str], None]
) -> Iterator[Block]:
    """Yield the blocks of a file's first sound track that has a decoder."""
    is_bare = name in ("mp3", "aac")
    has_length = name == "mp3" and _has_xing_header(file)
    with open_container(file, name, path) as container:
        stream = usable_track(container.streams.audio, "sound", path, note)
        timeline = _Timeline(container, path) if name in ("mov", "matroska") else None
        num_samples, rate, is_mixed, failure = 0, 0, False, None
        packets = bare_packets if is_bare else whole_packets
        for packet in packets(container, stream, path):
            try:
                frames = packet.decode()
            except AV_ERRORS as error:
                failure = error
                continue
            if frames and failure is not None:
                raise damaged(path, failure)
            for frame in frames:
                samples, rate, is_mixed = _frame_samples(frame, path), frame.sample_rate, frame.layout.nb_channels > 2
                lacking = 0 if timeline is None else timeline.lacking(frame, num_samples)
                num_samples += lacking + frame.samples
                for start in range(0, lacking, _BLOCK_SAMPLES):
                    silence = np.zeros((len(samples), min(lacking - start, _BLOCK_SAMPLES)), np.float32)
                    yield Block(rate, silence, is_mixed)
                yield Block(rate, samples, is_mixed)
        if failure is not None and not (is_bare and num_samples):  # tags of all kinds are found at the end of an mp3
            raise damaged(path, failure)
        if has_length and stream.duration is not None:
            missing = round(stream.duration * stream.time_base * rate) - num_samples
            if missing > 2 * _MP3_FRAME_SAMPLES:
                raise truncated(path, f"{missing} samples are missing")
        if is_mixed:
            note(f"its sound is mixed from {stream.layout.name} to stereo")
        if timeline is not None:
            timeline.tell(note)


class _Timeline:
    """Where a container's frames of sound belong, by their timestamps.

    A file of sound alone begins at 0. One with several tracks begins with the first of them, as players show it.
    """

    def __init__(self, container: Any, path: str | os.PathLike[str]) -> None:
        self._origin = origin(container)
        self._end: Fraction | None = None  # of the frame before
        self._path = path
        self._late_seconds = self._hole_seconds = Fraction(0)
        self._num_holes = 0

    def lacking(self, frame: Any, num_samples: int) -> int:
        """Return how many samples of silence stand between the `num_samples` so far and an `av.AudioFrame`.

        Raises:
            MediaError: more than an hour.
        """
        if frame.pts is None:
            return 0
        rate, time = frame.sample_rate, frame.pts * Fraction(frame.time_base)
        if self._end is None:
            self._origin = self._end = min(self._origin, time)
        gap, self._end = time - self._end, time + Fraction(frame.samples, rate)
        if gap <= _ALLOWED_GAP_SECONDS:
            return 0
        if gap > _MAX_GAP_SECONDS:
            raise MediaError(
                f"{self._path}: there is no sound for {float(gap):.0f} s from {num_samples / rate:.2f} s on",
                "cut it to the part with the voice, or re-encode it by ffmpeg",
            )
        count: int = max(round((time - self._origin) * rate) - num_samples, 0)
        if num_samples == 0:
            self._late_seconds = Fraction(count, rate)
        else:
            self._num_holes += 1
            self._hole_seconds += Fraction(count, rate)
        return count

    def tell(self, note: Callable[[str], None]) -> None:
        """Note what was filled."""
        if self._late_seconds:
            note(f"its sound starts {float(self._late_seconds):.3f} s late: silence stands in front of it")
        if self._num_holes:
            holes = "a hole" if self._num_holes == 1 else f"{self._num_holes} holes"
            note(f"its sound has {holes} of {float(self._hole_seconds):.3f} s: filled with silence")


def _has_xing_header(file: FileIO | Patched) -> bool:
    """Tell whether an mp3 says how long it is (FFmpeg guesses otherwise); the file is left at its start."""
    file.seek(0)
    file.seek(id3_end(file.read(10)))
    frame = file.read(64)
    file.seek(0)
    return b"Xing" in frame or b"Info" in frame


def _frame_samples(frame: Any, path: str | os.PathLike[str]) -> NDArray[np.float32]:
    """Return an `av.AudioFrame` as float32 [1 or 2, samples], integers divided by their full scale."""
    name, count = frame.format.name, frame.layout.nb_channels
    dtype = _SAMPLE_TYPES.get(name.removesuffix("p"))
    if dtype is None:
        raise MediaError(f"{path}: samples of type {name} are not supported", "convert it to wav by ffmpeg")
    if count > MAX_AUDIO_CHANNELS:
        raise _too_many_channels(path, count)
    if (
        frame.format.is_planar and count == MAX_AUDIO_CHANNELS
    ):  # PyAV finds more planes than eight, and fails from 19 on
        packing = av.AudioResampler(frame.format.packed, frame.layout, frame.sample_rate)
        (frame,) = packing.resample(frame)
    planes, size = (frame.planes, frame.samples) if frame.format.is_planar else (frame.planes[:1], -1)
    values = np.stack([np.frombuffer(plane, dtype=dtype, count=size) for plane in planes])
    if not frame.format.is_planar:
        values = values[0, : frame.samples * count].reshape(-1, count).T  # [channels, samples]
    if dtype == np.uint8:
        samples = np.asarray((values.astype(np.float32) - np.float32(128)) / np.float32(128))
    elif dtype in (np.int16, np.int32):
        samples = np.asarray(values.astype(np.float32) * np.float32(2.0 ** (1 - 8 * values.itemsize)))
    else:
        samples = np.asarray(values, dtype=np.float32)
    return samples if count <= 2 else to_stereo(samples, [channel.name for channel in frame.layout.channels])


_MAX_CHUNKS = 1000  # before the sound
_PLACEHOLDERS = (2**31, 2**32, 2**63, 2**64)  # and what is a header's length or a block less than these
_NEAR = 2**16
_HUGE_BYTES, _HUGE_RATIO = 10**9, 8


class Patched:
    """A file some of whose bytes read otherwise."""

    def __init__(self, file: FileIO, patches: Mapping[int, bytes]) -> None:
        self._file, self._patches = file, patches
        self.seek, self.tell = file.seek, file.tell

    def read(self, count: int = -1) -> bytes:
        """Return up to `count` bytes."""
        start = self._file.tell()
        data = bytearray(self._file.read(count))
        for at, patch in self._patches.items():
            first, last = max(at, start), min(at + len(patch), start + len(data))
            if first < last:
                data[first - start : last - start] = patch[first - at : last - at]
        return bytes(data)


def with_real_length(file: FileIO, path: str | os.PathLike[str], note: Callable[[str], None]) -> FileIO | Patched:
    """Return a wav file (RIFF, RIFX, RF64) as one whose header tells how long the sound in it is.

    A promised length is a placeholder if it is 0 with something behind it that is no other chunk, if it is about a
    limit of the format, or if it is over 10**9 bytes and 8 times what is there. `note` is called where that is so, and
    where what stands behind the sound that is promised is no other chunk.

    Raises:
        MediaError: less is there than a length promises that is no placeholder.
    """
    magic = file.read(4)
    order = ">" if magic == b"RIFX" else "<"
    size = file.seek(0, os.SEEK_END)
    wide = None  # where a length of 64 bits stands
    data = None
    for name, start, length in _chunks(file, order, 12, size):
        if name == b"ds64" and magic == b"RF64":
            wide = start + 8
        if name == b"data":
            data = start, length
            break
    if data is None:
        file.seek(0)
        return file  # not a whole header: libsndfile says so
    start, promised = data
    if wide is not None:
        file.seek(wide)
        (promised,) = struct.unpack("<Q", file.read(8))
    present = size - start
    end = start + promised
    has_more = end < size and not _is_chunk_list(file, order, end + promised % 2, size)
    file.seek(0)
    if promised <= present and (promised or not has_more):
        if has_more:
            more = f"the {present - promised} behind them, which are no other chunk, are not read"
            note(f"its header tells of {promised} bytes of sound; {more}: save it again if it ends too early")
        return file
    if promised and not any(limit - _NEAR <= promised <= limit for limit in _PLACEHOLDERS):
        if promised < _HUGE_BYTES or promised < _HUGE_RATIO * present:
            raise truncated(path, f"{promised} bytes were promised, {present} are there")
        note(f"its header promises {promised} bytes of sound, {present} are there: taken as streamed, and complete")
    patches = {start - 4: struct.pack(f"{order}I", min(present, 2**32 - 1))}
    if wide is not None:
        patches[wide - 8] = struct.pack("<QQ", size - 8, present)
    return Patched(file, patches)


def _chunks(file: FileIO, order: str, at: int, size: int) -> Iterator[tuple[bytes, int, int]]:
    """Yield each chunk's name, where its content starts, and how long it claims to be."""
    for _ in range(_MAX_CHUNKS):
        file.seek(at)
        head = file.read(8)
        if len(head) < 8 or at >= size:
            return
        name, length = struct.unpack(f"{order}4sI", head)
        yield name, at + 8, length
        at += 8 + length + length % 2


def _is_chunk_list(file: FileIO, order: str, at: int, size: int) -> bool:
    """Tell whether chunks with readable names fill the rest of the file exactly, or nothing is left."""
    end = at
    for name, start, length in _chunks(file, order, at, size):
        if not all(0x20 <= byte < 0x7F for byte in name):
            return False
        end = start + length + length % 2
    return end in (size, size + 1)


HALF_POWER = 0.5**0.5
_FRONT: Mapping[str, tuple[float, float]] = {  # a channel's shares in left and right, by FFmpeg's names
    "FL": (1, 0),
    "FR": (0, 1),
    "FC": (HALF_POWER, HALF_POWER),
    "FLC": (np.cos(np.pi / 8), np.sin(np.pi / 8)),  # halfway between left and centre, at constant power
    "FRC": (np.sin(np.pi / 8), np.cos(np.pi / 8)),
    "LFE": (0, 0),
}
_SURROUND: Mapping[str, tuple[float, float]] = {"L": (HALF_POWER, 0), "R": (0, HALF_POWER), "C": (0.5, 0.5)}
_LAYOUTS: Mapping[int, tuple[str, ...]] = {  # where a file does not say: as FLAC (RFC 9639, section 9.1.3)
    3: ("FL", "FR", "FC"),
    4: ("FL", "FR", "BL", "BR"),
    5: ("FL", "FR", "FC", "BL", "BR"),
    6: ("FL", "FR", "FC", "LFE", "BL", "BR"),
    7: ("FL", "FR", "FC", "LFE", "BC", "SL", "SR"),
    8: ("FL", "FR", "FC", "LFE", "BL", "BR", "SL", "SR"),
}


def to_stereo(samples: NDArray[np.float32], channels: Sequence[str]) -> NDArray[np.float32]:
    """Mix three to eight channels to left and right; their mean is proportional to the recommendation's mono.

    Nothing is attenuated: the sum of loud channels may exceed full scale.

    `samples`: float32 [channels, n], of which float32 [2, n] comes; `channels`: FFmpeg's name of each, such as FC; with
    a name of no place (NONE) the count decides.

    Source: Recommendation ITU-R BS.775, downward mixing equations for 3/2 material.
    """
    is_known = all(name in _FRONT or name[-1:] in _SURROUND for name in channels)
    names = channels if is_known else _LAYOUTS[len(channels)]
    weights = [_FRONT[name] if name in _FRONT else _SURROUND[name[-1]] for name in names]
    return np.asarray(np.einsum("cn,cs->sn", samples, np.array(weights, np.float32)))
