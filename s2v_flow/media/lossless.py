"""Frames on disk as they are, to be read again: H.264 without loss, RGB, in Matroska; a few of them in memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

_NUM_THREADS = 4  # of the encoder: each holds frames


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
