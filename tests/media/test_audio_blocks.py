"""Sound in containers: where timestamps put it, and which of several tracks is read."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from numpy.typing import NDArray
from recipes_for_tests import read_audio

from s2v_flow.errors import MediaError
from s2v_flow.media.audio import open_audio, probe_audio
from s2v_flow.media.source import open_container, tags_of

RATE = 48_000
HOLE = (0.3, 0.6)  # seconds after the sound's start
KINDS = [("mp4", "aac"), ("mov", "pcm_s16le"), ("matroska", "flac"), ("matroska", "aac"), ("webm", "libopus")]


def film(
    path: Path,
    format_name: str,
    codec: str,
    *,
    late_seconds: float = 0,
    has_hole: bool = False,
    video_from: float | None = 0.0,
    tones_hz: tuple[int, ...] = (440,),
) -> Path:
    """Write a film with a second of sound, on a track for each tone; a hole has no packets."""
    with av.open(str(path), "w", format=format_name) as container:
        picture = None
        if video_from is not None:
            picture = container.add_stream("libvpx" if format_name == "webm" else "mpeg4", rate=16)
            picture.width, picture.height, picture.pix_fmt = 32, 32, "yuv420p"
        tracks = [container.add_stream(codec, rate=RATE, layout="mono") for _ in tones_hz]
        for index in range(48 if picture is not None else 0):
            shown = av.VideoFrame(32, 32, "yuv420p")
            shown.pts, shown.time_base = index + round((video_from or 0) * 16), Fraction(1, 16)
            container.mux(picture.encode(shown))
        container.mux([] if picture is None else picture.encode(None))
        for track, tone in zip(tracks, tones_hz, strict=True):
            for packet in packets(track, tone):
                if has_hole and HOLE[0] < packet.pts * packet.time_base < HOLE[1]:
                    continue
                packet.pts += round(late_seconds / packet.time_base)
                packet.dts = packet.pts
                container.mux(packet)
    return path


def packets(track: av.AudioStream, tone_hz: int) -> list[av.Packet]:
    """Return a second of a tone, in packets of 20 ms or what the codec makes of them."""
    wave = (0.5 * np.sin(2 * np.pi * tone_hz * np.arange(RATE) / RATE)).astype("f4")[None]
    found = []
    for start in range(0, RATE, 960):
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(wave[:, start : start + 960]), "fltp", "mono")
        frame.sample_rate, frame.pts, frame.time_base = RATE, start, Fraction(1, RATE)
        found += track.encode(frame)
    return [packet for packet in [*found, *track.encode(None)] if packet.pts is not None]


def test_tags_in_any_encoding_are_read(tmp_path: Path) -> None:
    """What is no UTF-8 in them is no reason to refuse the sound, and no half of a pair gets into a text."""
    path = film(tmp_path / "a.mkv", "matroska", "flac", video_from=None)
    content = path.read_bytes()
    assert b"Lavf" in content
    path.write_bytes(content.replace(b"Lavf", b"caf\xe9"))
    assert read_audio(path).num_samples == RATE
    with path.open("rb") as file, open_container(file, "matroska", path) as container:
        assert "caf\ufffd" in dict(tags_of(container))["ENCODER"]


def sounding(waveform: NDArray[np.float32]) -> list[tuple[float, float]]:
    """Return the pieces (from, to), in seconds, that are louder than silence, by 10 ms."""
    loud = np.abs(waveform[0, : waveform.shape[1] // 480 * 480].reshape(-1, 480)).max(axis=1) > 0.05
    edges = np.flatnonzero(np.diff(np.concatenate([[False], loud, [False]]).astype(int)))
    return [(first / 100, last / 100) for first, last in edges.reshape(-1, 2).tolist()]


@pytest.mark.parametrize("has_video", [True, False])
@pytest.mark.parametrize(("format_name", "codec"), [kind for kind in KINDS if kind[1] != "pcm_s16le"])
def test_sound_that_starts_late_and_has_a_hole_keeps_its_place(
    tmp_path: Path, format_name: str, codec: str, has_video: bool
) -> None:
    """Silence stands in front (in mp4 there is an edit list) and in the hole: else the mouth moves early."""
    path = film(tmp_path / "a", format_name, codec, late_seconds=1, has_hole=True, video_from=0 if has_video else None)
    audio = read_audio(path)
    assert audio.num_samples == pytest.approx(2 * RATE, abs=1500)
    expected = [(1, 1.3), (1.6, 2)]
    assert np.array(sounding(audio.waveform)) == pytest.approx(np.array(expected), abs=0.1)  # a packet of flac
    clip = open_audio(path)
    assert np.array_equal(np.concatenate([*clip.blocks()], axis=1), audio.waveform)
    late, hole = probe_audio(path).notes
    assert late.endswith("s late: silence stands in front of it")
    assert hole.startswith("its sound has a hole of 0.") or "holes" in hole


def test_sound_behind_an_edit_list_without_packets_keeps_its_place(tmp_path: Path) -> None:
    path = film(tmp_path / "a.mov", "mov", "pcm_s16le", late_seconds=1)
    assert sounding(read_audio(path).waveform) == [(1, 2)]


@pytest.mark.parametrize(("format_name", "codec"), KINDS)
def test_sound_without_a_gap_gets_none(tmp_path: Path, format_name: str, codec: str) -> None:
    info = probe_audio(film(tmp_path / "a", format_name, codec))
    assert info.notes == ()
    assert RATE <= info.num_samples < RATE + 2_048


def test_a_film_that_starts_late_as_a_whole_starts_with_its_picture(tmp_path: Path) -> None:
    """As players show it: the sound begins half a second after the first frame."""
    path = film(tmp_path / "a.mkv", "matroska", "flac", late_seconds=5.5, video_from=5)
    assert sounding(read_audio(path).waveform) == [(pytest.approx(0.5, abs=0.02), pytest.approx(1.5, abs=0.02))]


def test_a_timestamp_hours_away_is_a_mistake_of_the_file(tmp_path: Path) -> None:
    path = film(tmp_path / "a.mkv", "matroska", "flac", late_seconds=4_000, video_from=None)
    with pytest.raises(MediaError, match=r"there is no sound for 4000 s from 0.00 s on"):
        probe_audio(path)


def test_many_holes_are_counted_and_do_not_add_up_to_an_error(tmp_path: Path) -> None:
    """Voice transmission leaves pauses out: 20 ms each here, every 100 ms, at millisecond timestamps."""
    with av.open(str(tmp_path / "a.webm"), "w") as container:
        track = container.add_stream("libopus", rate=RATE, layout="mono")
        for number, packet in enumerate(packets(track, 440)):
            if number % 5 or number == 0:
                container.mux(packet)
    info = probe_audio(tmp_path / "a.webm")
    assert info.num_samples == pytest.approx(RATE, abs=1_000)
    assert "holes of 0." in info.notes[0]


@pytest.mark.parametrize(
    ("format_name", "codec", "spoilt"),
    [
        ("mp4", "aac", {b"mp4a\0": b"apac\0", b"esds": b"free"}),
        ("matroska", "aac", {b"A_AAC": b"A_XYZ"}),
        ("mov", "pcm_s16le", {b"sowt": b"zzzz"}),
    ],
)
def test_the_first_track_that_has_a_decoder_is_read(
    tmp_path: Path, format_name: str, codec: str, spoilt: dict[bytes, bytes]
) -> None:
    """As of a telephone that records a second track in a format of its own; without any, the error says so."""
    path = film(tmp_path / "a", format_name, codec, tones_hz=(440, 1760), video_from=None)
    content = path.read_bytes()
    one, both = content, content
    for known, unknown in spoilt.items():
        assert content.count(known) == 2
        one, both = one.replace(known, unknown, 1), both.replace(known, unknown)
    path.write_bytes(one)
    audio = read_audio(path)
    spectrum = np.abs(np.fft.rfft(audio.waveform[0, :RATE]))
    assert np.argmax(spectrum) == pytest.approx(1760, abs=3)
    (note,) = probe_audio(path).notes
    assert note == "its sound track 2 is used: no decoder is available for what stands before it"
    path.write_bytes(both)
    with pytest.raises(MediaError, match="no decoder for its sound is available") as caught:
        probe_audio(path)
    assert caught.value.fix == "convert it to wav by ffmpeg"
