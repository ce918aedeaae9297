"""Runs and videos as text for people."""

from __future__ import annotations

from collections import Counter
from typing import Any

from s2v_flow.history.find import Listing
from s2v_flow.runs.manifest import Essence, FileRecord, Manifest
from s2v_flow.wording import size_text

_SHORT = 12  # digits of a digest that people are shown


def runs_text(listing: Listing) -> str:
    """Return a line for every run: id, how it ended, how long it took, what it did, the recipe."""
    if not listing.runs:
        return "no runs"
    rows = []
    for run in listing.runs:
        counts = Counter(node.status for node in run.nodes)
        did = ", ".join(f"{counts[state]} {state}" for state in ("computed", "stored", "failed") if counts[state])
        rows.append(f"{run.id}  {run.status:<11}  {run.seconds:>8.1f} s  {did}  {run.recipe.path}")
    return "\n".join(rows)


def listing_json(listing: Listing) -> dict[str, Any]:
    """Return the object that `s2vflow runs --json` prints: what a list needs; `show` has the rest."""
    kept = {"id", "status", "error", "started", "ended", "seconds"}
    runs = []
    for run in listing.runs:
        outputs = [item.name for item in run.outputs]
        runs.append({**run.model_dump(mode="json", include=kept), "recipe": run.recipe.path, "outputs": outputs})
    return {"runs": runs, "skipped": list(listing.notes)}


def show_text(found: Manifest | Essence) -> str:
    """Return a run, or what a video says of itself, as lines with the recipe at the end."""
    lines = _run_lines(found) if isinstance(found, Manifest) else _video_lines(found)
    text = found.recipe.text if isinstance(found, Manifest) else found.recipe
    return "\n".join([*lines, "recipe:", *(f"  {line}".rstrip() for line in text.splitlines())])


def _run_lines(run: Manifest) -> list[str]:
    lines = [f"run {run.id}: {run.status}, {run.seconds:.1f} s, {run.started}"]
    lines += [] if run.error is None else [f"error: {run.error}"]
    given = [*(f"-p {name}" for name in run.given.profiles), *(f"-f {file.name}" for file in run.given.files)]
    lines.append(" ".join(["recipe:", run.recipe.path, *given, *run.given.overrides]))
    if run.git is not None:
        lines.append(f"commit: {run.git.commit or 'none yet'}{', with changes' if run.git.is_dirty else ''}")
    known = run.environment.model_dump(exclude_none=True)
    lines.append("environment: " + ", ".join(f"{name} {value}" for name, value in known.items()))
    lines += [f"seed: {name}: {seed}" for name, seed in run.seeds.items()]
    lines += [_file_line(item) for item in run.files]
    lines += [f"lora: {item.id} in {item.node}: {item.matched} of {item.total} keys" for item in run.loras]
    for node in run.nodes:
        peak = size_text(node.peak_bytes or 0, is_memory=True)
        cost = "" if node.seconds is None else f", {node.seconds:.1f} s, peak {peak}"
        lines.append(f"node: {node.name} ({node.kind}): {node.status.replace('_', ' ')}{cost}")
    for item in run.outputs:
        frames = "" if item.frames is None else f", {item.frames} frames"
        lines.append(f"output: {item.name}, {item.size} bytes{frames}, sha256 {(item.sha256 or '')[:_SHORT]}")
    return lines


def _video_lines(essence: Essence) -> list[str]:
    versions = (f"{name} {version}" for name, found in essence.software.items() for version in found)
    lines = [f"made by the node {essence.node} on {essence.device} with {', '.join(versions) or 'unknown versions'}"]
    lines += [_file_line(item) for item in essence.files]
    lines += [f"node: {name} ({node.kind}): {node.fingerprint[:_SHORT]}" for name, node in essence.nodes.items()]
    return [*lines, f"frames: {essence.frames}, sha256 {(essence.frames_sha256 or 'unknown')[:_SHORT]}"]


def _file_line(item: FileRecord) -> str:
    size = "" if item.size is None else f", {item.size} bytes"
    return f"{item.role}: {item.name} ({item.at}){size}, sha256 {(item.sha256 or 'unknown')[:_SHORT]}"
