from __future__ import annotations

import hashlib
import resource
import signal
import stat
import weakref
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray
from recipes_for_tests import read_audio

from s2v_flow.errors import ExitCode, S2VFlowError
from s2v_flow.files.atomic import CannotWriteError
from s2v_flow.media import writer as writer_module
from s2v_flow.media.audio import Audio, open_audio
from s2v_flow.media.image import read_image
from s2v_flow.media.video import VideoReader, probe_video
from s2v_flow.media.writer import VideoWriter, write_images

WIDTH, HEIGHT = 64, 48


def moving_frames(num_frames: int) -> NDArray[np.uint8]:
    """Return smooth noise that slides, uint8 [N, H, W, 3]."""
    noise = np.random.default_rng(0).integers(0, 256, (HEIGHT // 8, WIDTH // 8, 3), dtype=np.uint8)
    image = noise.repeat(8, axis=0).repeat(8, axis=1)
    return np.stack([np.roll(image, 3 * i, axis=1) for i in range(num_frames)])


def click(seconds: float, at_seconds: float, rate: int, channels: int = 1) -> Audio:
    waveform = np.zeros((channels, round(seconds * rate)), np.float32)
    waveform[:, round(at_seconds * rate)] = 0.9
    return Audio(waveform, rate)


@pytest.mark.parametrize("num_frames", [1, 5, 33])
def test_a_file_has_every_frame_at_16_a_second_from_zero(tmp_path: Path, num_frames: int) -> None:
    frames = moving_frames(num_frames)
    with VideoWriter(tmp_path / "a.mp4", WIDTH, HEIGHT) as writer:
        for start in range(0, num_frames, 4):
            writer.write(frames[start : start + 4])
    assert writer.num_frames == num_frames
    info = probe_video(tmp_path / "a.mp4")
    assert (info.num_frames, info.fps, info.duration_seconds * 16) == (num_frames, 16, num_frames)
    assert not info.has_audio
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        times = [float(frame.pts * frame.time_base) for frame in container.decode(stream)]
        assert times == [i / 16 for i in range(num_frames)]
        assert stream.codec_context.name == "h264"
        assert stream.codec_context.pix_fmt == "yuv420p"
        assert (stream.codec_context.colorspace, stream.codec_context.color_range) == (1, 1)
        assert (stream.codec_context.color_primaries, stream.codec_context.color_trc) == (1, 1)
    with VideoReader(tmp_path / "a.mp4") as reader:
        assert np.abs(reader.read(0, num_frames).astype(int) - frames).mean() < 12  # 4:2:0 blurs the blocks' edges


@pytest.mark.parametrize(
    ("text", "rate"),
    [("29.97002997", Fraction(30_000, 1001)), ("16.0000000001", Fraction(16)), ("0.001", Fraction(1, 1000))],
)
def test_a_rate_of_many_digits_is_the_nearest_that_an_mp4_holds(tmp_path: Path, text: str, rate: Fraction) -> None:
    with VideoWriter(tmp_path / "a.mp4", WIDTH, HEIGHT, fps=Fraction(text)) as writer:
        writer.write(moving_frames(2))
    with av.open(str(tmp_path / "a.mp4")) as file:
        assert file.streams.video[0].average_rate == rate


def test_the_index_stands_in_front_of_the_data(tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "a.mp4", WIDTH, HEIGHT) as writer:
        writer.write(moving_frames(3))
    content = (tmp_path / "a.mp4").read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")


@pytest.mark.parametrize("rate", [8_000, 16_000, 22_050, 24_000, 44_100, 48_000, 96_000, 17_000])
@pytest.mark.parametrize("channels", [1, 2])
def test_sound_starts_with_the_picture_and_is_as_long(tmp_path: Path, rate: int, channels: int) -> None:
    """A click 1 s into 2 s of sound is found where it was; the encoder's priming samples are hidden by an edit list."""
    with VideoWriter(tmp_path / "a.mp4", WIDTH, HEIGHT, audio=click(2, 1, rate, channels)) as writer:
        writer.write(moving_frames(32))
    sound = read_audio(tmp_path / "a.mp4")
    assert sound.sample_rate_hz == (rate if rate != 17_000 else 48_000)
    assert sound.num_channels == channels
    found = np.abs(sound.waveform).argmax(axis=1) / sound.sample_rate_hz
    assert np.abs(found - 1).max() <= 1 / sound.sample_rate_hz  # measured: exact
    with av.open(str(tmp_path / "a.mp4")) as container:
        streams = container.streams
        assert [float(s.duration * s.time_base) for s in streams] == pytest.approx([2, 2], abs=1e-9)
        assert [s.start_time for s in streams] == [0, 0]


def test_sound_that_is_shorter_or_longer_than_the_picture_keeps_its_length(tmp_path: Path) -> None:
    for seconds in (0.5, 3.25):
        with VideoWriter(tmp_path / "a.mp4", WIDTH, HEIGHT, audio=click(seconds, 0.25, 16_000)) as writer:
            writer.write(moving_frames(16))
        with av.open(str(tmp_path / "a.mp4")) as container:
            video, sound = container.streams
            assert (float(video.duration * video.time_base), float(sound.duration * sound.time_base)) == (1, seconds)


def test_sound_of_more_than_two_channels_is_refused(tmp_path: Path) -> None:
    """Files are read as mono or stereo: nothing else reaches the writer."""
    with pytest.raises(ValueError, match="mono or stereo, got 3 channels"):
        VideoWriter(tmp_path / "a.mp4", WIDTH, HEIGHT, audio=click(1, 0, 16_000, 3))


def test_sound_and_picture_are_interleaved(tmp_path: Path) -> None:
    """No packet lies more than one second of the other stream away, so that a player need not jump about."""
    with VideoWriter(tmp_path / "a.mp4", WIDTH, HEIGHT, audio=click(8, 1, 16_000)) as writer:
        for frame in moving_frames(128):
            writer.write(frame[None])
    latest = {"video": 0.0, "audio": 0.0}
    with av.open(str(tmp_path / "a.mp4")) as container:
        positions = []
        for packet in container.demux():
            if packet.pts is not None:
                positions.append((packet.pos, packet.stream.type, float(packet.dts * packet.time_base)))
    for _, kind, time in sorted(positions):
        latest[kind] = time
        assert abs(latest["video"] - latest["audio"]) < 1


def test_the_same_frames_and_sound_give_the_same_bytes(tmp_path: Path) -> None:
    """x264's macroblock tree must be off: with it some runs in a hundred differ, which a few runs here could miss."""
    digests = set()
    for name in "abcd":
        tags = {"comment": "talk", "s2vflow": "{}"}
        path = tmp_path / f"{name}.mp4"
        with VideoWriter(path, WIDTH, HEIGHT, audio=click(3, 1, 44_100, 2), metadata=tags) as writer:
            writer.write(moving_frames(48))
        digests.add(hashlib.sha256(path.read_bytes()).hexdigest())
        assert b" mbtree=0 " in path.read_bytes()
    assert len(digests) == 1


def test_metadata_of_any_name_comes_back(tmp_path: Path) -> None:
    tags = {"comment": "Grüße, 世界", "title": "talk", "s2vflow": '{"seed": 20}' * 2_000}
    with VideoWriter(tmp_path / "a.mp4", WIDTH, HEIGHT, metadata=tags) as writer:
        writer.write(moving_frames(2))
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert {name: container.metadata[name] for name in tags} == tags


def test_the_writer_keeps_no_frames(tmp_path: Path) -> None:
    class Frames(np.ndarray):  # a subclass can be referred to weakly
        pass

    alive: list[weakref.ref[Frames]] = []
    with VideoWriter(tmp_path / "a.mp4", WIDTH, HEIGHT, preset="ultrafast") as writer:
        for start in range(0, 200, 4):
            frames = moving_frames(4).view(Frames)
            frames[:] += np.uint8(start)
            alive.append(weakref.ref(frames))
            writer.write(frames)
            del frames
            assert sum(reference() is not None for reference in alive) == 0
    assert probe_video(tmp_path / "a.mp4").num_frames == 200


def test_after_an_error_nothing_new_is_left_and_the_old_file_stays(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"old")

    def fail(error: type[BaseException]) -> None:
        with VideoWriter(tmp_path / "a.mp4", WIDTH, HEIGHT, audio=click(1, 0, 16_000)) as writer:
            writer.write(moving_frames(5))
            assert len(list(tmp_path.iterdir())) == 2
            raise error

    for error in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(error):
            fail(error)
        assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a.mp4", b"old")]


def test_a_video_without_frames_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no frames"), VideoWriter(tmp_path / "a.mp4", WIDTH, HEIGHT):
        pass
    assert list(tmp_path.iterdir()) == []


def test_folders_are_made_and_permissions_follow_the_umask(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    path = tmp_path / "http:" / "out %d" / "a.mp4"
    with VideoWriter(path, WIDTH, HEIGHT) as writer:
        writer.write(moving_frames(2))
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(S2VFlowError, match=r"cannot write under .*file/a\.mp4"):
        VideoWriter(tmp_path / "file" / "a.mp4", WIDTH, HEIGHT).__enter__()


@pytest.fixture
def small_files() -> Iterator[None]:
    """Let no file grow beyond 4 kB, which fails like a full disk."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4_096, old[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, old)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_disk_that_takes_no_more_is_an_error_and_leaves_nothing(tmp_path: Path, small_files: None) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (60, HEIGHT, WIDTH, 3), dtype=np.uint8)

    def fill() -> None:
        with VideoWriter(tmp_path / "a.mp4", WIDTH, HEIGHT, crf=1, preset="ultrafast") as writer:
            writer.write(frames)

    with pytest.raises(S2VFlowError, match="cannot write"):
        fill()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_has_its_own_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer_module.os, "fsync", full)
    with pytest.raises(S2VFlowError, match="no space left") as caught:
        write_images(tmp_path, [moving_frames(1)[0]])
    assert caught.value.exit_code is ExitCode.DISK_FULL
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "settings",
    [{"width": 63}, {"height": 0}, {"fps": 0}, {"crf": 52}, {"crf": -1}, {"preset": "quick"}],
)
def test_settings_out_of_range_are_refused(tmp_path: Path, settings: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"even|fps"):
        VideoWriter(tmp_path / "a.mp4", **({"width": WIDTH, "height": HEIGHT} | settings))  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_what_the_encoders_refuse_is_no_matter_of_the_disk(tmp_path: Path) -> None:
    sound = Audio(np.full((1, 16_000), 1e30, np.float32), 16_000)

    def write() -> None:
        with VideoWriter(tmp_path / "a.mp4", WIDTH, HEIGHT, audio=sound) as writer:
            writer.write(moving_frames(16))

    with pytest.raises(S2VFlowError, match="the encoders refuse") as caught:
        write()
    assert not isinstance(caught.value, CannotWriteError)
    assert list(tmp_path.iterdir()) == []


def test_frames_of_another_size_or_type_are_refused(tmp_path: Path) -> None:
    def write(frames: NDArray[np.generic]) -> None:
        with VideoWriter(tmp_path / "a.mp4", WIDTH, HEIGHT) as writer:
            writer.write(frames)  # type: ignore[arg-type]

    for frames in (moving_frames(1)[0], moving_frames(1)[:, :8], moving_frames(1).astype(np.float32)):
        with pytest.raises(ValueError, match="frames must be uint8"):
            write(frames)


def test_images_are_written_one_by_one_and_come_back_exactly(tmp_path: Path) -> None:
    frames = moving_frames(3)
    paths = write_images(tmp_path / "out", (frame for frame in frames))
    assert [path.name for path in paths] == ["frame_00001.png", "frame_00002.png", "frame_00003.png"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [path.name for path in paths]
    for path, frame in zip(paths, frames, strict=True):
        assert np.array_equal(np.round(read_image(path) * 255).astype(np.uint8), frame)


def test_images_refuse_other_types(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="uint8"):
        write_images(tmp_path, [np.zeros((4, 4, 3), np.float32)])  # type: ignore[list-item]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("rate", [16_000, 11_000])
def test_sound_that_is_read_as_it_is_written_gives_the_same_file(tmp_path: Path, rate: int) -> None:
    """A clip of a file in blocks, and the whole of it at once; also where it is resampled for AAC."""
    audio = click(9, 1, rate)
    soundfile.write(tmp_path / "a.wav", audio.waveform.T, rate, subtype="FLOAT")
    for name, sound in (("whole", audio), ("clip", open_audio(tmp_path / "a.wav"))):
        with VideoWriter(tmp_path / f"{name}.mp4", WIDTH, HEIGHT, audio=sound) as writer:
            for _ in range(9 * 16):
                writer.write(np.zeros((1, HEIGHT, WIDTH, 3), np.uint8))
    assert (tmp_path / "whole.mp4").read_bytes() == (tmp_path / "clip.mp4").read_bytes()
