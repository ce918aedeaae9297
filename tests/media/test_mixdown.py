"""More than two channels become two: the voice, mostly in the centre, keeps its level."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray
from recipes_for_tests import read_audio

from s2v_flow.media.audio import open_audio, probe_audio
from s2v_flow.media.audio_blocks import HALF_POWER, to_stereo
from s2v_flow.media.resample import speech_blocks
from s2v_flow.media.writer import VideoWriter

INPUTS = Path(__file__).parent / "inputs"
RATE = 48_000
SIDES = {
    "FL": (1, 0),
    "FR": (0, 1),
    "FC": (0.7071, 0.7071),
    "LFE": (0, 0),
    "BC": (0.5, 0.5),
    "BL": (0.7071, 0),
    "BR": (0, 0.7071),
    "SL": (0.7071, 0),
    "SR": (0, 0.7071),
}
LAYOUTS = {
    "3.0": ("FL", "FR", "FC"),
    "2.1": ("FL", "FR", "LFE"),
    "quad": ("FL", "FR", "BL", "BR"),
    "4.0": ("FL", "FR", "FC", "BC"),
    "5.0": ("FL", "FR", "FC", "BL", "BR"),
    "5.1": ("FL", "FR", "FC", "LFE", "BL", "BR"),
    "6.1": ("FL", "FR", "FC", "LFE", "BC", "SL", "SR"),
    "7.1": ("FL", "FR", "FC", "LFE", "BL", "BR", "SL", "SR"),
}


def tones(count: int) -> NDArray[np.float32]:
    """Return a tone of its own for each channel, [count, samples]; any two of them are orthogonal over a second."""
    time = np.arange(RATE) / RATE
    return np.stack([0.1 * np.sin(2 * np.pi * 200 * (k + 1) * time) for k in range(count)]).astype("f4")


def levels(mixed: NDArray[np.float32], count: int) -> NDArray[np.float32]:
    """Return how much of each tone there is on the left and on the right, [count, 2]."""
    return tones(count) @ mixed[:, :RATE].T / (0.1**2 / 2 * RATE)


def shares(channels: tuple[str, ...]) -> NDArray[np.float64]:
    return np.array([SIDES[name] for name in channels])


def encoded(path: Path, codec: str, format_name: str, layout: str, samples: NDArray[np.float32]) -> Path:
    with av.open(str(path), "w", format=format_name) as container:
        stream = container.add_stream(codec, rate=RATE, layout=layout)
        for start in range(0, RATE, 4_800):
            part = np.ascontiguousarray(samples[:, start : start + 4_800])
            frame = av.AudioFrame.from_ndarray(part, "fltp", layout)
            frame.sample_rate, frame.pts, frame.time_base = RATE, start, Fraction(1, RATE)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


@pytest.mark.parametrize(
    ("codec", "format_name", "layout"),
    [
        *(("flac", "matroska", layout) for layout in ("3.0", "2.1", "quad", "4.0", "5.0", "5.1", "6.1")),
        *(("pcm_s16le", "mov", layout) for layout in ("3.0", "quad", "4.0", "5.1", "6.1")),
        *(("aac", "mp4", layout) for layout in ("3.0", "quad", "5.0", "5.1")),
        *(("ac3", "matroska", layout) for layout in ("3.0", "5.1")),
        ("aac", "adts", "5.1"),
        ("libopus", "webm", "5.1"),
    ],
)
def test_each_channel_has_its_share_in_every_container(
    tmp_path: Path, codec: str, format_name: str, layout: str
) -> None:
    """As ITU-R BS.775 weighs them, whatever order the codec keeps them in."""
    channels = LAYOUTS[layout]
    path = encoded(tmp_path / "a", codec, format_name, layout, tones(len(channels)))
    audio = read_audio(path)
    assert audio.num_channels == 2
    delay = 0 if codec != "aac" or format_name == "mp4" else 1024  # ADTS does not tell the encoder's delay
    found = levels(audio.waveform[:, delay:], len(channels))
    rough = codec in ("aac", "ac3", "libopus")  # and their low-pass on the LFE
    assert np.abs(found - shares(channels)).max() < (0.15 if rough else 0.01)


@pytest.mark.parametrize(("format_name", "subtype"), [("WAVEX", "PCM_16"), ("WAV", "FLOAT"), ("FLAC", "PCM_24")])
@pytest.mark.parametrize("layout", ["3.0", "quad", "5.0", "5.1", "6.1", "7.1"])
def test_a_layout_that_is_not_told_is_flacs(tmp_path: Path, format_name: str, subtype: str, layout: str) -> None:
    channels = LAYOUTS[layout]
    if (format_name, layout) == ("WAVEX", "7.1"):
        channels = ("FL", "FR", "FC", "LFE", "BL", "BR", "FL", "FR")  # libsndfile writes left and right of centre
    samples = tones(len(channels))
    soundfile.write(tmp_path / "a", samples.T, RATE, format=format_name, subtype=subtype)
    found = levels(read_audio(tmp_path / "a").waveform, len(channels))
    wrong = np.abs(found - shares(channels)).max(axis=1)
    assert wrong[:6].max() < 0.01
    assert wrong.max() < 0.4


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_the_centre_of_an_ogg_is_found_although_vorbis_puts_it_second(tmp_path: Path, subtype: str) -> None:
    samples = np.zeros((RATE, 6), np.float32)
    samples[:, 1] = tones(1)[0]
    soundfile.write(tmp_path / "a.ogg", samples, RATE, format="OGG", subtype=subtype)
    found = levels(read_audio(tmp_path / "a.ogg").waveform, 1)[0]
    assert found == pytest.approx([HALF_POWER, HALF_POWER], abs=0.05)


def test_a_voice_in_the_centre_keeps_half_its_power_in_the_film_and_its_shape_for_the_encoder(tmp_path: Path) -> None:
    """5.1 at 8 kHz: before, its mean was 6 times, that is 16 dB, softer."""
    source = soundfile.read(INPUTS / "centre_voice_51.wav")[0][:, 2]
    clip = open_audio(INPUTS / "centre_voice_51.wav")
    with VideoWriter(tmp_path / "a.mp4", 64, 64, audio=clip) as writer:
        writer.write(np.zeros((4, 64, 64, 3), np.uint8))
    film = read_audio(tmp_path / "a.mp4")
    assert film.num_channels == 2
    level = np.sqrt((source**2).mean())
    assert level == pytest.approx(0.26, abs=0.005)
    for side in film.waveform:
        assert np.sqrt((side**2).mean()) == pytest.approx(level * HALF_POWER, rel=0.03)
    heard = np.concatenate([block.mean(axis=0) for block in clip.blocks()])
    assert np.allclose(heard, source * HALF_POWER, atol=1e-4)
    spoken = np.concatenate([*speech_blocks(clip, "official")])
    assert np.sqrt((spoken**2).mean()) == pytest.approx(level * HALF_POWER, rel=0.03)


def test_the_mean_of_the_two_is_proportional_to_the_recommended_mono() -> None:
    """0.7071 L + 0.7071 R + C + 0.5 Ls + 0.5 Rs."""
    channels = LAYOUTS["5.1"]
    mono = to_stereo(np.eye(6, dtype="f4"), channels).mean(axis=0)
    assert mono * 2**0.5 == pytest.approx([0.7071, 0.7071, 1, 0, 0.5, 0.5], abs=1e-4)


def test_loud_channels_do_not_clip_and_the_voice_loses_six_decibels_at_most(tmp_path: Path) -> None:
    """Full scale in every channel would be 2.4; a gain for the whole file, known from the probe, holds it back."""
    for level, gain in ((0.3, 1.0), (0.5, 1 / (0.5 * (1 + 2 * HALF_POWER))), (1.0, HALF_POWER)):
        samples = np.full((4_800, 6), level, np.float32)
        soundfile.write(tmp_path / "a.wav", samples, RATE, format="WAVEX", subtype="FLOAT")
        assert probe_audio(tmp_path / "a.wav").gain == pytest.approx(gain, rel=1e-3)
        (block, *_) = open_audio(tmp_path / "a.wav").blocks()
        assert block.max() == pytest.approx(level * (1 + 2 * HALF_POWER) * gain, rel=1e-3)


def test_two_channels_stay_as_they_are_even_beyond_full_scale(tmp_path: Path) -> None:
    samples = np.full((4_800, 2), 1.5, np.float32)
    soundfile.write(tmp_path / "a.wav", samples, RATE, subtype="FLOAT")
    info = probe_audio(tmp_path / "a.wav")
    assert (info.num_channels, info.gain, info.notes) == (2, 1, ())
    (block, *_) = open_audio(tmp_path / "a.wav").blocks()
    assert np.array_equal(block, samples.T)


def test_a_probe_says_what_was_mixed(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", tones(6).T, RATE, format="WAVEX")
    assert probe_audio(tmp_path / "a.wav").notes == ("its sound is mixed from 5.1 to stereo",)
