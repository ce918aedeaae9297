"""From 50 states a second to rows for video frames, for any length of chunk."""

from __future__ import annotations

import re

import pytest
import torch
from reference import fill_module, load_golden
from torch import Tensor

from s2v_flow.models.encoders import AudioEncoder, build_wav2vec2
from s2v_flow.models.speech import (
    Loudness,
    SpeechTable,
    chunk_embed,
    joined,
    to_video_rate,
    windowed_video_rate,
)
from s2v_flow.models.speech_rate import num_segments


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


def test_layers_one_by_one_give_the_same_bits_as_all_at_once() -> None:
    features = torch.randn(3, 97, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(to_video_rate(iter(features)).rows, to_video_rate(features).rows)


def test_a_chunk_reads_the_same_rows_from_segments_as_from_the_whole() -> None:
    """Also across a border, at the end, and past it, where there is nothing."""
    table = to_video_rate(torch.randn(2, 2111, 3, generator=torch.Generator().manual_seed(0)))
    segments = list(table.segments())
    assert [len(part.rows) for part in segments] == [320, 320, len(table.rows) - 640]
    for offset, num_latent_frames, parts in [
        (80, 20, segments[:1]),
        (300, 20, segments[:2]),
        (600, 20, segments[1:]),
        (640, 20, segments[2:]),
        (675, 1, segments[2:]),
        (720, 20, segments[2:]),
    ]:
        expected, found = (chunk_embed(part, offset, num_latent_frames) for part in (table, joined(parts)))
        if expected is None:
            assert found is None
        else:
            assert found is not None
            assert torch.equal(found, expected)


def test_a_part_that_others_follow_ends_no_table() -> None:
    """It must be given whole: a chunk that begins past its rows gets zeros, never nothing."""
    part = SpeechTable(torch.ones(320, 1, 1), None)
    embed = chunk_embed(part, 400, 20)
    assert embed is not None
    assert not embed.any()


class LocalEncoder:
    """Stands for an encoder that hears 10 s around at most: a state is the sum of its own samples, in two layers."""

    def __init__(self) -> None:
        self.longest = 0

    def states(self, samples: Tensor, *, final_norm: bool) -> list[Tensor]:
        self.longest = max(self.longest, len(samples))
        sums = samples.unfold(0, 400, 320).sum(1, keepdim=True)  # [T, 1]
        return [sums, -sums]


def encoded(samples: Tensor, window_states: int) -> tuple[list[SpeechTable], int]:
    encoder = LocalEncoder()
    read = lambda start, stop: samples[start:stop]  # noqa: E731
    tables = windowed_video_rate(encoder, read, len(samples), window_states)  # type: ignore[arg-type]
    return list(tables), encoder.longest


@pytest.mark.parametrize("num_samples", [400, 16_000, 20 * 16_000, 16_000 * 61 + 17, 320 * 3000 + 80])
def test_windows_join_without_a_seam_where_10_seconds_are_all_that_counts(num_samples: int) -> None:
    samples = torch.randn(num_samples, generator=torch.Generator().manual_seed(0)).double()
    whole, _ = encoded(samples, 10**9)
    for window_states in (500, 1000, 1234):
        tables, longest = encoded(samples, window_states)
        assert longest <= 320 * (window_states + 1000 - 1) + 400
        assert len(tables) == num_segments(num_samples)
        assert [table.first_row for table in tables] == [320 * index for index in range(len(tables))]
        assert [table.num_features_30hz is None for table in tables] == [True] * (len(tables) - 1) + [False]
        assert torch.equal(joined(tables).rows, joined(whole).rows)


def test_a_row_stands_at_its_time_on_the_sound() -> None:
    """A voice that rises evenly gives rows that rise evenly, from its start to its end: row i is at state 3.125 i."""
    samples = torch.arange(16_000 * 50, dtype=torch.float64)
    rows = joined(encoded(samples, 700)[0]).rows[:, 0, 0]
    first = samples[:400].sum()
    places = (rows - first) / (320 * 400)
    nearest = torch.tensor([round(row * 1.875) * 5 / 3 for row in range(len(rows))])
    assert torch.allclose(places, nearest.to(places.dtype), atol=1e-3)


NARROW = {
    **{
        f"feature_extractor.conv_layers.{i}.conv.weight": (4, channels, kernel)
        for i, (channels, kernel) in enumerate([(1, 10), *[(4, 3)] * 4, *[(4, 2)] * 2])
    },
    "encoder.pos_conv_embed.conv.parametrizations.weight.original1": (16, 4, 128),
    "encoder.layers.0.feed_forward.intermediate_dense.weight": (16, 16),
    "encoder.layers.1.layer_norm.weight": (16,),
}


def test_a_change_late_in_a_voice_leaves_earlier_segments_bit_for_bit() -> None:
    """In windows of 20 s: another end, of another length, changes nothing that comes more than 10 s before its window.

    With a real, if narrow, encoder, whose attention hears all of a window.
    """
    encoder = AudioEncoder(fill_module(build_wav2vec2(NARROW)))
    generator = torch.Generator().manual_seed(0)
    voice = 0.105 * torch.randn(16_000 * 75, generator=generator)
    edited = torch.cat([voice[: 16_000 * 65], 0.105 * torch.randn(16_000 * 17, generator=generator)])
    found = []
    for samples in (voice, edited):
        loudness = Loudness()
        loudness.add(samples)
        read = lambda start, stop, loud=loudness, of=samples: loud.normalise(of[start:stop])  # noqa: E731
        found.append(list(windowed_video_rate(encoder, read, len(samples), 1000)))
    assert [torch.equal(a.rows, b.rows) for a, b in zip(*found, strict=False)] == [True, True, False, False]


def test_loudness_is_measured_over_all_blocks_and_rounded() -> None:
    """Within an eighth of an octave, and the same whatever the blocks."""
    samples = 0.02 + 0.3 * torch.randn(50_000, generator=torch.Generator().manual_seed(0))
    whole, parts = Loudness(), Loudness()
    whole.add(samples)
    for part in samples.split(777):
        parts.add(part)
    assert torch.equal(whole.normalise(samples), parts.normalise(samples))
    normal = whole.normalise(samples)
    assert 2 ** (-1 / 16) - 1e-3 <= float(normal.std()) <= 2 ** (1 / 16) + 1e-3
    assert abs(float(normal.mean())) <= 1 / 32 + 1e-3
    silence = Loudness()
    silence.add(torch.zeros(1000))
    assert not silence.normalise(torch.zeros(9)).any()
