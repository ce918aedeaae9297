"""Frames as a value: made or read when somebody iterates, a few at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Frames:
    """A video's frames. Iterating makes them anew, in groups: uint8 arrays [n, 8H, 8W, 3].

    `read(start, count)` gives some of them, fewer at the end.
    """

    width: int
    height: int
    num_frames: int
    groups: Callable[[], Iterator[np.ndarray]]
    read: Callable[[int, int], np.ndarray]

    def __iter__(self) -> Iterator[np.ndarray]:
        return self.groups()


def window(groups: Iterator[np.ndarray], start: int, count: int) -> Iterator[np.ndarray]:
    """Pass through the frames from `start` on, `count` of them, keeping the grouping."""
    position = 0
    for group in groups:
        first, last = max(start - position, 0), min(start + count - position, len(group))
        position += len(group)
        if first < last:
            yield group[first:last]
        if position >= start + count:
            return
