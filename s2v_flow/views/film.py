"""One video as a report shows it: a poster, a film strip, and curves over its time, drawn from one pass over it."""

from __future__ import annotations

import base64
import io
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s2v_flow.runs.essence import essence_in
from s2v_flow.runs.manifest import Essence

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

WIDTH = 1000  # of a time line, in its own units
STRIP_HEIGHT, WAVE_HEIGHT, CURVE_HEIGHT = 64, 56, 64
_POSTER_SIDE = 640  # pixels
_TILE_SIDE = 320  # of one in a grid
_MAX_MOVEMENT_FRAMES = 60_000  # an hour: a kilobyte is kept of each
_POINTS = 500  # of a curve
_PROXY_SIDE = 360
_PROXY_CRFS = (28, 36, 44)


@dataclass(frozen=True)
class Film:
    """A video and what is drawn of it; pictures are `data:` addresses, curves the `d` of an SVG path."""

    label: str
    path: Path
    frames: int
    fps: float
    size: tuple[int, int]
    poster: str
    figures: Mapping[str, Any] | None = None
    essence: Essence | None = None
    seams: tuple[float, ...] = ()  # in seconds
    strip: str = ""
    wave: str = ""
    loudness: str = ""
    mouth: str = ""
    src: str = ""  # where the page finds it
    cell: tuple[str, ...] = field(default=())

    @property
    def seconds(self) -> float:
        """How long it is."""
        return self.frames / self.fps


def poster_of(path: Path, label: str, figures: Mapping[str, Any] | None = None) -> Film:
    """Return a video of a grid: its middle frame and no curves.

    Raises:
        MissingError, MediaError, RefusedError: As `VideoReader`.
    """
    from s2v_flow.media.video import VideoReader, probe_video

    fps = probe_video(path).fps
    with VideoReader(path, fps) as reader:
        middle, frames = reader.read(len(reader) // 2, 1)[0], len(reader)
    size = middle.shape[1], middle.shape[0]
    return Film(label, path, frames, float(fps), size, _jpeg(middle, _TILE_SIDE), figures)


def film_of(path: Path, label: str, figures: Mapping[str, Any] | None = None) -> Film:
    """Return a video with its strip and curves.

    Args:
        path: The video; every frame is decoded, none is kept.
        label: What to call it.
        figures: Its figures, where they are known; else they are measured.

    Raises:
        MissingError, MediaError, RefusedError: As `VideoReader`.
    """
    import numpy as np

    from s2v_flow.media.audio import open_audio
    from s2v_flow.media.video import VideoReader, probe_video
    from s2v_flow.quality.figures import Measure

    info, essence = probe_video(path), essence_in(path)
    sound = open_audio(path) if info.has_audio else None
    with VideoReader(path, info.fps) as reader:
        count = len(reader)
        starts = essence.chunk_starts if essence is not None and essence.frames in (None, count) else []
        measure = Measure(sound, float(info.fps), count, keeps=count <= _MAX_MOVEMENT_FRAMES)
        thumbs = max(1, min(round(WIDTH * info.height / info.width / STRIP_HEIGHT), WIDTH))
        wanted = [int((index + 0.5) * count / thumbs) for index in range(thumbs)]
        strip, poster, place = np.zeros((2 * STRIP_HEIGHT, 2 * WIDTH, 3), np.uint8), None, 0
        for index, frame in enumerate(reader):
            measure.add(frame[None])
            poster = frame.copy() if poster is None or index == count // 2 else poster
            while place < thumbs and wanted[place] == index:  # of a short video each frame several times
                left, right = (2 * WIDTH * (place + side) // thumbs for side in (0, 1))
                place += 1
                strip[:, left:right] = _fitted(frame, right - left, 2 * STRIP_HEIGHT)
    measured, voice = measure.figures(starts), measure.voice
    assert poster is not None
    return Film(
        label=label,
        path=path,
        frames=count,
        fps=float(info.fps),
        size=(info.width, info.height),
        poster=_jpeg(poster, _POSTER_SIDE),
        figures=figures or measured,
        essence=essence,
        seams=tuple(seam["frame"] / float(info.fps) for seam in measured["seams"]),
        strip=_jpeg(strip, 2 * WIDTH),
        wave="" if sound is None else _envelope(_peaks(sound, count / float(info.fps))),
        loudness="" if voice is None else _curve(voice / max(float(voice.max(initial=0.0)), 1e-9), is_closed=True),
        mouth=_curve((measure.movement() + 1) / 2),
    )


def proxy_of(film: Film, max_bytes: int) -> str:
    """Return a small copy of a video, of 360 lines at most, as a `data:` address; "" where it would be too large."""
    from s2v_flow.media.audio import open_audio
    from s2v_flow.media.video import VideoReader, probe_video
    from s2v_flow.media.writer import VideoWriter

    factor = min(1.0, _PROXY_SIDE / min(film.size))
    width, height = (max(2, round(side * factor / 2) * 2) for side in film.size)
    info = probe_video(film.path)
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "proxy.mp4"
        for crf in _PROXY_CRFS:
            sound = open_audio(film.path) if info.has_audio else None
            settings: dict[str, Any] = {"fps": Fraction(info.fps), "crf": crf, "preset": "veryfast", "audio": sound}
            with VideoReader(film.path, info.fps) as reader, VideoWriter(target, width, height, **settings) as writer:
                for frame in reader:
                    writer.write(_fitted(frame, width, height)[None])
            if target.stat().st_size <= max_bytes:
                return _data("video/mp4", target.read_bytes())
    return ""


def _fitted(frame: NDArray[np.uint8], width: int, height: int) -> NDArray[np.uint8]:
    """Return a picture that fills a size; what is too much is cut off at the sides."""
    import numpy as np
    from PIL import Image, ImageOps

    return np.asarray(ImageOps.fit(Image.fromarray(frame), (width, height), Image.Resampling.BILINEAR))


def _jpeg(picture: NDArray[np.uint8], side: int) -> str:
    from PIL import Image

    image, content = Image.fromarray(picture), io.BytesIO()
    image.thumbnail((side, side))
    image.save(content, format="JPEG", quality=82, optimize=True)
    return _data("image/jpeg", content.getvalue())


def _data(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _peaks(sound: Any, seconds: float) -> NDArray[np.float64]:
    """Return the largest of each share of the picture's time: float64 [points], 1 is the largest of all."""
    import numpy as np

    peaks, position, total = np.zeros(_POINTS), 0, max(seconds * sound.sample_rate_hz, 1.0)
    for block in sound.blocks():
        at = ((position + np.arange(block.shape[1])) * (_POINTS / total)).astype(np.int64)
        inside = at < _POINTS
        np.maximum.at(peaks, at[inside], np.abs(block).max(axis=0)[inside])
        position += block.shape[1]
    return peaks / max(float(peaks.max()), 1e-9)


def _envelope(peaks: NDArray[np.float64]) -> str:
    """Return a wave as a path around the middle of its lane."""
    xs, middle = [WIDTH * (index + 0.5) / len(peaks) for index in range(len(peaks))], WAVE_HEIGHT / 2
    upper = [(x, middle - max(peak, 0.01) * middle) for x, peak in zip(xs, peaks, strict=True)]
    lower = [(x, 2 * middle - y) for x, y in reversed(upper)]
    return _path([*upper, *lower]) + "Z"


def _curve(values: NDArray[np.float64], *, is_closed: bool = False) -> str:
    """Return values of 0 to 1 as a path in their lane, of so many points that it can be seen; "" for none."""
    import numpy as np

    if not len(values):
        return ""
    parts = np.array_split(values, min(len(values), _POINTS))
    points = [
        (WIDTH * (index + 0.5) / len(parts), CURVE_HEIGHT * (1 - float(part.mean())))
        for index, part in enumerate(parts)
    ]
    ends = ([(0.0, float(CURVE_HEIGHT))], [(float(WIDTH), float(CURVE_HEIGHT))]) if is_closed else ([], [])
    return _path(list(chain(ends[0], points, ends[1])))


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
