"""Images, sounds and videos that cannot be used are found by planning: exit code 4, the node and the file named."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import soundfile
from PIL import Image
from recipes_for_tests import PORTRAIT, call, options, write_clip, write_recipe, write_voice

from s2v_flow import api
from s2v_flow.errors import ExitCode, MediaError
from s2v_flow.media import video as video_module
from s2v_flow.media.video import VideoReader
from s2v_flow.media.writer import VideoWriter
from s2v_flow.nodes.load_media import LoadVideo

Changes = Mapping[str, Mapping[str, Any] | None]
CLIP: Changes = {"clip": {"kind": "load_video", "file": "bad"}, "first": {"control_video": "$clip"}}
MOTION: Changes = {"clip": {"kind": "load_video", "file": "bad"}, "first": {"motion_video": "$clip"}}
FACE: Changes = {"portrait": {"file": "bad"}}
VOICE: Changes = {"voice": {"file": "bad"}}


def picture(path: Path, width: int, height: int) -> None:
    Image.new("RGB", (width, height), (90, 120, 200)).save(path, format="PNG")


def cut(path: Path, source: str = PORTRAIT, share: float = 0.5) -> None:
    content = Path(source).read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def cut_clip(path: Path) -> None:
    cut(path, str(write_clip(path.with_suffix(".mp4"), 20)), 0.6)


def clip_of_garbage(path: Path) -> None:
    """Write a film whose index is sound and whose frames are noise."""
    content = bytearray(write_clip(path.with_suffix(".mp4"), 20).read_bytes())
    start = content.index(b"mdat") + 4
    content[start:] = np.random.default_rng(0).bytes(len(content) - start)
    path.write_bytes(content)


def clip_without_decoder(path: Path) -> None:
    content = write_clip(path.with_suffix(".mp4"), 4).read_bytes()
    path.write_bytes(content.replace(b"avc1", b"zzzz").replace(b"avcC", b"free"))


def narrow_clip(path: Path) -> None:
    with VideoWriter(path, 4096, 2, preset="ultrafast") as writer:
        writer.write(np.zeros((2, 2, 4096, 3), np.uint8))


def silent_clip(path: Path) -> None:
    path.write_bytes(write_clip(path.with_suffix(".mp4"), 4).read_bytes())


CASES: list[tuple[Changes, Callable[[Path], Any], str, str]] = [
    (FACE, lambda path: path.write_bytes(b""), "portrait", "the file is empty"),
    (FACE, lambda path: path.write_bytes(b"<!doctype html>"), "portrait", "not an image.*it is a web page"),
    (FACE, lambda path: path.write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"), "portrait", "not an image.*HEIC"),
    (
        FACE,
        lambda path: path.write_bytes(b"<?xml version='1.0'?>\n<!-- a -->\n<svg/>"),
        "portrait",
        "not an image.*SVG",
    ),
    (FACE, silent_clip, "portrait", "not an image.*it is a video"),
    (FACE, cut, "portrait", "damaged image"),
    (FACE, lambda path: write_voice(path.with_suffix(".wav"), 1).rename(path), "portrait", "not an image"),
    (FACE, lambda path: picture(path, 1, 4096), "reference", "1x4096 pixels are too narrow to be cut to"),
    (FACE, lambda path: picture(path, 4096, 1), "reference", "4096x1 pixels are too narrow to be cut to"),
    (CLIP, lambda path: path.write_bytes(b""), "clip", "the file is empty"),
    (CLIP, lambda path: picture(path, 64, 64), "clip", "not a recording"),
    (CLIP, cut_clip, "clip", "cut short|damaged"),
    (CLIP, clip_of_garbage, "clip", "damaged"),
    (CLIP, clip_without_decoder, "clip", "no decoder for its video"),
    (CLIP, narrow_clip, "first", "4096x2 pixels are too narrow to be cut to the shape of 64x2048"),
    (MOTION, cut_clip, "clip", "cut short|damaged"),
    (MOTION, narrow_clip, "first", "4096x2 pixels are too narrow to be cut to the shape of 64x2048"),
    (VOICE, lambda path: path.write_bytes(b""), "voice", "the file is empty"),
    (VOICE, silent_clip, "voice", "no sound in it"),
    (VOICE, lambda path: cut(path, str(write_voice(path.with_suffix(".wav"), 2))), "voice", "cut short"),
]
"""What the recipe says, what makes the file, the node that is named, and why."""


@pytest.mark.parametrize(("changes", "make", "node", "reason"), CASES)
def test_what_cannot_be_used_is_found_by_the_plan(
    tmp_path: Path, changes: Changes, make: Callable[[Path], Any], node: str, reason: str
) -> None:
    write_voice(tmp_path / "voice.wav", 1)
    make(tmp_path / "bad")
    if make is narrow_clip:
        changes = {**changes, "reference": {"width": 64, "height": 2048}}
    recipe = write_recipe(tmp_path, changes)
    with pytest.raises(MediaError, match=reason) as caught:
        api.plan(recipe, options(tmp_path, tmp_path / "models"))
    assert caught.value.message.startswith(f"{node}: ")
    assert str(tmp_path / "bad") in caught.value.message
    assert caught.value.fix
    assert caught.value.exit_code is ExitCode.MISSING
    assert not list(tmp_path.glob("cache/objects/*"))


def test_the_program_leaves_with_4_and_one_message(tmp_path: Path) -> None:
    write_voice(tmp_path / "voice.wav", 1)
    cut(tmp_path / "bad")
    code, _, err = call("plan", write_recipe(tmp_path, FACE), "--cache-dir", tmp_path / "cache")
    assert code == 4
    assert f"portrait: file: {tmp_path / 'bad'}: a damaged image" in err
    assert "Traceback" not in err


def test_what_was_probed_is_remembered_by_its_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second plan decodes nothing, of a copy neither; of a changed file it does."""
    from s2v_flow.media import audio, image

    write_voice(tmp_path / "voice.wav", 1)
    write_clip(tmp_path / "bad", 4)
    recipe = write_recipe(tmp_path, CLIP)
    decoded: list[Path] = []
    for module, name in ((audio, "probe_audio"), (image, "probe_image"), (video_module, "probe_video")):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda path, _real=real, **more: decoded.append(path) or _real(path, **more))
    for expected in (3, 0, 0):
        decoded.clear()
        api.plan(recipe, options(tmp_path, tmp_path / "models"))
        assert len(decoded) == expected
        (tmp_path / "bad").write_bytes((tmp_path / "bad").read_bytes())
    write_clip(tmp_path / "bad", 5)
    api.plan(recipe, options(tmp_path, tmp_path / "models"))
    assert decoded == [tmp_path / "bad"]


def test_a_voice_in_the_centre_is_noted_and_has_an_identity_of_its_own(tmp_path: Path) -> None:
    """Earlier versions read it otherwise: what they stored of it does not count; of a mono voice it does."""
    write_voice(tmp_path / "voice.wav", 1)
    recipe = write_recipe(tmp_path)
    mono = api.plan(recipe, options(tmp_path, tmp_path / "models"))
    assert mono.plan.node("voice").node.version == 1
    assert not [note for note in mono.notes if "voice" in note]
    samples = np.zeros((16_000, 6), np.float32)
    soundfile.write(tmp_path / "voice.wav", samples, 16_000, format="WAVEX")
    mixed = api.plan(recipe, options(tmp_path, tmp_path / "models"))
    assert mixed.plan.node("voice").node.version == 2
    assert "voice: file: voice.wav: its sound is mixed from 5.1 to stereo" in mixed.notes


def test_a_pose_video_that_is_mirrored_has_an_identity_of_its_own(tmp_path: Path) -> None:
    write_voice(tmp_path / "voice.wav", 1)
    clip = write_clip(tmp_path / "bad", 4)
    recipe = write_recipe(tmp_path, CLIP)
    assert api.plan(recipe, options(tmp_path, tmp_path / "models")).plan.node("clip").node.version == 1
    content = bytearray(clip.read_bytes())
    at = content.index(b"tkhd") + 44
    content[at : at + 4] = struct.pack(">i", -1 << 16)
    clip.write_bytes(bytes(content))
    mirrored = api.plan(recipe, options(tmp_path, tmp_path / "models"))
    assert mirrored.plan.node("clip").node.version == 2
    assert "clip: file: bad: it is shown mirrored, as its metadata says" in mirrored.notes


def test_how_a_file_was_always_read_is_noted_and_makes_nothing_stale(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "voice.wav", np.zeros(8000, np.float32), 16_000)
    pictures = [Image.new("RGB", (64, 64), (shade, 90, 90)) for shade in (0, 100, 200)]
    pictures[0].save(tmp_path / "bad", format="GIF", save_all=True, append_images=pictures[1:])
    planned = api.plan(write_recipe(tmp_path, FACE), options(tmp_path, tmp_path / "models"))
    assert "voice: file: voice.wav: it is silent from beginning to end: is the right track recorded?" in planned.notes
    assert "portrait: file: bad: of its 3 pictures the first is used" in planned.notes
    assert planned.plan.node("voice").node.version == 1
    soundfile.write(tmp_path / "voice.wav", np.full(8000, 32_767, np.float32), 16_000, subtype="FLOAT")
    loud = api.plan(write_recipe(tmp_path), options(tmp_path, tmp_path / "models"))
    assert [note for note in loud.notes if "its peak is 32767 times full scale" in note]
    assert loud.plan.node("voice").node.version == 1


@pytest.fixture(scope="module")
def long_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip") / "a.mp4", 200)


class _Planned:
    def __init__(self, path: Path) -> None:
        self.files = {("file",): path}


def test_chunks_that_ask_in_order_decode_each_frame_of_a_pose_video_once(
    long_clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """12 chunks of 16 frames: 200 frames and the probe's one, not the sum of all beginnings; the same bits."""
    counts = {"frames": 0}
    real = video_module._decoded

    def counted(packet: av.Packet, path: Path) -> Any:
        for frame in real(packet, path):
            counts["frames"] += 1
            yield frame

    monkeypatch.setattr(video_module, "_decoded", counted)
    frames = LoadVideo(file="a.mp4").run(_Planned(long_clip), {})["frames"]  # type: ignore[arg-type]
    starts = range(0, 192, 16)
    chunks = [frames.read(start, 16) for start in starts]
    assert counts["frames"] <= 200 + 1
    frames.close()
    monkeypatch.undo()
    for start, chunk in zip(starts, chunks, strict=True):
        with VideoReader(long_clip, 16) as reader:
            assert np.array_equal(reader.read(start, 16), chunk)
    assert np.array_equal(frames.read(8, 4), chunks[0][8:12])  # behind, and after it was closed
    frames.close()
