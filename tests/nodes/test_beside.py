"""Writing in a thread while the next frames are made: the same bytes, bounded, and no end is lost."""

from __future__ import annotations

import os
import resource
import signal
import threading
import time
from collections.abc import Iterator
from itertools import repeat
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from s2v_flow.errors import S2VFlowError
from s2v_flow.media.writer import VideoWriter
from s2v_flow.nodes.frames import MAX_HANDED_OVER, beside

SIDE = 64
Group = NDArray[np.uint8]


def noise(count: int) -> Iterator[Group]:
    generator = np.random.default_rng(0)
    return (generator.integers(0, 256, (4, SIDE, SIDE, 3), dtype=np.uint8) for _ in range(count))


def film(path: Path, groups: Iterator[Group]) -> bytes:
    with VideoWriter(path, SIDE, SIDE, preset="veryfast") as writer:
        for group in groups:
            writer.write(group)
    return path.read_bytes()


def test_a_film_is_the_same_as_one_that_is_written_without_a_thread(tmp_path: Path) -> None:
    made = beside(noise(6), lambda groups: film(tmp_path / "a.mp4", groups))
    assert made == film(tmp_path / "b.mp4", noise(6))


def test_no_more_than_a_few_are_held(tmp_path: Path) -> None:
    """However slow the work is: one in work, two that wait, and the one that is being made."""
    made, done, held = [0], [0], [0]

    def items() -> Iterator[int]:
        for number in range(40):
            made[0] += 1
            yield number

    def work(given: Iterator[int]) -> list[int]:
        seen = []
        for number in given:
            while made[0] < min(number + MAX_HANDED_OVER + 1, 40):
                time.sleep(0.0001)
            held.append(made[0] - done[0])
            seen.append(number)
            done[0] += 1
        return seen

    assert beside(items(), work) == list(range(40))
    assert max(held) <= MAX_HANDED_OVER + 1


def test_a_failure_of_the_work_ends_the_making(tmp_path: Path) -> None:
    """Of frames without end: the error is the writer's own, and nothing half-written is left."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4_096, old[1]))
    try:
        with pytest.raises(S2VFlowError, match="cannot write"):
            beside(repeat(next(noise(1))), lambda groups: film(tmp_path / "a.mp4", groups))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == []


def test_a_failure_of_the_making_leaves_no_thread_and_no_file(tmp_path: Path) -> None:
    """It is told as it is; what was written so far goes away."""

    def frames() -> Iterator[Group]:
        yield from noise(3)
        raise ValueError("no memory left")

    before = threading.active_count()
    with pytest.raises(ValueError, match="no memory left"):
        beside(frames(), lambda groups: film(tmp_path / "a.mp4", groups))
    assert list(tmp_path.iterdir()) == []
    assert threading.active_count() == before


def test_a_signal_ends_both_sides(tmp_path: Path) -> None:
    """Also while the making waits for room."""
    made: list[Group] = []

    def endless() -> Iterator[Group]:
        for group in repeat(next(noise(1)), 1000):
            made.append(group)
            yield group

    def work(groups: Iterator[Group]) -> bytes:
        def passing() -> Iterator[Group]:
            for number, group in enumerate(groups):
                if number == 2:
                    while len(made) < number + MAX_HANDED_OVER + 1:  # then the other side waits
                        time.sleep(0.0001)
                    os.kill(os.getpid(), signal.SIGINT)
                yield group

        return film(tmp_path / "a.mp4", passing())

    before = threading.active_count()
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background a shell has it ignored
    try:
        with pytest.raises(KeyboardInterrupt):
            beside(endless(), work)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert list(tmp_path.iterdir()) == []
    assert threading.active_count() == before
