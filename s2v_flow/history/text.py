"""Runs, videos and their figures as text for people."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from s2v_flow.cache.store import Store
from s2v_flow.errors import MissingError
from s2v_flow.history.compare import Difference, inputs_that_differ
from s2v_flow.history.find import Listing, find
from s2v_flow.history.side import of_run
from s2v_flow.quality import of_videos
from s2v_flow.recipe.problems import Problems, StopReadingError
from s2v_flow.recipe.reader import Source, read_yaml
from s2v_flow.recipe.tree import plain
from s2v_flow.runs.essence import essence_in
from s2v_flow.runs.manifest import Essence, FileRecord, Manifest, NodeState
from s2v_flow.runs.record import runs_root
from s2v_flow.wording import counted, duration_text, listed, reused_text, shortened, size_text, visible

_SHORT = 12  # digits of a digest that people are shown
_MAX_CHANGES = 4  # of a run that the list shows
_TOLD: tuple[NodeState, ...] = ("computed", "stored", "failed", "interrupted", "not_reached")


def runs_text(listing: Listing) -> str:
    """Return a line for every run: id, status, start, length, recipe, output, changes."""
    if not listing.runs:
        return "no runs"
    rows = []
    for run, before in _with_before(listing):
        outputs = [item.name for item in run.outputs]
        more = f" and {len(outputs) - 1} more" if len(outputs) > 1 else ""
        output = f"{outputs[0]}{more}" if outputs else "-"
        rows.append((run.id, run.status, _local(run.started), _took(run), run.recipe.path, output, _news(run, before)))
    return "\n".join(map(visible, _table(rows)))


def listing_json(listing: Listing) -> dict[str, Any]:
    """Return the object that `s2vflow runs --json` prints: what a list needs; `show` has the rest."""
    kept = {"id", "status", "error", "started", "ended", "seconds", "cells"}
    runs = []
    for run, before in _with_before(listing):
        outputs = [item.name for item in run.outputs]
        changes = [] if before is None else [item.to_json() for item in _changes(run, before)]
        found = {**run.model_dump(mode="json", include=kept), "recipe": run.recipe.path, "outputs": outputs}
        runs.append({**found, "before": before and before.id, "changes": changes})
    return {"runs": runs, "skipped": list(listing.notes)}


def show_text(found: Manifest | Essence) -> str:
    """Return a run, or what a video says of itself, what the recipe says at the end."""
    lines = _run_lines(found) if isinstance(found, Manifest) else _video_lines(found)
    text = found.recipe.text if isinstance(found, Manifest) else found.recipe
    told = [item.name for item in found.files]
    return "\n".join(visible(line) for line in (*lines, *_recipe_lines(text, told)))


def _with_before(listing: Listing) -> list[tuple[Manifest, Manifest | None]]:
    last: dict[str, Manifest] = {}
    pairs = []
    for run in reversed(listing.runs):
        pairs.append((run, last.get(run.recipe.path)))
        last[run.recipe.path] = run
    return pairs[::-1]


def _changes(run: Manifest, before: Manifest) -> list[Difference]:
    return inputs_that_differ(of_run(before), of_run(run))


def _news(run: Manifest, before: Manifest | None) -> str:
    """Return why a run failed, its cells, and what differs from the run before: "seed 20 -> 21"."""
    found = [] if before is None else [item.to_text() for item in _changes(run, before)]
    more = [f"{len(found) - _MAX_CHANGES} more"] if len(found) > _MAX_CHANGES else []
    cells = [f"{len(run.cells)} cells: {listed(run.cells, 3)}"] if run.cells else []
    error = [] if run.error is None else [shortened(run.error)]
    return "; ".join([*error, *cells, *found[:_MAX_CHANGES], *more])


def _local(time: str) -> str:
    with suppress(ValueError):
        return f"{datetime.fromisoformat(time).astimezone():%Y-%m-%d %H:%M}"
    return time


def _took(run: Manifest) -> str:
    if run.seconds is not None:
        return duration_text(run.seconds)
    with suppress(ValueError, TypeError):
        if run.status == "running":
            since = datetime.now(timezone.utc) - datetime.fromisoformat(run.started)
            return f"{duration_text(since.total_seconds())} so far"
    return "-"


def _run_lines(run: Manifest) -> Iterator[str]:
    yield f"run {run.id}: {run.status}, {_took(run)}, started {_local(run.started)}"
    given = [*(f"-p {name}" for name in run.given.profiles), *(f"-f {file.name}" for file in run.given.files)]
    known = run.environment.model_dump(exclude_none=True)
    lines = [] if run.error is None else [f"error: {run.error}"]
    if run.status == "killed":
        lines.append("it ended without a word; the same command goes on from what it had stored")
    lines.append(" ".join(["recipe:", run.recipe.path, *given, *run.given.overrides]))
    if run.git is not None:
        lines.append(f"commit: {run.git.commit or 'none yet'}{', with changes' if run.git.is_dirty else ''}")
    lines.append("environment: " + ", ".join(f"{name} {value}" for name, value in known.items()))
    lines += [f"seeds: {_ranges(dict.fromkeys(run.seeds.values()))}"] if run.seeds else []
    loras = Counter((item.id, item.matched, item.total) for item in run.loras)
    for (name, matched, total), count in loras.items():
        share = f" ({matched / total:.0%})".replace("%", " %") if total else ""
        lines.append(f"LoRA {name}: {matched} of {total} keys{share}, in {counted(count, 'node')}")
    lines += filter(None, [reused_text(node.step_cache for node in run.nodes)])
    for state in ("failed", "interrupted"):
        names = [node.name for node in run.nodes if node.status == state]
        lines += [f"{state}: {listed(names)}"] if names else []
    yield from lines
    if run.outputs:
        yield "outputs:"
        rows = [(item.name, _size(item.size), f"{item.frames or '?'} frames", _sha256(item)) for item in run.outputs]
        yield from _table(rows, "  ")
    yield from _times(run)
    yield from _files(run.files)


def _times(run: Manifest) -> Iterator[str]:
    """Yield what each kind of node did, and what that took, with totals."""
    total = sum(node.seconds or 0.0 for node in run.nodes)
    told = [node for node in run.nodes if node.status in _TOLD and run.seconds is not None]
    rows = []
    for kind in [*dict.fromkeys(node.kind for node in told), ""]:
        nodes = [node for node in told if kind in ("", node.kind)]
        seconds, states = sum(node.seconds or 0.0 for node in nodes), Counter(node.status for node in nodes)
        did = ", ".join(f"{states[state]} {state.replace('_', ' ')}" for state in _TOLD if states[state])
        took = (duration_text(seconds), f"{seconds / total:.0%}".replace("%", " %")) if total else ("", "")
        rows.append((kind or "together", *took, did))
    if told:
        yield "time:"
        yield from _table(rows, "  ")
    peak = max((node.peak_bytes or 0 for node in run.nodes), default=0)
    if peak:
        yield f"peak memory: {size_text(peak, is_memory=True)}"


def _video_lines(essence: Essence) -> Iterator[str]:
    versions = (f"{name} {version}" for name, found in essence.software.items() for version in found)
    yield f"made by the node {essence.node} on {essence.device} with {', '.join(versions) or 'unknown versions'}"
    kinds = Counter(node.kind for node in essence.nodes.values())
    yield f"of stored results: {', '.join(f'{count} {kind}' for kind, count in kinds.items())}"
    yield f"frames: {essence.frames}, sha256 {(essence.frames_sha256 or 'unknown')[:_SHORT]}"
    yield from _files(essence.files)


def _files(files: Sequence[FileRecord]) -> Iterator[str]:
    for role in ("model", "input"):
        rows = [(item.name, _size(item.size), _sha256(item), item.at) for item in files if item.role == role]
        if rows:
            yield f"{role}s:"
            yield from _table(rows, "  ")


def _sha256(item: Any) -> str:
    return f"sha256 {(item.sha256 or 'unknown')[:_SHORT]}"


def _size(size: int | None) -> str:
    return "-" if size is None else size_text(size)


def _ranges(numbers: Iterable[int]) -> str:
    """Return numbers in their order, those that follow each other as "20..32"."""
    groups: list[list[int]] = []
    for number in numbers:
        if groups and number == groups[-1][-1] + 1:
            groups[-1][1:] = [number]
        else:
            groups.append([number])
    return listed("..".join(map(str, group)) for group in groups)


def _recipe_lines(text: str, told: Sequence[str]) -> Iterator[str]:
    """Yield what a recipe says, each parameter's value once, without references and what has been told."""
    source = Source("recipe", Path(), tuple(text.splitlines()) or ("",))
    try:
        found = plain(read_yaml(text.encode(), source, Problems()))
        nodes, params = dict(found["nodes"]), dict(found.get("params", {}))
    except (StopReadingError, KeyError, TypeError, ValueError, AttributeError):
        yield from ("recipe:", *(f"  {line}" for line in text.splitlines()))
        return
    yield "recipe (--json has the whole text):"
    yield from _said("params", params, told)
    texts = [value for value in params.values() if isinstance(value, str)]
    for name, node in nodes.items():
        fields = dict(node) if isinstance(node, Mapping) else {}
        kind = fields.pop("kind", None)
        repeated = {key for key, value in fields.items() if value == params.get(key) or value in texts}
        yield from _said(f"{name} ({kind})", {key: fields[key] for key in fields if key not in repeated}, told)


def _said(name: str, values: Mapping[str, Any], told: Sequence[str]) -> Iterator[str]:
    said = []
    for key, value in values.items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        if text not in told and not re.match(r'["[]*\$', text):
            said.append(f"{key} {text!r}" if " " in text and text == value else f"{key} {text}")
    if said:
        yield f"  {name}: {', '.join(said)}"


def _table(rows: Sequence[tuple[str, ...]], indent: str = "") -> Iterator[str]:
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (f"{cell:<{length}}" for cell, length in zip(row, widths, strict=True))
        yield f"{indent}{'  '.join(cells).rstrip()}"


def figures_of(text: str, cache_root: Path, mouth: tuple[int, int, int, int] | None = None) -> dict[str, Any]:
    """Return what `quality --json` prints of a video, by its path, or a run; see docs/quality.md.

    `mouth`: x, y, width, height in pixels.

    Raises:
        MissingError: There is no such file or run, or what the run wrote is no video, or is no longer stored.
        MediaError: The video cannot be read.
        S2VFlowError: The box does not lie in the picture.
    """
    from s2v_flow.quality.figures import measure_video

    path = Path(text)
    if os.path.isfile(path) and path.suffix != ".json":
        essence = essence_in(path)
        starts, count = ((), None) if essence is None else (essence.chunk_starts, essence.frames)
        return measure_video(path, starts, mouth, starts_of=count)
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
    late = "picture and sound in time" if lag == 0 else "no lag can be told"
    late = f"the picture is {counted(abs(lag), 'frame')} {'late' if lag > 0 else 'early'}" if lag else late
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
