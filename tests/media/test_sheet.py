"""The contact sheet and the film of several videos: whole or not at all, and made once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from s2v_flow.errors import S2VFlowError
from s2v_flow.files.atomic import reap, stale
from s2v_flow.media.sheet import Page, Tile, contact_sheet, side_by_side
from s2v_flow.media.video import VideoReader, probe_video
from s2v_flow.media.writer import VideoWriter

LABELS = ("steps=2", "steps=4")


def clips(folder: Path, num_frames: int = 8) -> list[Path]:
    paths = [folder / f"{name}.mp4" for name in "ab"]
    for level, path in enumerate(paths):
        with VideoWriter(path, 32, 32, preset="ultrafast") as writer:
            writer.write(np.full((num_frames, 32, 32, 3), 80 * (level + 1), np.uint8))
    return paths


def page(videos: list[Path], labels: tuple[str, ...]) -> Page:
    return [[Tile((label,), video)] for video, label in zip(videos, labels, strict=True)]


def make(folder: Path, videos: list[Path], labels: tuple[str, ...]) -> tuple[int, int]:
    """Make both; return when they were last written."""
    contact_sheet(page(videos, labels), folder / "cells.png")
    side_by_side(page(videos, labels), folder / "cells.mp4", None, Fraction(16))
    return (folder / "cells.png").stat().st_mtime_ns, (folder / "cells.mp4").stat().st_mtime_ns


def test_what_was_made_of_the_same_is_left_alone_and_anything_else_is_made_anew(tmp_path: Path) -> None:
    videos = clips(tmp_path)
    first = make(tmp_path, videos, LABELS)
    with Image.open(tmp_path / "cells.png") as sheet:
        assert sheet.size == (4 * 240 + 8, 2 * (20 + 240 + 20))
    assert probe_video(tmp_path / "cells.mp4").num_frames == 8
    assert make(tmp_path, videos, LABELS) == first
    second = make(tmp_path, videos, ("a", "b"))
    assert second[0] != first[0]
    assert second[1] != first[1]
    third = make(tmp_path, clips(tmp_path, 9), ("a", "b"))
    assert third[0] != second[0]
    assert probe_video(tmp_path / "cells.mp4").num_frames == 9
    for name in ("cells.png", "cells.mp4"):
        (tmp_path / name).write_bytes(b"spoilt")
    make(tmp_path, videos, ("a", "b"))
    assert probe_video(tmp_path / "cells.mp4").num_frames == 9


def test_holes_are_black_and_labels_are_whole(tmp_path: Path) -> None:
    """Two rows and columns, one of them a hole; a label that is longer than its video makes the columns wider."""
    one, other = clips(tmp_path)
    long = "negative_prompt=blurry, overexposed"
    grid: Page = [[Tile(("seed=1", long), one), Tile(("seed=1", "b"), other)], [None, Tile(("seed=2", "b"), one)]]
    contact_sheet(grid, tmp_path / "cells.png")
    side_by_side(grid, tmp_path / "cells.mp4", None, Fraction(16))
    with Image.open(tmp_path / "cells.png") as opened:
        sheet = np.asarray(opened)
    row = 40 + 240 + 20
    assert sheet.shape == (2 * row, 2 * 968, 3)
    assert [int(sheet[row * i + 100, 968 * j + 100].mean()) // 60 for i in (0, 1) for j in (0, 1)] == [1, 2, 0, 1]
    assert not sheet[row:, :960].any()
    film = probe_video(tmp_path / "cells.mp4")
    with VideoReader(tmp_path / "cells.mp4") as reader:
        (first,) = reader.read(0, 1)
    lit = np.nonzero((first[20:40, : film.width // 2] > 128).any(axis=(0, 2)))[0]
    assert 150 < lit.max() < film.width // 2 - 4, "the last letter stands inside its column"
    assert film.height == 2 * (40 + 32) + 20


def test_many_columns_have_two_pictures_each(tmp_path: Path) -> None:
    one, _ = clips(tmp_path)
    contact_sheet([[Tile((f"seed={seed}",), one) for seed in range(6)]], tmp_path / "cells.png")
    with Image.open(tmp_path / "cells.png") as sheet:
        assert sheet.width == 6 * (2 * 240 + 8)


def test_a_file_of_the_users_beside_the_sheet_is_not_touched(tmp_path: Path) -> None:
    """Before, cells.partial was overwritten and removed."""
    videos = clips(tmp_path)
    for name in ("cells.partial", ".cells.png.partial"):
        (tmp_path / name).write_bytes(b"mine")
    make(tmp_path, videos, LABELS)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"a.mp4", "b.mp4", "cells.png", "cells.mp4", "cells.partial", ".cells.png.partial"}
    assert (tmp_path / "cells.partial").read_bytes() == b"mine"


def test_a_sheet_that_cannot_be_written_is_an_error_of_ours(tmp_path: Path) -> None:
    videos = clips(tmp_path)
    (tmp_path / "cells.png").mkdir()
    with pytest.raises(S2VFlowError, match=r"cannot write under .*cells\.png"):
        contact_sheet(page(videos, LABELS), tmp_path / "cells.png")
    assert not stale(tmp_path)


def test_what_a_killed_writer_leaves_is_found_and_removed_once_it_is_dead(tmp_path: Path) -> None:
    """While it lives it is its own; other programs' files never are ours."""
    program = (
        "import sys, time, numpy as np\n"
        "from s2v_flow.media.writer import VideoWriter\n"
        "with VideoWriter(sys.argv[1], 32, 32) as writer:\n"
        "    writer.write(np.zeros((2, 32, 32, 3), np.uint8))\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(60)\n"
    )
    (tmp_path / ".other.mp4.12345678.partial").touch()
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "a.mp4")],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        assert len(list(tmp_path.iterdir())) == 2
        assert reap(tmp_path) == 0
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert reap(tmp_path) == 1
    assert [path.name for path in tmp_path.iterdir()] == [".other.mp4.12345678.partial"]
