"""Picture and sound: frame i of the file was conditioned on the sound of frame i, at i/16 s.

Models are replaced by ones that pass on which frame of sound they were given; everything between them is real: reading
and resampling, planning, chunks, samplers, the decoder's stream, and the files.

- the voice is a staircase, one level for each 1/16 s;
- the audio encoder turns step i into the number i + 1, silence into 0;
- the diffusion model's latent frame t holds in its channels 0 to 3 the numbers of its four frames of sound;
- the VAE decodes a latent frame to four frames (the first of a stream to its last one) that show these numbers in bits;
- whatever is encoded from pixels (portrait, motion) shows the number 4095, which must not be seen in any file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import imageio.v3 as iio
import numpy as np
import pytest
import soundfile
import torch
from recipes_for_tests import RATE_HZ, SIDE, options, tiny, write_recipe
from torch import Tensor, nn

from s2v_flow import api
from s2v_flow.media.video import VideoReader, probe_video
from s2v_flow.models import load, speech
from s2v_flow.models.speech import SpeechTable
from s2v_flow.models.vae import denormalise, normalise

STEP = RATE_HZ // 16
NOT_SOUND = 4095
SCALE = 1024.0  # numbers in a latent are divided by it
BITS = 12
LENGTHS = [  # seconds, chunks of 8 frames, frames
    (1.23, 3, 20),
    *(pytest.param(*length, marks=pytest.mark.slow) for length in ((0.3, 1, 5), (6.25, 13, 100))),
]


class StampingAudioEncoder(nn.Module):
    """Gives one number for each 1/16 s of the waveform; the `to_video_rate` beside it has nothing left to do."""

    def mono(self, waveform: Tensor, conditioning: str) -> Tensor:
        return waveform

    def states(self, waveform: Tensor, *, final_norm: bool) -> Tensor:
        padded = torch.cat([waveform, waveform[-1:].expand(-len(waveform) % STEP)])
        levels = padded.reshape(-1, STEP)
        is_silent = (levels == 0).all(dim=1)
        voice = levels[~is_silent]
        assert not bool(is_silent[int(is_silent.sum()) :].any()), "silence stands in front only"
        assert bool((voice[1:, 100] > voice[:-1, -100] + 1e-3).all()), "each frame is a step of its own"
        assert float((voice[:, 100] - voice[:, STEP // 4]).abs().max()) < 1e-3, "steps begin where frames begin"
        stamps = torch.arange(1, len(levels) + 1) - is_silent.sum()
        return torch.where(is_silent, 0, stamps).float()


def stamped_table(stamps: Tensor) -> SpeechTable:
    return SpeechTable(stamps[:, None, None].expand(-1, 25, 64).contiguous(), int(len(stamps) * 30 / 16))


class StampingDit(nn.Module):
    """Its velocity leads straight to the latent that holds the numbers of its frames of sound."""

    def prepare_text(self, context: Tensor, **_: Any) -> None:
        return None

    def prepare_audio(self, audio_embed: Tensor | None, *, num_latent_frames: int, conditioning: str) -> Tensor:
        assert audio_embed is not None
        return audio_embed[0, 0, 0].reshape(num_latent_frames, 4)

    def prepare_chunk(self, *, num_latent_frames: int, height: int, width: int, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(latent_shape=(1, 16, num_latent_frames, height, width))

    def forward(self, x: Tensor, timestep: Tensor, chunk: Any, branches: Sequence[Any]) -> list[Tensor]:
        target = torch.zeros(chunk.latent_shape)
        target[:, :4] = branches[0].audio.T[None, :, :, None, None] / SCALE
        return [(x - target) / (timestep / 1000)]


class StampingVae(nn.Module):
    """Shows a latent's numbers as vertical stripes, white for 1, the highest bit on the left."""

    def encode(self, pixels: Tensor) -> Tensor:
        shape = (1, 16, (pixels.shape[2] - 1) // 4 + 1, SIDE // 8, SIDE // 8)
        return denormalise(torch.full(shape, NOT_SOUND / SCALE))

    def decode_next(self, latent: Tensor, state: bool | None) -> tuple[Tensor, bool]:
        numbers = (normalise(latent)[0, :4, :, 0, 0].T * SCALE).round().long().flatten()  # [4 F]
        shown = numbers if state else numbers[3:]
        columns = torch.arange(SIDE) * BITS // SIDE
        bits = (shown[:, None] >> (BITS - 1 - columns)) & 1  # [n, W]
        return (bits * 2.0 - 1)[None, None, :, None, :].expand(1, 3, -1, SIDE, -1), True


class StampingTextEncoder(nn.Module):
    def encode_parts(self, parts: Any) -> Tensor:
        return torch.zeros(1, 1, 64)


@pytest.fixture
def stamping_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the stamping models where the loaders look for theirs."""
    dit = SimpleNamespace(module=StampingDit(), loras=())
    makers: dict[str, Callable[..., Any]] = {
        "load_dit": lambda *_, **__: dit,
        "load_text_encoder": lambda *_, **__: StampingTextEncoder(),
        "load_audio_encoder": lambda *_, **__: StampingAudioEncoder(),
        "load_vae": lambda *_, **__: StampingVae(),
    }
    for name, maker in makers.items():
        monkeypatch.setattr(load, name, maker)
    monkeypatch.setattr(speech, "to_video_rate", stamped_table)


def write_staircase(path: Path, seconds: float) -> None:
    """Write a voice whose level rises at every 1/16 s."""
    count = round(seconds * RATE_HZ)
    steps = np.arange(count) // STEP
    soundfile.write(path, (0.1 + 0.8 * steps / 128).astype(np.float32), RATE_HZ, subtype="FLOAT")


def numbers_shown(frames: np.ndarray) -> list[int]:
    """Read the numbers off frames, uint8 [n, H, W, 3]."""
    centres = (np.arange(BITS) * 2 + 1) * SIDE // (2 * BITS)
    bits = frames[:, SIDE // 2, centres, 1] > 127
    return [int("".join("01"[int(bit)] for bit in row), 2) for row in bits]


def run_talk(folder: Path, models: Path, seconds: float, **changes: Any) -> api.RunResult:
    write_staircase(folder / "voice.wav", seconds)
    changes["first"] = {"sampler": "euler", **changes.get("first", {})}  # it ends at sigma 0, without a rest of noise
    return api.run(write_recipe(folder, tiny(**changes)), options(folder, models))


def saved_frames(folder: Path) -> np.ndarray:
    return np.stack([iio.imread(path) for path in sorted((folder / "out").glob("frame_*.png"))])


IMAGES = {"kind": "save_images", "frames": "$frames", "file": "out/frame.png"}


@pytest.mark.usefixtures("stamping_models")
@pytest.mark.parametrize(("seconds", "num_chunks", "num_frames"), LENGTHS)
@pytest.mark.parametrize("conditioning", ["official", "comfyui"])
@pytest.mark.parametrize(
    "prefix", ["reference", *(pytest.param(it, marks=pytest.mark.slow) for it in ("first", "none"))]
)
def test_frame_i_of_the_file_shows_the_sound_of_frame_i(
    prefix: str,
    conditioning: str,
    seconds: float,
    num_chunks: int,
    num_frames: int,
    tmp_path: Path,
    tiny_models: Path,
) -> None:
    result = run_talk(
        tmp_path,
        tiny_models,
        seconds,
        first={"conditioning": conditioning},
        speech={"conditioning": conditioning},
        frames={"prefix": prefix},
        video=None,
        images=IMAGES,
    )
    assert sum(name.startswith(("first", "talk")) for name in result.computed) == num_chunks
    assert num_frames == ceil(seconds * 16)
    assert numbers_shown(saved_frames(tmp_path)) == list(range(1, num_frames + 1))


@pytest.mark.usefixtures("stamping_models")
@pytest.mark.parametrize(("seconds", "num_chunks", "num_frames"), LENGTHS)
def test_the_video_file_is_in_time_too(
    seconds: float, num_chunks: int, num_frames: int, tmp_path: Path, tiny_models: Path
) -> None:
    (path,) = run_talk(tmp_path, tiny_models, seconds, video={"crf": 4, "preset": "ultrafast"}).outputs["video"]
    with VideoReader(path, 16) as reader:
        assert numbers_shown(reader.read(0, 1000)) == list(range(1, num_frames + 1))
    info = probe_video(path)
    assert (info.num_frames, info.fps, info.has_audio) == (num_frames, 16, True)


@pytest.mark.slow
@pytest.mark.usefixtures("stamping_models")
@pytest.mark.parametrize("first", [{}, {"init_first_frame": True}])
@pytest.mark.parametrize(("motion", "warmup"), [("pixels", 3), ("pixels", 7), ("latent", 7)])
def test_every_way_to_hand_over_motion_is_in_time(
    motion: str, warmup: int, first: dict[str, Any], tmp_path: Path, tiny_models: Path
) -> None:
    changes: dict[str, Any] = {"speech": {"warmup_frames": warmup}, "video": None, "images": IMAGES}
    run_talk(tmp_path, tiny_models, 1.23, first={"motion": motion, **first}, **changes)
    assert numbers_shown(saved_frames(tmp_path)) == list(range(1, 21))


@pytest.mark.slow
@pytest.mark.usefixtures("stamping_models")
@pytest.mark.parametrize("prefix", ["reference", "first"])
def test_without_warm_up_the_first_frame_is_in_time(prefix: str, tmp_path: Path, tiny_models: Path) -> None:
    changes: dict[str, Any] = {"speech": {"warmup_frames": 0}, "video": None, "images": IMAGES}
    run_talk(tmp_path, tiny_models, 1.23, frames={"prefix": prefix}, **changes)
    assert numbers_shown(saved_frames(tmp_path)) == list(range(1, 21))


@pytest.mark.usefixtures("stamping_models")
def test_one_frame_more_or_less_dropped_is_seen(tmp_path: Path, tiny_models: Path) -> None:
    """The test itself can fail: auto drops four frames here, five put the picture one frame ahead of the sound."""
    run_talk(tmp_path, tiny_models, 1.23, frames={"drop_frames": 5}, video=None, images=IMAGES)
    assert numbers_shown(saved_frames(tmp_path))[:3] == [2, 3, 4]
