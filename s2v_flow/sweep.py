"""What a matrix's cells end in: a contact sheet and a video that shows them side by side."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

from s2v_flow.api import Planned
from s2v_flow.graph.run import RunResult


def cell_videos(planned: Planned, result: RunResult) -> list[tuple[str, Path]]:
    """Return the cells' videos that were written, each with its label, in the cells' order."""
    found = {name: path for name, paths in result.outputs.items() for path in paths if path.suffix == ".mp4"}
    return [(label, path) for label in planned.labels for name, path in found.items() if name.startswith(f"{label}/")]


def summarise(videos: Sequence[tuple[str, Path]], stem: str) -> list[Path]:
    """Write the contact sheet and the side-by-side video beside the first video.

    Args:
        videos: At least two labelled videos.
        stem: How the two files' names begin.

    Returns:
        The two files. The sound is the first video's.
    """
    from s2v_flow.media.audio import open_audio
    from s2v_flow.media.sheet import contact_sheet, side_by_side
    from s2v_flow.media.video import probe_video

    labels, paths = [label for label, _ in videos], [path for _, path in videos]
    info = probe_video(paths[0])
    sheet, film = (paths[0].with_name(f"{stem}.{name}") for name in ("cells.png", "cells.mp4"))
    contact_sheet(paths, labels, sheet)
    audio = open_audio(paths[0]) if info.has_audio else None
    side_by_side(paths, labels, film, audio, Fraction(info.fps))
    return [sheet, film]
