"""One side of a comparison: a run, a video or a recipe, brought into one shape."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

from s2v_flow import api
from s2v_flow.api import Planned
from s2v_flow.graph.run import RunResult
from s2v_flow.history.find import find
from s2v_flow.runs.manifest import Essence, FileRecord, Manifest
from s2v_flow.runs.record import runs_root
from s2v_flow.runs.values import values_of


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


RECIPE_SUFFIXES = (".yaml", ".yml")


_CHUNK_KINDS = ("sample", "extend")


@dataclass(frozen=True)
class Video:
    """A video that can be looked at: a file, or an object of the store by its sha256; and its frames' sha256."""

    frames_sha256: str | None
    file: Path | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class Side:
    """What is known of one side; a recipe alone knows its values only."""

    name: str
    values: Mapping[str, Any]
    files: Mapping[str, FileRecord] | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    latents: Mapping[str, str] = field(default_factory=dict)
    videos: Mapping[str, Video] = field(default_factory=dict)


def side(text: str, options: api.Options) -> Side:
    """Return what is known of a run, a manifest, a video or a recipe.

    Raises:
        S2VFlowError: There is no such thing.
        RecipeError: The recipe is wrong.
    """
    if text.endswith(RECIPE_SUFFIXES):
        return Side(text, values_of(api.check(text)))
    found = find(runs_root(options.cache_root), text)
    return _of_run(found) if isinstance(found, Manifest) else _of_video(text, found)


def _of_run(manifest: Manifest) -> Side:
    known = manifest.environment.model_dump(exclude={"host", "user"})
    if manifest.git is not None and manifest.git.commit is not None:
        known["commit"] = manifest.git.commit + (" and changes" if manifest.git.is_dirty else "")
    results = {node.name: node for node in manifest.nodes}
    seconds = {node.name: node.seconds for node in manifest.nodes if node.seconds is not None}
    return Side(
        name=manifest.id,
        values=manifest.recipe.values,
        files={item.at: item for item in manifest.files},
        environment={key: str(value) for key, value in known.items() if value is not None},
        seconds={"the whole run": manifest.seconds, **seconds},
        latents={node.name: node.outputs["latent"] for node in manifest.nodes if _is_chunk(node.kind, node.outputs)},
        videos={
            item.node: Video(item.frames_sha256, sha256=results[item.node].outputs.get("file"))
            for item in manifest.outputs
            if item.name.endswith(".mp4")
        },
    )


def _of_video(text: str, essence: Essence) -> Side:
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "recipe.yaml"
        recipe.write_text(essence.recipe, encoding="utf-8")
        values = values_of(api.check(recipe))
    versions = {name: ", ".join(found) for name, found in essence.software.items()}
    return Side(
        name=text,
        values=values,
        files={item.at: item for item in essence.files},
        environment={**versions, "device": essence.device},
        latents={
            name: node.outputs["latent"] for name, node in essence.nodes.items() if _is_chunk(node.kind, node.outputs)
        },
        videos={essence.node: Video(essence.frames_sha256, file=Path(text))},
    )


def _is_chunk(kind: str, outputs: Mapping[str, str]) -> bool:
    return kind in _CHUNK_KINDS and "latent" in outputs
