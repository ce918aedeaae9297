"""Read videos: measure them, and take their frames at a constant rate, some at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from math import ceil
from typing import Any

import numpy as np
from numpy.typing import NDArray

from s2v_flow.errors import MediaError, RefusedError
from s2v_flow.media.source import (
    AV_ERRORS,
    MAX_IMAGE_PIXELS,
    MAX_VIDEO_FRAMES,
    MAX_VIDEO_SECONDS,
    Remark,
    damaged,
    films,
    is_picture,
    open_container,
    open_source,
    origin,
    sniff,
    usable_track,
    whole_packets,
)

_TIMESTAMP_TOLERANCE_SECONDS = Fraction(2, 1000)  # Matroska rounds its times to milliseconds
_HDR_CURVES = (16, 18)  # ISO/IEC 23091-2: PQ and HLG
_SEEN_ASPECT = Fraction(1, 100)  # rounded sizes make pixels less square than that
_NOTICED_SECONDS = Fraction(45, 1000)  # from which on sound before its picture is noticed (ITU-R BT.1359)


@dataclass(frozen=True)
class VideoInfo:
    """What a video file shows; `width` and `height` are those of the upright picture in square pixels.

    `pixel_aspect` is how wide the file's own pixels are for their height, 1 where that cannot be seen.
    `late_seconds` is for how long the sound goes on before the picture, if that is noticed: the first frame stands
    still then, and that counts in `duration_seconds`.
    """

    width: int
    height: int
    num_frames: int
    fps: Fraction
    duration_seconds: Fraction
    has_audio: bool
    late_seconds: Fraction = Fraction(0)
    notes: tuple[str, ...] = ()
    pixel_aspect: Fraction = Fraction(1)

    def num_frames_at(self, fps: int | Fraction) -> int:
        """Return how many frames at i / fps begin before the video ends; a rest under 2 ms is a rounded timestamp."""
        return max(1, ceil((self.duration_seconds - _TIMESTAMP_TOLERANCE_SECONDS) * fps))


def probe_video(path: str | os.PathLike[str]) -> VideoInfo:
    """Measure a video file by reading all its packets and decoding one frame.

    Frames are counted as packets that show one, and the length is that from the first frame's time (or the sound's,
    where that starts earlier) to the last frame's end: what is in the file, not what its header says. A codec with
    hidden frames (VP8) may count a few that are never shown.

    Raises:
        MissingError: the file is not there, or may not be read.
        MediaError: it is not an mp4, mov, mkv or webm file, has no video in it, is damaged or cut short.
        RefusedError: it is longer than 24 hours, has more frames than that at 60 a second, or frames of more than 64
            megapixels.
    """
    notes: list[str] = []
    with _opened(path, notes.append) as (container, stream):
        first: Any = None
        start, end, num_frames = None, Fraction(0), 0
        for packet in whole_packets(container, stream, path):
            if first is None:
                first = next(_decoded(packet, path), None)
            if packet.pts is None or packet.is_discard:
                continue
            num_frames += 1
            if num_frames > MAX_VIDEO_FRAMES:
                raise RefusedError(f"{path}: the video has over {MAX_VIDEO_FRAMES} frames", "cut it to what is needed")
            time = packet.pts * packet.time_base
            start = time if start is None else min(start, time)
            end = max(end, time + (packet.duration or 0) * packet.time_base)
        if first is None or start is None:
            raise MediaError(f"{path}: the video has no frames", "give a video that has some")
        aspect = _pixel_aspect(stream)
        height, width = _upright_pixels(first, path, aspect).shape[:2]
        fps = Fraction(stream.average_rate or stream.guessed_rate or 25)
        late = start - origin(container) if container.streams.audio else Fraction(0)
        late = late if late > _NOTICED_SECONDS else Fraction(0)
        if late:
            notes.append(f"its picture starts {float(late):.3f} s late: the first frame stands still until then")
        if _is_mirrored(first):
            notes.append("it is shown mirrored, as its metadata says")
        if aspect != 1:
            shape = f"{aspect.numerator}:{aspect.denominator}"
            notes.append(f"its pixels are {shape}, not square: it is scaled to {width}x{height}, as players show it")
        if first.color_trc in _HDR_CURVES:
            notes.append(Remark("it is HDR, and taken as SDR: colours look pale; convert it to SDR by ffmpeg"))
        duration = max(end - start, 1 / fps) + late
        if duration > MAX_VIDEO_SECONDS:
            raise RefusedError(f"{path}: the video lasts {float(duration):.0f} s", f"cut it to {MAX_VIDEO_SECONDS} s")
        has_audio = bool(container.streams.audio)
        return VideoInfo(width, height, num_frames, fps, duration, has_audio, late, tuple(notes), aspect)


class VideoReader:
    """A video's frames at a constant rate: frame i is the one shown nearest to i / fps seconds after the start.

    Reads forwards from where it stands and begins again when asked for what lies behind, so it never holds more than
    two decoded frames besides those that it returns. Rotation, mirroring and pixels that are not square, in the file's
    metadata, are applied. Use it in a `with` statement.

    Raises:
        MissingError, MediaError, RefusedError: as `probe_video`.
        ValueError: `fps` is not positive.
    """

    def __init__(self, path: str | os.PathLike[str], fps: int | Fraction = 16) -> None:
        if fps <= 0:
            raise ValueError(f"fps must be positive, got {fps}")
        self.info = probe_video(path)
        self.fps = Fraction(fps)
        self._path = path
        self._stack = ExitStack()
        self._timeline: Iterator[tuple[Fraction, Any]] = iter(())
        self._before: tuple[Fraction, Any] | None = None  # the last frame before the wanted time
        self._after: tuple[Fraction, Any] | None = None  # the first frame at or after it
        self._position: int | None = None  # the index that was last asked for

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; a later `read` opens it again."""
        self._position = self._before = self._after = None
        self._timeline = iter(())
        self._stack.close()

    def __len__(self) -> int:
        return self.info.num_frames_at(self.fps)

    def __iter__(self) -> Iterator[NDArray[np.uint8]]:
        for index in range(len(self)):
            yield self._frame(index)

    def read(self, start: int, count: int) -> NDArray[np.uint8]:
        """Return frames [start, start + count) as uint8 [n, H, W, 3]; fewer, or none, at the end of the video.

        Raises:
            ValueError: `start` or `count` is negative.
            MediaError: the file is damaged.
        """
        if start < 0 or count < 0:
            raise ValueError(f"start and count must not be negative, got {start} and {count}")
        num_frames = max(0, min(start + count, len(self)) - start)
        frames = np.empty((num_frames, self.info.height, self.info.width, 3), dtype=np.uint8)
        for index in range(num_frames):
            frames[index] = self._frame(start + index)
        return frames

    def _frame(self, index: int) -> NDArray[np.uint8]:
        """Return the frame nearest to index / fps; of two equally near ones the earlier."""
        if self._position is None or index < self._position:
            self.close()
            opened = self._stack.enter_context(_opened(self._path))
            self._timeline = _timeline(*opened, self._path, self.info.late_seconds)
            self._after = next(self._timeline, None)
        self._position = index
        wanted = index / self.fps
        while self._after is not None and self._after[0] < wanted:
            self._before, self._after = self._after, next(self._timeline, None)
        candidates = [shown for shown in (self._before, self._after) if shown is not None]
        if not candidates:
            raise MediaError(f"{self._path}: the video has no frames", "give a video that has some")
        nearest = min(candidates, key=lambda shown: abs(shown[0] - wanted))
        pixels = _upright_pixels(nearest[1], self._path, self.info.pixel_aspect)
        if pixels.shape != (self.info.height, self.info.width, 3):
            raise MediaError(f"{self._path}: its frames change their size on the way", "re-encode it by ffmpeg")
        return pixels


@contextmanager
def _opened(path: str | os.PathLike[str], note: Callable[[str], None] = lambda text: None) -> Iterator[tuple[Any, Any]]:
    """Open a video file; give its container and its first video stream that has a decoder, of an allowed size."""
    with open_source(path) as file:
        name = sniff(file, path)
        if name not in ("mov", "matroska"):
            raise MediaError(f"{path}: not a video but a sound ({name})", "give an mp4, mov, mkv or webm file")
        with open_container(file, name, path) as container:
            tracks, every = films(container), container.streams.video
            stream = usable_track(tracks, "video", path, note)
            if any(track not in tracks and is_picture(track) for track in every[: every.index(stream)]):
                note(f"its video track {every.index(stream) + 1} is used: before it stands a picture")
            aspect = _pixel_aspect(stream)
            if stream.codec_context.width * stream.codec_context.height * max(aspect, 1 / aspect) > MAX_IMAGE_PIXELS:
                raise RefusedError(
                    f"{path}: its frames have more than {MAX_IMAGE_PIXELS // 2**20} megapixels", "scale the video down"
                )
            yield container, stream


def _timeline(
    container: Any, stream: Any, path: str | os.PathLike[str], late_seconds: Fraction
) -> Iterator[tuple[Fraction, Any]]:
    """Yield each decoded `av.VideoFrame` with its time in seconds; the first one's is `late_seconds`."""
    first = None
    for packet in whole_packets(container, stream, path):
        for frame in _decoded(packet, path):
            if frame.pts is None:
                continue
            time = frame.pts * Fraction(frame.time_base)
            first = time - late_seconds if first is None else first
            yield time - first, frame


def _decoded(packet: Any, path: str | os.PathLike[str]) -> Iterator[Any]:
    """Yield the frames that a packet completes."""
    try:
        yield from packet.decode()
    except AV_ERRORS as error:
        raise damaged(path, error) from error


def _pixel_aspect(stream: Any) -> Fraction:
    """Return how wide a stream's pixels are for their height; 1 where they are nearly square, or nothing is said."""
    aspect = Fraction(stream.sample_aspect_ratio or 1)
    return aspect if abs(aspect - 1) > _SEEN_ASPECT else Fraction(1)


def _upright_pixels(frame: Any, path: str | os.PathLike[str], aspect: Fraction) -> NDArray[np.uint8]:
    """Return an `av.VideoFrame` as uint8 [H, W, 3], as the file's metadata says: mirrored, turned in quarters, and with
    the shorter side of its pixels scaled up, to an even number.
    """
    width = frame.width if aspect <= 1 else 2 * round(frame.width * aspect / 2)
    height = frame.height if aspect >= 1 else 2 * round(frame.height / aspect / 2)
    try:
        pixels: NDArray[np.uint8] = frame.to_ndarray(format="rgb24", width=width, height=height)
    except (*AV_ERRORS, OSError) as error:  # a colour space that FFmpeg cannot convert
        raise damaged(path, error) from error
    pixels = pixels[::-1] if _is_mirrored(frame) else pixels
    return np.rot90(pixels, k=round(frame.rotation / 90))  # both count counterclockwise


def _is_mirrored(frame: Any) -> bool:
    """Tell whether a frame's display matrix (ISO/IEC 14496-12, 6.2.2) has a negative determinant."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return False
    a, b, _, c, d = np.frombuffer(matrix, np.int32, 5).tolist()
    return bool(a * d < b * c)
