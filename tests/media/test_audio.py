from __future__ import annotations

import os
import tracemalloc
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray
from recipes_for_tests import read_audio

from s2v_flow.errors import MediaError, MissingError, RefusedError
from s2v_flow.media.audio import Audio, AudioClip, AudioInfo, open_audio, probe_audio

INPUTS = Path(__file__).parents[2] / "recipes" / "inputs"


def tone(seconds: float, rate: int, channels: int = 1) -> NDArray[np.float32]:
    """Return a tone whose pitch rises, float32 [channels, samples]."""
    time = np.arange(int(seconds * rate), dtype=np.float32) / rate
    return np.stack([0.5 * np.sin(2 * np.pi * (220 + 100 * k + 200 * time) * time) for k in range(channels)]).astype(
        "f4"
    )


def encoded(
    folder: Path, codec: str, format_name: str, samples: NDArray[np.float32], rate: int, **options: str
) -> bytes:
    """Return float32 [channels, samples] as the bytes of a file that FFmpeg writes."""
    path = folder / "encoded"
    layout = "mono" if len(samples) == 1 else "stereo"
    with av.open(str(path), "w", format=format_name, options=options) as container:
        stream = container.add_stream(codec, rate=rate, layout=layout)
        frame = av.AudioFrame.from_ndarray(samples, "fltp", layout)
        frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path.read_bytes()


def stored(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("name", "rate", "channels", "samples"),
    [("speech.wav", 22_050, 1, 129_767), ("speech16k.wav", 16_000, 1, 94_162), ("speech.mp3", 44_100, 2, 259_534)],
)
def test_the_recipes_voices_have_their_exact_length(name: str, rate: int, channels: int, samples: int) -> None:
    audio = read_audio(INPUTS / name)
    assert probe_audio(INPUTS / name) == AudioInfo(rate, channels, samples)
    assert (audio.sample_rate_hz, audio.num_channels, audio.num_samples) == (rate, channels, samples)
    assert probe_audio(INPUTS / name).duration_seconds == Fraction(samples, rate)


def test_mp3_by_ffmpeg_equals_mp3_by_libsndfile_with_no_offset() -> None:
    by_libsndfile, _ = soundfile.read(INPUTS / "speech.mp3", dtype="float32", always_2d=True)
    assert np.abs(read_audio(INPUTS / "speech.mp3").waveform - by_libsndfile.T).max() < 1e-6


def test_mp3_without_a_length_header_is_read_to_its_end(tmp_path: Path) -> None:
    """libsndfile guesses the length from the first frame's bit rate, and would cut this one to a fraction."""
    noise = np.random.default_rng(0).uniform(-0.9, 0.9, (1, 22_050)).astype("f4")
    samples = np.concatenate([noise, np.zeros((1, 22_050 * 9), "f4")], axis=1)
    path = stored(tmp_path / "a.mp3", encoded(tmp_path, "libmp3lame", "mp3", samples, 22_050, write_xing="0"))
    assert probe_audio(path).num_samples >= samples.shape[1]


@pytest.mark.parametrize(
    ("format_name", "subtype"), [("WAV", "PCM_16"), ("WAV", "PCM_24"), ("WAV", "FLOAT"), ("FLAC", "PCM_16")]
)
def test_lossless_files_give_back_what_was_written(tmp_path: Path, format_name: str, subtype: str) -> None:
    samples = np.round(tone(0.3, 8_000, 2) * 2**15) / np.float32(2**15)
    soundfile.write(tmp_path / "sound", samples.T, 8_000, format=format_name, subtype=subtype)
    audio = read_audio(tmp_path / "sound")
    assert audio.sample_rate_hz == 8_000
    assert np.array_equal(audio.waveform, samples)


@pytest.mark.parametrize(
    ("codec", "format_name"),
    [
        ("aac", "ipod"),
        ("aac", "mp4"),
        ("aac", "mov"),
        ("libopus", "webm"),
        ("pcm_s16le", "matroska"),
    ],
)
def test_sound_in_containers_is_aligned_whatever_the_suffix(tmp_path: Path, codec: str, format_name: str) -> None:
    samples = tone(1, 48_000, 2)
    data = encoded(tmp_path, codec, format_name, samples, 48_000)
    audio = read_audio(stored(tmp_path / "sound.txt", data))
    assert (audio.sample_rate_hz, audio.num_channels) == (48_000, 2)
    assert 0 <= audio.num_samples - 48_000 < 2_048
    assert np.sqrt(np.mean((audio.waveform[:, 2_000:46_000] - samples[:, 2_000:46_000]) ** 2)) < 0.01


def test_aac_without_a_container_is_read(tmp_path: Path) -> None:
    audio = read_audio(stored(tmp_path / "a", encoded(tmp_path, "aac", "adts", tone(1, 44_100), 44_100)))
    assert audio.sample_rate_hz == 44_100
    assert 44_100 <= audio.num_samples <= 44_100 + 3 * 1_024


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_ogg_has_its_exact_length(tmp_path: Path, subtype: str) -> None:
    soundfile.write(tmp_path / "a", tone(1, 48_000).T, 48_000, format="OGG", subtype=subtype)
    assert probe_audio(tmp_path / "a").num_samples == 48_000


def _cut_files(folder: Path) -> dict[str, bytes]:
    samples = tone(2, 22_050)
    files = {"mp3": (INPUTS / "speech.mp3").read_bytes()}
    for format_name, subtype in (("WAV", "PCM_16"), ("FLAC", "PCM_16"), ("OGG", "VORBIS")):
        soundfile.write(folder / "x", samples.T, 22_050, format=format_name, subtype=subtype)
        files[format_name] = (folder / "x").read_bytes()
    files["m4a"] = encoded(folder, "aac", "mp4", samples, 22_050, movflags="faststart")
    files["m4a with its index at the end"] = encoded(folder, "aac", "mp4", samples, 22_050)
    return files


def test_a_file_that_is_cut_short_is_refused_in_every_format(tmp_path: Path) -> None:
    for name, content in _cut_files(tmp_path).items():
        whole = stored(tmp_path / "whole", content)
        assert probe_audio(whole).num_samples > 0, name
        for keep in (0.5, 0.75):
            path = stored(tmp_path / "cut", content[: int(keep * len(content))])
            with pytest.raises(MediaError):
                probe_audio(path)
            with pytest.raises(MediaError) as caught:
                read_audio(path)
            assert str(path) in caught.value.message, name
            assert caught.value.fix, name


def test_rubbish_after_an_mp3_is_passed_over(tmp_path: Path) -> None:
    content = (INPUTS / "speech.mp3").read_bytes() + np.random.default_rng(0).bytes(3_000)
    assert probe_audio(stored(tmp_path / "a.mp3", content)).num_samples == 259_534


def test_a_video_without_sound_is_refused(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "v.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=16)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        container.mux(stream.encode(av.VideoFrame(32, 32, "yuv420p")))
        container.mux(stream.encode(None))
    with pytest.raises(MediaError, match="no sound"):
        read_audio(tmp_path / "v.mp4")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"hello, this is no sound at all", "not a recording"),
        (b"\x89PNG\r\n\x1a\n" + bytes(40), "a PNG picture, not a recording"),
        (b"#EXTM3U\n#EXTINF:1,\n/etc/passwd\n", "playlist"),
        (b"ffconcat version 1.0\nfile /etc/passwd\n", "playlist"),
        (b"\xef\xbb\xbf#EXTM3U\nhttp://localhost/a.ts\n", "playlist"),
        (b"http://localhost/a.mp3", "playlist"),
        (b"RIFF\x24\x00\x00\x00WAVEfmt ", "damaged"),
        (b"\x00\x00\x00\x18ftypmp42" + bytes(64), "damaged"),
        (b"\x1a\x45\xdf\xa3" + bytes(64), "damaged"),
        (b"fLaC" + bytes(64), "damaged"),
        (b"OggS" + bytes(64), "cut short"),
        (b"ID3\x04\x00\x00\x00\x00\x00\x00" + bytes(64), "damaged|no samples"),
    ],
)
def test_what_is_not_a_sound_is_refused_whatever_its_suffix(tmp_path: Path, content: bytes, reason: str) -> None:
    for suffix in ("mp3", "mp4", "wav"):
        with pytest.raises(MediaError, match=reason) as caught:
            read_audio(stored(tmp_path / f"a.{suffix}", content))
        assert caught.value.fix


def test_folders_fifos_and_devices_are_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path, tmp_path / "fifo", Path("/dev/zero")):
        with pytest.raises(MediaError, match="not a regular file"):
            read_audio(path)


def test_a_missing_file_is_missing_and_not_bad(tmp_path: Path) -> None:
    for name in ("none.wav", "nul\0.wav"):
        with pytest.raises(MissingError) as caught:
            read_audio(tmp_path / name)
        assert not isinstance(caught.value, MediaError)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, -1e17])
def test_bad_numbers_are_refused_with_their_time(tmp_path: Path, bad: float) -> None:
    samples = tone(2, 8_000).T
    samples[12_000] = bad
    soundfile.write(tmp_path / "a.wav", samples, 8_000, subtype="FLOAT")
    with pytest.raises(MediaError, match=r"NaN, infinity or a value over 1e\+09 at 1\.500 s"):
        probe_audio(tmp_path / "a.wav")


@pytest.mark.parametrize(("rate", "channels"), [(7_999, 1), (192_001, 1), (2**31 - 1, 1), (8_000, 9)])
def test_rates_and_channels_outside_the_limits_are_refused(tmp_path: Path, rate: int, channels: int) -> None:
    soundfile.write(tmp_path / "a.wav", np.zeros((100, channels), "f4"), rate)
    with pytest.raises(MediaError, match="rate is" if channels == 1 else "9 channels"):
        read_audio(tmp_path / "a.wav")


def test_a_sound_without_samples_is_refused(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.zeros((0, 1), "f4"), 8_000)
    with pytest.raises(MediaError, match="no samples"):
        read_audio(tmp_path / "a.wav")


def test_a_sound_that_is_too_long_is_refused() -> None:
    assert probe_audio(INPUTS / "speech16k.wav", max_seconds=6).num_samples == 94_162
    with pytest.raises(RefusedError, match="too long"):
        probe_audio(INPUTS / "speech16k.wav", max_seconds=5.8)


def test_a_mutated_file_gives_a_sound_or_a_typed_error(tmp_path: Path) -> None:
    """Random bytes changed in each format: whatever is read is finite and within the limits."""
    random = np.random.default_rng(7)
    outcomes = {"read": 0, "refused": 0}
    for content in _cut_files(tmp_path).values():
        for _ in range(12):
            mutant = bytearray(content[:40_000])
            for at in random.integers(0, random.choice([64, 512, len(mutant)]), 6):
                mutant[at] = random.integers(256)
            try:
                audio = read_audio(stored(tmp_path / "mutant", bytes(mutant)))
            except (MediaError, RefusedError):
                outcomes["refused"] += 1
            else:
                outcomes["read"] += 1
                assert np.isfinite(audio.waveform).all()
                assert 8_000 <= audio.sample_rate_hz <= 192_000
    assert min(outcomes.values()) > 0


def test_audio_refuses_what_is_not_a_waveform() -> None:
    for waveform in (np.zeros(5, "f4"), np.zeros((1, 5)), np.zeros((1, 0), "f4")):
        with pytest.raises(ValueError, match="waveform"):
            Audio(waveform, 16_000)
    with pytest.raises(ValueError, match="sample_rate_hz"):
        Audio(np.zeros((1, 5), "f4"), 0)


def whole(clip: AudioClip) -> np.ndarray:
    return np.concatenate([np.zeros((clip.num_channels, 0), "f4"), *clip.blocks()], axis=1)


def test_a_clip_gives_the_file_s_samples_block_by_block(tmp_path: Path) -> None:
    waveform = np.random.default_rng(0).uniform(-1, 1, (2, 200_000)).astype("f4")
    soundfile.write(tmp_path / "a.wav", waveform.T, 8_000, subtype="FLOAT")
    clip = open_audio(tmp_path / "a.wav")
    assert (clip.num_samples, clip.num_channels, clip.sample_rate_hz) == (200_000, 2, 8_000)
    blocks = list(clip.blocks())
    assert max(block.shape[1] for block in blocks) <= 65_536
    assert np.array_equal(np.concatenate(blocks, axis=1), waveform)
    for first, last in [(0, 200_000), (65_536, 131_072), (65_535, 65_537), (70_000, 70_000), (199_999, 200_000)]:
        part = replace(clip, first=first, last=last)
        assert part.num_samples == last - first
        assert np.array_equal(whole(part), waveform[:, first:last])


def test_a_clip_is_faded_over_its_part_however_much_of_it_is_taken(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.ones(200_000, "f4"), 8_000, subtype="FLOAT")
    clip = replace(open_audio(tmp_path / "a.wav"), first=1000, last=151_000, num_fade_samples=100_000)
    ramp = np.arange(1, 75_001, dtype="f4") / np.float32(75_001)  # at most half of the part
    expected = np.concatenate([ramp, ramp[::-1]])
    assert np.array_equal(whole(clip)[0], expected)
    assert np.array_equal(whole(replace(clip, limit=70_000))[0], expected[:70_000])
    short = whole(replace(clip, num_fade_samples=3))[0]
    assert np.array_equal(short[:4], np.array([0.25, 0.5, 0.75, 1], "f4"))
    assert np.array_equal(short[-4:], np.array([1, 0.75, 0.5, 0.25], "f4"))
    assert short.min() > 0


@pytest.mark.slow
def test_a_sound_of_hours_is_measured_and_read_in_little_memory(tmp_path: Path) -> None:
    """Six hours at 8 kHz, more than were taken before; a day's limit is kept for more."""
    hours = 6
    with soundfile.SoundFile(tmp_path / "a.flac", "w", 8_000, 1, "PCM_16") as file:
        for _ in range(hours):
            file.write(np.zeros(3600 * 8_000, "i2"))
    tracemalloc.start()
    clip = open_audio(tmp_path / "a.flac")
    assert clip.num_samples == hours * 3600 * 8_000
    assert sum(block.shape[1] for block in replace(clip, first=10, limit=10**6).blocks()) == 10**6
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10e6


def test_eight_channels_are_read_without_a_crash(tmp_path: Path) -> None:
    """7.1 is the most that is read; FFmpeg keeps the pointers to more planes than 8 elsewhere."""
    samples = np.zeros((24_000, 8), np.float32)
    samples[:, 1] = tone(0.5, 48_000)[0]  # the centre, in Vorbis' order
    soundfile.write(tmp_path / "a.ogg", samples, 48_000, format="OGG", subtype="OPUS")
    with av.open(str(tmp_path / "a.ogg")) as old, av.open(str(tmp_path / "a.mkv"), "w") as new:
        stream = new.add_stream_from_template(old.streams.audio[0])
        for packet in old.demux():
            if packet.dts is not None:
                packet.stream = stream
                new.mux(packet)
    audio = read_audio(tmp_path / "a.mkv")
    assert audio.num_channels == 2
    assert np.sqrt((audio.waveform**2).mean(axis=1)) == pytest.approx([0.25, 0.25], abs=0.01)


def test_more_channels_than_eight_are_refused_before_they_are_read(tmp_path: Path) -> None:
    """This file claims 29; it crashed the process."""
    spoilt = Path(__file__).parents[1] / "fuzz" / "corpus" / "media" / "claims_29_channels.aac"
    with pytest.raises(MediaError, match=r"it has 29 channels|damaged"):
        probe_audio(spoilt)


def test_silence_stands_before_and_after_a_clip(tmp_path: Path) -> None:
    """Of any length, in blocks; a limit counts from the silence's start, and nothing is read for silence alone."""
    soundfile.write(tmp_path / "a.wav", np.ones((3000, 2), "f4"), 8_000, subtype="FLOAT")
    clip = replace(open_audio(tmp_path / "a.wav"), first=1000, num_lead=70_000, num_tail=500)
    expected = np.concatenate([np.zeros(70_000), np.ones(2000), np.zeros(500)]).astype("f4")
    assert clip.num_samples == 72_500
    assert all(np.array_equal(row, expected) for row in whole(clip))
    assert max(block.shape[1] for block in clip.blocks()) <= 65_536
    for limit in (0, 10, 70_000, 71_999, 72_100, 90_000):
        cut = replace(clip, limit=limit)
        assert np.array_equal(whole(cut)[1], expected[:limit])
        assert cut.num_samples == min(limit, 72_500)
    (tmp_path / "a.wav").unlink()
    assert np.array_equal(whole(replace(clip, limit=60_000))[0], expected[:60_000])
