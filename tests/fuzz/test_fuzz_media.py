"""Spoilt sounds, pictures, videos and what stands in them: arrays within the limits or an error of ours.

Decoders run in a child process with limits; one that crashes does not take the tests along. 200 files are part of
the slow tests. `make soak` runs more and prints figures: S2VFLOW_SOAK_MEDIA says how many. What once went wrong
stands in corpus/media.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from contextlib import suppress
from fractions import Fraction
from io import BytesIO
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import soundfile
from byte_mutation import mended, spoilt
from limited import survey
from PIL import Image, PngImagePlugin
from recipes_for_tests import read_audio

from s2v_flow.errors import ExitCode, MediaError, MissingError, RefusedError, S2VFlowError
from s2v_flow.media.audio import Audio, probe_audio
from s2v_flow.media.image import probe_image, read_image
from s2v_flow.media.source import (
    MAX_AUDIO_CHANNELS,
    MAX_IMAGE_PIXELS,
    MAX_SAMPLE_RATE_HZ,
    MAX_VIDEO_FRAMES,
    MIN_SAMPLE_RATE_HZ,
)
from s2v_flow.media.video import VideoReader, probe_video
from s2v_flow.media.writer import VideoWriter
from s2v_flow.runs.essence import note_box

TESTS = Path(__file__).parents[1]
CORPUS = Path(__file__).parent / "corpus" / "media"
SIDE = 32
SECONDS = 0.25
MANIFEST = {
    "manifest": 1,
    "id": "20261122-161502-7f3a",
    "status": "finished",
    "started": "",
    "ended": "",
    "seconds": 1.5,
    "recipe": {"path": "talk.yaml", "files": [], "text": "s2vflow: 1", "values": {"params.seed": 20}, "origins": {}},
    "given": {"profiles": ["quality"], "files": [], "overrides": ["--set seed=20"]},
    "seeds": {"first": 20},
    "files": [{"name": "talk.wav", "sha256": None, "at": "nodes.voice.file", "role": "input", "size": 3}],
    "loras": [{"node": "first", "id": "lightning", "matched": 1, "total": 2}],
    "environment": dict.fromkeys(("s2vflow", "python", "torch", "system", "machine", "device"), "x"),
    "nodes": [
        {
            "name": "first",
            "kind": "sample",
            "status": "computed",
            "fingerprint": "ab" * 32,
            "seconds": 1.5,
            "outputs": {},
        }
        | {"peak_bytes": 1 << 30}
    ],
    "outputs": [{"name": "talk.mp4", "sha256": "ab", "node": "first", "size": 3, "changed": True, "frames": 20}],
}
OURS = (MediaError, MissingError, RefusedError)


def write_seeds(folder: Path) -> Path:
    """Write a small sound file of every kind that is read, and return its folder."""
    (folder / "seeds").mkdir(parents=True)
    _write_sounds(folder / "seeds")
    _write_videos(folder / "seeds")
    _write_pictures(folder / "seeds")
    for name in ("template", "lightning"):
        (folder / "seeds" / f"{name}.json").write_bytes((TESTS / f"golden/e2e/{name}.json").read_bytes())
    (folder / "seeds" / "manifest.json").write_text(json.dumps(MANIFEST), encoding="utf-8")
    return folder


def _tone(rate: int, channels: int) -> np.ndarray:
    time_axis = np.arange(int(SECONDS * rate), dtype=np.float32) / rate
    return np.stack([0.5 * np.sin(2 * np.pi * (220 + 50 * k) * time_axis) for k in range(channels)]).astype(np.float32)


def _write_sounds(folder: Path) -> None:
    for name, kind, subtype, rate, channels in (
        ("pcm16.wav", "WAV", "PCM_16", 8000, 1),
        ("pcm24.wav", "WAVEX", "PCM_24", 8000, 2),
        ("float.wav", "WAV", "FLOAT", 8000, 1),
        ("adpcm.wav", "WAV", "IMA_ADPCM", 8000, 1),
        ("a.flac", "FLAC", "PCM_16", 8000, 2),
        ("vorbis.ogg", "OGG", "VORBIS", 16_000, 1),
        ("opus.ogg", "OGG", "OPUS", 16_000, 1),
        ("a.mp3", "MP3", "MPEG_LAYER_III", 16_000, 1),
    ):
        soundfile.write(folder / name, _tone(rate, channels).T, rate, format=kind, subtype=subtype)
    for name, form in (("a.aac", "adts"), ("a.m4a", "ipod"), ("fragments.m4a", "mp4")):
        options = {"movflags": "frag_keyframe+empty_moov"} if name.startswith("fragments") else {}
        with av.open(str(folder / name), "w", format=form, options=options) as container:
            stream = container.add_stream("aac", rate=16_000, layout="mono")
            frame = av.AudioFrame.from_ndarray(_tone(16_000, 1), "fltp", "mono")
            frame.sample_rate, frame.pts, frame.time_base = 16_000, 0, Fraction(1, 16_000)
            container.mux(stream.encode(frame))
            container.mux(stream.encode(None))


def _write_videos(folder: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    workflow = json.loads((TESTS / "golden/e2e/template.json").read_text())
    tags = {"comment": json.dumps({"prompt": workflow})}
    sound = Audio(_tone(16_000, 1), 16_000)
    with VideoWriter(folder / "a.mp4", SIDE, SIDE, crf=30, preset="ultrafast", audio=sound, metadata=tags) as writer:
        writer.write(np.stack([np.roll(noise, 2 * index, axis=1) for index in range(4)]))
    for name in ("a.mkv", "a.mov"):
        with av.open(str(folder / "a.mp4")) as old, av.open(str(folder / name), "w") as new:
            new.metadata.update(old.metadata)
            streams = {stream.index: new.add_stream_from_template(stream) for stream in old.streams}
            for packet in old.demux():
                if packet.dts is not None:
                    packet.stream = streams[packet.stream_index]
                    new.mux(packet)
    with (folder / "a.mp4").open("ab") as file:
        parts = {"files": [], "device": "cpu", "software": {}, "nodes": {}}
        file.write(note_box(json.dumps({"essence": 1, "node": "video", "recipe": "s2vflow: 1", **parts}).encode()))


def _write_pictures(folder: Path) -> None:
    grey = np.arange(SIDE * SIDE, dtype=np.uint16).reshape(SIDE, SIDE)
    colour = np.stack([grey % 256, grey // 4, grey % 7 * 30, 255 - grey // 8], axis=2).astype(np.uint8)
    rgb, rgba = Image.fromarray(colour[..., :3]), Image.fromarray(colour)
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010F] = "prompt:" + (TESTS / "golden/e2e/template.json").read_text()
    text = PngImagePlugin.PngInfo()
    text.add_text("prompt", (TESTS / "golden/e2e/template.json").read_text(), zip=True)
    text.add_itxt("Description", "{}", "en", "x")
    pictures: list[tuple[str, Image.Image, dict[str, Any]]] = [
        ("rgb.png", rgb, {"pnginfo": text, "exif": exif}),
        ("rgba.png", rgba, {}),
        ("deep.png", Image.fromarray(grey * 60), {}),
        ("palette.png", rgb.quantize(16), {"transparency": 3}),
        ("a.jpg", rgb, {"exif": exif, "progressive": True}),
        ("cmyk.jpg", rgb.convert("CMYK"), {}),
        ("lossy.webp", rgb, {"exif": exif}),
        ("lossless.webp", rgba, {"lossless": True}),
        ("a.gif", rgb.quantize(16), {"transparency": 3, "save_all": True, "append_images": [rgb.quantize(8)]}),
        ("a.bmp", rgb, {}),
        ("a.tiff", rgba, {"compression": "tiff_lzw"}),
        ("a.ppm", rgb, {}),
    ]
    for name, picture, options in pictures:
        buffer = BytesIO()
        suffix = name.split(".")[1]
        picture.save(buffer, format={"jpg": "jpeg"}.get(suffix, suffix), **options)
        (folder / name).write_bytes(buffer.getvalue())


def spoil(chance: random.Random, seeds: dict[str, bytes]) -> tuple[str, bytes]:
    """Return a spoilt file, and the name of what it was."""
    name = chance.choice(sorted(seeds))
    data = spoilt(seeds[name], list(seeds.values()), chance)
    return name, mended(data) if chance.random() < 0.6 else data


def check(data: bytes, name: str, folder: Path) -> str:
    """Read a file in every way, whatever it is, and hold what comes out against the limits."""
    path = folder / f"spoilt-{os.getpid()}{Path(name).suffix}"
    path.write_bytes(data)
    steps = {"sound": _check_sound, "video": _check_video, "picture": _check_picture}
    read = [name for name, step in steps.items() if step(path)] + _check_notes(path)
    return "+".join(read) or "refused"


def _check_sound(path: Path) -> bool:
    try:
        info = probe_audio(path)
    except OURS:
        return False
    audio = read_audio(path)  # a probe finds every mistake
    assert (audio.num_samples, audio.num_channels) == (info.num_samples, info.num_channels)
    assert np.isfinite(audio.waveform).all()
    assert MIN_SAMPLE_RATE_HZ <= audio.sample_rate_hz == info.sample_rate_hz <= MAX_SAMPLE_RATE_HZ
    assert 1 <= audio.num_channels <= MAX_AUDIO_CHANNELS
    assert audio.num_samples >= 1
    return True


def _check_video(path: Path) -> bool:
    try:
        info = probe_video(path)
        with VideoReader(path) as reader:
            count = len(reader)
            assert 1 <= count <= MAX_VIDEO_FRAMES, f"{count} frames"
            for start in (0, count - 1, count // 2):
                frames = reader.read(start, min(2, count - start))
                assert frames.shape[1:] == (info.height, info.width, 3)
    except OURS:
        return False
    assert info.width * info.height <= MAX_IMAGE_PIXELS
    assert info.num_frames >= 1
    assert info.duration_seconds > 0
    assert info.fps > 0
    return True


def _check_picture(path: Path) -> bool:
    try:
        probed = probe_image(path)
    except OURS:
        probed = None
    try:
        pixels = read_image(path)
    except OURS:
        return False
    assert probed == (pixels.shape[1], pixels.shape[0])
    assert pixels.dtype == np.float32
    assert pixels.shape[2:] == (3,)
    assert pixels.size // 3 <= MAX_IMAGE_PIXELS
    assert pixels.min() >= 0
    assert pixels.max() <= 1
    return True


def _check_notes(path: Path) -> list[str]:
    """Look for what a run left in a video, and for a workflow."""
    from s2v_flow.api import KINDS
    from s2v_flow.comfy.importer import import_workflow
    from s2v_flow.history.find import find
    from s2v_flow.history.text import show_text

    found = []
    with suppress(MediaError, MissingError):
        assert show_text(find(path.parent, str(path)))
        found.append("run")
    try:
        import_workflow(path, KINDS)
        found.append("workflow")
    except S2VFlowError as error:
        hold(error)
    return found


def hold(error: S2VFlowError) -> None:
    """Hold an import's error to the exit codes that an import has."""
    assert error.exit_code in (ExitCode.RECIPE, ExitCode.MISSING, ExitCode.REFUSED)


def fuzz(folder: Path, count: int, seed: int) -> str:
    """Read so many spoilt files; return what came of them."""
    found = survey("test_fuzz_media", write_seeds(folder), count, seed)
    assert found.failures == [], f"seed {seed}: {found.failures[:5]}"
    assert sum(found.outcomes.values()) == count
    return ", ".join(f"{number} {what}" for what, number in found.outcomes.most_common())


def test_the_seeds_are_sound(tmp_path: Path) -> None:
    """Each is read as what it is, so that spoiling it is worth while."""
    seeds = sorted((write_seeds(tmp_path) / "seeds").iterdir())
    outcomes = {path.name: check(path.read_bytes(), path.name, tmp_path) for path in seeds}
    assert "refused" not in outcomes.values(), outcomes
    assert outcomes["a.mp4"] == "sound+video+run"
    assert outcomes["a.mkv"] == "sound+video+workflow"
    assert outcomes["rgb.png"] == outcomes["lossy.webp"] == "picture+workflow"


@pytest.mark.slow
def test_spoilt_media_are_read_within_the_limits_or_refused(tmp_path: Path) -> None:
    """200 files."""
    fuzz(tmp_path, 200, seed=1)


def test_what_once_went_wrong_does_not_again(tmp_path: Path) -> None:
    """Each file in the corpus was found by this test."""
    files = sorted(CORPUS.iterdir())
    assert files
    for path in files:
        assert check(path.read_bytes(), path.name, tmp_path)


@pytest.mark.soak
def test_soak_media(tmp_path: Path) -> None:
    """S2VFLOW_SOAK_MEDIA spoilt files (5,000 unless told otherwise)."""
    count, seed = int(os.environ.get("S2VFLOW_SOAK_MEDIA", "5000")), int(time.time())
    started = time.monotonic()
    told = fuzz(tmp_path, count, seed)
    rate = count / (time.monotonic() - started)
    sys.stdout.write(f"\nseed {seed}: {count} media files, {told}; {rate:.0f} a second\n")
