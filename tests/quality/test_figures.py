"""Figures of drawn faces whose lag, drift and seams are known."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from recipes_for_tests import call

from s2v_flow.errors import S2VFlowError
from s2v_flow.media.audio import Audio
from s2v_flow.media.writer import VideoWriter
from s2v_flow.quality import GATES, unmet
from s2v_flow.quality.figures import Box, Measure, measure_frames, measure_video
from s2v_flow.quality.sync import loudness

FPS, SIDE, SECONDS, RATE_HZ = 16, 64, 6, 16_000
NUM_FRAMES = FPS * SECONDS
Frames = NDArray[np.uint8]
Floats = NDArray[np.float64]


def spoken(seed: int) -> Audio:
    """Syllables of random length and loudness with pauses: amplitude-modulated tones."""
    rng, samples = np.random.default_rng(seed), np.zeros(SECONDS * RATE_HZ, np.float32)
    at = 0.6
    while at < SECONDS - 0.8:
        length = rng.uniform(0.12, 0.3)
        time = np.arange(int(length * RATE_HZ)) / RATE_HZ
        tone = np.sin(np.pi * time / length) * np.sin(2 * np.pi * 140 * time) * rng.uniform(0.2, 0.8)
        samples[int(at * RATE_HZ) :][: len(tone)] = tone
        at += length + (rng.uniform(0.5, 0.8) if rng.random() < 0.2 else rng.uniform(0, 0.08))
    return Audio(samples[None], RATE_HZ)


def opening(voice: Audio) -> Floats:
    """How far the mouth opens in each frame, 0 to 1."""
    loud = loudness(voice, FPS, NUM_FRAMES)
    return np.minimum(loud / np.quantile(loud, 0.95), 1)


def face(opens: Floats, turn: Floats | None = None) -> Frames:
    """A drawn face with grain, uint8 [T, 64, 64, 3]; `turn` moves it sideways, in pixels."""
    rng = np.random.default_rng(1)
    y, x = np.mgrid[:SIDE, :SIDE].astype(np.float64)
    frames = np.empty((len(opens), SIDE, SIDE, 3), np.uint8)
    for index, wide in enumerate(opens):
        across = x - SIDE / 2 - (0 if turn is None else turn[index])
        picture = np.full((SIDE, SIDE, 3), (90.0, 120.0, 160.0))
        picture[(across / 20) ** 2 + ((y - 32) / 26) ** 2 < 1] = (225, 180, 150)
        for eye in (-8, 8):
            picture[((across - eye) / 3) ** 2 + ((y - 25) / 2) ** 2 < 1] = (30, 30, 40)
        picture[(across / 7) ** 2 + ((y - 46) / (1 + 5 * wide)) ** 2 < 1] = (110, 20, 30)
        frames[index] = np.clip(picture + rng.normal(0, 1, picture.shape), 0, 255)
    return frames


def measured(frames: Frames, sound: Audio | None, starts: tuple[int, ...] = (), mouth: Box | None = None) -> dict:
    groups = (frames[at : at + 5] for at in range(0, len(frames), 5))
    return measure_frames(groups, sound, FPS, len(frames), starts, mouth)


@pytest.fixture(scope="module")
def voice() -> Audio:
    return spoken(0)


@pytest.fixture(scope="module")
def talking(voice: Audio) -> Frames:
    return face(opening(voice))


def test_the_mouth_is_seen_to_move_with_the_voice(voice: Audio, talking: Frames) -> None:
    measure = Measure(voice, FPS, NUM_FRAMES, keeps=True)
    measure.add(talking)
    measure.figures()
    moved, opens = measure.movement(), opening(voice)
    assert (moved.shape, np.abs(moved).max()) == ((NUM_FRAMES,), 1)
    assert np.corrcoef(moved, opens)[0, 1] > 0.8


@pytest.mark.parametrize("lag", [-8, -5, -1, 0, 2, 8])
def test_a_known_lag_is_found_exactly(lag: int, voice: Audio, talking: Frames) -> None:
    """Positive where the picture is later than the sound."""
    sync = measured(np.roll(talking, lag, axis=0), voice)["sync"]
    assert (sync["lag_frames"], sync["correlation"] > 0.9, sync["confidence"] > 0.9) == (lag, True, True)
    assert sync["silence_activity"] < 0.3  # grain


def test_a_steady_beat_is_nearest_to_its_time() -> None:
    """Half a period away the picture fits as well, with the mouth moving the other way."""
    time = np.arange(SECONDS * RATE_HZ) / RATE_HZ
    tone = np.sin(2 * np.pi * 220 * time) * (1 + np.sin(2 * np.pi * time)) / 4
    beat = Audio(tone[None].astype(np.float32), RATE_HZ)
    assert measured(face(opening(beat)), beat)["sync"]["lag_frames"] == 0


def test_a_face_that_turns_is_no_matter(voice: Audio) -> None:
    turn = 4 * np.sin(np.arange(NUM_FRAMES) / 10)
    sync = measured(face(opening(voice), turn), voice)["sync"]
    assert (sync["lag_frames"], sync["confidence"] > 0.5) == (0, True)


def test_a_box_says_where_the_mouth_is(voice: Audio, talking: Frames) -> None:
    """Within it the mouth is found; where there is none, nothing is; outside the picture it is refused."""
    assert measured(talking, voice, mouth=(20, 38, 24, 16))["sync"]["lag_frames"] == 0
    assert measured(talking, voice, mouth=(0, 0, 10, 20))["sync"]["confidence"] < 0.5
    with pytest.raises(S2VFlowError, match="does not lie in the picture of 64x64 pixels"):
        measured(talking, voice, mouth=(50, 0, 20, 20))


def test_what_does_not_speak_gives_no_confidence(voice: Audio, talking: Frames) -> None:
    """Music under a closed or speaking mouth, another's voice, a still picture, no sound."""
    time = np.arange(SECONDS * RATE_HZ) / RATE_HZ
    beat = np.exp(-4 * (time % 0.5)) * np.sin(2 * np.pi * 220 * time) * 0.5
    music = Audio(beat[None].astype(np.float32), RATE_HZ)
    closed = face(np.zeros(NUM_FRAMES))
    still = np.repeat(talking[:1], NUM_FRAMES, axis=0)
    cases = [(closed, music), (talking, music), (talking, spoken(9)), (closed, voice), (still, voice), (still, None)]
    assert [measured(frames, sound)["sync"]["confidence"] < 0.5 for frames, sound in cases] == [True] * 6


def test_guards(voice: Audio, talking: Frames) -> None:
    """One black frame, or one of one colour, is enough; frozen is what does not move while the voice speaks."""
    black, flat = talking.copy(), talking.copy()
    black[40], flat[40] = 0, 128
    late = talking.copy()
    late[20:] = talking[20]
    found = [measured(frames, voice)["guards"] for frames in (talking, black, flat, late)]
    assert [[name for name, is_so in guards.items() if is_so] for guards in found] == [
        [],
        ["black", "flat"],
        ["flat"],
        ["frozen"],
    ]


def test_known_drift_and_seams(voice: Audio, talking: Frames) -> None:
    """Contrast falls evenly by a fifth; half as sharp, and another colour, from the second chunk on."""
    still = np.repeat(talking[:1], NUM_FRAMES, axis=0).astype(np.float64)
    fade = 1 - 0.2 * np.arange(NUM_FRAMES) / (NUM_FRAMES - 1)
    faded = ((still - 128) * fade[:, None, None, None] + 128).astype(np.uint8)
    contrast = measured(faded, voice)["drift"]["contrast"]
    assert contrast["per_minute"] == pytest.approx(-0.2 / (SECONDS / 60), rel=0.05)
    redder = talking.copy()
    redder[48:, ..., 0] = np.minimum(redder[48:, ..., 0].astype(int) + 30, 255)
    found = measured(redder, voice, (48,))
    assert found["drift"]["colour"]["per_chunk"][0] == 0
    assert 5 < found["drift"]["colour"]["per_chunk"][1] < 15  # CIELAB
    assert [seam["frame"] for seam in found["seams"]] == [48]
    assert found["seams"][0]["ratio"] > 5
    assert measured(talking, voice, (48,))["seams"][0]["ratio"] < 3
    soft = talking.astype(np.float64)
    soft[48:] = (soft[48:] + np.roll(soft[48:], 1, axis=2)) / 2
    drift = measured(soft.astype(np.uint8), voice, (48,))["drift"]
    assert drift["sharpness"]["per_chunk"][1] < -0.2
    assert drift["likeness"]["per_chunk"][1] < drift["likeness"]["per_chunk"][0]


def test_borders_in_any_order_are_borders(talking: Frames) -> None:
    """As somebody else's note may have them; one that is there twice is one."""
    assert measured(talking, None, (64, 48, 48, 0, 10**400)) == measured(talking, None, (48, 64))


def test_gates_name_what_is_not_met(voice: Audio, talking: Frames) -> None:
    good = measured(talking, voice)
    strict = {"max_lag_frames": 1, "min_correlation": 0.5, "min_confidence": 0.5, "max_guards": 0}
    assert list(unmet(good, strict)) == []
    bad = measured(np.zeros_like(talking), voice)
    assert len(list(unmet(bad, strict))) == 4
    assert next(unmet(bad, {"max_lag_frames": 1})) == (
        "how many frames picture and sound are apart cannot be told, max_lag_frames is 1"
    )
    assert list(unmet(good, dict.fromkeys((name for name in GATES if name.startswith("max")), 1e6))) == []


@pytest.mark.slow
def test_the_command_measures_a_file(tmp_path: Path, voice: Audio, talking: Frames) -> None:
    """As its frames before encoding; and says what is wrong with what it is given."""
    video = tmp_path / "talk.mp4"
    with VideoWriter(video, SIDE, SIDE, FPS, audio=voice) as writer:
        writer.write(np.roll(talking, 3, axis=0))
    code, out, _ = call("quality", video, "--json")
    found = json.loads(out)
    assert (code, list(found)) == (0, ["sync", "drift", "seams", "guards", "timing"])
    assert (found["sync"]["lag_frames"], found["guards"]["frozen"], found["seams"]) == (3, False, [])
    assert found["timing"]["frames"] == NUM_FRAMES
    assert "the picture is 3 frames late" in call("quality", video)[1]
    for words, wanted in (((video, "--mouth", "1,2"), 2), ((video, "--mouth", "0,0,99,9"), 2), (("none.mp4",), 4)):
        assert call("quality", *words)[0] == wanted


def test_chunks_are_those_of_as_many_frames(tmp_path: Path, talking: Frames) -> None:
    """A video that was cut, or given another rate, keeps its note, in which the borders are of other frames."""
    video = tmp_path / "talk.mp4"
    with VideoWriter(video, SIDE, SIDE, FPS) as writer:
        writer.write(talking[:32])
    found = [measure_video(video, (16,), starts_of=count)["seams"] for count in (32, None, 50)]
    assert [len(seams) for seams in found] == [1, 1, 0]
