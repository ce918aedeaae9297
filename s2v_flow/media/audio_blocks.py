"""Decode a sound file block by block: wav, flac and ogg by libsndfile, mp3, aac and containers by FFmpeg.

MP3 goes to FFmpeg, as in ComfyUI, because libsndfile cuts an mp3 without a Xing header at a length that it guesses from
the first frame's bit rate. Where both decode the same samples they agree to 1e-6, encoder delay removed alike.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from io import FileIO
from typing import Any

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
    sniff,
    truncated,
    whole_packets,
)

_BLOCK_SAMPLES = 65_536
_LARGEST_OGG_PAGE = 65_307
_STREAMED_WAV_BYTES = 0x7F00_0000  # programs that write a wav into a pipe put a huge length into its header
_MP3_FRAME_SAMPLES = 1152
_SAMPLE_TYPES: Mapping[str, Any] = {
    "u8": np.uint8,
    "s16": np.int16,
    "s32": np.int32,
    "flt": np.float32,
    "dbl": np.float64,
}

Block = tuple[int, NDArray[np.float32]]
"""Sample rate in Hz, and samples [channels, n] in [-1, 1] (float formats may go beyond)."""


def decode_blocks(path: str | os.PathLike[str]) -> Iterator[Block]:
    """Yield a file's sound in order; memory does not grow with its length.

    Raises:
        MissingError: the file is not there.
        MediaError: it is not a sound file, is damaged, has no sound in it, or is cut short.
    """
    with open_source(path) as file:
        name = sniff(file, path)
        if name in ("wav", "flac", "ogg"):
            if name == "ogg":
                _check_last_ogg_page(file, path)
            yield from _libsndfile_blocks(file, path)
        else:
            yield from _ffmpeg_blocks(file, name, path)


def _libsndfile_blocks(file: FileIO, path: str | os.PathLike[str]) -> Iterator[Block]:
    """Yield the blocks of a wav, flac or ogg file."""
    try:
        with soundfile.SoundFile(file.fileno(), closefd=False) as sound:
            _check_wav_length(sound.extra_info, path)
            while True:
                block: NDArray[np.float32] = sound.read(_BLOCK_SAMPLES, dtype="float32", always_2d=True)
                if len(block) == 0:
                    return
                yield sound.samplerate, block.T
    except (soundfile.SoundFileError, ValueError, OverflowError) as error:
        raise damaged(path, error) from error


def _check_wav_length(log: str, path: str | os.PathLike[str]) -> None:
    """Refuse a wav file whose data is shorter than its header says; libsndfile only notes that in its log."""
    match = re.search(r"^\s*data\s*: (\d+) \(should be (\d+)\)", log, re.MULTILINE)
    if match:
        promised, present = int(match[1]), int(match[2])
        if present < promised < _STREAMED_WAV_BYTES:
            raise truncated(path, f"{promised} bytes were promised, {present} are there")


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


def _ffmpeg_blocks(file: FileIO, name: str, path: str | os.PathLike[str]) -> Iterator[Block]:
    """Yield the blocks of the first sound stream of an mp3, aac, mp4 or mkv file."""
    is_bare = name in ("mp3", "aac")
    has_length = name == "mp3" and _has_xing_header(file)
    with open_container(file, name, path) as container:
        if not container.streams.audio:
            raise MediaError(f"{path}: has no sound in it", "give a file with a sound track")
        stream = container.streams.audio[0]
        num_samples, rate, failure = 0, 0, None
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
                num_samples, rate = num_samples + frame.samples, frame.sample_rate
                yield frame.sample_rate, _frame_samples(frame, path)
        if failure is not None and not (is_bare and num_samples):  # tags of all kinds are found at the end of an mp3
            raise damaged(path, failure)
        if has_length and stream.duration is not None:
            missing = round(stream.duration * stream.time_base * rate) - num_samples
            if missing > 2 * _MP3_FRAME_SAMPLES:
                raise truncated(path, f"{missing} samples are missing")


def _has_xing_header(file: FileIO) -> bool:
    """Tell whether an mp3 says how long it is (FFmpeg guesses otherwise); the file is left at its start."""
    file.seek(0)
    file.seek(id3_end(file.read(10)))
    frame = file.read(64)
    file.seek(0)
    return b"Xing" in frame or b"Info" in frame


def _frame_samples(frame: Any, path: str | os.PathLike[str]) -> NDArray[np.float32]:
    """Return an `av.AudioFrame` as float32 [channels, samples], integers divided by their full scale."""
    name, count = frame.format.name, frame.layout.nb_channels
    dtype = _SAMPLE_TYPES.get(name.removesuffix("p"))
    if dtype is None:
        raise MediaError(f"{path}: samples of type {name} are not supported", "convert it to wav by ffmpeg")
    if count > MAX_AUDIO_CHANNELS:
        raise MediaError(f"{path}: it has {count} channels", f"mix it down to at most {MAX_AUDIO_CHANNELS}")
    # PyAV finds more planes than there are from 8 channels on, and to_ndarray reads them: garbage, or a crash
    planes, size = (frame.planes[:count], frame.samples) if frame.format.is_planar else (frame.planes[:1], -1)
    values = np.stack([np.frombuffer(plane, dtype=dtype, count=size) for plane in planes])
    if not frame.format.is_planar:
        values = values[0, : frame.samples * count].reshape(-1, count).T  # [channels, samples]
    if dtype == np.uint8:
        return np.asarray((values.astype(np.float32) - np.float32(128)) / np.float32(128))
    if dtype in (np.int16, np.int32):
        return np.asarray(values.astype(np.float32) * np.float32(2.0 ** (1 - 8 * values.itemsize)))
    return np.asarray(values, dtype=np.float32)
