"""Lengths of streamed wav files: what writes into a pipe cannot fill them in."""

from __future__ import annotations

import struct
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import soundfile
from recipes_for_tests import read_audio

from s2v_flow.errors import MediaError
from s2v_flow.media.audio import AudioInfo, probe_audio

INPUTS = Path(__file__).parent / "inputs"
RATE, LENGTH = 8_000, 3_000
FORMATS = [
    ("WAV", "PCM_16", 1, None),
    ("WAV", "PCM_24", 2, None),
    ("WAV", "FLOAT", 1, None),
    ("WAV", "ULAW", 1, None),
    ("WAV", "PCM_16", 1, "BIG"),
    ("WAVEX", "PCM_16", 6, None),
    ("RF64", "PCM_16", 1, None),
]
PLACEHOLDERS = [
    *(0, 2**32 - 1, 2**32 - 2, 2**32 - 1 - 36, 2**32 - 1 - 44, 2**32 - 4096),
    *(2**31, 2**31 - 1, 2**31 - 1 - 36, 2**31 - 4096, 2 * 10**9, 2**30, 10**9),
]


def wav(format_name: str, subtype: str, channels: int, endian: str | None) -> bytearray:
    """Return a wav file that ends with its sound."""
    buffer = BytesIO()
    samples = 0.5 * np.sin(np.arange(LENGTH) / 7)
    columns = np.repeat(samples[:, None], channels, axis=1)
    soundfile.write(buffer, columns, RATE, format=format_name, subtype=subtype, endian=endian)
    content = bytearray(buffer.getvalue())
    start = content.index(b"data") + 8
    return content[: start + LENGTH * channels * {"PCM_24": 3, "FLOAT": 4, "ULAW": 1}.get(subtype, 2)]


def with_length(content: bytearray, length: int, riff_length: int) -> bytes:
    """Return a wav file with other lengths in its header; of RF64 in the chunk that holds the long ones."""
    changed = bytearray(content)
    order = ">" if content[:4] == b"RIFX" else "<"
    if content[:4] == b"RF64":
        wide = content.index(b"ds64") + 8
        grown = 2**64 - 1 if length == 2**32 - 1 else length
        struct.pack_into("<QQ", changed, wide, min(grown + 36, 2**64 - 1), grown)
    else:
        struct.pack_into(f"{order}I", changed, 4, riff_length)
        struct.pack_into(f"{order}I", changed, content.index(b"data") + 4, length)
    return bytes(changed)


@pytest.mark.parametrize("kind", FORMATS, ids=str)
def test_a_placeholder_for_a_length_stands_for_what_is_there(tmp_path: Path, kind: tuple[str, str, int, str]) -> None:
    content = wav(*kind)
    path = tmp_path / "a.wav"
    path.write_bytes(bytes(content))
    expected = read_audio(path).waveform
    assert expected.shape[1] == LENGTH
    for length in PLACEHOLDERS:
        for riff_length in {0, min(length + 36, 2**32 - 1), 2**32 - 1, len(content) - 8}:
            path.write_bytes(with_length(content, length, riff_length))
            assert np.array_equal(read_audio(path).waveform, expected), (hex(length), hex(riff_length))


def test_a_voice_from_a_pipe_has_its_real_length() -> None:
    info = probe_audio(INPUTS / "tts_placeholder_length.wav")
    assert info.duration_seconds == 0.375
    (note,) = info.notes
    assert "promises 2000000000 bytes of sound, 6000 are there" in note


@pytest.mark.parametrize("kind", FORMATS, ids=str)
def test_sound_behind_the_length_in_the_header_is_noted(tmp_path: Path, kind: tuple[str, str, int, str]) -> None:
    """As players do, the header is followed; other chunks behind it are no sound, whole ones or one that is padded."""
    content, path = wav(*kind), tmp_path / "a.wav"
    width = len(content[content.index(b"data") + 8 :]) // LENGTH
    for length in (width, 1000 * width, (LENGTH - 9) * width):
        path.write_bytes(with_length(content, length, length + 36))
        found = probe_audio(path)
        (note,) = (text for text in found.notes if "header" in text)
        assert found.num_samples == length // width
        assert f"{length} bytes of sound; the {LENGTH * width - length} behind them" in note
    order = ">" if kind[3] == "BIG" else "<"
    for tail in (
        b"",
        b"LIST" + struct.pack(f"{order}I", 4) + b"INFO",
        b"id3 " + struct.pack(f"{order}I", 3) + b"abc\0",
    ):
        path.write_bytes(bytes(content) + b"\0" * (len(content) % 2) + tail)
        assert not [text for text in probe_audio(path).notes if "header" in text], tail


@pytest.mark.parametrize("length", [0, 2**32 - 1])
def test_the_half_of_a_sample_at_the_end_of_a_stream_is_dropped(tmp_path: Path, length: int) -> None:
    path = tmp_path / "a.wav"
    path.write_bytes(with_length(wav("WAV", "PCM_24", 2, None), length, length) + b"\1\2\3\4\5")
    assert probe_audio(path) == AudioInfo(RATE, 2, LENGTH)


@pytest.mark.parametrize("kind", FORMATS, ids=str)
def test_a_length_that_is_no_placeholder_is_a_promise(tmp_path: Path, kind: tuple[str, str, int, str]) -> None:
    content = wav(*kind)
    path = tmp_path / "a.wav"
    for length in (20 * LENGTH * kind[2] * 4, 10_240_000, 10**9 - 1):
        path.write_bytes(with_length(content, length, length + 36))
        with pytest.raises(MediaError, match=f"cut short.*{length} bytes were promised"):
            probe_audio(path)


def test_a_large_file_that_lacks_a_part_is_not_taken_for_a_stream(tmp_path: Path) -> None:
    """Over 10**9 bytes are promised, and more than an eighth is there: a download that broke off."""
    path = tmp_path / "a.wav"
    path.write_bytes(with_length(wav("WAV", "PCM_16", 1, None), 1_200_000_000, 1_200_000_036))
    with path.open("r+b") as file:
        file.truncate(200_000_000)  # a hole: takes no space
    with pytest.raises(MediaError, match="cut short"):
        probe_audio(path)


def test_an_empty_sound_with_a_list_behind_it_is_empty(tmp_path: Path) -> None:
    content = with_length(wav("WAV", "PCM_16", 1, None), 0, 36)[:44] + b"LIST\x0a\x00\x00\x00INFOabcdef"
    (tmp_path / "a.wav").write_bytes(content)
    with pytest.raises(MediaError, match="no samples"):
        probe_audio(tmp_path / "a.wav")


def test_a_flac_of_unknown_length_is_read_to_its_end(tmp_path: Path) -> None:
    """STREAMINFO says 0 samples, as an encoder leaves it that cannot go back."""
    for channels in (1, 3):
        soundfile.write(tmp_path / "a.flac", np.full((LENGTH * 9, channels), 0.2), RATE)
        content = bytearray((tmp_path / "a.flac").read_bytes())
        content[21] &= 0xF0
        content[22:26] = bytes(4)
        (tmp_path / "a.flac").write_bytes(content)
        assert probe_audio(tmp_path / "a.flac").num_samples == LENGTH * 9
