"""A video's figures, frame by frame: what `quality` prints and a manifest holds."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from s2v_flow.errors import UsageError
from s2v_flow.media.audio import Sound, open_audio
from s2v_flow.media.video import VideoReader, probe_video
from s2v_flow.quality.sync import NO_SYNC, Array, Sync, is_spoken, loudness

Box = tuple[int, int, int, int]

_CELLS = 24  # a side
_COLUMNS = 9  # figures that are kept of each frame
_LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601
_BLACK_LEVEL, _FLAT_LEVELS, _STILL_LEVELS = 8.0, 2.0, 0.75  # of 255
_FROZEN_SHARE = 0.6  # more than a half: every picture may be shown twice
_SHARPNESS_PIXELS = 1 << 18  # larger frames are measured more seldom
_NEIGHBOURS = 8  # frames on either side of a seam


class Measure:
    """Figures of a video, from its frames as they pass; of each frame a dozen numbers stay.

    `mouth`: where it is: x, y, width and height in pixels; None: wherever the picture moves with the voice. `keeps`:
    keep what `movement` needs: a kilobyte a frame.
    """

    def __init__(
        self, sound: Sound | None, fps: float, num_frames: int, mouth: Box | None = None, *, keeps: bool = False
    ) -> None:
        self._fps, self._mouth = float(fps), mouth
        self._audio_seconds = None if sound is None else sound.num_samples / sound.sample_rate_hz
        self.voice = None if sound is None else loudness(sound, self._fps, num_frames)
        self._sync = None if self.voice is None else Sync(self.voice, self._fps, _CELLS**2, keeps=keeps)
        self._means: dict[tuple[int, int], NDArray[np.float32]] = {}
        self._first: Array | None = None
        self._sharpness = 0.0
        self._before: Array | None = None
        self._rows = array("d")  # L, a, b, contrast, sharpness, likeness, change, most, mean

    def add(self, frames: NDArray[np.uint8]) -> None:
        """Take the next frames, uint8 [N, H, W, 3], RGB.

        Raises:
            S2VFlowError: the mouth's box does not lie in the picture.
        """
        cells = np.stack([self._cells(frame) for frame in frames])  # [N, rows, columns, 3]
        luma = (cells @ _LUMA).reshape(len(frames), -1)
        if self._sync is not None:
            self._sync.add(luma if self._mouth is None else self._in_box(frames, self._mouth))
        self._first = luma[0] if self._first is None else self._first
        step = -(-frames.shape[1] * frames.shape[2] // _SHARPNESS_PIXELS)
        for frame, grid, colour in zip(frames, luma, cells.mean(axis=(1, 2)), strict=True):
            change = np.zeros_like(grid) if self._before is None else np.abs(grid - self._before)
            if len(self._rows) // _COLUMNS % step == 0:
                self._sharpness = _sharpness(frame)
            figures = (float(grid.std()), self._sharpness, _likeness(grid, self._first))
            self._rows.extend((*_lab(colour), *figures, change.mean(), change.max(), grid.mean()))
            self._before = grid

    def figures(self, chunk_starts: Sequence[int] = ()) -> dict[str, Any]:
        """Return what `quality --json` prints; `chunk_starts` are the first frames of all chunks but the first."""
        audio_seconds = self._audio_seconds
        rows = np.frombuffer(self._rows).reshape(-1, _COLUMNS)
        seconds = len(rows) / self._fps
        borders = sorted({start for start in chunk_starts if 0 < start < len(rows)})
        return {
            "sync": dict(NO_SYNC) if self._sync is None else self._sync.figures(),
            "drift": _drift(rows, borders, self._fps),
            "seams": [_seam(rows[:, 6], start, self._fps) for start in borders],
            "guards": self._guards(rows),
            "timing": {
                "frames": len(rows),
                "fps": round(self._fps, 6),
                "seconds": round(seconds, 3),
                "audio_seconds": None if audio_seconds is None else round(audio_seconds, 3),
                "audio_longer_seconds": None if audio_seconds is None else round(audio_seconds - seconds, 3),
            },
        }

    def movement(self) -> Array:
        """Return how the mouth moves, float64 [T], -1 to 1; nothing where there is no sound. After `figures`."""
        return np.zeros(0) if self._sync is None else self._sync.movement()

    def _guards(self, rows: Array) -> dict[str, bool]:
        moves = rows[1:, 7] >= _STILL_LEVELS
        if self.voice is not None and len(moves):
            spoken = is_spoken(self.voice)[1 : len(rows)]
            moves = moves[spoken] if spoken.any() else moves
        return {
            "black": bool((rows[:, 8] < _BLACK_LEVEL).any()),
            "flat": bool((rows[:, 3] < _FLAT_LEVELS).any()),
            "frozen": len(moves) > 0 and bool(np.mean(~moves) > _FROZEN_SHARE),
        }

    def _cells(self, frame: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return the means of small cells, float32 [rows, columns, 3]."""
        height, width = frame.shape[:2]
        rows, columns = self._averages(height), self._averages(width)
        above = (rows @ frame.reshape(height, -1).astype(np.float32)).reshape(_CELLS, width, 3)
        cells: NDArray[np.float32] = np.einsum("cw,rwk->rck", columns, above, optimize=True)
        return cells

    def _averages(self, size: int) -> NDArray[np.float32]:
        """Return the matrix that averages `size` pixels to cells: float32 [cells, size]."""
        if (_CELLS, size) not in self._means:
            edges = np.arange(_CELLS + 1) * size / _CELLS
            pixels = np.arange(size)
            covered = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
            self._means[_CELLS, size] = (np.maximum(covered, 0) * _CELLS / size).astype(np.float32)
        return self._means[_CELLS, size]

    def _in_box(self, frames: NDArray[np.uint8], mouth: Box) -> Array:
        x, y, width, height = mouth
        if x < 0 or y < 0 or width < 1 or height < 1 or x + width > frames.shape[2] or y + height > frames.shape[1]:
            size = f"{frames.shape[2]}x{frames.shape[1]}"
            message = f"the mouth's box {x},{y},{width},{height} does not lie in the picture of {size} pixels"
            raise UsageError(message, "give x,y,w,h in pixels from the upper left")
        parts = frames[:, y : y + height, x : x + width]
        return np.stack([(self._cells(part) @ _LUMA).ravel() for part in parts])


def measure_frames(
    groups: Iterable[NDArray[np.uint8]],
    sound: Sound | None,
    fps: float,
    num_frames: int,
    chunk_starts: Sequence[int] = (),
    mouth: Box | None = None,
) -> dict[str, Any]:
    """Measure `num_frames` frames, groups of uint8 [N, H, W, 3]; see `Measure`."""
    measure = Measure(sound, fps, num_frames, mouth)
    for group in groups:
        measure.add(group)
    return measure.figures(chunk_starts)


def measure_video(
    path: str | os.PathLike[str],
    chunk_starts: Sequence[int] = (),
    mouth: Box | None = None,
    *,
    starts_of: int | None = None,
) -> dict[str, Any]:
    """Measure a video file, frame by frame; see `Measure`.

    `chunk_starts`: the first frame of each chunk but the first; `starts_of`: how many frames the video had when they
    were told: with others it was cut or has another rate.

    Raises:
        MissingError, MediaError, RefusedError: as `VideoReader`.
        S2VFlowError: the mouth's box does not lie in the picture.
    """
    info = probe_video(path)
    sound = open_audio(path) if info.has_audio else None
    with VideoReader(path, Fraction(info.fps)) as reader:
        groups = (frame[None] for frame in reader)
        starts = chunk_starts if starts_of in (None, len(reader)) else ()
        return measure_frames(groups, sound, float(info.fps), len(reader), starts, mouth)


def _lab(colour: Array) -> tuple[float, ...]:
    """Return a colour, sRGB 0 to 255, as L*, a*, b*. Source: IEC 61966-2-1; CIE 15, D65."""
    value = np.asarray(colour, np.float64) / 255
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    x, y, z = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ linear
    white = np.array([x / 0.9505, y, z / 1.089])
    x, y, z = np.where(white > 216 / 24389, np.cbrt(white), (24389 / 27 * white + 16) / 116)
    return float(116 * y - 16), float(500 * (x - y)), float(200 * (y - z))


def _sharpness(frame: NDArray[np.uint8]) -> float:
    """Return the deviation of the Laplacian of green, in levels."""
    green = frame[..., 1].astype(np.int16)
    laplacian = green[1:-1, :-2] + green[1:-1, 2:] + green[:-2, 1:-1] + green[2:, 1:-1] - 4 * green[1:-1, 1:-1]
    return float(laplacian.astype(np.float32).std()) if laplacian.size else 0.0


def _likeness(grid: Array, first: Array) -> float:
    """Return the correlation of two pictures' cells: brightness and contrast do not count, shape and place do."""
    one, other = grid - grid.mean(), first - first.mean()
    power = float(np.sqrt((one @ one) * (other @ other)))
    return float(one @ other) / power if power > 1e-6 else 1.0


def _drift(rows: Array, borders: Sequence[int], fps: float) -> dict[str, Any]:
    """Return how colour, contrast, sharpness and likeness go away from the start; see docs/quality.md."""
    starts = [0, *borders] if borders else []
    per_chunk = [np.median(part, axis=0) for part in np.split(rows, borders)] if borders else []
    second = max(round(fps), 1)
    times = [rows[at : at + second] for at in range(0, len(rows), second)]
    if len(times) > 1 and len(times[-1]) < second:
        times[-2:] = [np.concatenate(times[-2:])]
    medians = np.array([np.median(part, axis=0) for part in times])
    start = per_chunk[0] if starts else medians[0]
    minutes = np.array([(index + 0.5) * second / fps / 60 for index in range(len(medians))])
    found = {}
    for name, of in _DRIFTS.items():
        slope = _slope(minutes, np.array([of(row, start) for row in medians]))
        found[name] = {"per_minute": round(slope, 4), "per_chunk": [round(of(row, start), 4) for row in per_chunk]}
    return found


def _relative(column: int) -> Any:
    return lambda row, start: float(row[column] / start[column] - 1) if start[column] > 1e-6 else 0.0


_DRIFTS: Mapping[str, Any] = {
    "colour": lambda row, start: float(np.linalg.norm(row[:3] - start[:3])),
    "contrast": _relative(3),
    "sharpness": _relative(4),
    "likeness": lambda row, start: float(row[5]),
}


def _slope(times: Array, values: Array) -> float:
    """Return the median of the slopes between all pairs of points. Source: Theil (1950), Sen (1968)."""
    keep = np.unique(np.linspace(0, len(times) - 1, min(len(times), 200)).astype(int))
    one, other = np.triu_indices(len(keep), 1)
    times, values = times[keep], values[keep]
    return float(np.median((values[other] - values[one]) / (times[other] - times[one]))) if len(one) else 0.0


def _seam(change: Array, start: int, fps: float) -> dict[str, Any]:
    """Return how much more the picture changes at a chunk's first frame than in the frames around it."""
    around = np.concatenate([change[max(start - _NEIGHBOURS, 1) : start], change[start + 1 : start + 1 + _NEIGHBOURS]])
    usual = max(float(np.median(around)) if len(around) else 0.0, 0.05)
    return {"frame": int(start), "seconds": round(start / fps, 3), "ratio": round(float(change[start]) / usual, 3)}
