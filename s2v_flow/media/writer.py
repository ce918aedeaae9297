"""Write frames, as they come, to an mp4 file with sound, to PNG files, or without loss to be read again."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any

import av
import imageio.v3 as iio
import numpy as np
from numpy.typing import NDArray

from s2v_flow.errors import S2VFlowError
from s2v_flow.files.atomic import put_new, temporary_prefix, writing
from s2v_flow.media.audio import Sound
from s2v_flow.media.resample import Joined

PRESETS = ("ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower", "veryslow", "placebo")
"""x264's presets, from the quickest to the smallest file."""

_AAC_RATES_HZ = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000, 64000, 88200, 96000)
_OTHER_AUDIO_RATE_HZ = 48_000
_AUDIO_BITS_PER_SECOND = 192_000
_MAX_AAC_BITS_PER_SAMPLE = 6
_NUM_THREADS = 4  # fixed: the output of x264 depends on it, and each holds frames
_BT709 = 1  # ISO/IEC 23091-2: primaries, transfer and matrix of BT.709 are all 1
_LIMITED_RANGE = 1


class VideoWriter:
    """An mp4 file in the making: H.264 (yuv420p, BT.709), sound as AAC, the index in front for streaming.

    Frames are encoded as they come and none is kept; the sound is read and interleaved up to the same time. Everything
    goes to a temporary file beside the target, which takes its name when the `with` block ends well, and is removed
    when it does not. The same frames, sound and settings give the same bytes.

    The sound, mono or stereo, begins with the first frame and is as long as the caller's `audio`: cut or pad it before.
    Rates that AAC does not know are resampled to 48 kHz.

    Args:
        path: the target; folders that are missing are made.
        width: in pixels, even.
        height: in pixels, even.
        fps: frames a second, 0.001 or more; of a fraction, the nearest of up to a million parts.
        crf: x264's constant rate factor, 0 (best) to 51.
        preset: one of `PRESETS`.
        audio: the sound, or none.
        metadata: tags for the whole file, under any names.
        replaces: put it in the place of a file that is there.

    Raises:
        ValueError: a setting is out of range.
        TakenError: on leaving, another file is there.
        CannotWriteError: the file cannot be written; `exit_code` tells a full disk.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        width: int,
        height: int,
        fps: int | Fraction = 16,
        crf: int = 18,
        preset: str = "medium",
        audio: Sound | None = None,
        metadata: Mapping[str, str] | None = None,
        replaces: bool = True,
    ) -> None:
        if width < 2 or height < 2 or width % 2 or height % 2:
            raise ValueError(f"width and height must be even, got {width}x{height}")
        if audio is not None and audio.num_channels > 2:
            raise ValueError(f"sound must be mono or stereo, got {audio.num_channels} channels")
        if fps * 1000 < 1 or not 0 <= crf <= 51 or preset not in PRESETS:
            raise ValueError(
                f"fps {fps} must be at least 0.001, crf {crf} from 0 to 51, preset {preset!r} one of {PRESETS}"
            )
        self.path, self._replaces = Path(path), replaces
        self.num_frames = 0
        self._width, self._height = width, height
        self._fps = Fraction(fps).limit_denominator(1_000_000)  # FFmpeg's numbers have 31 bits
        # x264's macroblock tree now and then gives other bytes for the same frames (88 of 300 runs at 128x96, 0 of 850
        # without it), and a run that was killed ends in the same bytes. Without it files are larger at the same crf: of
        # a moving portrait by 16 % (33 % with grain) at 640x640, by 2 % (-6 %) at 192x192.
        self._video_options = {"crf": str(crf), "preset": preset, "mbtree": "0"}
        self._audio = None if audio is None else _AacFeed(audio)
        self._metadata = dict(metadata or {})
        self._stack = ExitStack()
        self._container: Any = None
        self._video_stream: Any = None
        self._audio_stream: Any = None

    def __enter__(self) -> VideoWriter:
        with ExitStack() as stack:
            temporary = stack.enter_context(replacing(self.path, self._replaces))
            with _explained(self.path):
                named = "+use_metadata_tags" * bool(self._metadata)  # FFmpeg reads one table of names: a note's, else
                self._container = av.open(
                    os.path.abspath(temporary),  # with a root in front no name looks like an address to FFmpeg
                    mode="w",
                    format="mp4",
                    container_options={"movflags": f"+faststart{named}", "fflags": "+bitexact"},
                )
                stack.callback(self._abandon)
                self._container.metadata.update(self._metadata)
                self._video_stream = self._add_video_stream()
                self._audio_stream = self._add_audio_stream() if self._audio else None
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._stack.__exit__(kind, error, trace)
            return
        with self._stack:
            self._finish()

    def write(self, frames: NDArray[np.uint8]) -> None:
        """Append frames, uint8 [N, H, W, 3], RGB.

        Raises:
            ValueError: they have another type or size.
            CannotWriteError: the file cannot be written.
        """
        assert self._container is not None, "a VideoWriter is used in a with statement"
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[1:] != (self._height, self._width, 3):
            raise ValueError(
                f"frames must be uint8 [N, {self._height}, {self._width}, 3], got {frames.dtype} {frames.shape}"
            )
        with _explained(self.path):
            for pixels in frames:
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24").reformat(
                    format="yuv420p", dst_colorspace=_BT709, dst_color_range=_LIMITED_RANGE
                )
                frame.pts, frame.time_base = self.num_frames, 1 / self._fps
                self._container.mux(self._video_stream.encode(frame))
                self.num_frames += 1
                self._write_audio(until=self.num_frames / self._fps)

    def _add_video_stream(self) -> Any:
        """Return the new H.264 stream, its colours tagged."""
        stream = self._container.add_stream("libx264", rate=self._fps, options=self._video_options)
        stream.width, stream.height, stream.pix_fmt = self._width, self._height, "yuv420p"
        codec = stream.codec_context
        codec.time_base, codec.thread_count = 1 / self._fps, _NUM_THREADS
        codec.color_primaries, codec.color_trc, codec.colorspace = _BT709, _BT709, _BT709
        codec.color_range = _LIMITED_RANGE
        return stream

    def _add_audio_stream(self) -> Any:
        """Return the new AAC stream."""
        assert self._audio is not None
        rate, num_channels = self._audio.sample_rate_hz, self._audio.num_channels
        stream = self._container.add_stream("aac", rate=rate, layout="mono" if num_channels == 1 else "stereo")
        stream.bit_rate = min(_AUDIO_BITS_PER_SECOND, _MAX_AAC_BITS_PER_SAMPLE * rate * num_channels)
        stream.codec_context.flags |= av.codec.context.Flags.bitexact  # no version of FFmpeg within the sound
        return stream

    def _write_audio(self, until: Fraction | None = None) -> None:
        """Encode the sound up to a time in seconds, or all that is left of it."""
        if self._audio is None:
            return
        rate, start = self._audio.sample_rate_hz, self._audio.num_taken
        samples = self._audio.take(None if until is None else int(until * rate) - start)
        if samples.shape[1]:
            layout = "mono" if self._audio.num_channels == 1 else "stereo"
            frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout=layout)
            frame.sample_rate, frame.pts, frame.time_base = rate, start, Fraction(1, rate)
            self._container.mux(self._audio_stream.encode(frame))

    def _finish(self) -> None:
        """Write what the encoders still hold, and the index."""
        if self.num_frames == 0:
            raise ValueError(f"{self.path}: no frames were written")
        with _explained(self.path):
            self._write_audio()
            if self._audio_stream is not None:
                self._container.mux(self._audio_stream.encode(None))
            self._container.mux(self._video_stream.encode(None))
            self._container.close()

    def _abandon(self) -> None:
        """Close the file whatever state it is in; nothing happens if it is closed."""
        with suppress(OSError, av.error.FFmpegError):
            self._container.close()


def write_images(directory: Path, frames: Iterable[NDArray[np.uint8]]) -> list[Path]:
    """Write frames as <directory>/frame_00001.png and on, one at a time, each whole or not at all; return the files.

    The directory is made if it is missing; files of the same names are replaced. `frames`: uint8 [H, W, 3] each, RGB.

    Raises:
        ValueError: a frame is of another type or shape.
        CannotWriteError: a file cannot be written; `exit_code` tells a full disk.
    """
    paths = []
    for number, frame in enumerate(frames, start=1):
        if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
            raise ValueError(f"a frame must be uint8 [H, W, 3], got {frame.dtype} {frame.shape}")
        path = directory / f"frame_{number:05d}.png"
        encoded = iio.imwrite("<bytes>", frame, extension=".png", plugin="pillow")
        with replacing(path) as temporary, _explained(path):
            temporary.write_bytes(encoded)
        paths.append(path)
    return paths


class _AacFeed:
    """Hands out a sound piece by piece at one of AAC's rates."""

    def __init__(self, sound: Sound) -> None:
        self.num_taken = 0
        if sound.sample_rate_hz not in _AAC_RATES_HZ:
            sound = Joined((sound,), rate=_OTHER_AUDIO_RATE_HZ)
        self.sample_rate_hz = sound.sample_rate_hz
        self.num_channels = sound.num_channels
        self._blocks = sound.blocks()
        self._held = np.zeros((self.num_channels, 0), np.float32)

    def take(self, count: int | None) -> NDArray[np.float32]:
        """Return the next `count` samples, [channels, n]; fewer at the sound's end; None: all that is left."""
        parts = [self._held]
        length = self._held.shape[1]
        while (count is None or length < count) and (block := next(self._blocks, None)) is not None:
            parts.append(block)
            length += block.shape[1]
        joined = np.concatenate(parts, axis=1) if len(parts) > 1 else self._held
        split = length if count is None else max(count, 0)
        taken, self._held = np.ascontiguousarray(joined[:, :split]), joined[:, split:]
        self.num_taken += taken.shape[1]
        return taken


@contextmanager
def replacing(path: Path, replaces: bool = True) -> Iterator[Path]:
    """Give a new, empty file beside `path`; it takes the name if all goes well (and it is free), and goes away if not.

    What a killed process leaves of it is found by its name, and removed by the next run that writes to that folder.
    """
    temporary = path.with_name(f"{temporary_prefix()}{secrets.token_hex(4)}{path.suffix}")
    with _explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch(exist_ok=False)  # with the permissions that the user's umask grants
    try:
        yield temporary
        with _explained(path):
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            temporary.replace(path) if replaces else put_new(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn an error of the file system, or of FFmpeg while it writes, into one that says what to do."""
    with writing(path):
        try:
            with _system_errors():
                yield
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            fix = "give a sound within full scale, and other settings"
            raise S2VFlowError(f"{path}: the encoders refuse the frames, the sound or the settings", fix) from error


class LosslessWriter:
    """A file in the making, of frames `width` x `height` pixels large.

    Raises:
        OSError: It cannot be written; so do all methods but `close`.
    """

    def __init__(self, path: Path, width: int, height: int) -> None:
        path.touch()  # FFmpeg makes it when it has something to write
        with _system_errors():
            self._container = av.open(str(path), "w", format="matroska", container_options={"fflags": "+bitexact"})
            self._stream = self._container.add_stream("libx264rgb", rate=1, options={"qp": "0", "preset": "ultrafast"})
        self._stream.width, self._stream.height, self._stream.pix_fmt = width, height, "rgb24"
        self._stream.codec_context.thread_count = _NUM_THREADS

    def write(self, frames: NDArray[np.uint8]) -> None:
        """Append frames, uint8 [n, H, W, 3]."""
        with _system_errors():
            for pixels in frames:
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
                self._container.mux(self._stream.encode(frame))

    def finish(self) -> None:
        """Write what the encoder still holds."""
        with _system_errors():
            self._container.mux(self._stream.encode(None))
            self._container.close()

    def close(self) -> None:
        """Close the file, whatever state it is in."""
        with suppress(OSError, av.error.FFmpegError):
            self._container.close()


def read_lossless(path: Path) -> Iterator[NDArray[np.uint8]]:
    """Yield the frames that a `LosslessWriter` was given, one at a time: uint8 [1, H, W, 3].

    Raises:
        OSError: It cannot be read.
    """
    with _system_errors(), av.open(str(path), format="matroska") as container:
        for frame in container.decode(video=0):
            yield frame.to_ndarray(format="rgb24")[None]


@contextmanager
def _system_errors() -> Iterator[None]:
    """Turn FFmpeg's own errors into the operating system's; many are so already."""
    try:
        yield
    except av.error.FFmpegError as error:
        if isinstance(error, OSError):
            raise
        raise OSError(error.errno, error.strerror) from error
