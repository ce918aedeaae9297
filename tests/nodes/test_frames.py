"""Frames as a stream: the warning about pictures that show nothing."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from s2v_flow.nodes.frames import warned_of_flat


def warnings_of(*groups: np.ndarray) -> list[str]:
    """Pass groups through; return what was noted."""
    notes: list[str] = []
    context = SimpleNamespace(note=lambda text, *, is_warning: notes.append(text))
    passed = list(warned_of_flat(context, iter(groups)))  # type: ignore[arg-type]
    assert all(one is other for one, other in zip(passed, groups, strict=True))
    return notes


def frame(level: int) -> np.ndarray:
    return np.full((1, 64, 64, 3), level, np.uint8)


@pytest.mark.parametrize(("level", "word"), [(0, "black"), (127, "of one colour"), (255, "of one colour")])
def test_a_first_frame_of_one_colour_warns_once(level: int, word: str) -> None:
    (note,) = warnings_of(frame(level), frame(level))
    assert f"the first frame is {word}" in note


def test_rounding_noise_is_still_flat() -> None:
    noise = np.random.default_rng(0).integers(0, 3, (1, 64, 64, 3), dtype=np.uint8)
    assert len(warnings_of(frame(100) + noise)) == 1


def test_a_small_bright_spot_and_a_later_flat_frame_do_not_warn() -> None:
    """A spot of a thousandth of the picture; and a video may fade to black."""
    spot = frame(0)
    spot[0, :2, :2] = 255
    assert warnings_of(spot, frame(0)) == []


def test_a_coloured_ramp_does_not_warn() -> None:
    """Each colour counts alone."""
    ramp = frame(0)
    ramp[0, :, :, 2] = np.arange(64)[None] // 4
    assert warnings_of(ramp) == []


def test_no_frames_no_warning() -> None:
    assert warnings_of() == []
    assert warnings_of(np.zeros((0, 4, 4, 3), np.uint8)) == []
