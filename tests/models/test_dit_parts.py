"""What the DiT is made of: positions, packed motion, audio tokens, modulation, layers that stay in float32."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reference import fill_module, relative_error
from torch import nn

from s2v_flow.demo.plan import uniform
from s2v_flow.models.attention import Grid, attention, rotate_, rotation_table
from s2v_flow.models.conditioning import MotionPacker, motion_grids
from s2v_flow.models.dit import comfyui_noisy_tokens, unpatchify
from s2v_flow.models.dit_block import (
    AudioInjector,
    CausalAudioEncoder,
    Gelu,
    add_gated_,
    modulated_norm,
    split_rows,
    timestep_embedding,
)
from s2v_flow.models.float32 import PatchEmbedding, RMSNorm, TimeConv
from s2v_flow.models.footprint import INJECTION_BLOCKS

Whose = Literal["official", "comfyui"]


def test_rotation_turns_neighbouring_channels_by_position_times_frequency() -> None:
    """Channels 2 and 3 belong to time's second frequency, 44 and 45 to rows' first, 86 and 87 to columns' first."""
    table = rotation_table([Grid(np.array([7.0]), np.array([3.0]), np.array([-2.0]))])
    x = rotate_(torch.eye(128)[[2, 44, 86]].reshape(1, 1, 3, 128), table)[0, 0]
    for row, channel, angle in ((0, 2, 7 * 10000 ** (-2 / 44)), (1, 44, 3.0), (2, 86, -2.0)):
        expected = torch.zeros(128)
        expected[channel], expected[channel + 1] = np.cos(angle), np.sin(angle)
        torch.testing.assert_close(x[row], expected, rtol=0, atol=1e-6)


def test_scores_depend_on_relative_positions_only() -> None:
    q, k = uniform(0, "q", (128,)), uniform(0, "k", (128,))
    scores = []
    for shift in (0, 13):
        table = rotation_table([Grid.dense(2, 1, 1, start_time=shift)])
        x = rotate_(torch.stack([q, k]).reshape(1, 2, 1, 128), table)
        scores.append(float(x[0, 0, 0] @ x[0, 1, 0]))
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)


def test_tokens_run_over_columns_then_rows_then_time() -> None:
    table = torch.view_as_complex(rotation_table([Grid.dense(2, 3, 5)]))[:, 0]
    time, rows, columns = table[:, 0].angle(), table[:, 22].angle(), table[:, 43].angle()
    assert time.round().tolist() == [0] * 15 + [1] * 15
    assert rows.round().tolist() == [0] * 5 + [1] * 5 + [2] * 5 + [0] * 5 + [1] * 5 + [2] * 5
    assert columns[:3].round().tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("conditioning", "oldest", "rows"),
    [
        ("comfyui", [-19, -18, -17, -16], [0, 19 / 4, 19 / 2, 57 / 4, 19]),
        ("official", [-19, -14, -9, -4], [0, 4, 9, 14, 19]),
    ],
)
def test_motion_sits_where_the_model_was_trained_or_where_comfyui_puts_it(
    conditioning: Whose, oldest: list[int], rows: list[float]
) -> None:
    newest_grid, older_grid, oldest_grid = motion_grids(40, 40, conditioning)
    assert newest_grid.time.tolist() == [-1]
    assert older_grid.time.tolist() == [-3]
    assert oldest_grid.time.tolist() == oldest
    assert newest_grid.rows.tolist() == list(range(20))
    assert oldest_grid.rows.tolist() == pytest.approx(rows)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (10, 14), (12, 16), (22, 18)])
def test_there_is_one_position_per_motion_token(height: int, width: int) -> None:
    tokens = fill_module(MotionPacker(16, 8))(torch.zeros(1, 16, 19, height, width))
    assert tokens.shape[1] == sum(grid.num_tokens for grid in motion_grids(height, width, "official"))


def test_motion_is_the_last_19_frames_with_zeros_in_front() -> None:
    packer = fill_module(MotionPacker(16, 8))
    video = uniform(0, "video", (1, 16, 30, 8, 8))
    assert torch.equal(packer(video), packer(video[:, :, 11:]))
    short = torch.cat([torch.zeros(1, 16, 14, 8, 8), video[:, :, :5]], dim=2)
    assert torch.equal(packer(video[:, :, :5]), packer(short))


@pytest.mark.parametrize(("conditioning", "ahead"), [("official", 3), ("comfyui", 0)])
def test_a_latent_frame_hears_no_further_than_its_alignment(conditioning: Whose, ahead: int) -> None:
    """Latent frame t depends on audio frame 4t + `ahead`, and on none later."""
    encoder = fill_module(CausalAudioEncoder(8, 16))
    audio = uniform(0, "audio", (1, 25, 8, 16))
    plain = encoder(audio, conditioning, torch.float32)
    for frame in range(1, 16):
        changed = audio.clone()
        changed[..., frame] += 1
        first = max(0, -(-(frame - ahead) // 4))
        for tokens, reference in zip(encoder(changed, conditioning, torch.float32), plain, strict=True):
            differs = (tokens != reference).flatten(2).any(-1)[0].tolist()
            assert differs[:first] == [False] * first
            assert differs[first : first + 1] == [True] * (first < 4)


def test_injectors_past_the_last_block_are_not_prepared() -> None:
    injector = fill_module(AudioInjector(128))
    tokens = uniform(0, "tokens", (1, 2, 5, 128))
    assert tuple(injector.prepare(tokens[:, :, 0], tokens, num_blocks=40)) == INJECTION_BLOCKS
    assert tuple(injector.prepare(tokens[:, :, 0], tokens, num_blocks=10)) == (0, 4, 8)


def test_a_latent_frame_attends_to_its_own_audio_only() -> None:
    injector = fill_module(AudioInjector(128))
    video, tokens = uniform(0, "video", (1, 6, 128)), uniform(0, "tokens", (1, 3, 5, 128))
    changed = tokens.clone()
    changed[:, 1] += 1
    plain, other = (
        injector(video, injector.prepare(audio[:, :, 0], audio, num_blocks=1)[0], 0, torch.float32)
        for audio in (tokens, changed)
    )
    assert (plain != other).any(-1)[0].tolist() == [False, False, True, True, False, False]


@pytest.mark.parametrize(
    ("num_latent_frames", "height", "width"),
    [(1, 8, 8), (5, 80, 80), (20, 80, 80), (21, 64, 64), (20, 88, 128), (20, 60, 104), (20, 90, 160)],
)
def test_comfyui_sets_the_border_right_at_usual_sizes(num_latent_frames: int, height: int, width: int) -> None:
    """Latent sizes: where 8 divides both for any length, and 480 x 832 and 720 x 1280 pixels at 20 frames."""
    frame = height * width // 4
    motion = sum(grid.num_tokens for grid in motion_grids(height, width, "comfyui"))
    num_tokens = (num_latent_frames + 1) * frame + motion
    assert comfyui_noisy_tokens(num_latent_frames, 1, num_tokens) == num_latent_frames * frame


def test_modulation_gives_the_timestep_to_noisy_tokens_and_zero_to_the_others() -> None:
    shift, scale = split_rows(uniform(0, "rows", (3, 2, 8)), num_noisy=2)  # two samples and time 0
    x = uniform(0, "x", (2, 5, 8))
    rows, normed = uniform(0, "rows", (3, 2, 8)), F.layer_norm(x, (8,), eps=1e-6)
    expected = torch.stack(
        [
            torch.stack([normed[b, i] * (1 + rows[r, 1]) + rows[r, 0] for i, r in enumerate([b, b, 2, 2, 2])])
            for b in range(2)
        ]
    )
    torch.testing.assert_close(modulated_norm(x, shift, scale, torch.float32), expected, rtol=1e-6, atol=1e-6)
    assert modulated_norm(x, shift, scale, torch.bfloat16).dtype == torch.bfloat16
    gated = add_gated_(x.clone(), torch.ones_like(x), scale)
    assert torch.equal(gated[1, 1], x[1, 1] + rows[1, 1])
    assert torch.equal(gated[1, 2], x[1, 2] + rows[2, 1])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-7), (torch.bfloat16, 2e-3)])
def test_gelu_overwrites_its_input_and_is_as_exact_as_torchs(dtype: torch.dtype, tolerance: float) -> None:
    """In 16 bits the rounding of the result is all of the error; far from 0 it saturates."""
    x = torch.cat([uniform(0, "x", (2, 70, 24)) * 4, torch.tensor([-100.0, 100.0]).expand(2, 70, 2)], dim=2).to(dtype)
    expected = F.gelu(x.double(), approximate="tanh")
    theirs = relative_error(F.gelu(x, approximate="tanh"), expected)
    ours = Gelu()(x)
    assert ours is x
    assert relative_error(ours, expected) <= min(tolerance, 2 * theirs)


@pytest.mark.parametrize(("conditioning", "tolerance"), [("official", 1e-7), ("comfyui", 2e-4)])
def test_timesteps_become_cosines_then_sines(conditioning: Whose, tolerance: float) -> None:
    """ComfyUI's angles are float32, hence its tolerance: an angle of 1000 has a spacing of 6e-5."""
    angles = np.outer([0.0, 999.0], 10000.0 ** (-np.arange(128) / 128))
    expected = torch.from_numpy(np.concatenate([np.cos(angles), np.sin(angles)], axis=1)).float()
    embedding = timestep_embedding(torch.tensor([0.0, 999.0]), conditioning)
    torch.testing.assert_close(embedding, expected, rtol=0, atol=tolerance)


def test_patch_embedding_equals_a_strided_convolution() -> None:
    """Odd sizes lose what is left after the last whole patch."""
    layer = fill_module(PatchEmbedding(4, 8, (2, 4, 4)))
    x = uniform(0, "x", (2, 4, 4, 10, 13))
    expected = nn.functional.conv3d(x, layer.weight, layer.bias, stride=(2, 4, 4)).flatten(2).transpose(1, 2)
    assert relative_error(layer(x), expected) <= 1e-6


def test_time_convolution_equals_a_strided_convolution() -> None:
    layer = fill_module(TimeConv(4, 8, kernel_size=3, stride=2))
    x = uniform(0, "x", (2, 11, 4))
    expected = nn.functional.conv1d(x.transpose(1, 2), layer.weight, layer.bias, stride=2).transpose(1, 2)
    assert relative_error(layer(x), expected) <= 1e-6


def test_rms_norm_has_unit_mean_square_before_the_gain() -> None:
    layer = RMSNorm(64)
    x = uniform(0, "x", (3, 64)).to(torch.bfloat16) * 100
    assert layer(x).dtype == torch.float32
    torch.testing.assert_close(layer(x).square().mean(-1), torch.ones(3))


def test_attention_is_a_softmax_over_scaled_scores() -> None:
    q, k, v = (uniform(0, name, (1, 2, 6, 128)) for name in "qkv")
    weights = (q @ k.transpose(2, 3) / 128**0.5).softmax(-1)
    expected = (weights @ v).transpose(1, 2).reshape(1, 6, 256)
    assert relative_error(attention(q, k, v), expected) <= 1e-6


def test_unpatchify_puts_every_value_in_its_place() -> None:
    """Within a patch the channel runs fastest, then the column, then the row."""
    latent = unpatchify(torch.arange(12 * 64).reshape(1, 12, 64), (1, 16, 2, 4, 6))
    for channel, frame, row, column in ((0, 0, 0, 0), (5, 1, 3, 2), (15, 0, 2, 5)):
        token = (frame * 2 + row // 2) * 3 + column // 2
        assert latent[0, channel, frame, row, column] == token * 64 + (row % 2 * 2 + column % 2) * 16 + channel
