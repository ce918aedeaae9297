"""From the audio encoder's 50 states a second to the rows that the diffusion model takes, 16 a second."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from s2v_flow.models.speech_rate import (
    FEATURES_HZ,
    RECEPTIVE_FIELD,
    SAMPLES_PER_STATE,
    SEGMENT_ROWS,
    STATES_HZ,
    VIDEO_HZ,
    feature_of,
    num_features,
    num_rows,
    num_states,
)

if TYPE_CHECKING:
    from s2v_flow.models.encoders import AudioEncoder

CONTEXT_STATES = 500  # 10 s on each side of a window, encoded but not kept


@dataclass(frozen=True)
class SpeechTable:
    """A voice at video rate, or a part of it, whatever the chunks' length.

    `rows` [T, A, E] holds, from video frame `first_row` on, a row for each as far as there is sound.
    `num_features_30hz` is the length of the 30 Hz sequence from which they were picked, which says where a table of
    chunks ends; None in a part that others follow.
    """

    rows: Tensor
    num_features_30hz: int | None
    first_row: int = 0

    def to_tensors(self) -> dict[str, Tensor]:
        """Return what is stored of it; only the last part tells where the voice ends."""
        numbers = {"first_row": self.first_row, "num_features_30hz": self.num_features_30hz}
        known = {name: torch.tensor(number) for name, number in numbers.items() if number is not None}  # int64
        return {"rows": self.rows.contiguous(), **known}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> SpeechTable:
        """Return the table of such tensors."""
        end = tensors.get("num_features_30hz")
        return cls(tensors["rows"], None if end is None else int(end), int(tensors["first_row"]))

    def num_chunks(self, num_frames: int) -> int | None:
        """Return how many chunks of `num_frames` video frames the table has; the last is filled up with zeros."""
        if self.num_features_30hz is None:
            return None
        return int(self.num_features_30hz / (num_frames * FEATURES_HZ / VIDEO_HZ)) + 1

    def segments(self) -> Iterator[SpeechTable]:
        """Cut the table into segments of 320 rows; at least one, and only the last knows where the voice ends."""
        starts = range(0, max(len(self.rows), 1), SEGMENT_ROWS)
        for start in starts:
            end = self.num_features_30hz if start == starts[-1] else None
            yield SpeechTable(self.rows[start : start + SEGMENT_ROWS], end, self.first_row + start)


def joined(parts: Sequence[SpeechTable]) -> SpeechTable:
    """Join parts that follow one another."""
    rows = parts[0].rows if len(parts) == 1 else torch.cat([part.rows for part in parts])
    return SpeechTable(rows, parts[-1].num_features_30hz, parts[0].first_row)


def to_video_rate(features: Iterable[Tensor]) -> SpeechTable:
    """Interpolate features to 30 Hz and pick the nearest for each video frame: number round_half_to_even(1.875 i).

    `features`: one [T, E] per layer, 50 states a second: [A, T, E], or layers as they come, of which none is kept. The
    table is float32, on the CPU.

    Source: Wan2.2, wan/modules/s2v/audio_encoder.py, linear_interpolation and get_audio_embed_bucket_fps.
    """
    layers, length = [], 0
    for layer in features:
        length = num_features(layer.shape[0])
        picks = [feature_of(row) for row in range(num_rows(length))]
        state = layer.float().cpu()
        if length == 0:
            layers.append(state[:0])
            continue
        at_30hz = F.interpolate(state.T[None], size=length, mode="linear", align_corners=True)[0]  # [E, length]
        layers.append(at_30hz[:, picks].T)  # [T, E]
    return SpeechTable(torch.stack(layers, dim=1), length)  # [T, A, E]


def windowed_video_rate(
    encoder: AudioEncoder,
    read: Callable[[int, int], Tensor],
    num_samples: int,
    window_states: int,
    *,
    final_norm: bool = True,
) -> Iterator[SpeechTable]:
    """Encode a long voice in windows, each with 10 s of what is before and after it, and yield its segments.

    What a row is depends on the sound near it alone: windows stand at fixed times, and features are interpolated at
    exactly 5/3 states each, not stretched to the clip's ends (which moves them by less than 14 ms). So a change late in
    a voice leaves its earlier segments as they were, bit for bit.

    `read(start, stop)` gives samples [n] at 16 kHz, normalised (see `Loudness`), of which there are `num_samples`. The
    tables have 320 rows each, the last one fewer; there are as many as `speech_rate.num_segments` says.
    """
    states = num_states(num_samples)
    length = num_features(states)
    total = num_rows(length)
    held: list[Tensor] = []  # rows that are not given out yet
    row, start = 0, 0
    for first in range(0, states, window_states):
        begin, end = max(first - CONTEXT_STATES, 0), min(first + window_states + CONTEXT_STATES, states)
        stop = row
        while stop < total and feature_of(stop) * STATES_HZ // FEATURES_HZ < first + window_states:
            stop += 1
        samples = read(begin * SAMPLES_PER_STATE, (end - 1) * SAMPLES_PER_STATE + RECEPTIVE_FIELD)
        layers = encoder.states(samples, final_norm=final_norm)
        held.append(torch.stack([_at_rows(layer, begin, range(row, stop)) for layer in layers], dim=1))  # [n, A, E]
        row = stop
        while (row - start >= SEGMENT_ROWS and row < total) or (row == total and start < max(total, 1)):
            rows = torch.cat(held)
            is_last = row == total and len(rows) <= SEGMENT_ROWS
            yield SpeechTable(rows[:SEGMENT_ROWS], length if is_last else None, start)
            held, start = [rows[SEGMENT_ROWS:]], start + SEGMENT_ROWS


def _at_rows(layer: Tensor, begin: int, rows: range) -> Tensor:
    """Interpolate one layer [T, E], whose first state is number `begin`, to video frames: [n, E]."""
    places = torch.tensor([feature_of(row) * STATES_HZ for row in rows], dtype=torch.int64)
    lower = places // FEATURES_HZ - begin
    weight = (places % FEATURES_HZ).float()[:, None] / FEATURES_HZ
    state = layer.float().cpu()
    return state[lower] * (1 - weight) + state[(lower + 1).clamp(max=len(state) - 1)] * weight


@dataclass
class Loudness:
    """Adds up a waveform's blocks to what normalises it: in windows, all of them are shifted and scaled alike.

    Both numbers are rounded, the scale to an eighth of an octave: the model hardly notices (its first layers
    normalise), and a change somewhere in a long voice does not reach all of it.
    """

    count: int = 0
    total: float = 0.0
    squares: float = 0.0

    def add(self, block: Tensor) -> None:
        """Count in a block [n]."""
        values = block.double()
        self.count += len(values)
        self.total += float(values.sum())
        self.squares += float(values.square().sum())

    def normalise(self, samples: Tensor) -> Tensor:
        """Give samples [n] about zero mean and unit variance, as measured over all blocks."""
        mean = self.total / max(self.count, 1)
        deviation = math.sqrt(max(self.squares / max(self.count, 1) - mean * mean, 0.0) + 1e-7)
        deviation = 2.0 ** (round(8 * math.log2(deviation)) / 8)
        step = deviation / 16
        return samples.sub(round(mean / step) * step).div_(deviation)


def chunk_embed(table: SpeechTable, offset: int, num_latent_frames: int) -> Tensor | None:
    """Take one chunk's rows: [1, A, E, 4F], zeros past the sound, or None if the chunk begins past the table.

    `table`: the voice, or the part of it that the chunk needs; past its end the last part. `offset`: the chunk's first
    video frame, at least the table's first.
    """
    num_frames = 4 * num_latent_frames
    count = table.num_chunks(num_frames)
    if count is not None and offset >= count * num_frames:
        return None
    rows = table.rows[offset - table.first_row :][:num_frames]
    rows = F.pad(rows, (0, 0, 0, 0, 0, num_frames - rows.shape[0]))  # [4F, A, E]
    return rows.permute(1, 2, 0)[None]  # [1, A, E, 4F]
