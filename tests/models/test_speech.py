"""From 50 states a second to rows for video frames, for any length of chunk."""

from __future__ import annotations

import re

import pytest
import torch
from reference import load_golden

from s2v_flow.models.speech import chunk_embed, to_video_rate


@pytest.mark.parametrize("name", ["audio_bucket_97", "audio_bucket_294"])
def test_chunks_equal_the_reference(name: str) -> None:
    inputs, outputs, _ = load_golden(f"components/{name}")
    table = to_video_rate(inputs["features"])
    compared = 0
    for key, expected in outputs.items():
        match = re.fullmatch(r"embed_off(\d+)_len(\d+)", key)
        if match is None:
            num_frames = 4 * ((int(key.removeprefix("repeat_len")) - 1) // 4 + 1)
            assert table.num_chunks(num_frames) == int(expected)
            continue
        embed = chunk_embed(table, int(match[1]), (int(match[2]) - 1) // 4 + 1)
        if expected.numel() == 0:
            assert embed is None
        else:
            assert embed is not None
            assert embed.shape == expected.shape
            assert (embed - expected).abs().max() <= 1e-6
            compared += 1
    assert compared >= 3


def test_rows_past_the_sound_are_zero_and_past_the_table_there_is_none() -> None:
    table = to_video_rate(torch.ones(25, 50, 2))  # one second: rows 0..15
    assert table.num_features_30hz == 30
    assert table.rows.shape == (16, 25, 2)
    embed = chunk_embed(table, 0, 5)
    assert embed is not None
    assert embed.shape == (1, 25, 2, 20)
    assert embed[..., :16].eq(1).all()
    assert embed[..., 16:].eq(0).all()
    assert chunk_embed(table, 20, 5) is None
    assert chunk_embed(table, 19, 5) is not None


def test_chunks_of_any_length_cut_the_same_rows() -> None:
    table = to_video_rate(torch.randn(25, 400, 2, generator=torch.Generator().manual_seed(0)))
    long = chunk_embed(table, 0, 20)
    assert long is not None
    short = [chunk_embed(table, offset, 5) for offset in (0, 20, 40, 60)]
    assert torch.equal(long, torch.cat([part for part in short if part is not None], dim=-1))


def test_a_sound_too_short_for_one_row_is_silence() -> None:
    table = to_video_rate(torch.ones(25, 1, 2))
    assert table.rows.shape == (0, 25, 2)
    embed = chunk_embed(table, 0, 1)
    assert embed is not None
    assert embed.shape == (1, 25, 2, 4)
    assert not embed.any()
