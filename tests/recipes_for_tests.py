"""Small recipes and inputs for tests: written as files, one node a line, on the demo's tiny models."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
import signal
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import soundfile

from s2v_flow import api
from s2v_flow.cli import main
from s2v_flow.media.audio import Audio, open_audio
from s2v_flow.media.writer import VideoWriter

RECIPES = Path(__file__).parent.parent / "recipes"
PORTRAIT = str(RECIPES / "inputs" / "astronaut.png")
SIDE = 64
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
RATE_HZ = 16_000
TINY = {"length": 5, "steps": 2, "cfg": 1.0}

NODES: Mapping[str, Mapping[str, Any]] = {
    "dit": {"kind": "load_diffusion_model", "checkpoint": "tiny_s2v.safetensors"},
    "umt5": {"kind": "load_text_encoder", "checkpoint": "tiny_umt5.safetensors"},
    "wav2vec2": {"kind": "load_audio_encoder", "checkpoint": "tiny_wav2vec2.safetensors"},
    "vae": {"kind": "load_vae", "checkpoint": "tiny_vae.safetensors"},
    "portrait": {"kind": "load_image", "file": PORTRAIT},
    "voice": {"kind": "load_audio", "file": "voice.wav"},
    "positive": {"kind": "encode_text", "text_encoder": "$umt5", "text": "She speaks."},
    "negative": {"kind": "encode_text", "text_encoder": "$umt5", "text": "blurry"},
    "speech": {"kind": "encode_audio", "audio_encoder": "$wav2vec2", "audio": "$voice"},
    "reference": {"kind": "encode_image", "vae": "$vae", "image": "$portrait", "width": SIDE, "height": SIDE},
    "first": {
        "kind": "sample",
        "model": "$dit",
        "positive": "$positive",
        "negative": "$negative",
        "speech": "$speech",
        "reference": "$reference",
        "vae": "$vae",
        "seed": 20,
    },
    "talk": {"kind": "extend", "video": "$first"},
    "frames": {"kind": "decode", "vae": "$vae", "latent": "$talk"},
    "video": {"kind": "save_video", "frames": "$frames", "audio": "$voice", "file": "out/talk.mp4"},
}


def write_recipe(
    folder: Path,
    changes: Mapping[str, Mapping[str, Any] | None] | None = None,
    *,
    name: str = "recipe.yaml",
    extra: str = "",
) -> Path:
    """Write a talking portrait's recipe, changed node by node.

    Args:
        folder: Where to write it.
        changes: Fields to lay over a node's (None takes a field away); None for a whole node takes it away; a name that
            is not there yet adds a node.
        name: The file's name.
        extra: More text at the end, such as profiles.
    """
    nodes: dict[str, dict[str, Any]] = {key: dict(fields) for key, fields in NODES.items()}
    for key, fields in (changes or {}).items():
        if fields is None:
            del nodes[key]
        else:
            merged = {**nodes.get(key, {}), **fields}
            nodes[key] = {field: value for field, value in merged.items() if value is not None}
    lines = [f"  {key}: {json.dumps(fields, ensure_ascii=False)}" for key, fields in nodes.items()]
    path = folder / name
    path.write_text("\n".join(["s2vflow: 1", "nodes:", *lines, extra]) + "\n", encoding="utf-8")
    return path


def tiny(**changes: Mapping[str, Any] | None) -> dict[str, Mapping[str, Any] | None]:
    """Return changes for `write_recipe` that make a run quick: chunks of 2 latent frames, 2 steps, no guidance."""
    return {**changes, "first": {**TINY, **(changes.get("first") or {})}}


def write_voice(path: Path, seconds: float, rate_hz: int = RATE_HZ) -> Path:
    """Write a sound of `seconds`, as 16-bit wav."""
    time = np.arange(round(seconds * rate_hz)) / rate_hz
    wave = 0.3 * np.sin(2 * np.pi * 220 * time) * np.sin(2 * np.pi * 3 * time)
    soundfile.write(path, wave.astype(np.float32), rate_hz, subtype="PCM_16")
    return path


def read_audio(path: Path) -> Audio:
    """Return a file's sound whole, without the gain that keeps what was mixed within full scale."""
    clip = replace(open_audio(path), gain=1.0)
    return Audio(np.concatenate([*clip.blocks()], axis=1), clip.sample_rate_hz)


def remux(source: Path, target: Path, **options: str) -> None:
    """Copy a video's first track into a new file, with the tags, as ffmpeg does; `options` of the container."""
    with av.open(str(source)) as old, av.open(str(target), "w", options=options) as new:
        new.metadata.update(old.metadata)
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(old.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                new.mux(packet)


def write_clip(path: Path, num_frames: int, seed: int = 0) -> Path:
    """Write a video of moving noise, 16 frames a second."""
    noise = np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    with VideoWriter(path, SIDE, SIDE, fps=16, crf=10, preset="ultrafast") as writer:
        for index in range(num_frames):
            writer.write(np.roll(noise, 2 * index, axis=1)[None])
    return path


def options(folder: Path, models: Path, cache: Path | None = None, **more: Any) -> api.Options:
    """Return options that keep everything inside `folder`."""
    return api.Options(models_dirs=[models], cache_dir=cache or folder / "cache", device="cpu", **more)


def without_notes(text: str) -> str:
    """Return what was printed without notes (quick recipes have few steps, and a negative prompt at cfg 1), and without
    a run's first and last line."""
    mark = re.compile(r"(\d\d:\d\d:\d\d [^:]+: )?(note|begin|end): ")
    return "".join(line for line in text.splitlines(keepends=True) if not mark.match(line))


def quoted(path: Path) -> str:
    """Return a path as a command names it."""
    return shlex.quote(str(path))


def call(*arguments: object) -> tuple[int, str, str]:
    """Call the program in this process: return its exit code, stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    before = sys.argv
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    sys.argv = ["s2vflow", *map(str, arguments)]
    code = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main.main()
    except SystemExit as left:
        code = int(left.code or 0)
    finally:
        sys.argv = before
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return code, out.getvalue(), err.getvalue()
