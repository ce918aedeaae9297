"""Figures of a video, or of what a run wrote: those that its manifest holds, else measured in the stored file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from s2v_flow.cache.store import Store
from s2v_flow.errors import MissingError
from s2v_flow.history.find import find
from s2v_flow.quality.gates import of_videos
from s2v_flow.runs.essence import essence_in
from s2v_flow.runs.manifest import Manifest
from s2v_flow.runs.record import runs_root


def figures_of(text: str, cache_root: Path, mouth: tuple[int, int, int, int] | None = None) -> dict[str, Any]:
    """Return what `quality --json` prints; see docs/quality.md.

    Args:
        text: A video's path, a run's id or the beginning of one, or "last".
        cache_root: The cache folder, with the runs.
        mouth: x, y, width, height in pixels.

    Raises:
        MissingError: There is no such file or run, or what the run wrote is no video, or is no longer stored.
        MediaError: The video cannot be read.
        S2VFlowError: The box does not lie in the picture.
    """
    from s2v_flow.quality.figures import measure_video

    path = Path(text)
    if path.is_file() and path.suffix != ".json":
        essence = essence_in(path)
        return measure_video(path, () if essence is None else essence.chunk_starts, mouth)
    if path.suffix in (".mp4", ".mov", ".mkv", ".webm"):
        raise MissingError(f"{text}: there is no such file", "give a video, a run's id, or last")
    run = find(runs_root(cache_root), text)
    assert isinstance(run, Manifest)
    if run.quality is not None and mouth is None:
        return dict(run.quality)
    store, found = Store(cache_root), {}
    for node in run.nodes:
        entry = store.lookup(node.fingerprint or "") if node.kind == "save_video" else None
        if entry is not None and store.object_path(entry.outputs["file"]).is_file():
            starts = entry.facts.get("chunk_starts") or ()
            found[node.name] = measure_video(store.object_path(entry.outputs["file"]), starts, mouth)
    if not found:
        raise MissingError(f"run {run.id}: none of its videos is stored any more", "give the video's file")
    return of_videos(found)


def figures_text(figures: Mapping[str, Any]) -> str:
    """Return figures for people, a line for each kind."""
    return "\n".join(_lines(figures))


def _lines(figures: Mapping[str, Any]) -> Iterator[str]:
    for name, video in figures.get("videos", {}).items():
        yield f"{name}:"
        yield from (f"  {line}" for line in _lines(video))
    if "sync" not in figures:
        return
    sync, lag = figures["sync"], figures["sync"]["lag_frames"]
    late = "no lag can be told" if lag is None else f"the picture is {abs(lag)} frames {'late' if lag > 0 else 'early'}"
    late = "picture and sound in time" if lag == 0 else late
    silent = sync["silence_activity"]
    still = "" if silent is None else f", in silence the mouth moves {silent:.0%} as much".replace("%", " %")
    yield f"sync: {late}, correlation {sync['correlation']:.2f}, confidence {sync['confidence']:.2f}{still}"
    for name, drift in figures["drift"].items():
        chunks = ", ".join(f"{value:.3g}" for value in drift["per_chunk"])
        yield f"drift of {name}: {drift['per_minute']:.3g} per minute{f'; by chunk {chunks}' if chunks else ''}"
    for seam in figures["seams"]:
        yield f"seam at {seam['seconds']} s (frame {seam['frame']}): {seam['ratio']:.2f} times the change around it"
    found = [name for name, is_so in figures["guards"].items() if is_so]
    yield f"guards: {', '.join(found) or 'neither black nor flat nor frozen'}"
    timing = figures["timing"]
    sound = "no sound" if timing["audio_seconds"] is None else f"sound {timing['audio_seconds']} s"
    yield f"time: {timing['frames']} frames, {timing['fps']:g} a second, {timing['seconds']} s, {sound}"
