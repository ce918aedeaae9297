"""Rotary position embedding over three axes: time, rows and columns of the token grid.

Angles are computed in float64 on the host, once per chunk, and applied in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

HEAD_WIDTH = 128
AXIS_WIDTHS = (44, 42, 42)  # how the head's 128 channels are split over time, rows and columns
THETA = 10000.0

Positions = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Grid:
    """Where the tokens of one segment sit, by axis; tokens run over columns first, then rows, then time."""

    time: Positions
    rows: Positions
    columns: Positions

    @property
    def num_tokens(self) -> int:
        """How many tokens the segment has."""
        return len(self.time) * len(self.rows) * len(self.columns)

    @staticmethod
    def dense(num_frames: int, num_rows: int, num_columns: int, *, start_time: int = 0) -> Grid:
        """Place one token on every integer position, the first frame at `start_time`."""
        time, rows, columns = (np.arange(count, dtype=np.float64) for count in (num_frames, num_rows, num_columns))
        return Grid(time + start_time, rows, columns)


def rotation_table(grids: Sequence[Grid], device: torch.device | str = "cpu") -> Tensor:
    """Compute the rotations of a sequence of segments.

    Args:
        grids: The segments, in the order of their tokens.
        device: Where the table is put.

    Returns:
        Unit complex numbers, complex64 [L, 1, K / 2], to be broadcast over heads.

    Source: J. Su et al., 2021, section 3.4; Wan2.2, wan/modules/model.py, rope_params.
    """
    angles = np.concatenate([_angles(grid) for grid in grids])  # [L, K/2]
    rotations = (np.cos(angles) + 1j * np.sin(angles)).astype(np.complex64)
    return torch.from_numpy(rotations).unsqueeze(1).to(device)  # [L, 1, K/2]


def rotate_(x: Tensor, rotations: Tensor) -> Tensor:
    """Rotate each pair of neighbouring channels (0 and 1, 2 and 3, ...) in place.

    Args:
        x: Queries or keys, float32 [B, L, N, K], contiguous; overwritten.
        rotations: complex64 [L, 1, K / 2], from `rotation_table`.

    Returns:
        x.
    """
    torch.view_as_complex(x.view(*x.shape[:-1], -1, 2)).mul_(rotations)
    return x


def _angles(grid: Grid) -> Positions:
    shape = (len(grid.time), len(grid.rows), len(grid.columns))
    parts = []
    for axis, (positions, width) in enumerate(zip((grid.time, grid.rows, grid.columns), AXIS_WIDTHS, strict=True)):
        frequencies = THETA ** (-np.arange(0, width, 2, dtype=np.float64) / width)
        angles = np.expand_dims(np.outer(positions, frequencies), [other for other in range(3) if other != axis])
        parts.append(np.broadcast_to(angles, (*shape, width // 2)))
    return np.concatenate(parts, axis=-1).reshape(-1, HEAD_WIDTH // 2)
