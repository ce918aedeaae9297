"""Open input files safely: regular files only, the format found by content, and nothing but that file is ever read.

FFmpeg's demuxers can open further files and addresses (playlists, concat scripts, HLS). They never get the chance: the
format is decided here from the first bytes, forced on the demuxer, and PyAV is handed an open file instead of a name.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from io import FileIO
from pathlib import Path
from typing import Any

import av
from av.stream import Disposition

from s2v_flow.errors import MediaError, MissingError

MAX_IMAGE_PIXELS = 64 * 2**20
"""Pixels of an image, or of one frame of a video (64 megapixels)."""


MAX_AUDIO_SECONDS = 24 * 3600
"""Length of a sound that is read as it is used."""


MAX_AUDIO_CHANNELS = 8
MIN_SAMPLE_RATE_HZ = 8_000
MAX_SAMPLE_RATE_HZ = 192_000
MAX_VIDEO_SECONDS = 24 * 3600
"""Length of an input video: at a constant rate, a few frames that are shown for years are billions."""


MAX_VIDEO_FRAMES = MAX_VIDEO_SECONDS * 60
"""Frames of an input video: 24 hours at 60 frames a second."""


AV_ERRORS = (av.error.FFmpegError, OSError, ValueError, OverflowError, MemoryError)
"""What PyAV raises for a file that is damaged, or is not what it claims to be; OSError where that sends it before the
file's start."""
# what is no UTF-8 in a tag: from 19 on PyAV keeps its bytes so and cannot be asked, before, it has to be asked
_TAG_OPTIONS = {} if int(av.__version__.partition(".")[0]) >= 19 else {"metadata_errors": "surrogateescape"}


_ALLOWED_GAP_SECONDS = Fraction(1, 4)  # between the length that a header promises and the last packet
_QUICKTIME_ATOMS = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot")
_CONVERT = {"video": "convert it to H.264 by ffmpeg", "sound": "convert it to wav by ffmpeg"}
_PICTURES = {b"\x89PNG": "PNG", b"\xff\xd8\xff": "JPEG", b"GIF8": "GIF"}
_PICTURE_CODECS = ("mjpeg", "png", "bmp", "gif", "webp", "tiff")
_PLAYLISTS = (b"#EXTM3U", b"ffconcat", b"[playlist]", b"<?xml", b"<smil", b"http:", b"https:")


class Remark(str):
    """A note on how a file was always read: nothing that was made of it before is out of date."""


def open_source(path: str | os.PathLike[str]) -> FileIO:
    """Open a regular file for reading, unbuffered, without ever waiting on a FIFO or a device.

    Raises:
        MissingError: nothing is there, or it may not be read.
        MediaError: it is a directory, a FIFO, a socket or a device.
    """
    name = os.fspath(path)
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    not_a_file = MediaError(f"{name}: not a regular file", "give a file, not a directory, a pipe or a device")
    try:
        descriptor = os.open(name, flags)
    except FileNotFoundError:
        raise MissingError(f"{name}: no such file", "paths are relative to the file that wrote them") from None
    except IsADirectoryError:
        raise not_a_file from None
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the name
        if Path(name.replace("\0", "")).is_dir():
            raise not_a_file from None
        raise MissingError(f"{name}: cannot be read ({error})", "check the name and its permissions") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise not_a_file
    return FileIO(descriptor, "rb")


def sniff(file: FileIO, path: str | os.PathLike[str]) -> str:
    """Tell a file's format by its first bytes, never by its suffix; the file is left at its start.

    Returns:
        "wav", "flac", "ogg", "mp3", "aac" (ADTS), "mov" (mp4, m4a, mov) or "matroska" (mkv, webm).

    Raises:
        MediaError: it is empty, a playlist, or none of these.
    """
    file.seek(0)
    head = file.read(64)
    try:
        if not head:
            raise MediaError(f"{path}: the file is empty", "give a file that has content")
        if head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(_PLAYLISTS):
            raise MediaError(f"{path}: a playlist or a script, not a recording", "give the media file itself")
        file.seek(id3_end(head))
        body = file.read(16)
    finally:
        file.seek(0)
    if head[:4] in (b"RIFF", b"RIFX", b"RF64") and head[8:12] == b"WAVE":
        return "wav"
    if head[4:8] in _QUICKTIME_ATOMS:
        return "mov"
    for magic, name in ((b"OggS", "ogg"), (b"\x1a\x45\xdf\xa3", "matroska")):
        if head.startswith(magic):
            return name
    if body.startswith(b"fLaC"):
        return "flac"
    if len(body) >= 2 and body[0] == 0xFF and body[1] & 0xE0 == 0xE0:
        return "aac" if body[1] & 0xF6 == 0xF0 else "mp3"  # layer bits 00: ADTS
    if head.startswith(b"ID3"):
        return "mp3"
    what = next(
        (f"a {name} picture, not a recording" for magic, name in _PICTURES.items() if head.startswith(magic)), ""
    )
    raise MediaError(
        f"{path}: {what or 'not a recording that can be read'} (its first bytes are {head[:8].hex(' ')})",
        "use wav, flac, ogg, mp3, m4a, aac, mp4, mov, mkv or webm; ffmpeg converts anything else",
    )


def id3_end(head: bytes) -> int:
    """Return where the ID3v2 tag ends whose first ten bytes are given; 0 if there is none."""
    if not head.startswith(b"ID3") or len(head) < 10:
        return 0
    return 10 + sum((byte & 0x7F) << shift for byte, shift in zip(head[6:10], (21, 14, 7, 0), strict=True))


def open_container(file: Any, format_name: str | None, path: str | os.PathLike[str]) -> Any:
    """Open a file, or what reads and seeks like one, with one named demuxer, that can open nothing else.

    None names the one that FFmpeg takes for it.

    Raises:
        MediaError: the file is not of that format, or damaged.
    """
    try:
        options = {"protocol_whitelist": "none"}
        return av.open(file, mode="r", format=format_name, container_options=options, **_TAG_OPTIONS)
    except AV_ERRORS as error:
        raise damaged(path, error) from error


def tags_of(part: Any) -> list[tuple[str, str]]:
    """Return the tags of a container or a stream, name and text; U+FFFD stands for what is no UTF-8 in them."""
    pairs = part.metadata.items()
    return [(_without_surrogates(name), _without_surrogates(text)) for name, text in pairs]


def _without_surrogates(text: str) -> str:
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def usable_track(streams: Sequence[Any], what: str, path: str | os.PathLike[str], note: Callable[[str], None]) -> Any:
    """Return the first of a file's tracks of one kind that has a decoder; note that there are more.

    Raises:
        MediaError: there is none.
    """
    if not streams:
        raise MediaError(f"{path}: has no {what} in it", f"give a file with a {what} track")
    usable = [number for number, stream in enumerate(streams, 1) if stream.codec_context is not None]
    if not usable:
        raise MediaError(f"{path}: no decoder for its {what} is available", _CONVERT[what])
    if usable[0] > 1:
        note(f"its {what} track {usable[0]} is used: no decoder is available for what stands before it")
    elif len(streams) > 1:
        note(Remark(f"of its {len(streams)} {what} tracks the first is used"))
    return streams[usable[0] - 1]


def films(container: Any) -> list[Any]:
    """Return a file's video tracks, without pictures of the whole, such as an album's cover, marked as one or not."""
    tracks = [track for track in container.streams.video if not track.disposition & Disposition.attached_pic]
    return [track for track in tracks if not is_picture(track)] or tracks


def is_picture(track: Any) -> bool:
    """Tell whether a video track has a codec of pictures: beside a film it is a cover."""
    return track.codec_context is not None and track.codec_context.name in _PICTURE_CODECS


def origin(container: Any) -> Fraction:
    """Return when a file begins, in seconds: of several tracks, with the first, as players show it; one alone at 0."""
    tracks = [*films(container), *container.streams.audio]
    starts = [track.start_time * Fraction(track.time_base) for track in tracks if track.start_time is not None]
    return min(starts, default=Fraction(0)) if len(tracks) > 1 else Fraction(0)


def bare_packets(container: Any, stream: Any, path: str | os.PathLike[str]) -> Iterator[Any]:
    """Yield one stream's packets, the flushing one included, from a file that does not say how long it is.

    Raises:
        MediaError: They cannot be read.
    """
    try:
        yield from container.demux(stream)
    except AV_ERRORS as error:
        raise damaged(path, error) from error


def whole_packets(container: Any, stream: Any, path: str | os.PathLike[str]) -> Iterator[Any]:
    """Yield one stream's packets, the flushing one included, and make sure that the file does not end too early.

    Raises:
        MediaError: the packets end before the length that the header promises, or cannot be read.
    """
    ends = {stream.index: Fraction(0)}
    try:
        for packet in container.demux():
            if packet.pts is not None and packet.time_base is not None:
                end = (packet.pts + (packet.duration or 0)) * packet.time_base
                ends[packet.stream_index] = max(ends.get(packet.stream_index, end), end)
            if packet.stream is stream:  # the index of a flushing packet is not set
                yield packet
    except AV_ERRORS as error:
        raise damaged(path, error) from error
    if stream.duration is not None:
        promised, reached = Fraction(stream.duration) * stream.time_base, ends[stream.index]
        reached -= Fraction(stream.start_time or 0) * stream.time_base
    else:
        promised, reached = Fraction(container.duration or 0, av.time_base), max(ends.values())
    if promised - reached > _ALLOWED_GAP_SECONDS:
        raise truncated(path, f"{float(promised):.2f} s were promised, {float(reached):.2f} s are there")


def damaged(path: str | os.PathLike[str], error: BaseException) -> MediaError:
    """Return the error for a file that the decoder gave up on."""
    return MediaError(
        f"{path}: damaged, or not what it seems to be ({error})", "export it again, or convert it by ffmpeg"
    )


def truncated(path: str | os.PathLike[str], detail: str) -> MediaError:
    """Return the error for a file whose end is missing."""
    return MediaError(
        f"{path}: the file is cut short ({detail})", "copy or download it again; or re-encode it by ffmpeg"
    )
