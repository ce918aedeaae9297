"""The VAE against the reference's numbers, and what streaming promises."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from reference import fill_module, load_golden, load_keys, relative_error
from torch import Tensor

from s2v_flow.errors import CheckpointError
from s2v_flow.models.vae import StreamState, VAEConfig, WanVAE, normalise


def make_vae(width: int) -> WanVAE:
    with torch.device("meta"):
        vae = WanVAE(VAEConfig(width))
    fill_module(vae)
    return vae


@pytest.fixture(scope="module")
def tiny() -> WanVAE:
    return make_vae(16)


@pytest.fixture(scope="module")
def full() -> WanVAE:
    return make_vae(96)


def groupings(total: int) -> Iterator[tuple[int, ...]]:
    """Yield every way to write `total` as an ordered sum."""
    if total == 0:
        yield ()
    for first in range(1, total + 1):
        for rest in groupings(total - first):
            yield (first, *rest)


def decode_in_groups(vae: WanVAE, latent: Tensor, sizes: tuple[int, ...]) -> Tensor:
    state: StreamState | None = None
    parts = []
    for group in latent.split(list(sizes), dim=2):
        pixels, state = vae.decode_next(group, state)
        parts.append(pixels)
    return torch.cat(parts, dim=2)


def test_keys_and_shapes_equal_the_released_checkpoint() -> None:
    expected = load_keys("wan21_vae")
    with torch.device("meta"):
        vae = WanVAE(VAEConfig.from_shapes(expected))
    assert {key: tuple(value.shape) for key, value in vae.state_dict().items()} == expected
    assert len(expected) == 194


def test_the_tiny_width_scales_every_shape() -> None:
    scale = {96: 16, 192: 32, 384: 64, 768: 128, 1152: 192}
    expected = {key: tuple(scale.get(size, size) for size in shape) for key, shape in load_keys("wan21_vae").items()}
    config = VAEConfig.from_shapes(expected)
    with torch.device("meta"):
        vae = WanVAE(config)
    assert config.width == 16
    assert {key: tuple(value.shape) for key, value in vae.state_dict().items()} == expected


@pytest.mark.parametrize("shapes", [{}, {"decoder.head.0.gamma": (256, 1, 1, 1), "conv2.weight": (48, 48, 1, 1, 1)}])
def test_another_familys_file_is_refused(shapes: dict[str, tuple[int, ...]]) -> None:
    with pytest.raises(CheckpointError, match="not a Wan"):
        VAEConfig.from_shapes(shapes)


@pytest.mark.parametrize("case", ["vae_tiny_encode_1f", "vae_tiny_encode_9f", "vae_tiny_encode_17f"])
def test_tiny_encoding_equals_the_reference(tiny: WanVAE, case: str) -> None:
    check_encoding(tiny, case)


@pytest.mark.parametrize("case", ["vae_tiny_decode_1t", "vae_tiny_decode_3t", "vae_tiny_decode_6t"])
def test_tiny_decoding_equals_the_reference(tiny: WanVAE, case: str) -> None:
    check_decoding(tiny, case)


@pytest.mark.parametrize("case", ["vae_full_encode_1f", pytest.param("vae_full_encode_9f", marks=pytest.mark.slow)])
def test_full_width_encoding_equals_the_reference(full: WanVAE, case: str) -> None:
    check_encoding(full, case)


@pytest.mark.parametrize("case", ["vae_full_decode_1t", "vae_full_decode_3t"])
def test_full_width_decoding_equals_the_reference(full: WanVAE, case: str) -> None:
    check_decoding(full, case)


def check_encoding(vae: WanVAE, case: str) -> None:
    inputs, expected, _ = load_golden(f"components/{case}")
    latent = vae.encode(inputs["pixels"])
    assert relative_error(latent, expected["latent"]) <= 1e-5
    assert relative_error(normalise(latent), expected["model_latent"]) <= 1e-5


def check_decoding(vae: WanVAE, case: str) -> None:
    inputs, expected, _ = load_golden(f"components/{case}")
    assert relative_error(vae.decode(inputs["latent"]), expected["pixels"]) <= 1e-5


@pytest.mark.slow
def test_decoding_does_not_depend_on_how_latent_frames_are_grouped() -> None:
    """All 32 groupings of six frames equal the whole to 1e-12 relative in float64 (3e-15 is reached)."""
    vae = make_vae(16).double()
    latent = torch.randn(1, 16, 6, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole = vae.decode(latent)
    errors = [relative_error(decode_in_groups(vae, latent, sizes), whole) for sizes in groupings(6)]
    assert len(errors) == 32
    assert max(errors) <= 1e-12


@pytest.mark.parametrize("sizes", [(1, 5), (5, 1), (2, 3, 1), (1, 1, 1, 1, 1, 1)])
def test_streamed_float32_decoding_equals_the_reference_as_the_whole_does(tiny: WanVAE, sizes: tuple[int, ...]) -> None:
    """In float32 groupings differ by rounding (1.1e-6 here): torch picks its convolution kernels by size."""
    inputs, expected, _ = load_golden("components/vae_tiny_decode_6t")
    assert relative_error(decode_in_groups(tiny, inputs["latent"], sizes), expected["pixels"]) <= 1e-5


def test_encoding_does_not_depend_on_how_frames_are_grouped() -> None:
    """Any first call of 4f + 1 and later calls of 4f frames equal `encode` to 1e-12 relative in float64."""
    vae = make_vae(16).double()
    pixels = torch.rand(1, 3, 17, 8, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1
    whole = vae.encode(pixels)
    for sizes in ([17], [5, 12], [1, 16], [9, 4, 4], [1, 8, 8]):
        state: StreamState | None = None
        parts = []
        for group in pixels.split(sizes, dim=2):
            latent, state = vae.encode_next(group, state)
            parts.append(latent)
        assert relative_error(torch.cat(parts, dim=2), whole) <= 1e-12


def test_a_state_is_not_changed_by_the_call_it_is_given_to(tiny: WanVAE) -> None:
    """So a decoding can be forked: the same state gives the same bits twice."""
    latent = load_golden("components/vae_tiny_decode_6t")[0]["latent"]
    _, state = tiny.decode_next(latent[:, :, :2], None)
    before = [frames.clone() for frames in state.frames]
    once, _ = tiny.decode_next(latent[:, :, 2:4], state)
    twice, _ = tiny.decode_next(latent[:, :, 2:4], state)
    assert torch.equal(once, twice)
    assert all(torch.equal(old, new) for old, new in zip(before, state.frames, strict=True))
    with pytest.raises(dataclasses.FrozenInstanceError):
        state.frames = ()  # type: ignore[misc]


def test_the_state_holds_the_causal_frames_and_no_more_however_many_frames_went_in(tiny: WanVAE) -> None:
    latent = torch.zeros(1, 16, 5, 2, 2)
    _, after_one = tiny.decode_next(latent[:, :, :1], None)
    _, after_five = tiny.decode_next(latent, None)
    for first, later in zip(after_one.frames, after_five.frames, strict=True):
        assert first.shape == later.shape
        assert first.shape[2] == 2
        assert later.untyped_storage().nbytes() == later.numel() * later.element_size()
    assert sum(1 for _ in after_one.frames) == 1 + 2 * 14 + 2 + 1  # first, blocks, frame doublings, head


def test_a_batch_decodes_as_its_members_do() -> None:
    vae = make_vae(16).double()
    latent = torch.randn(2, 16, 2, 1, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    apart = torch.cat([vae.decode(latent[:1]), vae.decode(latent[1:])])
    assert relative_error(vae.decode(latent), apart) <= 1e-12


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 4e-2), (torch.float16, 5e-3)])
def test_16_bit_weights_come_near_float32(tiny: WanVAE, dtype: torch.dtype, tolerance: float) -> None:
    """The bounds are ten units of the format's precision (bf16 2^-8, fp16 2^-11), over some thirty layers."""
    vae = make_vae(16).to(dtype)
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(1, 16, 2, 1, 2, generator=generator)
    pixels = vae.decode(latent)
    assert pixels.dtype == dtype
    assert relative_error(pixels, tiny.decode(latent)) <= tolerance
    clip = torch.rand(1, 3, 5, 8, 16, generator=generator) * 2 - 1
    assert vae.encode(clip).dtype == dtype
    assert relative_error(vae.encode(clip), tiny.encode(clip)) <= tolerance


def test_norms_do_not_overflow_in_half_precision(tiny: WanVAE) -> None:
    """The lengths of these activations, and all the more their squares, pass float16's largest number, 65504."""
    norm = tiny.decoder.head["0"]
    x = torch.full((1, 16, 1, 1, 1), 30000.0, dtype=torch.float16)
    assert torch.allclose(norm(x).flatten().float(), norm.gamma.flatten(), rtol=2e-3)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3, 1, 8, 8), "pixels are"),
        ((1, 4, 1, 8, 8), "pixels are"),
        ((1, 3, 1, 12, 8), "multiples of 8"),
        ((1, 3, 4, 8, 8), r"starts with 4k \+ 1 frames, got 4"),
        ((1, 3, 0, 8, 8), r"starts with 4k \+ 1 frames, got 0"),
    ],
)
def test_clips_of_an_impossible_size_are_refused(tiny: WanVAE, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny.encode(torch.zeros(shape))


def test_later_pixels_come_in_multiples_of_four_frames(tiny: WanVAE) -> None:
    _, state = tiny.encode_next(torch.zeros(1, 3, 1, 8, 8), None)
    with pytest.raises(ValueError, match="multiples of 4 frames, got 3"):
        tiny.encode_next(torch.zeros(1, 3, 3, 8, 8), state)


def test_latents_of_an_impossible_size_and_another_videos_state_are_refused(tiny: WanVAE) -> None:
    with pytest.raises(ValueError, match="a latent is"):
        tiny.decode(torch.zeros(1, 48, 1, 2, 2))
    with pytest.raises(ValueError, match="F >= 1"):
        tiny.decode(torch.zeros(1, 16, 0, 2, 2))
    _, state = tiny.decode_next(torch.zeros(1, 16, 1, 2, 2), None)
    with pytest.raises(ValueError, match="the state is of a stream"):
        tiny.decode_next(torch.zeros(1, 16, 1, 2, 3), state)
