"""The VAE in tiles: equal to the whole where tiles see what it sees, and a stream all the same."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import fill_module, load_golden, relative_error
from torch import Tensor

from s2v_flow.models.vae import StreamState, VAEConfig, WanVAE
from s2v_flow.models.vae_tiles import (
    MOST_TILES,
    OVERLAP,
    SMALLEST_TILE,
    Axis,
    Grid,
    TiledState,
    decode_next_tiled,
    encode_tiled,
    most_tiles,
)


@pytest.fixture(scope="module")
def vae() -> WanVAE:
    return fill_module(WanVAE(VAEConfig(4)))


@pytest.fixture(scope="module")
def blind() -> WanVAE:
    """Return a VAE whose attention adds nothing: what a pixel depends on lies around it."""
    vae = fill_module(WanVAE(VAEConfig(4))).double()
    for middle in (vae.decoder.middle, vae.encoder.middle):
        torch.nn.init.zeros_(middle[1].proj.weight)  # type: ignore[union-attr]
    return vae


REACH = 18


def noise(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2), dtype=dtype)


@settings(deadline=None)
@given(st.integers(4, 300), st.integers(1, 8))
def test_tiles_cover_every_row_with_weights_that_sum_to_one(length: int, tiles: int) -> None:
    """Each tile has the same size, the last one ends with the picture, neighbours share at least the overlap."""
    axis = Axis.cut(length, tiles)
    assert axis.starts[0] == 0
    assert axis.starts[-1] + axis.size == length
    assert len(axis.starts) <= tiles
    if axis.size > OVERLAP + 1:
        assert all(left + axis.size - right >= min(OVERLAP, axis.size) - 1 for left, right in pairs(axis.starts))
    for scale in (1, 8):
        total = torch.zeros(length * scale)
        for start, weights in zip(axis.starts, axis.weights(scale, torch.device("cpu")), strict=True):
            assert float(weights.min()) > 0
            total[start * scale : (start + axis.size) * scale] += weights
        assert torch.allclose(total, torch.ones_like(total), atol=1e-6)
    shares = [(begin, end) for _, begin, end in axis.shares()]
    assert [begin for begin, _ in shares] == [0, *(end for _, end in shares[:-1])]
    assert all(start <= begin < end <= start + axis.size for start, begin, end in axis.shares())


def pairs(values: tuple[int, ...]) -> list[tuple[int, int]]:
    return list(pairwise(values))


def test_a_picture_is_cut_until_a_tile_would_have_less_than_16_rows() -> None:
    assert most_tiles(80, 80) == MOST_TILES
    assert Axis.cut(80, 8).size == 17
    assert most_tiles(60, 104) == 7
    assert most_tiles(20, 80) == 1
    for side in (24, 40, 60):
        assert (
            Axis.cut(side, most_tiles(side, side)).size
            >= SMALLEST_TILE
            > Axis.cut(side, most_tiles(side, side) + 1).size
        )


def test_one_tile_is_the_whole(vae: WanVAE) -> None:
    latent, pixels = noise(1, 16, 2, 6, 9), noise(1, 3, 5, 48, 72).clamp(-1, 1)
    assert torch.equal(decode_next_tiled(vae, latent, None, 1)[0], vae.decode(latent))
    assert torch.equal(encode_tiled(vae, pixels, 1), vae.encode(pixels))


def test_away_from_the_seams_tiles_equal_the_whole(blind: WanVAE) -> None:
    """But for attention, which sees its tile only: a pixel depends on what is within 17.25 latent pixels of it."""
    latent = noise(1, 16, 1, 4, 64, dtype=torch.float64)
    grid = Grid.cut(4, 64, 2)
    found, whole = decode_next_tiled(blind, latent, None, 2)[0], blind.decode(latent)
    left_end, right_start = grid.columns.size, grid.columns.starts[1]
    same = (found - whole).abs().amax(dim=(0, 1, 2, 3)) < 1e-5
    assert bool(same[: 8 * (left_end - REACH)].all())
    assert bool(same[8 * (right_start + REACH) :].all())
    assert not bool(same.all())


@pytest.mark.slow
def test_decoding_in_tiles_is_a_stream(vae: WanVAE) -> None:
    """Any grouping of frames gives the whole clip's frames, to rounding; a change of tiles midway loses no frame."""
    latent = noise(1, 16, 4, 10, 16)
    whole, _ = decode_next_tiled(vae, latent, None, 2)
    state: TiledState | StreamState | None = None
    parts = []
    for part in latent.split([1, 1, 2], dim=2):
        pixels, state = decode_next_tiled(vae, part, state, 2)
        parts.append(pixels)
    assert relative_error(torch.cat(parts, 2), whole) <= 1e-5
    shapes = []
    state = vae.decode_next(latent[:, :, :2], None)[1]
    for tiles in (2, 3, 1):
        pixels, state = decode_next_tiled(vae, latent[:, :, 2:3], state, tiles)
        shapes.append(tuple(pixels.shape))
    assert shapes == [(1, 3, 4, 80, 128)] * 3


def test_a_state_that_is_cut_and_joined_is_the_same(vae: WanVAE) -> None:
    """So that the number of tiles can change in the middle of a video."""
    _, state = vae.decode_next(noise(1, 16, 2, 12, 20), None)
    for tiles in (1, 2, 3):
        cut = TiledState.of(state, Grid.cut(12, 20, tiles))
        assert all(map(torch.equal, cut.whole().frames, state.frames))


@pytest.mark.parametrize("case", ["vae_tiny_decode_3t"])
def test_a_state_of_another_video_is_refused(case: str, vae: WanVAE) -> None:
    _, state = decode_next_tiled(vae, noise(1, 16, 1, 12, 20), None, 2)
    latent = load_golden(f"components/{case}")[0]["latent"]
    with pytest.raises(ValueError, match="the state is of a stream"):
        decode_next_tiled(vae, latent, state.tiles[0], 1)
