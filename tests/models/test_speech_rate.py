"""Samples, states, features, rows and segments: the counts that planning relies on are those that encoding gives."""

from __future__ import annotations

import pytest
import torch

from s2v_flow.models.speech import to_video_rate
from s2v_flow.models.speech_rate import (
    SEGMENT_ROWS,
    feature_of,
    num_features,
    num_rows,
    num_segments,
    num_states,
    segments_of,
)


@pytest.mark.parametrize("states", [0, 1, 2, 3, 4, 49, 50, 97, 294, 999, 1000, 1001])
def test_rows_are_counted_as_they_come_out(states: int) -> None:
    table = to_video_rate(torch.zeros(1, states, 1))
    assert table.rows.shape[0] == num_rows(num_features(states))
    assert table.num_features_30hz == num_features(states)


@pytest.mark.parametrize("features", [*range(40), 10_007, 2_592_000])
def test_the_last_row_is_the_last_one_with_a_feature(features: int) -> None:
    rows = num_rows(features)
    assert feature_of(rows) >= features
    assert rows == 0 or feature_of(rows - 1) < features


def test_states_begin_with_400_samples_and_come_every_320() -> None:
    assert [num_states(samples) for samples in (0, 399, 400, 719, 720)] == [0, 0, 1, 1, 2]


def test_every_voice_has_a_segment_and_one_more_for_every_20_seconds() -> None:
    """Twenty seconds of sound have one row less than 320: the last state ends before them."""
    assert [num_segments(seconds * 16_000) for seconds in (0, 1, 20, 21, 40, 3600, 86_400)] == [
        1,
        1,
        1,
        2,
        2,
        180,
        4320,
    ]


def test_a_chunk_of_length_77_takes_one_segment_and_past_the_end_the_last() -> None:
    for chunk in range(12):
        assert len(segments_of(80 * chunk, 80, 10)) == 1
    assert segments_of(300, 80, 10) == range(2)
    assert segments_of(SEGMENT_ROWS * 9 + 200, 1000, 10) == range(9, 10)
    assert segments_of(SEGMENT_ROWS * 50, 80, 10) == range(9, 10)
