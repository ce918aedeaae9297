from __future__ import annotations

import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from numpy.typing import NDArray

from s2v_flow.errors import MediaError, MissingError, RefusedError
from s2v_flow.media import video
from s2v_flow.media.audio import Audio
from s2v_flow.media.video import VideoReader, probe_video
from s2v_flow.media.writer import VideoWriter

WIDTH, HEIGHT = 48, 32


def grey_frames(num_frames: int) -> NDArray[np.uint8]:
    """Return frames that tell their index by their brightness, 4 levels apart, uint8 [N, H, W, 3]."""
    levels = 20 + 4 * np.arange(num_frames, dtype=np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (num_frames, HEIGHT, WIDTH, 3))


def indices(frames: NDArray[np.uint8]) -> list[int]:
    """Return the index that each of `grey_frames` tells."""
    return [round((float(frame.mean()) - 20) / 4) for frame in frames]


def written(path: Path, num_frames: int, fps: int | Fraction, sound: bool = False) -> Path:
    audio = Audio(np.zeros((1, int(num_frames * 16_000 / fps)), np.float32), 16_000) if sound else None
    with VideoWriter(path, WIDTH, HEIGHT, fps=fps, crf=1, preset="ultrafast", audio=audio) as writer:
        writer.write(grey_frames(num_frames))
    return path


def remuxed(source: Path, target: Path, **options: str) -> Path:
    """Copy the packets of a video into another container."""
    with av.open(str(source)) as old, av.open(str(target), "w", options=options) as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(old.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                new.mux(packet)
    return target


@pytest.mark.parametrize("fps", [16, 25, Fraction(30_000, 1001)])
@pytest.mark.parametrize("suffix", ["mp4", "mkv", "mov"])
def test_a_probe_tells_size_count_rate_and_length(tmp_path: Path, fps: int | Fraction, suffix: str) -> None:
    if suffix == "mkv" and int(av.__version__.partition(".")[0]) < 18:
        pytest.skip("before PyAV 18, FFmpeg writes no rate into mkv, and guesses one")
    path = written(tmp_path / "a.mp4", 30, fps, sound=suffix == "mp4")
    if suffix != "mp4":
        path = remuxed(path, tmp_path / f"b.{suffix}")
    info = probe_video(path)
    assert (info.width, info.height, info.num_frames, info.has_audio) == (WIDTH, HEIGHT, 30, suffix == "mp4")
    assert abs(info.duration_seconds - 30 / Fraction(fps)) <= Fraction(1, 1000)
    assert float(info.fps) == pytest.approx(float(fps), rel=1e-3)
    assert info.num_frames_at(fps) == 30


@pytest.mark.parametrize(
    ("fps", "expected"),
    [
        (16, list(range(30))),
        (32, [0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28]),
        (8, [i // 2 for i in range(60)]),  # halfway between two frames the earlier one is shown
        (25, [0, 2, 3, 5, 6, 8, 9, 11, 12, 14, 16, 17, 19, 20, 22, 23, 25, 27, 28, 29]),
    ],
)
def test_frames_are_those_nearest_in_time(tmp_path: Path, fps: int, expected: list[int]) -> None:
    with VideoReader(written(tmp_path / "a.mp4", 30, fps), fps=16) as reader:
        assert len(reader) == len(expected)
        shown = indices(reader.read(0, 100))
    assert shown == expected


def test_chunks_in_any_order_equal_the_whole(tmp_path: Path) -> None:
    with VideoReader(written(tmp_path / "a.mp4", 24, 24), fps=16) as reader:
        whole = reader.read(0, 16)
        assert whole.shape == (16, HEIGHT, WIDTH, 3)
        for start, count in ((0, 4), (4, 4), (3, 6), (12, 9), (15, 1), (16, 5), (99, 1), (0, 0)):
            assert np.array_equal(reader.read(start, count), whole[start : start + count])
        assert np.array_equal(np.stack(list(reader)), whole)
        with pytest.raises(ValueError, match="negative"):
            reader.read(-1, 2)


def test_reading_forwards_decodes_each_frame_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "a.mp4", 32, 16)
    opened = []
    original = video._timeline
    monkeypatch.setattr(video, "_timeline", lambda *args: opened.append(1) or original(*args))
    with VideoReader(path) as reader:
        for start in range(0, 32, 8):
            reader.read(start, 8)
        assert len(opened) == 1
        reader.read(0, 1)
        assert len(opened) == 2


def test_colours_come_back_as_they_were_written(tmp_path: Path) -> None:
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (200, 120, 40)]
    frames = np.broadcast_to(np.array(colours, np.uint8)[:, None, None], (6, HEIGHT, WIDTH, 3))
    with VideoWriter(tmp_path / "a.mp4", WIDTH, HEIGHT, crf=1) as writer:
        writer.write(frames)
    with VideoReader(tmp_path / "a.mp4") as reader:
        assert np.abs(reader.read(0, 6).astype(int) - frames).max() <= 4


def test_rotation_in_the_metadata_is_applied(tmp_path: Path) -> None:
    """A display matrix that turns a quarter clockwise, as a telephone held upright writes it."""
    frames = np.zeros((2, HEIGHT, WIDTH, 3), np.uint8)
    frames[:, :8, :8] = 255  # a white corner, top left
    with VideoWriter(tmp_path / "a.mp4", WIDTH, HEIGHT, crf=1) as writer:
        writer.write(frames)
    content = bytearray((tmp_path / "a.mp4").read_bytes())
    at = content.index(b"tkhd") + 44
    content[at : at + 36] = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, HEIGHT << 16, 0, 1 << 30)
    (tmp_path / "a.mp4").write_bytes(bytes(content))
    assert (probe_video(tmp_path / "a.mp4").width, probe_video(tmp_path / "a.mp4").height) == (HEIGHT, WIDTH)
    with VideoReader(tmp_path / "a.mp4") as reader:
        frame = reader.read(0, 1)[0]
    assert frame.shape == (WIDTH, HEIGHT, 3)
    assert frame[4, -4].min() > 240  # the corner is now top right
    assert frame[4, 4].max() < 15


@pytest.mark.parametrize(
    ("matrix", "rows"),
    [((-1, 0, 0, 1), "RW kk"), ((1, 0, 0, -1), "kk WR"), ((0, 1, 1, 0), "Wk Rk"), ((0, -1, -1, 0), "kR kW")],
)
def test_a_mirrored_picture_is_shown_as_players_show_it(
    tmp_path: Path, matrix: tuple[int, int, int, int], rows: str
) -> None:
    """Front cameras mirror by the display matrix: its rotation alone would turn a face upside down."""
    frames = np.zeros((1, HEIGHT, HEIGHT, 3), np.uint8)
    half = HEIGHT // 2
    frames[:, :half, :half], frames[:, :half, half:, 0] = 255, 255  # white, red; black below
    with VideoWriter(tmp_path / "a.mp4", HEIGHT, HEIGHT, crf=1) as writer:
        writer.write(frames)
    content = bytearray((tmp_path / "a.mp4").read_bytes())
    at, (a, b, c, d) = content.index(b"tkhd") + 44, (value << 16 for value in matrix)
    content[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    (tmp_path / "a.mp4").write_bytes(bytes(content))
    with VideoReader(tmp_path / "a.mp4") as reader:
        corners = reader.read(0, 1)[0][half // 2 :: half, half // 2 :: half] > 128
    assert " ".join("".join("kkkkRkkW"[4 * r + 2 * g + b] for r, g, b in row) for row in corners.tolist()) == rows
    assert reader.info.notes == ("it is shown mirrored, as its metadata says",)


def with_sound(source: Path, target: Path, late_seconds: Fraction) -> Path:
    """Copy a video with its sound, the picture later than that."""
    with av.open(str(source)) as old, av.open(str(target), "w") as new:
        streams = {stream.index: new.add_stream_from_template(stream) for stream in old.streams}
        for packet in old.demux():
            if packet.dts is None:
                continue
            stream = streams[packet.stream_index]
            if stream.type == "video":
                shift = int(late_seconds / packet.time_base)
                packet.pts, packet.dts = packet.pts + shift, packet.dts + shift
            packet.stream = stream
            new.mux(packet)
    return target


def test_a_picture_that_starts_later_than_the_sound_stands_still_until_then(tmp_path: Path) -> None:
    source = written(tmp_path / "whole.mp4", 8, 16, sound=True)
    late = with_sound(source, tmp_path / "late.mp4", Fraction(4, 16))
    with VideoReader(late) as reader:
        assert indices(reader.read(0, 20)) == [0, 0, 0, 0, *range(8)]
        assert [indices(reader.read(at, 1)) for at in (5, 2)] == [[1], [0]]
    (note,) = probe_video(late).notes
    assert note.startswith("its picture starts 0.2")
    barely = with_sound(source, tmp_path / "barely.mp4", Fraction(1, 50))
    assert (probe_video(barely).late_seconds, probe_video(barely).notes) == (0, ())


def test_a_cover_is_no_video(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "a.m4a"), "w", format="mp4") as file:
        cover = file.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = WIDTH, HEIGHT, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        file.mux(cover.encode(av.VideoFrame.from_ndarray(grey_frames(1)[0], "rgb24")))
        file.mux(cover.encode(None))
    with pytest.raises(MediaError, match="has no video in it"):
        probe_video(tmp_path / "a.m4a")


def coded(path: Path, *tracks: tuple[str, NDArray[np.uint8]], aspect: Fraction | None = None) -> Path:
    """Write tracks of frames by their codecs, with pixels of a shape."""
    with av.open(str(path), "w") as file:
        streams = [file.add_stream(codec, rate=16) for codec, _ in tracks]
        for stream, (codec, frames) in zip(streams, tracks, strict=True):
            stream.height, stream.width = frames.shape[1:3]
            stream.pix_fmt = {"png": "rgb24", "mjpeg": "yuvj420p"}.get(codec, "yuv420p")
            if aspect is not None:
                stream.codec_context.sample_aspect_ratio = aspect
        for stream, (_, frames) in zip(streams, tracks, strict=True):
            for frame in frames:
                file.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), "rgb24")))
            file.mux(stream.encode(None))
    return path


@pytest.mark.parametrize(("codec", "suffix"), [("png", "mov"), ("mjpeg", "mkv")])
def test_a_cover_in_a_track_of_its_own_is_passed_over(tmp_path: Path, codec: str, suffix: str) -> None:
    """Wherever it stands; a film that is all the file has may have the same codec."""
    film, cover = ("libx264", grey_frames(5)), (codec, np.full((1, 64, 64, 3), 255, np.uint8))
    for name, tracks, notes in (
        (f"before.{suffix}", (cover, film), ("its video track 2 is used: before it stands a picture",)),
        (f"behind.{suffix}", (film, cover), ()),
        (f"alone.{suffix}", ((codec, grey_frames(5)),), ()),
    ):
        with VideoReader(coded(tmp_path / name, *tracks)) as reader:
            assert (reader.info.width, reader.info.height, reader.info.notes) == (WIDTH, HEIGHT, notes)
            assert indices(reader.read(0, 9)) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("aspect", "size"),
    [
        (Fraction(16, 11), (70, HEIGHT)),
        (Fraction(8, 9), (WIDTH, 36)),
        (Fraction(405, 404), (WIDTH, HEIGHT)),
        (None, (WIDTH, HEIGHT)),
    ],
)
def test_pixels_that_are_not_square_are_made_so(tmp_path: Path, aspect: Fraction | None, size: tuple[int, int]) -> None:
    """By scaling the shorter side up, to an even number, and told; what nobody can see is left as it is."""
    frames = grey_frames(3).copy()
    frames[:, :, : WIDTH // 2] = 0
    with VideoReader(coded(tmp_path / "a.mp4", ("libx264", frames), aspect=aspect)) as reader:
        assert (reader.info.width, reader.info.height) == size
        (frame,) = reader.read(2, 1)
    assert frame.shape == (size[1], size[0], 3)
    assert frame[:, : size[0] // 2 - 4].max() < 15
    assert frame[:, size[0] // 2 + 4 :].min() > 15
    shown = () if size == (WIDTH, HEIGHT) else (f"it is scaled to {size[0]}x{size[1]}",)
    assert [note.partition(": ")[2].partition(",")[0] for note in reader.info.notes] == list(shown)


def test_pixels_so_wide_that_a_frame_would_be_huge_are_refused(tmp_path: Path) -> None:
    film = coded(tmp_path / "a.mp4", ("libx264", np.zeros((1, 480, 640, 3), np.uint8)), aspect=Fraction(255))
    with pytest.raises(RefusedError, match="more than 64 megapixels"):
        probe_video(film)


def test_what_is_not_a_video_is_refused(tmp_path: Path) -> None:
    inputs = Path(__file__).parents[2] / "recipes" / "inputs"
    with pytest.raises(MediaError, match="not a video but a sound"):
        probe_video(inputs / "speech.mp3")
    with pytest.raises(MissingError):
        probe_video(tmp_path / "none.mp4")
    (tmp_path / "a.mp4").write_bytes(b"#EXTM3U\n#EXTINF:1,\n/etc/passwd\n")
    with pytest.raises(MediaError, match="playlist"):
        VideoReader(tmp_path / "a.mp4")
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4_000), np.float32), "fltp", "mono")
        frame.sample_rate = 16_000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(MediaError, match="no video"):
        probe_video(tmp_path / "sound.mp4")
    with pytest.raises(ValueError, match="fps"):
        VideoReader(tmp_path / "a.mp4", fps=0)


def test_a_video_that_is_cut_short_is_refused(tmp_path: Path) -> None:
    content = written(tmp_path / "a.mp4", 60, 16).read_bytes()
    for keep in (0.5, 0.9):
        (tmp_path / "cut.mp4").write_bytes(content[: int(keep * len(content))])
        with pytest.raises(MediaError):
            probe_video(tmp_path / "cut.mp4")


def test_videos_beyond_the_limits_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "a.mp4", 9, 16)
    monkeypatch.setattr(video, "MAX_VIDEO_FRAMES", 8)
    with pytest.raises(RefusedError, match="over 8 frames"):
        probe_video(path)
    monkeypatch.setattr(video, "MAX_IMAGE_PIXELS", WIDTH * HEIGHT - 1)
    with pytest.raises(RefusedError, match="megapixels"):
        probe_video(path)


def test_a_mutated_video_gives_frames_or_a_typed_error(tmp_path: Path) -> None:
    content = written(tmp_path / "a.mp4", 12, 16, sound=True).read_bytes()
    random = np.random.default_rng(5)
    outcomes = {"read": 0, "refused": 0}
    for _ in range(60):
        mutant = bytearray(content)
        for at in random.integers(0, len(mutant), 4):
            mutant[at] = random.integers(256)
        (tmp_path / "mutant.mp4").write_bytes(bytes(mutant))
        try:
            with VideoReader(tmp_path / "mutant.mp4") as reader:
                reader.read(0, 4)
        except (MediaError, RefusedError):
            outcomes["refused"] += 1
        else:
            outcomes["read"] += 1
    assert min(outcomes.values()) > 0


def test_a_few_frames_that_are_shown_for_years_are_refused(tmp_path: Path) -> None:
    """At a constant rate they would be billions."""
    content = bytearray(written(tmp_path / "a.mp4", 4, 16).read_bytes())
    struct.pack_into(">I", content, content.index(b"stts") + 16, 0x7FFF_FFFF)  # how long each frame is shown
    (tmp_path / "a.mp4").write_bytes(content)
    with pytest.raises(RefusedError, match="the video lasts 131072 s"):
        probe_video(tmp_path / "a.mp4")
