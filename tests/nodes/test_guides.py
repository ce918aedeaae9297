"""What else steers a chunk: a pose video, a clip to continue, the portrait as the first frame."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from recipes_for_tests import SIDE, options, tiny, write_clip, write_recipe, write_voice
from safetensors.torch import load, load_file
from torch import Tensor

from s2v_flow import api
from s2v_flow.models.vae import denormalise
from s2v_flow.nodes.chunk import EncodeControl, EncodeMotion
from s2v_flow.nodes.frames import Frames

GREY_LEVELS = 8  # a stamped frame i is grey level 8 i


class CountingVae:
    """Stands in for a VAE: keeps which stamped frames it was given (black is -1) and encodes them to ones."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def get(self) -> CountingVae:
        return self

    def encode(self, pixels: Tensor) -> Tensor:
        levels = (pixels[0, 0, :, 0, 0] + 1) / 2 * 255
        self.seen = [round(float(level)) // GREY_LEVELS - 1 for level in levels]
        return torch.ones(1, 16, (pixels.shape[2] - 1) // 4 + 1, SIDE // 8, SIDE // 8)


def stamped_frames(count: int) -> Frames:
    """Return frames of which frame i is grey level 8 (i + 1)."""
    levels = GREY_LEVELS * np.arange(1, count + 1, dtype=np.uint8)
    video = np.broadcast_to(levels[:, None, None, None], (count, SIDE, SIDE, 3))
    return Frames(SIDE, SIDE, count, lambda: iter([video]), lambda start, number: video[start : start + number])


def control(conditioning: str, *, offset: int, warmup: int, frames: int, count: int = 2) -> tuple[list[int], Tensor]:
    """Encode a chunk's poses; return which frames the VAE saw, and the latent."""
    node = EncodeControl.model_validate(
        {
            "width": SIDE,
            "height": SIDE,
            "offset": offset,
            "warmup_frames": warmup,
            "num_latent_frames": count,
            "conditioning": conditioning,
        }
    )
    vae = CountingVae()
    context: Any = SimpleNamespace(device="cpu")
    packed = node.run(context, {"vae": vae, "control_video": stamped_frames(frames)})["control"]
    return vae.seen, load(packed)["samples"]


@pytest.mark.parametrize(
    ("offset", "warmup", "frames", "seen"),
    [
        (0, 0, 20, [0, 0, 1, 2, 3, 4, 5, 6, 7]),
        (8, 0, 20, [8, 8, 9, 10, 11, 12, 13, 14, 15]),
        (0, 3, 20, [0, 0, 0, 0, 0, 1, 2, 3, 4]),
        (8, 3, 20, [5, 5, 6, 7, 8, 9, 10, 11, 12]),
        (0, 30, 20, [0] * 9),
        (16, 0, 20, [16, 16, 17, 18, 19, -1, -1, -1, -1]),
        (40, 0, 20, [-1] * 9),
    ],
)
def test_poses_stand_at_the_time_of_their_frames_and_past_the_end_it_is_black(
    offset: int, warmup: int, frames: int, seen: list[int]
) -> None:
    """The first frame is doubled and its latent dropped; during the warm-up the first frame stands."""
    found, latent = control("official", offset=offset, warmup=warmup, frames=frames)
    assert found == seen
    assert latent.shape == (1, 16, 2, SIDE // 8, SIDE // 8)


@pytest.mark.parametrize(
    ("offset", "warmup", "frames", "seen", "num_encoded"),
    [
        (0, 0, 20, [0, 1, 2, 3, 4], 2),
        (0, 30, 20, [0] * 5, 2),
        (16, 0, 20, [16], 1),
        (40, 0, 20, [], 0),
    ],
)
def test_as_in_comfyui_latents_past_the_clips_end_are_those_of_zero(
    offset: int, warmup: int, frames: int, seen: list[int], num_encoded: int
) -> None:
    found, latent = control("comfyui", offset=offset, warmup=warmup, frames=frames)
    assert found == seen
    assert bool((latent[:, :, :num_encoded] == 1).all())
    assert torch.equal(latent[:, :, num_encoded:], denormalise(torch.zeros(1, 16, 2, 8, 8))[:, :, num_encoded:])


@pytest.mark.parametrize(("frames", "seen"), [(5, [*[15] * 68, 0, 1, 2, 3, 4]), (73, None)])
def test_a_short_clip_to_continue_is_filled_up_with_grey_in_front(frames: int, seen: list[int] | None) -> None:
    """Mid-grey is level 127.5, which reads as stamp 15; of a longer clip the last 73 frames count."""
    node = EncodeMotion.model_validate({"width": SIDE, "height": SIDE, "conditioning": "official"})
    vae = CountingVae()
    context: Any = SimpleNamespace(device="cpu")
    if seen is None:
        long = stamped_frames(frames + 3)
        asked: list[tuple[int, int]] = []

        def read(start: int, count: int) -> np.ndarray:
            asked.append((start, count))
            return long.read(start, count)

        node.run(context, {"vae": vae, "motion_video": Frames(SIDE, SIDE, long.num_frames, long.groups, read)})
        assert asked == [(3, 73)]
    else:
        node.run(context, {"vae": vae, "motion_video": stamped_frames(frames)})
        assert vae.seen == seen


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a voice, a pose video and a clip, and a cache that all runs share."""
    path = tmp_path_factory.mktemp("guides")
    write_voice(path / "voice.wav", 0.3)
    write_clip(path / "clip.mp4", 12)
    return path


def sampled(folder: Path, models: Path, cache: str, first: Mapping[str, Any]) -> Tensor:
    """Sample one chunk and one more; return the joined latent."""
    changes = tiny(
        clip={"kind": "load_video", "file": "clip.mp4"},
        first=first,
        talk={"chunks": 1},
        frames=None,
        video=None,
        latent={"kind": "save_latent", "latent": "$talk", "file": "out.latent"},
    )
    (path,) = api.run(write_recipe(folder, changes), options(folder, models, folder / cache)).outputs["latent"]
    return load_file(path)["latent_tensor"]


@pytest.mark.slow
@pytest.mark.parametrize("conditioning", ["official", "comfyui"])
def test_a_pose_video_and_a_clip_to_continue_each_change_the_latent(
    conditioning: str, folder: Path, tiny_models: Path
) -> None:
    plain = sampled(folder, tiny_models, "cache", {"conditioning": conditioning})
    posed = sampled(folder, tiny_models, "cache", {"conditioning": conditioning, "control_video": "$clip"})
    moving = sampled(folder, tiny_models, "cache", {"conditioning": conditioning, "motion_video": "$clip"})
    assert plain.shape == posed.shape == moving.shape == (1, 16, 4, 8, 8)
    assert not torch.equal(plain[:, :, :2], posed[:, :, :2])
    assert not torch.equal(plain[:, :, 2:], posed[:, :, 2:])
    assert not torch.equal(plain[:, :, :2], moving[:, :, :2])
    assert not torch.equal(posed, moving)


@pytest.mark.slow
def test_guided_runs_are_deterministic(folder: Path, tiny_models: Path) -> None:
    guided = {"control_video": "$clip", "motion_video": "$clip"}
    again = [sampled(folder, tiny_models, cache, guided) for cache in ("cache", "another cache")]
    assert torch.equal(*again)


@pytest.mark.slow
@pytest.mark.parametrize("motion", ["latent", "pixels"])
def test_a_video_can_begin_with_the_portrait(motion: str, folder: Path, tiny_models: Path) -> None:
    without = sampled(folder, tiny_models, "cache", {})
    begun = sampled(folder, tiny_models, "cache", {"motion": motion, "init_first_frame": True})
    assert without.shape == begun.shape
    assert not torch.equal(without[:, :, :2], begun[:, :, :2])
    assert bool(begun.isfinite().all())
