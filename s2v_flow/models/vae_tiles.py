"""The VAE in spatial tiles, where the whole picture's activations do not fit: near to the whole, not equal to it.

Tiles overlap and are blended linearly. They differ from the whole because the VAE's attention sees one tile instead of
the picture, and because borders are padded with zeros. Every tile has its own state, so that decoding stays a stream.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from s2v_flow.models.vae import SPATIAL_STRIDE, StreamState, WanVAE

OVERLAP = 8  # latent rows and columns that neighbours share at least: 64 pixels
MOST_TILES = 8  # a side
SMALLEST_TILE = 16  # latent rows or columns; smaller ones save little and see little


@dataclass(frozen=True)
class Axis:
    """How latent rows or columns are cut: tiles of one size, each from its start, the last one to the end."""

    length: int
    size: int
    starts: tuple[int, ...]

    @classmethod
    def cut(cls, length: int, tiles: int) -> Axis:
        """Cut `length` rows or columns into `tiles` (fewer where they would be equal) as evenly as can be."""
        size = min(-(-(length + (tiles - 1) * OVERLAP) // tiles), length)
        starts = {round(index * (length - size) / max(tiles - 1, 1)) for index in range(tiles)}
        return cls(length, size, tuple(sorted(starts)))

    def shares(self) -> list[tuple[int, int, int]]:
        """Return, per tile, its start and what it alone stands for: from the middle of one overlap to the next's."""
        borders = [(left + self.size + right) // 2 for left, right in zip(self.starts, self.starts[1:], strict=False)]
        return list(zip(self.starts, [0, *borders], [*borders, self.length], strict=True))

    def weights(self, scale: int, device: torch.device) -> list[Tensor]:
        """Return each tile's weights, float32 [size * scale]: ramps over the overlaps; over all tiles they sum to 1."""
        position = torch.arange(self.size * scale, dtype=torch.float32) + 0.5
        total = torch.zeros(self.length * scale)
        ramps = []
        for index, start in enumerate(self.starts):
            ramp = torch.ones(self.size * scale)
            if index > 0:
                ramp = ramp.minimum(position / (scale * (self.starts[index - 1] + self.size - start)))
            if index + 1 < len(self.starts):
                overlap = scale * (start + self.size - self.starts[index + 1])
                ramp = ramp.minimum((self.size * scale - position) / overlap)
            total[start * scale : (start + self.size) * scale] += ramp
            ramps.append(ramp)
        return [
            (ramp / total[start * scale : (start + self.size) * scale]).to(device)
            for ramp, start in zip(ramps, self.starts, strict=True)
        ]


@dataclass(frozen=True)
class Grid:
    """The tiles of a picture, row by row."""

    rows: Axis
    columns: Axis

    @classmethod
    def cut(cls, height: int, width: int, tiles: int) -> Grid:
        """Cut a picture of latent rows and columns into `tiles` by `tiles`."""
        return cls(Axis.cut(height, tiles), Axis.cut(width, tiles))

    def part(self, x: Tensor, row: int, column: int, scale: int) -> Tensor:
        """Return a tile of x [..., H scale, W scale], as a view, by where it starts in the latent."""
        rows = slice(row * scale, (row + self.rows.size) * scale)
        return x[..., rows, column * scale : (column + self.columns.size) * scale]

    def starts(self) -> Iterator[tuple[int, int]]:
        """Yield where each tile starts: row and column."""
        yield from ((row, column) for row in self.rows.starts for column in self.columns.starts)

    def blend(self, parts: Iterator[Tensor], scale: int) -> Tensor:
        """Lay tiles [..., rows * scale, columns * scale] over one another, in float32; as they come, in their dtype."""
        joined: Tensor | None = None
        weights: list[Tensor] = []
        dtype = torch.float32
        for index, ((row, column), part) in enumerate(zip(self.starts(), parts, strict=True)):
            if joined is None:
                dtype = part.dtype
                size = (self.rows.length * scale, self.columns.length * scale)
                joined = torch.zeros(*part.shape[:-2], *size, device=part.device)
                down, across = (axis.weights(scale, part.device) for axis in (self.rows, self.columns))
                weights = [rows[:, None] * columns for rows in down for columns in across]  # [rows, columns] a tile
            self.part(joined, row, column, scale).add_(part.float() * weights[index])
        assert joined is not None
        return joined.to(dtype)


@dataclass(frozen=True)
class TiledState:
    """What a decoder in tiles remembers between calls: its tiles' states, row by row, offloaded to host memory."""

    grid: Grid
    tiles: tuple[StreamState, ...]

    @classmethod
    def of(cls, whole: StreamState, grid: Grid) -> TiledState:
        """Cut the state of a decoder of whole pictures."""
        layers = [(frames, frames.shape[-1] // grid.columns.length) for frames in moved(whole, "cpu").frames]
        tiles = [
            tuple(grid.part(frames, row, column, scale).contiguous() for frames, scale in layers)
            for row, column in grid.starts()
        ]
        return cls(grid, tuple(map(StreamState, tiles)))

    def whole(self) -> StreamState:
        """Return the state of a decoder of whole pictures: each tile's share side by side, not blended."""
        rows, columns = self.grid.rows.shares(), self.grid.columns.shares()
        layers = []
        for layer in zip(*(state.frames for state in self.tiles), strict=True):
            scale = layer[0].shape[-1] // self.grid.columns.size
            bands = []
            for index, (top, first, last) in enumerate(rows):
                band = [
                    frames[
                        ..., (first - top) * scale : (last - top) * scale, (begin - left) * scale : (end - left) * scale
                    ]
                    for frames, (left, begin, end) in zip(layer[index * len(columns) :], columns, strict=False)
                ]
                bands.append(torch.cat(band, dim=-1))
            layers.append(torch.cat(bands, dim=-2))
        return StreamState(tuple(layers))


def decode_next_tiled(
    vae: WanVAE, latent: Tensor, state: StreamState | TiledState | None, tiles: int
) -> tuple[Tensor, TiledState]:
    """Decode the next latent frames of a video in `tiles` by `tiles` tiles: see `WanVAE.decode_next`.

    `state`: what the call before returned, also with another number of tiles or none; None in the first call.

    Raises:
        ValueError: The shape is not as above, or is not that of the state.
    """
    grid = Grid.cut(latent.shape[-2], latent.shape[-1], tiles)
    if isinstance(state, TiledState) and state.grid != grid:
        state = state.whole()
    if isinstance(state, StreamState):
        state = TiledState.of(state, grid)
    kept: list[StreamState] = []

    def parts() -> Iterator[Tensor]:
        for index, (row, column) in enumerate(grid.starts()):
            past = None if state is None else moved(state.tiles[index], latent.device)
            pixels, after = vae.decode_next(grid.part(latent, row, column, 1), past)
            kept.append(moved(after, "cpu"))
            del past, after  # each as large as what the next tile brings
            yield pixels

    pixels = grid.blend(parts(), SPATIAL_STRIDE)
    return pixels, TiledState(grid, tuple(kept))


def encode_tiled(vae: WanVAE, pixels: Tensor, tiles: int) -> Tensor:
    """Encode a whole clip, [B, 3, T, 8H, 8W] in [-1, 1], T = 4k + 1, in `tiles` by `tiles` tiles: see `WanVAE.encode`.

    Returns the raw latent mean [B, 16, k + 1, H, W], in the weights' dtype.

    Raises:
        ValueError: The shape is not as above.
    """
    grid = Grid.cut(pixels.shape[-2] // SPATIAL_STRIDE, pixels.shape[-1] // SPATIAL_STRIDE, tiles)
    parts = (vae.encode(grid.part(pixels, row, column, SPATIAL_STRIDE)) for row, column in grid.starts())
    return grid.blend(parts, 1)


def most_tiles(height: int, width: int) -> int:
    """Return into how many tiles a side, up to 8, a picture of latent rows and columns can be cut, none under 16."""
    tiles = 1
    while tiles < MOST_TILES and min(Axis.cut(side, tiles + 1).size for side in (height, width)) >= SMALLEST_TILE:
        tiles += 1
    return tiles


def moved(state: StreamState, device: torch.device | str) -> StreamState:
    """Return a state on another device."""
    return StreamState(tuple(frames.to(device) for frames in state.frames))
