"""Whether a mouth moves with the voice, and how late: correlation of small cells of the picture with loudness."""

from __future__ import annotations

from collections.abc import Mapping
from math import exp, sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from s2v_flow.media.audio import Sound

MAX_LAG = 15  # frames
_NUM_LAGS = 2 * MAX_LAG + 1
_NUM_CHANCES = 24
_AT_ONCE = 32  # frames
_HALF_SECONDS = 1.0  # frames go to two halves in turns of this length: one finds the mouth, the other is measured
_FORGET_SECONDS = 0.5  # slower changes are none of the mouth
_VOICE_SHARE = 0.1  # of the loudness of the loudest frames: what is below is silence
_NEAR = 2  # frames next to the voice in which a mouth may still close
_AS_HIGH = 0.97
_LIKELY = 4.25  # standard deviations above chance at which the confidence is a half

NO_SYNC: Mapping[str, Any] = {"lag_frames": None, "correlation": 0.0, "confidence": 0.0, "silence_activity": None}

Array = NDArray[np.float64]


def loudness(sound: Sound, fps: float, num_frames: int) -> Array:
    """Return the sound's root mean square in each frame's time, float64 [num_frames], full scale 1; 0 after its end."""
    edges = np.round(np.arange(num_frames + 1) * sound.sample_rate_hz / fps).astype(np.int64)
    sums, position = np.zeros(num_frames + 1), 0  # the last one takes what lies behind
    for block in sound.blocks():
        power = np.square(block, dtype=np.float64).mean(axis=0)
        first = int(np.searchsorted(edges, position, "right")) - 1
        last = int(np.searchsorted(edges, position + len(power) - 1, "right")) - 1
        starts = np.maximum(edges[first : last + 1] - position, 0)
        sums[first : last + 1] += np.add.reduceat(power, starts)
        position += len(power)
    return np.sqrt(sums[:-1] / np.maximum(np.diff(edges), 1))


def is_spoken(voice: Array) -> NDArray[np.bool_]:
    """Tell in which frames there is a voice: bool [T]."""
    return voice > max(_VOICE_SHARE * float(np.quantile(voice, 0.95)), 1e-4) if len(voice) else voice > 0


class Sync:
    """Sums over a video's frames, from which lag, correlation and confidence follow; no frame is kept.

    `voice`: as `loudness` gives it, float64 [T]; `num_cells`: of the picture, C; `keeps`: keep every frame's cells, in
    16 bits, for `movement`.
    """

    def __init__(self, voice: Array, fps: float, num_cells: int, *, keeps: bool = False) -> None:
        self._kept: list[NDArray[np.float16]] | None = [] if keeps else None
        self._mouth = np.zeros(num_cells)
        self._fps, self._rate = fps, 1 - exp(-1 / (fps * _FORGET_SECONDS))
        fast, _ = self._fast(np.pad(voice**0.6, MAX_LAG), None)  # as loud as it is heard (Stevens)
        spoken = np.pad(is_spoken(voice), MAX_LAG)
        near = np.convolve(spoken, np.ones(2 * _NEAR + 1), "same") > 0
        self._lagged = _windows(fast)  # [T, lags]
        self._spoken, self._near = _windows(spoken), _windows(near)
        self._own, self._shifts = fast[MAX_LAG : MAX_LAG + len(voice)], np.array(_far_shifts(len(voice)), np.int64)
        self._slow: Array | None = None
        self._before: Array | None = None
        self._num_frames = 0
        self._moved = np.zeros((2, num_cells, _NUM_LAGS))  # with the voice, in silence
        self._counts = np.zeros((2, _NUM_LAGS))
        self._halves = [_Sums(num_cells, _NUM_LAGS + len(self._shifts)) for _ in range(2)]

    def add(self, cells: Array) -> None:
        """Take the next frames' cells, float64 [N, C], 0 to 255."""
        fast, self._slow = self._fast(cells, self._slow)
        halves = ((self._num_frames + np.arange(len(cells))) / (self._fps * _HALF_SECONDS)).astype(np.int64) % 2
        if self._kept is not None:
            self._kept.append(fast.astype(np.float16))
        before = cells[:1] if self._before is None else self._before
        moved = np.abs(np.diff(cells, axis=0, prepend=before))
        self._before = cells[-1:]
        now = slice(self._num_frames, self._num_frames + len(cells))
        parts = np.stack([self._spoken[now], ~self._near[now]]).astype(np.float64)  # [2, N, lags]
        self._moved += moved.T @ parts
        self._counts += parts.sum(axis=1)
        far = (np.arange(now.start, now.stop)[:, None] - self._shifts) % max(len(self._own), 1)
        voices = np.concatenate([self._lagged[now], self._own[far]], axis=1)  # [N, lags and chances]
        for half, sums in enumerate(self._halves):
            sums.add(fast[halves == half], voices[halves == half])
        self._num_frames += len(cells)

    def figures(self) -> dict[str, Any]:
        """Return lag_frames, correlation, confidence, silence_activity; null what cannot be told.

        Each half's mouth is found in the other half, so that what merely happens to move with the voice once does not
        count. Confidence compares the best lag with the voice shifted far out of place.
        """
        for sums in self._halves:
            sums.settle()
        curve = (self._held_out(0, 1) + self._held_out(1, 0)) / 2
        lags, chances = curve[:_NUM_LAGS], np.arctanh(np.clip(curve[_NUM_LAGS:], -0.999, 0.999))
        best = _nearest_peak(lags)
        if lags[best] <= 0 or len(chances) < 2:
            return dict(NO_SYNC)
        spread = max(float(chances.std()), 1 / sqrt(self._num_frames))
        above = (float(np.arctanh(min(lags[best], 0.999))) - float(chances.mean())) / spread
        self._mouth = self._halves[0].weights(best) + self._halves[1].weights(best)
        mouth = np.abs(self._mouth)
        counts = self._counts[:, best]
        spoken, silent = mouth @ self._moved[:, :, best].T / np.maximum(counts, 1)
        is_told = counts.min() > 0 and spoken > 0
        return {
            "lag_frames": best - MAX_LAG,
            "correlation": round(float(lags[best]), 3),
            "confidence": round(1 / (1 + exp(min(_LIKELY - above, 50.0))), 3),
            "silence_activity": round(float(silent / spoken), 3) if is_told else None,
        }

    def movement(self) -> Array:
        """Return how the mouth moves, float64 [T], with the voice where positive; 1 is its largest. After `figures`."""
        moved = np.concatenate(self._kept or [np.zeros((0, len(self._mouth)), np.float16)]) @ self._mouth
        found: Array = moved / max(float(np.abs(moved).max(initial=0.0)), 1e-9)
        return found

    def _held_out(self, train: int, test: int) -> Array:
        """Return the correlation in one half at each lag, of the cells that moved with the voice in the other."""
        lags = range(len(self._halves[test].voices))
        return np.array([self._halves[test].correlation(self._halves[train].weights(lag), lag) for lag in lags])

    def _fast(self, values: Array, slow: Array | None) -> tuple[Array, Array | None]:
        """Return values without what changes slowly, and that at their end; `slow`: what it was before, if known."""
        fast = np.empty_like(values)
        for index, value in enumerate(values):
            slow = value.copy() if slow is None else slow + self._rate * (value - slow)
            fast[index] = value - slow
        return fast, slow


class _Sums:
    """Sums for the covariance of cells, [C], with one another and with the voice at each lag, [L]."""

    def __init__(self, num_cells: int, num_lags: int) -> None:
        self.count = 0
        self._waiting: list[tuple[Array, Array]] = []
        self.cells, self.voices, self.powers = np.zeros(num_cells), np.zeros(num_lags), np.zeros(num_lags)
        self.squares, self.products = np.zeros((num_cells, num_cells)), np.zeros((num_cells, num_lags))

    def add(self, cells: Array, voices: Array) -> None:
        """Take cells [N, C] and voices [N, L]; many at once are much cheaper than one by one."""
        self._waiting.append((cells, voices))
        if sum(len(waiting) for waiting, _ in self._waiting) >= _AT_ONCE:
            self.settle()

    def settle(self) -> None:
        """Add up what waits."""
        if not self._waiting:
            return
        cells, voices = (np.concatenate(parts) for parts in zip(*self._waiting, strict=True))
        self._waiting.clear()
        self.count += len(cells)
        self.cells += cells.sum(axis=0)
        self.voices += voices.sum(axis=0)
        self.powers += np.square(voices).sum(axis=0)
        self.squares += cells.T @ cells
        self.products += cells.T @ voices

    def _with(self, lag: int) -> tuple[Array, float]:
        """Return the cells' covariance with the voice, [C], and the voice's variance."""
        n = max(self.count, 1)
        return (
            self.products[:, lag] / n - self.cells / n * self.voices[lag] / n,
            float(self.powers[lag] / n - (self.voices[lag] / n) ** 2),
        )

    def weights(self, lag: int) -> Array:
        """Return how much each cell counts, [C]: those whose correlation is at least half of the largest."""
        n = max(self.count, 1)
        covariance, power = self._with(lag)
        variance = np.diag(self.squares) / n - np.square(self.cells / n)
        correlation = np.abs(covariance) / np.sqrt(np.maximum(variance * power, 1e-12))
        correlation[variance < 0.01] = 0  # a tenth of a level
        return np.where((correlation > 0) & (correlation >= correlation.max() / 2), covariance, 0.0)

    def correlation(self, weights: Array, lag: int) -> float:
        n, chosen = max(self.count, 1), np.flatnonzero(weights)
        covariance, power = self._with(lag)
        means = self.cells[chosen] / n
        spread = self.squares[np.ix_(chosen, chosen)] / n - np.outer(means, means)
        variance = float(weights[chosen] @ spread @ weights[chosen]) * power
        return float(weights[chosen] @ covariance[chosen]) / sqrt(variance) if variance > 1e-12 else 0.0


def _nearest_peak(lags: Array) -> int:
    """Return where correlation has its peak, [L]; of peaks as high, as a steady beat has them, the one nearest 0."""
    beside = np.pad(lags, 1, constant_values=-np.inf)
    is_peak = (lags >= beside[:-2]) & (lags >= beside[2:]) & (lags >= _AS_HIGH * lags.max())
    return min((int(lag) for lag in np.flatnonzero(is_peak)), key=lambda lag: abs(lag - MAX_LAG), default=0)


def _windows(padded: NDArray[Any]) -> NDArray[Any]:
    """Return what belongs to each frame at each lag, [T, lags], as a view of values with MAX_LAG more on both sides."""
    return np.lib.stride_tricks.sliding_window_view(padded, _NUM_LAGS)[:, ::-1]


def _far_shifts(length: int) -> list[int]:
    """Return shifts by which nothing that belongs together meets: as far as the length allows."""
    first = min(2 * MAX_LAG, length // 4)
    return sorted({int(shift) for shift in np.linspace(first, length - first, _NUM_CHANCES)}) if length >= 8 else []
